"""The settings of an embedder, stored with the model in the layout of sentence-transformers.

    modules.json                      transformer, pooling, normalisation
    1_Pooling/config.json             which hidden states are pooled
    config_sentence_transformers.json prefixes ("prompts") of queries and documents
    sentence_bert_config.json         maximum tokens of a text
    tokenizer.json                    in ours, a post-processor adds the begin token

Other programs can load our directories, and we can load theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from khaosz.data.tokenizer import Tokenizer
from khaosz.data.tokenizer.files import template_processing
from khaosz.errors import ModelError, quoted
from khaosz.files import write_json
from khaosz.interop.huggingface import read_json

_MODULES = "modules.json"
_POOLING = "1_Pooling"
_NO_LENGTH = 10**9  # transformers writes 10^30 for "not set"
_QUERY, _PASSAGE = ("query", "s2p_query"), ("document", "passage", "corpus")
_KINDS = ("Transformer", "Pooling", "Normalize")


Pooling = Literal["mean", "last", "cls"]
_POOLINGS: dict[str, Pooling] = {
    "mean_tokens": "mean",
    "lasttoken": "last",
    "cls_token": "cls",
    "mean": "mean",
    "cls": "cls",  # names of sentence-transformers 6
}


@dataclass(frozen=True)
class EmbedderSettings:
    """Prefixes are pooled with the text; prefix, begin token and text are truncated to `max_length`
    tokens together."""

    pooling: Pooling = "mean"
    query_prefix: str = ""
    passage_prefix: str = ""
    max_length: int | None = None
    lower_case: bool = False  # of texts, before they are encoded


def is_embedder(directory: str | Path) -> bool:
    """Whether a model directory contains an embedder, not a language model."""
    return (Path(directory) / _MODULES).is_file()


def save_embedder(
    directory: Path, settings: EmbedderSettings, width: int, tokenizer: Tokenizer
) -> None:
    """Write the files listed above; `width` is the dimension of the hidden states."""
    tokenizer.save(directory)
    if tokenizer.begins_with_bos:
        _begin_with_bos(directory / "tokenizer.json", tokenizer)
    parts = [("", "Transformer"), (_POOLING, "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(parts)
    ]
    for path, _ in parts:
        (directory / path).mkdir(exist_ok=True)
    pooling = {
        "word_embedding_dimension": width,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": settings.pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": settings.pooling == "last",
        "include_prompt": True,
    }
    write_json(directory / _POOLING / "config.json", pooling)
    prompts = {"query": settings.query_prefix, "document": settings.passage_prefix}
    write_json(
        directory / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    write_json(
        directory / "sentence_bert_config.json",
        {"max_seq_length": settings.max_length, "do_lower_case": settings.lower_case},
    )
    # Last: `is_embedder` looks for it.
    write_json(directory / _MODULES, modules)


def load_embedder_settings(directory: str | Path) -> EmbedderSettings:
    """Settings of a model directory; the defaults for a plain language model.

    Raises `ModelError` for broken files and unsupported modules.
    """
    directory = Path(directory)
    has_modules = is_embedder(directory)  # the directory of an encoder may lack them
    modules = read_json(directory / _MODULES, list) if has_modules else []
    if not all(isinstance(part, dict) for part in modules):
        raise ModelError(f"{directory / _MODULES}: not a list of modules")
    folder = _POOLING
    for part in modules:
        kind = str(part.get("type")).rpartition(".")[2]
        if kind not in _KINDS:
            raise ModelError(
                f"{directory / _MODULES}: module {quoted(kind)} is not supported",
                hint=f"supported: {', '.join(_KINDS)}",
            )
        if kind == "Pooling":
            folder = str(part.get("path"))
    if Path(folder).name != folder:
        raise ModelError(f"{directory / _MODULES}: {quoted(folder)} is not a subdirectory")
    pooling = _read(directory / folder / "config.json", required=has_modules)
    pooling = pooling or {"pooling_mode": "mean"}
    modes = {key[13:] for key, on in pooling.items() if key.startswith("pooling_mode_") and on}
    if "pooling_mode" in pooling:  # sentence-transformers 6
        named = str(pooling["pooling_mode"])
        if any(_POOLINGS.get(mode) != _POOLINGS.get(named) for mode in modes):
            raise ModelError(
                f"{directory / folder / 'config.json'}: pooling_mode={quoted(named)} contradicts"
                f" pooling_mode_{sorted(modes)[0]}=true",
                hint="write the setting once",
            )
        modes = {named}
    if (
        len(modes) != 1
        or not modes <= _POOLINGS.keys()
        or pooling.get("include_prompt", True) is False
    ):
        names = ", ".join(sorted(modes)) or "none"
        raise ModelError(
            f"{directory / folder / 'config.json'}: pooling {quoted(names)} is not supported",
            hint="supported: mean over all tokens with the prompt, first token, last token",
        )
    prompts = _read(directory / "config_sentence_transformers.json").get("prompts") or {}
    transformer = _read(directory / "sentence_bert_config.json")
    max_length = transformer.get("max_seq_length")
    if max_length is None and has_modules:
        max_length = _read(directory / "tokenizer_config.json").get("model_max_length")
        if isinstance(max_length, float) or (
            isinstance(max_length, int) and max_length > _NO_LENGTH
        ):
            max_length = None
    if not isinstance(prompts, dict):
        prompts = {"query": None}  # rejected below
    query = next((prompts[name] for name in _QUERY if name in prompts), "")
    passage = next((prompts[name] for name in _PASSAGE if name in prompts), "")
    if not isinstance(query, str) or not isinstance(passage, str):
        raise ModelError(
            f"{directory / 'config_sentence_transformers.json'}: prompts are not strings"
        )
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ModelError(
            f"{directory / 'sentence_bert_config.json'}: max_seq_length={quoted(max_length)}"
        )
    lower_case = bool(transformer.get("do_lower_case"))
    return EmbedderSettings(_POOLINGS[modes.pop()], query, passage, max_length, lower_case)


def _begin_with_bos(path: Path, tokenizer: Tokenizer) -> None:
    """Let other programs, which follow tokenizer.json, prepend the begin token as we do."""
    values = read_json(path)
    if values.get("post_processor") is not None:
        return
    name, token_id = tokenizer.token_bytes(tokenizer.bos_id).decode(), tokenizer.bos_id
    values["post_processor"] = template_processing([(name, token_id)], [])
    write_json(path, values)


def _read(path: Path, *, required: bool = False) -> dict[str, Any]:
    return read_json(path) if required or path.is_file() else {}
