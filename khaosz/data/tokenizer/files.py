"""The files of a directory that say something about its tokenizer, in transformers' order of
precedence (tokenization_utils_base.py of transformers 5):

    tokenizer.json             tokens and their flags; what its post-processor adds to a text
    tokenizer_config.json      names of bos, eos, pad and others; flags in `added_tokens_decoder`
                               replace those of tokenizer.json
    special_tokens_map.json, added_tokens.json
                               of older versions, read without an `added_tokens_decoder`: names
                               replace those of tokenizer_config.json, tokens are added
    chat_template.jinja, additional_chat_templates/*.jinja
                               replace the templates in tokenizer_config.json
    generation_config.json, config.json
                               ids of bos, eos (often several) and pad, of the first that has them

`add_bos_token` and `add_eos_token` have no effect beside a tokenizer.json, whose post-processor
decides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from khaosz.errors import TokenizerError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONFIG = "tokenizer_config.json"
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_directory(directory: Path) -> tuple[bytes, dict[str, Any], dict[str, list[int]]]:
    """tokenizer.json with every token that another file adds, tokenizer_config.json with the names
    and templates of the other files, and the ids of "bos", "eos" and "pad" in the model's files.

    Raises TokenizerError for a file that is missing, broken, or of another shape.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(
            f"{path} does not exist", hint="is this a tokenizer or model directory?"
        )
    serialized = path.read_bytes()
    spec = _parse(path, serialized)  # reports where JSON is broken; the backend does not
    config = _read(directory / _CONFIG)
    _read_templates(directory, config)
    present = _present_tokens(spec)
    if "<|bos|>" not in present:  # the chat template of ours writes it
        serialized = _of_an_earlier_conversion(serialized, spec, config)
    listed = _listed_tokens(directory, config, present)
    named = _named_tokens(config)
    config |= {key: token.content for key, token in named.items()}
    names = {token.content for token in named.values()}
    for token in listed:
        token.special = token.special or token.content in names
    # Flags in another file replace those of tokenizer.json; a name alone adds a missing token.
    missing = [token for token in listed if present.get(token.content) != token]
    known = present.keys() | {token.content for token in listed}
    missing += [t for t in [*named.values(), *_extra_tokens(config)] if t.content not in known]
    ids, rows = _model_ids(directory)
    return _with_tokens(serialized, missing, rows), config, ids


def read_template(directory: Path) -> str | None:
    """The chat template of a directory without reading its vocabulary; None where there is none.
    Raises TokenizerError for a file that is broken."""
    config = _read(directory / _CONFIG)
    _read_templates(directory, config)
    value = config.get("chat_template")
    if isinstance(value, list):
        named = (each for each in value if isinstance(each, dict) and each.get("name") == "default")
        value = next(named, {}).get("template")
    return value if isinstance(value, str) else None


def template_processing(
    begin: list[tuple[str, int]], finish: list[tuple[str, int]]
) -> dict[str, Any] | None:
    """The post-processor of tokenizer.json that adds tokens (name, id) before and after a text."""
    if not begin and not finish:
        return None

    def part(kind: int) -> list[dict[str, Any]]:
        around = [
            [{"SpecialToken": {"id": name, "type_id": kind}} for name, _ in side]
            for side in (begin, finish)
        ]
        return [*around[0], {"Sequence": {"id": "AB"[kind], "type_id": kind}}, *around[1]]

    tokens = {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in [*begin, *finish]}
    return {
        "type": "TemplateProcessing",
        "single": part(0),
        "pair": [*part(0), *part(1)],
        "special_tokens": tokens,
    }


def _of_an_earlier_conversion(serialized: bytes, spec: dict[str, Any], config: Any) -> bytes:
    """tokenizer.json with the begin token that earlier versions wrote only as `add_bos_token` when
    they converted a GGUF file; only they wrote spaces after its colons on one line."""
    name = config.get("bos_token")
    ids = [t.get("id") for t in spec.get("added_tokens") or [] if t.get("content") == name]
    if (
        not serialized.startswith(b'{"version": "1.0", "truncation": null,')
        or spec.get("post_processor") is not None
        or config.get("add_bos_token") is not True
        or not ids
    ):
        return serialized
    spec["post_processor"] = template_processing([(name, ids[0])], [])
    return json.dumps(spec, ensure_ascii=False).encode()


def _present_tokens(spec: dict[str, Any]) -> dict[str, AddedToken]:
    try:
        tokens = [_token(entry, "tokenizer.json: added_tokens") for entry in spec["added_tokens"]]
    except (KeyError, TypeError):  # the backend names the fault
        return {}
    return {token.content: token for token in tokens}


def _listed_tokens(
    directory: Path, config: dict[str, Any], present: Iterable[str]
) -> list[AddedToken]:
    """Tokens with their flags in tokenizer_config.json; without them, those of added_tokens.json,
    and `config` gets the names in special_tokens_map.json."""
    if "added_tokens_decoder" in config:
        entries = config["added_tokens_decoder"]
        if not isinstance(entries, dict) or not all(str(i).isdecimal() for i in entries):
            raise TokenizerError(f"{_CONFIG}: added_tokens_decoder is not a table of ids")
        ordered = sorted(entries.items(), key=lambda entry: int(entry[0]))
        return [_token(entry, f"{_CONFIG}: added_tokens_decoder") for _, entry in ordered]
    older = _read(directory / "special_tokens_map.json")
    before, after = config.get(_EXTRA[0]), older.get(_EXTRA[0])
    config |= older
    if isinstance(before, list) and isinstance(after, list):
        config[_EXTRA[0]] = before + after
    added = _read(directory / "added_tokens.json")
    if not all(type(i) is int for i in added.values()):
        raise TokenizerError("added_tokens.json: the ids are not whole numbers")
    special = {t.content for t in [*_named_tokens(config).values(), *_extra_tokens(config)]}
    return [
        AddedToken(name, normalized=name not in special, special=name in special)
        for name in sorted(added, key=added.__getitem__)
        if name not in present  # tokenizer.json has its flags
    ]


def _named_tokens(config: dict[str, Any]) -> dict[str, AddedToken]:
    """By key: bos_token and its like, and names of the model's own such as image_token."""
    extra = config.get(_EXTRA[0])
    tables = {**config, **(extra if isinstance(extra, dict) else {})}
    return {
        key: _token(value, f"{_CONFIG}: {key}", special=True)
        for key, value in tables.items()
        if (key in NAMED and value is not None)
        or (key.endswith("_token") and isinstance(value, str))
        or (isinstance(extra, dict) and key in extra)
    }


def _extra_tokens(config: dict[str, Any]) -> list[AddedToken]:
    entries = config.get(_EXTRA[0]) or config.get(_EXTRA[1]) or []
    if isinstance(entries, dict):
        return []
    if not isinstance(entries, list):
        raise TokenizerError(f"{_CONFIG}: {_EXTRA[0]} is not a list of tokens")
    return [_token(entry, f"{_CONFIG}: {_EXTRA[0]}", special=True) for entry in entries]


def _token(entry: Any, source: str, **defaults: bool) -> AddedToken:
    """A token that is written as its name, or as a table with its flags."""
    flags = entry if isinstance(entry, dict) else {"content": entry}
    content = flags.get("content")
    if not isinstance(content, str) or not content:
        raise TokenizerError(f"{source} is {json.dumps(entry)[:60]}, not a token")
    given = {key: bool(flags[key]) for key in _FLAGS if key in flags}
    return AddedToken(content, **{**given, **defaults})


def _with_tokens(serialized: bytes, missing: list[AddedToken], rows: int | None) -> bytes:
    """tokenizer.json with the flags of `missing`, which get ids after the others where the model
    has rows of embedding for them."""
    if not missing:
        return serialized
    backend = _backend(serialized)
    size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    for token in missing:
        if backend.token_to_id(token.content) is None:
            if rows is not None and size >= rows:
                continue
            size += 1
        backend.add_tokens([token])
    return backend.to_str(pretty=True).encode()


def _backend(serialized: bytes) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(serialized)
    except ValueError as error:
        raise TokenizerError(f"tokenizer.json cannot be read: {error}") from error


def _read_templates(directory: Path, config: dict[str, Any]) -> None:
    files = {
        path.name.removesuffix(".jinja"): path
        for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))
    }
    if (path := directory / "chat_template.jinja").is_file():
        files = {"default": path, **files}
    try:
        texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{directory}: a chat template cannot be read: {error}") from error
    if texts.keys() == {"default"}:
        config["chat_template"] = texts["default"]
    elif texts:
        config["chat_template"] = [{"name": n, "template": text} for n, text in texts.items()]


def _model_ids(directory: Path) -> tuple[dict[str, list[int]], int | None]:
    """Ids of "bos", "eos" and "pad" in the model's files, and its rows of embedding."""
    ids: dict[str, list[int]] = {}
    rows = None
    for name in ("generation_config.json", "config.json"):
        values = _read(directory / name)
        rows = values.get("vocab_size")
        for key in ("bos", "eos", "pad"):
            value = values.get(f"{key}_token_id")
            several: list[Any] = value if isinstance(value, list) else [value]
            if value is None or key in ids:
                continue
            if not all(type(i) is int for i in several):
                raise TokenizerError(f"{directory / name}: {key}_token_id is {value!r}")
            ids[key] = [i for i in several if i >= 0]  # some files write -1 for none
    return ids, rows if type(rows) is int else None


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if there is none."""
    return _parse(path, path.read_bytes()) if path.is_file() else {}


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError
        raise TokenizerError(
            f"{path} is not valid JSON: {error}", hint="the file is cut short or damaged"
        ) from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content
