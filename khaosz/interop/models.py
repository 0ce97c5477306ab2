"""Models by path, in either format, and conversion between the formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from khaosz.config import ModelConfig
from khaosz.data.tokenizer import Tokenizer, load_tokenizer
from khaosz.data.tokenizer.files import read_template
from khaosz.data.tokenizer.thinking import Thinking, thinking_of
from khaosz.errors import ModelError, TokenizerError
from khaosz.files import atomic_folder, disk_hint
from khaosz.interop import huggingface, huggingface_config
from khaosz.interop.fetch.store import record_of
from khaosz.interop.gguf.file import SPLIT_NAME, GgufFile, is_gguf, split_names
from khaosz.interop.gguf.model import GgufModel, load_gguf, write_model
from khaosz.interop.modelfile import write_modelfile
from khaosz.interop.retrieval import check_encoder, is_encoder
from khaosz.interop.sampling import recommended_sampling
from khaosz.model import Transformer

_NAMED = {"bos_token": "", "eos_token": ""}  # variables that a template may add to text

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


def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """A `Transformer` from a Hugging Face directory or, dequantised, from a .gguf file, in
    evaluation mode.

    Raises `ModelError` for a missing or cut file, an unsupported family or feature, a missing,
    unexpected or misshapen tensor (each by name).
    """
    source = open_model(path)
    if isinstance(source, GgufModel):
        return load_gguf(source, dtype=dtype).to(device)
    return huggingface.load_model(path, device=device, dtype=dtype)


def open_model(path: str | Path, *, reranker: bool = False) -> ModelSource:
    """The parameters of a model in either format, read one at a time. Raises `ModelError`, also for
    an embedder that sees later tokens, and unless `reranker` for a file without output rows."""
    if not is_gguf(path):
        if huggingface.is_reward_model(path):
            raise huggingface.not_generating(path)
        if is_encoder(path):
            raise _encodes(path)
        return huggingface.ModelDirectory(path)
    file = GgufFile.open(path)
    if is_encoder(file):
        raise _encodes(path)
    model = GgufModel(file)
    if model.rerank_head is not None and not reranker:
        raise ModelError(
            f"{path} is a reranker: of its output it has the rows of yes and no only",
            hint="name it as --reranker",
        )
    return model


def model_config(path: str | Path) -> ModelConfig:
    """The shape of a model in either format. Raises `ModelError` as `open_model` does for a .gguf
    file, for a directory as `load_config`."""
    return open_model(path).config if is_gguf(path) else huggingface_config.load_config(Path(path))


def model_files(path: str | Path) -> list[Path]:
    """The files with a model's weights. Raises `ModelError`."""
    path = Path(path)
    if is_gguf(path):
        return [path.with_name(name) for name in split_names(path.name)]
    return huggingface.weight_files(path)


def _encodes(path: str | Path) -> ModelError:
    return ModelError(
        f"{path} is an encoder, which does not generate text",
        hint="name it as --embedder, or a cross-encoder as --reranker",
    )


def check_model(path: str | Path) -> None:
    """Raises `ModelError` or `TokenizerError` for a model directory (a decoder or an encoder) or
    .gguf file that is missing, incomplete or of an unknown kind. Reads no weights."""
    path = Path(path)
    if path.exists() and is_encoder(path):
        check_encoder(path)
    elif is_gguf(path):
        GgufModel.open(path)
    else:
        huggingface_config.load_config(path)
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
        known = huggingface_config.read_json(config).get("vocab_size")
        if isinstance(known, int) and tokenizer.vocab_size > known:
            raise ModelError(
                f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {known}",
                hint="use the tokenizer the model was trained with",
            )
    return tokenizer


def thinking_in(path: str | Path) -> Thinking:
    """What the chat template of a model does, without loading its vocabulary. Raises
    `ModelError`."""
    if is_gguf(path):
        template = GgufFile.open(path).metadata.get("tokenizer.chat_template")
        return thinking_of(template if isinstance(template, str) else None, _NAMED)
    try:
        return thinking_of(read_template(Path(path)), _NAMED)
    except TokenizerError:  # told when the model is loaded
        return Thinking()


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
    sampling = recommended_sampling(source)
    if is_gguf(target):
        write_model(model.config, model.read, tokenizer, target, kind or "F16", sampling=sampling)
        write_modelfile(target, tokenizer, model.config.max_position_embeddings)
        return target
    write_served(
        target, model.config, lambda name: model.read(name, torch.float32), tokenizer, sampling
    )
    return target


def write_served(
    directory: Path,
    config: ModelConfig,
    parameter: Callable[[str], Tensor],
    tokenizer: Tokenizer,
    sampling: Mapping[str, float] | None = None,
) -> None:
    """Write a model directory in fp32 with its tokenizer; its parameters are requested one at a
    time, by name. Raises `ModelError` when the disk refuses."""
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    ends = list(tokenizer.end_ids)
    try:
        with atomic_folder(directory) as partial:
            tokenizer.save(partial)
            huggingface.write_directory(
                partial,
                config,
                parameter,
                token_ids={**ids, "eos_token_id": ends},
                sampling=sampling,
            )
    except OSError as error:
        what = f"cannot write {directory}: {error.strerror or error}"
        raise ModelError(what, hint=disk_hint(error)) from error
