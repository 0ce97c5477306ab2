"""The settings of an embedder, stored with the model in the layout of sentence-transformers.

    modules.json                      transformer, pooling, projections, normalisation
    1_Pooling/config.json             which hidden states are pooled
    2_Dense/                          a projection of pooled vectors (EmbeddingGemma has two)
    1_LogitScore/config.json          of a reranker: the ids of its answers yes and no
    config_sentence_transformers.json prefixes ("prompts") of queries and documents
    sentence_bert_config.json         maximum tokens of a text
    tokenizer.json                    in ours, a post-processor adds the begin token

Other programs can load our directories, and we can load theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from khaosz.data.tokenizer import Tokenizer
from khaosz.data.tokenizer.files import template_processing
from khaosz.errors import ModelError, quoted
from khaosz.files import write_json
from khaosz.interop.huggingface import WEIGHTS
from khaosz.interop.huggingface_config import read_json
from khaosz.interop.prompts import known_prompts
from khaosz.interop.tensor_file import DTYPES, TensorFile

_MODULES = "modules.json"
_POOLING = "1_Pooling"
_NO_LENGTH = 10**9  # transformers writes 10^30 for "not set"
_QUERY, _PASSAGE = ("query", "s2p_query"), ("document", "passage", "corpus")
_KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
_LOGIT_SCORE = "LogitScore"

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
    dense: tuple[str, ...] = ()  # subdirectories of projections, see `load_dense`


def is_embedder(directory: str | Path) -> bool:
    """Whether a model directory contains an embedder, not a language model or a reranker."""
    path = Path(directory) / _MODULES
    return path.is_file() and "Pooling" in path.read_text("utf-8", errors="replace")


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
    modules = _modules(directory)
    has_modules = bool(modules)  # the directory of an encoder may lack them
    folder, dense = _POOLING, []
    for kind, path in modules:
        if kind == _LOGIT_SCORE:
            raise ModelError(f"{directory} is a reranker", hint="name it as --reranker")
        if kind not in _KINDS:
            raise ModelError(
                f"{directory / _MODULES}: module {quoted(kind)} is not supported",
                hint=f"supported: {', '.join(_KINDS)}",
            )
        if kind == "Pooling":
            folder = path
        elif kind == "Dense":
            dense.append(path)
    kinds = [kind for kind, _ in modules]
    if kinds != sorted(kinds, key=_KINDS.index) or kinds.count("Pooling") > 1:
        raise ModelError(
            f"{directory / _MODULES}: the order {', '.join(kinds)} is not supported",
            hint=f"supported: {', '.join(_KINDS)}",
        )
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
    settings = _read(directory / "config_sentence_transformers.json")
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict):
        prompts = {"query": None}  # rejected below
    default = prompts.get(settings.get("default_prompt_name") or "")
    if default is None and not prompts.keys() & {*_QUERY, *_PASSAGE}:
        queries, passages = known_prompts(_names(directory))
    else:
        queries = passages = "" if default is None else default
    query = next((prompts[name] for name in _QUERY if name in prompts), queries)
    passage = next((prompts[name] for name in _PASSAGE if name in prompts), passages)
    if not isinstance(query, str) or not isinstance(passage, str):
        raise ModelError(
            f"{directory / 'config_sentence_transformers.json'}: prompts are not strings"
        )
    max_length, lower_case = _text_settings(directory, default=has_modules)
    pooled = _POOLINGS[modes.pop()]
    return EmbedderSettings(pooled, query, passage, max_length, lower_case, tuple(dense))


def load_reranker_settings(directory: str | Path) -> EmbedderSettings:
    """Length and case of the texts of a cross-encoder. Raises `ModelError`."""
    max_length, lower_case = _text_settings(Path(directory), default=True)
    return EmbedderSettings(max_length=max_length, lower_case=lower_case)


def _text_settings(directory: Path, *, default: bool) -> tuple[int | None, bool]:
    """The maximum tokens of a text, by `default` those of the tokenizer, and whether it is
    lower-cased."""
    transformer = _read(directory / "sentence_bert_config.json")
    max_length = transformer.get("max_seq_length")
    if max_length is None and default:
        max_length = _read(directory / "tokenizer_config.json").get("model_max_length")
        if isinstance(max_length, float) or (
            isinstance(max_length, int) and max_length > _NO_LENGTH
        ):
            max_length = None
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ModelError(
            f"{directory / 'sentence_bert_config.json'}: max_seq_length={quoted(max_length)}"
        )
    return max_length, bool(transformer.get("do_lower_case"))


def _modules(directory: Path) -> list[tuple[str, str]]:
    """The kinds and subdirectories of modules, none without modules.json."""
    path = directory / _MODULES
    modules = read_json(path, list) if path.is_file() else []
    if not all(isinstance(part, dict) for part in modules):
        raise ModelError(f"{path}: not a list of modules")
    found = [(str(p.get("type")).rpartition(".")[2], str(p.get("path"))) for p in modules]
    for kind, folder in found:
        if kind != "Transformer" and Path(folder).name != folder:
            raise ModelError(f"{path}: {quoted(folder)} is not a subdirectory")
    return found


def _names(directory: Path) -> list[str]:
    """What a model is called: by its folder, of which Hugging Face's cache has one above those of
    revisions, and in config.json."""
    path = directory.resolve()
    cached = [part for part in path.parts if part.startswith("models--")]
    return [path.name, *cached, str(_read(path / "config.json").get("_name_or_path", ""))]


def load_dense(directory: str | Path) -> list[nn.Module]:
    """The projections of pooled vectors (B, D), in order. Raises `ModelError`."""
    directory = Path(directory)
    return [_dense(directory / name) for name in load_embedder_settings(directory).dense]


def _dense(directory: Path) -> nn.Module:
    config = read_json(directory / "config.json")
    activation = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    if activation not in ("Identity", "Tanh") or config.get("use_residual"):
        raise ModelError(
            f"{directory / 'config.json'}: this projection is not supported",
            hint="supported: Identity and Tanh, without a residual",
        )
    file = TensorFile(directory / WEIGHTS)
    shape = config.get("out_features"), config.get("in_features")
    shapes = {"linear.weight": shape} | ({"linear.bias": shape[:1]} if config.get("bias") else {})
    stored = {name: entry.shape for name, entry in file.entries.items()}
    if stored != shapes or any(entry.type not in DTYPES for entry in file.entries.values()):
        raise ModelError(f"{file.path}: tensors {stored} are not those of config.json, {shapes}")
    linear = nn.utils.skip_init(nn.Linear, shape[1], shape[0], bias="linear.bias" in shapes)
    loaded = {name.removeprefix("linear."): file.read(name, torch.float32) for name in shapes}
    linear.load_state_dict(loaded, assign=True)
    tail = nn.Tanh() if activation == "Tanh" else nn.Identity()
    return nn.Sequential(linear, tail).requires_grad_(False).eval()


def rerank_instruction(directory: str | Path) -> str | None:
    """What sentence-transformers gives the template of a reranker as its system message."""
    settings = _read(Path(directory) / "config_sentence_transformers.json")
    prompt = (settings.get("prompts") or {}).get(settings.get("default_prompt_name") or "")
    return prompt if isinstance(prompt, str) and prompt else None


def answer_ids(directory: str | Path) -> tuple[int, int] | None:
    """The ids of yes and no by which a reranker scores; None where its files do not say them.
    Raises `ModelError`."""
    path = Path(directory)
    folder = next((p for kind, p in _modules(path) if kind == _LOGIT_SCORE), None)
    if folder is None:
        return None
    config = read_json(path / folder / "config.json")
    ids = config.get("true_token_id"), config.get("false_token_id")
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ModelError(f"{path / folder / 'config.json'}: the ids {ids} are not supported")
    return ids


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
