"""Embedders and cross-encoders by path: a directory of transformers or sentence-transformers, or a
.gguf file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import tokenizers
import torch
from torch import nn

from khaosz.errors import ModelError, one_line, quoted
from khaosz.interop import encoder as directories
from khaosz.interop import huggingface, huggingface_config
from khaosz.interop.gguf import encoder as gguf
from khaosz.interop.gguf.architectures import ENCODER
from khaosz.interop.gguf.architectures.architecture import RERANK_HEAD
from khaosz.interop.gguf.blocks import read_array
from khaosz.interop.gguf.file import GgufFile, is_gguf
from khaosz.interop.gguf.model import GgufModel, load_gguf
from khaosz.interop.prompts import known_pooling, known_prompts
from khaosz.interop.sentence_transformers import (
    EmbedderSettings,
    Pooling,
    is_embedder,
    load_dense,
    load_embedder_settings,
    load_reranker_settings,
)
from khaosz.interop.tensor_file import TensorFile
from khaosz.model.encoder import Encoder, TransformerEncoder

_BIDIRECTIONAL = "gemma-embedding"
_POOLINGS: dict[int, Pooling] = {1: "mean", 2: "cls", 3: "last"}  # llama.h: llama_pooling_type
_RANK = 4
_DENSE = ("dense_2.weight", "dense_3.weight")


def is_encoder(path: str | Path | GgufFile) -> bool:
    """Whether a model sees later tokens too: one of the BERT family, or EmbeddingGemma."""
    if isinstance(path, GgufFile) or is_gguf(path):
        file = path if isinstance(path, GgufFile) else GgufFile.open(path)
        return _architecture(file) in (ENCODER, _BIDIRECTIONAL)
    return directories.is_encoder(path) or _is_bidirectional(Path(path))


def check_gguf(file: GgufFile) -> None:
    """Raises `ModelError` for a file of an unknown kind. Reads no weights."""
    if _architecture(file) == ENCODER:
        gguf.encoder_config(file)
        gguf.encoder_tokenizer(file)
    else:
        GgufModel(file)


def check_encoder(path: str | Path) -> None:
    """Raises `ModelError` and `TokenizerError` for an encoder that is incomplete or of an unknown
    kind. Reads no weights."""
    if not is_gguf(path):
        huggingface.weight_files(Path(path))
        if directories.is_encoder(path):
            directories.check_config(path)
        else:
            huggingface.ModelDirectory(path)
    elif _architecture(file := GgufFile.open(path)) == ENCODER:
        gguf.encoder_config(file)
    encoder_tokenizer(path)


def load_encoder(
    path: str | Path, *, device: str | torch.device = "cpu", head: bool = False
) -> Encoder | TransformerEncoder:
    """In fp32 and evaluation mode; `head`: a cross-encoder. Raises `ModelError`."""
    if directories.is_encoder(path):
        return directories.load_encoder(path, device=device, head=head)
    if is_gguf(path):
        file = GgufFile.open(path)
        if _architecture(file) == ENCODER:
            return gguf.read_encoder(file, head=head).to(device)
        body = load_gguf(path)
    else:
        body = huggingface.load_model(path)
    if head:
        raise ModelError(f"{path} is an embedder, not a reranker", hint="name it as --embedder")
    return TransformerEncoder(body).requires_grad_(False).eval().to(device)


def encoder_parameters(path: str | Path) -> int:
    """Numbers in an encoder's file, heads included. Reads no weights. Raises `ModelError`."""
    if is_gguf(path):
        return sum(prod(tensor.shape) for tensor in GgufFile.open(path).tensors.values())
    files = [TensorFile(file) for file in huggingface.weight_files(Path(path))]
    return sum(prod(entry.shape) for file in files for entry in file.entries.values())


def encoder_tokenizer(path: str | Path) -> tokenizers.Tokenizer:
    """With the special tokens of a text and of a pair. Raises `ModelError`, `TokenizerError`."""
    if not is_gguf(path):
        with tokenizer_errors(path):
            return directories.encoder_tokenizer(Path(path))
        raise AssertionError
    file = GgufFile.open(path)
    if _architecture(file) == ENCODER:
        serialized = gguf.encoder_tokenizer(file)
    else:
        serialized = GgufModel(file).tokenizer().serialized
    with tokenizer_errors(path):
        return tokenizers.Tokenizer.from_buffer(serialized)
    raise AssertionError


@contextmanager
def tokenizer_errors(path: str | Path) -> Iterator[None]:
    """Raises `ModelError` for what the library raises and, of a damaged charsmap, panics about."""
    try:
        yield
    except BaseException as error:
        raise _tokenizer_error(error, path) from None


def _tokenizer_error(error: BaseException, path: str | Path) -> BaseException:
    """Other errors are returned as they are."""
    # The second is pyo3's, which no module exports.
    if isinstance(error, ValueError) or type(error).__name__ == "PanicException":
        return ModelError(f"{path}: its tokenizer is damaged: {one_line(str(error))}")
    return error


def embedder_settings(path: str | Path) -> EmbedderSettings:
    """Pooling, prefixes and length of an embedder; the defaults for a plain language model. A
    prefix that the files do not say is that of the known model of the same name.

    Raises `ModelError` for broken files and what is not supported.
    """
    if not is_gguf(path):
        if directories.is_cross_encoder(path) and not is_embedder(path):
            raise _reranks(path)
        return load_embedder_settings(path)
    file = GgufFile.open(path)
    architecture = _architecture(file)
    number = file.metadata.get(f"{architecture}.pooling_type")
    if number == _RANK or RERANK_HEAD in file.tensors:
        raise _reranks(path)
    if number not in (None, 0, *_POOLINGS):
        raise ModelError(f"{path}: {architecture}.pooling_type = {quoted(number)} is not supported")
    missing = [name for name in _DENSE if name not in file.tensors]
    if architecture == _BIDIRECTIONAL and missing:
        raise ModelError(
            f"{path}: tensor '{missing[0]}' is missing: the file was converted without the"
            " projections that are part of the model",
            hint="use a file converted with --sentence-transformers-dense-modules",
        )
    names = [Path(path).name, str(file.metadata.get("general.name", ""))]
    query, passage = known_prompts(names)
    return EmbedderSettings(_POOLINGS.get(number or 0, known_pooling(names)), query, passage)


def _reranks(path: str | Path) -> ModelError:
    return ModelError(f"{path} is a reranker, not an embedder", hint="name it as --reranker")


def is_named_embedder(path: str | Path) -> bool:
    """Whether a model's files say that it embeds; an encoder or any other model may do so too."""
    if not is_gguf(path):
        return is_embedder(path)
    file = GgufFile.open(path)
    return file.metadata.get(f"{_architecture(file)}.pooling_type") in _POOLINGS


def reranker_settings(path: str | Path) -> EmbedderSettings:
    """Length and case of the texts of a cross-encoder. Raises `ModelError`."""
    return EmbedderSettings() if is_gguf(path) else load_reranker_settings(path)


def dense_layers(path: str | Path) -> nn.Sequential:
    """What is applied to pooled vectors (B, D), often nothing. Raises `ModelError`."""
    if not is_gguf(path):
        return nn.Sequential(*load_dense(path))
    file = GgufFile.open(path)
    found = [read_array(file, name) for name in _DENSE if name in file.tensors]
    layers = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in found))
    weights = {f"{i}.weight": torch.from_numpy(w) for i, w in enumerate(found)}
    layers.load_state_dict(weights, assign=True)
    return layers.requires_grad_(False)


def _architecture(file: GgufFile) -> str:
    return str(file.metadata.get("general.architecture"))


def _is_bidirectional(directory: Path) -> bool:
    try:
        values = huggingface_config.text_values(
            huggingface_config.read_json(directory / "config.json")
        )
    except ModelError:
        return False
    return values.get("use_bidirectional_attention") is True
