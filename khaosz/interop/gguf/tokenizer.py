"""Tokenizers of GGUF files <-> ours: byte-level BPE ("gpt2") with a named pre-tokenizer, and
SentencePiece ("llama"; "gemma4", which lists its merges)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models

from khaosz.data.tokenizer.chat_template import OWN_TEMPLATES
from khaosz.data.tokenizer.files import template_processing
from khaosz.data.tokenizer.tokenizer import QWEN2_PATTERN, Tokenizer
from khaosz.errors import ModelError, TokenizerError, quoted
from khaosz.interop.gguf.sentencepiece import (
    SPACE,
    merges_of,
    prefix_of,
    scores_of,
    spec_of,
    without_collection,
)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# The regular expressions llama.cpp applies one after the other (llama-vocab.cpp).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGIT = r"\p{N}"
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MINICPM5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(end: str, digits: str) -> str:
    """Words that begin with capitals or have none, each followed by `end`."""
    first = r"[^\r\n\p{L}\p{N}]?"
    words = f"{first}{_UPPER}*{_LOWER}+{end}|{first}{_UPPER}+{_LOWER}*{end}"
    return f"{words}|{digits}{_REST}"


_TEKKEN = _cased("", r"\p{N}")
_GPT4O = _cased("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}")
_HUNYUAN = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_PATTERNS = {
    "qwen2": (QWEN2_PATTERN,),
    "deepseek-r1-qwen": (QWEN2_PATTERN,),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "lfm2": (_LLAMA3,),
    "smollm": (_DIGIT, _GPT2),
    "refact": (_DIGIT, _GPT2),
    "qwen35": (_QWEN35,),
    "minicpm5": (r"\p{N}{1,3}", _MINICPM5),
    "hunyuan-dense": _HUNYUAN,
    "tekken": (_TEKKEN,),
    "gpt-4o": (_GPT4O,),
    "gpt-2": (_GPT2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
# These match whole words of the vocabulary before they apply merges.
_IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3", "lfm2", "minicpm5", "tekken")
_BEGINS = ("llama-bpe", "llama3", "llama-v3", "lfm2", "tekken")  # with a begin token, by default
# A control token of one of these names ends an answer in llama.cpp, whatever the keys say.
_END_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|eom_id|>",
    "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>",
)  # fmt: skip
# What llama.cpp has no key for.
_END_IDS, _FLAGS, _NAMES = "khaosz.end_token_ids", "khaosz.token_flags", "khaosz.token_names"
_STRIPS = ("single_word", "lstrip", "rstrip", "normalized")


def tokenizer_from_metadata(metadata: dict[str, Any], source: str) -> Tokenizer:
    """Raises `ModelError` for a kind of tokenizer or pre-tokenizer that is not supported."""
    with without_collection():
        spec, config, model_ids = _parts(metadata, source)
        # Its tokenizer.json is written where it is needed.
        return Tokenizer(partial(_serialized, metadata, source), config, model_ids, _backend(spec))


def _serialized(metadata: dict[str, Any], source: str) -> bytes:
    with without_collection():
        return json.dumps(_parts(metadata, source)[0], ensure_ascii=False).encode()


def _backend(spec: dict[str, Any]) -> tokenizers.Tokenizer:
    """Of a tokenizer.json. Its vocabulary and merges, by far the most of it, need not be text."""
    model = {**spec["model"]}
    vocab, merges = model.pop("vocab"), model.pop("merges")
    small = {**spec, "added_tokens": [], "model": {**model, "vocab": {}, "merges": []}}
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(small))
        given = {key: v for key, v in model.items() if key != "type" and v is not None}
        backend.model = models.BPE(vocab, merges, **given)
    except Exception as error:  # a plain Exception is what the library raises
        raise TokenizerError(f"the tokenizer cannot be read: {error}") from None
    added = [
        {key: value for key, value in token.items() if key != "id"}
        for token in spec["added_tokens"]
    ]
    backend.add_tokens([tokenizers.AddedToken(**token) for token in added])
    return backend


def _parts(
    metadata: dict[str, Any], source: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[int]]]:
    """What tokenizer.json and tokenizer_config.json say, and the model's own ids."""

    def get(name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.ggml.{name}", default)
        if value is not default and not isinstance(value, kind):
            raise ModelError(f"{source}: tokenizer.ggml.{name} is a {type(value).__name__}")
        return value

    def get_ids(key: str) -> list[int] | None:
        value = metadata.get(key)
        if value is not None and not (isinstance(value, np.ndarray) and value.dtype.kind in "iu"):
            raise ModelError(f"{source}: {key} is not a list of ids")
        return None if value is None else value.tolist()

    model, pre = get("model", str), get("pre", str, "default")
    if model not in ("gpt2", "llama", "gemma4"):
        raise ModelError(
            f"{source}: tokenizer {quoted(model)} is not supported",
            hint="byte-level BPE ('gpt2') and SentencePiece ('llama', 'gemma4') are",
        )
    pieces = model != "gpt2"
    if not pieces and pre not in _PATTERNS:
        raise ModelError(
            f"{source}: pre-tokenizer {quoted(pre)} is not supported",
            hint=f"supported: {', '.join(_PATTERNS)}",
        )
    tokens, merges = get("tokens", list, []), get("merges", list, [])
    types = get("token_type", np.ndarray)
    types = [_NORMAL] * len(tokens) if types is None else types.tolist()
    vocab = {token: i for i, token in enumerate(tokens)}
    if not tokens or len(types) != len(tokens):
        raise ModelError(f"{source}: {len(tokens)} tokens with {len(types)} types")
    if len(vocab) != len(tokens):
        raise ModelError(f"{source}: a token comes twice in the vocabulary")
    flags = _stored_flags(metadata.get(_FLAGS), source)
    added = [
        _added_token(i, token, kind == _CONTROL) | flags.get(token, {})
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    pairs: Sequence[Sequence[str]]
    if pieces:
        if model == "gemma4":  # its merges are listed, as those of byte-level BPE
            pairs = _merge_pairs(vocab, merges, source)
        else:
            scores = get("scores", np.ndarray)
            if scores is None or len(scores) != len(tokens):
                raise ModelError(
                    f"{source}: tokenizer.ggml.scores is not one number for each token"
                )
            known = zip(tokens, scores.tolist(), types, strict=True)
            pairs = merges_of({token: score for token, score, kind in known if kind == _NORMAL})
        unknown = (token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN)
        prefix = get("add_space_prefix", bool, model == "llama")
        made = spec_of(vocab, pairs, next(unknown, None), prefix)
    else:
        made = _byte_level(vocab, merges, pre, source)
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": None,  # below, once the ids are checked
        **made,
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": get("add_bos_token", bool, pieces or pre in _BEGINS),
        "add_eos_token": get("add_eos_token", bool, False),
        "clean_up_tokenization_spaces": False,
        "trust_remote_code": True,  # as `train_tokenizer` says: tokenizer.json is read as it is
    }
    ids: dict[str, int] = {}
    for key, name in _ID_KEYS.items():
        token_id = get(f"{name}_token_id", int)
        if token_id is not None:
            if not 0 <= token_id < len(tokens):
                raise ModelError(f"{source}: {name}_token_id {token_id} is not in the vocabulary")
            ids[key] = token_id
    if "eos" not in ids:
        raise ModelError(f"{source}: tokenizer.ggml.eos_token_id is missing")
    names = {f"{key}_token": tokens[i] for key, i in ids.items() if key not in ("eot", "eom")}
    config |= _stored_names(metadata.get(_NAMES), names, source)
    if "<|bos|>" not in vocab:  # the chat template of ours writes it
        around = {"bos": config["add_bos_token"] and "bos" in ids, "eos": config["add_eos_token"]}
        begin, finish = (
            [(tokens[ids[key]], ids[key])] if added else [] for key, added in around.items()
        )
        spec["post_processor"] = template_processing(begin, finish)
    if templates := _templates(metadata):
        config["chat_template"] = templates
    ends = [ids[key] for key in ("eos", "eot", "eom") if key in ids]
    named = [vocab[name] for name in _END_NAMES if name in vocab]
    named = [i for i in named if types[i] == _CONTROL]
    stored = get_ids(_END_IDS)
    model_ids = {key: [i] for key, i in ids.items() if key in ("bos", "pad")}
    model_ids["eos"] = list(dict.fromkeys([*ends, *(named if stored is None else stored)]))
    return spec, config, model_ids


_ID_KEYS = {
    "bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom",
    "pad": "padding", "unk": "unknown", "sep": "seperator", "mask": "mask",
}  # fmt: skip


def _merge_pairs(vocab: dict[str, int], merges: list[str], source: str) -> list[tuple[str, str]]:
    """Raises `ModelError` for a merge that is not made of tokens."""
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ModelError(f"{source}: merge {quoted(merge)} is not made of tokens")
        pairs.append((left, right))
    return pairs


def _byte_level(vocab: dict[str, int], merges: list[str], pre: str, source: str) -> dict[str, Any]:
    """What tokenizer.json says of byte-level BPE. Raises `ModelError`."""
    pairs = _merge_pairs(vocab, merges, source)
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in _PATTERNS[pre]
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*steps, {**byte_level, "use_regex": False}],
        },
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in _IGNORE_MERGES,
            "vocab": vocab,
            "merges": pairs,
        },
    }


def _stored_flags(stored: Any, source: str) -> dict[str, dict[str, bool]]:
    try:
        flags = json.loads(stored or "{}")
        return {
            name: {key: bool(row[key]) for key in _STRIPS if key in row}
            for name, row in flags.items()
        }
    except (ValueError, TypeError, AttributeError):
        raise ModelError(f"{source}: '{_FLAGS}' is {quoted(stored)}") from None


def _stored_names(stored: Any, otherwise: dict[str, str], source: str) -> dict[str, str]:
    """Variables of a chat template, such as bos_token: a model may have ids without these names."""
    try:
        names = otherwise if stored is None else json.loads(stored)
        return {key: name for key, name in names.items() if key.endswith("_token")}
    except (ValueError, TypeError, AttributeError):
        raise ModelError(f"{source}: '{_NAMES}' is {quoted(stored)}") from None


def _templates(metadata: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """The chat template, or several by name."""
    named = {"default": metadata.get("tokenizer.chat_template")}
    names = metadata.get("tokenizer.chat_templates")
    for name in names if isinstance(names, list) else []:
        named[str(name)] = metadata.get(f"tokenizer.chat_template.{name}")
    texts = {name: text for name, text in named.items() if isinstance(text, str)}
    for template in OWN_TEMPLATES:
        if texts.get("default") == _without_marks(template):
            texts["default"] = template
    if texts.keys() <= {"default"}:
        return texts.get("default")
    return [{"name": name, "template": text} for name, text in texts.items()]


def _without_marks(template: str) -> str:
    """`{% generation %}` marks what is trained; llama.cpp's Jinja does not support it."""
    return re.sub(r"\{%-? (end)?generation -?%\}", "", template)


def _added_token(token_id: int, content: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **flags, "special": special}


def _patterns(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...] | None:
    """The regular expressions of a byte-level pre-tokenizer; None for one that does more."""
    patterns: list[str] = []
    byte_level = False
    for step in (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]:
        match step:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}:
                patterns.append(pattern.replace("\r", r"\r").replace("\n", r"\n"))
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(_DIGIT)
            case {"type": "ByteLevel", "add_prefix_space": False}:
                byte_level = True
                patterns += [_GPT2] if step.get("use_regex", True) else []
            case _:
                return None
    return tuple(patterns) if byte_level else None


def _names(spec: dict[str, Any]) -> list[str]:
    """llama.cpp's names of the pre-tokenizer of a byte-level tokenizer.json, if it has any."""
    model, patterns = spec["model"], _patterns(spec.get("pre_tokenizer"))
    # Qwen2's composes characters (NFC) before anything else, which llama.cpp leaves out.
    normalizer = (spec.get("normalizer") or {"type": "NFC"})["type"]
    if model["type"] != "BPE" or normalizer != "NFC":
        return []
    whole_words = bool(model.get("ignore_merges"))
    return [
        name
        for name, known in _PATTERNS.items()
        if known == patterns and (name in _IGNORE_MERGES) == whole_words
    ]


def _pieces(spec: dict[str, Any]) -> tuple[dict[str, float], bool] | None:
    """Scores of the pieces of a SentencePiece vocabulary, and whether a space is put before a
    text; None for other tokenizers."""
    model, prefix = spec["model"], prefix_of(spec)
    if model["type"] != "BPE" or not model.get("byte_fallback") or prefix is None:
        return None
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    added = {token["content"] for token in spec["added_tokens"]}
    pieces = {token: i for token, i in model["vocab"].items() if token not in added}
    for byte in range(256):
        pieces.pop(f"<0x{byte:02X}>", None)
    scores = scores_of(pieces, merges)
    return None if scores is None else (scores, prefix)


def tokenizer_to_metadata(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """`tokenizer.*` keys for a model with `rows` rows of embedding (padding rows are named).

    Raises `ModelError` for a tokenizer whose pre-tokenizer has no name in llama.cpp.
    """
    spec = json.loads(tokenizer.serialized)
    model = spec["model"]
    pieces = _pieces(spec)
    kinds = [] if pieces is not None else _names(spec)
    if pieces is None and not kinds:
        raise ModelError(
            "the pre-tokenizer of this model has no name in llama.cpp",
            hint="models trained here have one: 'qwen2'",
        )
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = np.full(rows, _UNUSED, dtype=np.int32)
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, _NORMAL
    for added in spec["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _USER_DEFINED
    types[list(tokenizer.special_ids.values())] = _CONTROL
    begin, finish = tokenizer.begin_ids, tokenizer.finish_ids
    if begin not in ([], [tokenizer.bos_id]) or finish not in ([], [tokenizer.eos_id]):
        raise ModelError(
            f"the tokenizer adds {begin} before a text and {finish} after it; GGUF has keys for the"
            f" begin token {tokenizer.bos_id} and the end token {tokenizer.eos_id} only",
            hint="name these tokens as bos_token and eos_token in tokenizer_config.json",
        )
    if pieces is not None:
        scores, prefix = pieces
        for added in spec["added_tokens"]:  # llama.cpp finds these before it marks spaces
            if types[added["id"]] == _USER_DEFINED:
                tokens[added["id"]] = added["content"].replace(SPACE, " ")
        for token, i in model["vocab"].items():
            if types[i] == _NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", token):
                types[i] = _BYTE
        if (unknown := model.get("unk_token")) is not None:
            types[model["vocab"][unknown]] = _UNKNOWN
        kind: dict[str, Any] = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": np.array(
                [scores.get(token, -1e6) for token in tokens], np.float32
            ),
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.add_space_prefix": prefix,
        }
    else:
        kind = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": kinds[0],
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": [
                m if isinstance(m, str) else " ".join(m) for m in model["merges"]
            ],
        }
    metadata: dict[str, Any] = {
        **kind,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.ggml.add_bos_token": bool(begin),
        "tokenizer.ggml.add_eos_token": bool(finish),
    }
    if tokenizer.end_id != tokenizer.eos_id:
        metadata["tokenizer.ggml.eot_token_id"] = tokenizer.end_id
    if (eom := tokenizer.special_ids.get("<|eom_id|>")) in tokenizer.end_ids:
        metadata["tokenizer.ggml.eom_token_id"] = eom
    metadata[_END_IDS] = np.array(tokenizer.end_ids, np.int32)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    names = tokenizer.template_variables
    if names != {f"{key}_token": tokens[i] for key, i in ids.items()}:
        metadata[_NAMES] = json.dumps(names, ensure_ascii=False)
    flags = {
        added["content"]: {key: added[key] for key in _STRIPS if added.get(key)}
        for added in spec["added_tokens"]
    }
    if any(flags.values()):
        metadata[_FLAGS] = json.dumps({name: row for name, row in flags.items() if row})
    templates = {n: _without_marks(text) for n, text in tokenizer.chat_templates.items()}
    if "default" in templates:
        metadata["tokenizer.chat_template"] = templates.pop("default")
    if templates:
        metadata["tokenizer.chat_templates"] = list(templates)
    return metadata | {f"tokenizer.chat_template.{n}": text for n, text in templates.items()}
