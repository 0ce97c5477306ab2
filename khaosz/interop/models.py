"""Models by path, in either format, and conversion between the formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from khaosz.config import ModelConfig
from khaosz.data.tokenizer import Tokenizer, load_tokenizer
from khaosz.errors import ModelError
from khaosz.files import atomic_folder, disk_hint
from khaosz.interop import huggingface
from khaosz.interop.encoder import is_encoder
from khaosz.interop.fetch.store import record_of
from khaosz.interop.gguf.file import MAGIC, SPLIT_NAME
from khaosz.interop.gguf.model import GgufModel, load_gguf, write_model
from khaosz.interop.modelfile import write_modelfile
from khaosz.model import Transformer

ModelSource = GgufModel | huggingface.ModelDirectory


def default_name(model: Path) -> str:
    """A model's name by its path: runs/demo/dpo/last is dpo, qwen.Q4_0.gguf and
    qwen.Q4_0-00001-of-00002.gguf are qwen.Q4_0, and a pulled one is called as it was pulled."""
    if (record := record_of(model)) is not None:
        return record.name
    path = model.resolve()
    named = path.parent if path.name == "last" else path
    split = SPLIT_NAME.fullmatch(named.name)
    return split["name"] if split else named.name.removesuffix(".gguf")


def is_gguf(path: str | Path) -> bool:
    """Whether a path is a GGUF file by its name or, as Ollama's blobs, by its content."""
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:  # a folder, or not there
        return False


def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """A `Transformer` from a Hugging Face directory or, dequantised, from a .gguf file, in
    evaluation mode.

    Raises `ModelError` for a missing or cut file, an unsupported family or feature, a missing,
    unexpected or misshapen tensor (each by name).
    """
    if is_gguf(path):
        return load_gguf(path, dtype=dtype).to(device)
    return huggingface.load_model(path, device=device, dtype=dtype)


def open_model(path: str | Path) -> ModelSource:
    """The parameters of a model in either format, read one at a time. Raises `ModelError`."""
    if is_gguf(path):
        return GgufModel.open(path)
    if huggingface.is_reward_model(path):
        raise huggingface.not_generating(path)
    return huggingface.ModelDirectory(path)


def check_model(path: str | Path) -> None:
    """Raises `ModelError` or `TokenizerError` for a model directory (a decoder or an encoder) or
    .gguf file that is missing, incomplete or of an unknown kind. Reads no weights."""
    path = Path(path)
    if is_gguf(path):
        GgufModel.open(path)
        return
    if not is_encoder(path):
        huggingface.load_config(Path(path))
    huggingface.weight_files(path)
    load_tokenizer(path)


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer inside a .gguf file or a model directory. Raises `ModelError` where it has more
    tokens than the model beside it, `TokenizerError`."""
    if is_gguf(path):
        return GgufModel.open(path).tokenizer()
    tokenizer = load_tokenizer(path)
    config = Path(path) / "config.json"
    if config.exists() and not is_encoder(path):
        known = huggingface.read_json(config).get("vocab_size")
        if isinstance(known, int) and tokenizer.vocab_size > known:
            raise ModelError(
                f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {known}",
                hint="use the tokenizer the model was trained with",
            )
    return tokenizer


def convert(source: str | Path, target: str | Path, *, kind: str | None = None) -> Path:
    """Hugging Face directory -> .gguf (of type `kind`, F16 by default, with an Ollama Modelfile
    beside it), or .gguf -> directory (dequantised, fp32). Returns what was written.

    Raises `ModelError`, also when `target` exists.
    """
    source, target = Path(source), Path(target)
    if is_gguf(source) == is_gguf(target):
        raise ModelError(
            f"{source} and {target} have the same format",
            hint="convert DIR OUT.gguf, or convert IN.gguf DIR",
        )
    if target.exists():
        raise ModelError(f"{target} exists", hint="name another output, or remove it")
    if kind is not None and not is_gguf(target):
        raise ModelError("--to is for .gguf outputs", hint="a directory is always fp32")
    model, tokenizer = open_model(source), open_tokenizer(source)
    if is_gguf(target):
        write_model(model.config, model.read, tokenizer, target, kind or "F16")
        write_modelfile(target, tokenizer, model.config.max_position_embeddings)
        return target
    write_served(target, model.config, lambda name: model.read(name, torch.float32), tokenizer)
    return target


def write_served(
    directory: Path,
    config: ModelConfig,
    parameter: Callable[[str], Tensor],
    tokenizer: Tokenizer,
) -> None:
    """Write a model directory in fp32 with its tokenizer; its parameters are requested one at a
    time, by name. Raises `ModelError` when the disk refuses."""
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    ends = list(tokenizer.end_ids)
    try:
        with atomic_folder(directory) as partial:
            tokenizer.save(partial)
            huggingface.write_directory(
                partial, config, parameter, token_ids={**ids, "eos_token_id": ends}
            )
    except OSError as error:
        what = f"cannot write {directory}: {error.strerror or error}"
        raise ModelError(what, hint=disk_hint(error)) from error
