"""Hugging Face model directories, in and out: `config.json` and `model.safetensors`.

What we write, `transformers` loads as one of `FAMILIES` with equal logits; what it writes of those
families, we load. A feature that is not supported is rejected by name, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from khaosz.config import ModelConfig
from khaosz.errors import ModelError, quoted
from khaosz.files import write_json
from khaosz.interop.families import FAMILIES, WITH_IMAGES
from khaosz.interop.families.family import Stored, stored_shape, tensors
from khaosz.interop.huggingface_config import (
    check_rotary,
    config_to_hf,
    load_config,
    model_type,
    read_family,
    read_json,
)
from khaosz.interop.tensor_file import DTYPES, TensorFile, write_tensors
from khaosz.model import RewardModel, Transformer, parameter_shapes, reward_shapes
from khaosz.model.rotary import Rotary

_MAX_LAYERS = 10_000  # far above any model, few enough to list their names
M = TypeVar("M", bound=Transformer)
# Where a text model is in one that sees images, and the parts of that which are left out.
_TEXT = (("model.language_model.", "model."), ("language_model.", ""))
_IMAGES = ("vision_tower.", "multi_modal_projector.", "visual.", "embed_vision.")
_SOUNDS = ("audio_tower.", "embed_audio.")
_DERIVED = "rotary_emb.inv_freq"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


def save_model(
    model: Transformer,
    directory: Path,
    *,
    bos_id: int | None = None,
    eos_ids: list[int] | None = None,
    pad_id: int | None = None,
    sampling: Mapping[str, float] | None = None,
) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors` (the parameters as
    they are: fp32 masters stay fp32), each file atomically. A `RewardModel` is written as a
    sequence classifier of one label. `sampling`: what the model recommends."""
    write_directory(
        directory,
        model.config,
        dict(model.named_parameters()).__getitem__,
        dtype=model.embed_tokens.weight.dtype,
        rewards=isinstance(model, RewardModel),
        token_ids={"bos_token_id": bos_id, "eos_token_id": eos_ids, "pad_token_id": pad_id},
        sampling=sampling,
    )


def write_directory(
    directory: Path,
    config: ModelConfig,
    parameter: Callable[[str], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    rewards: bool = False,
    token_ids: dict[str, Any],
    sampling: Mapping[str, float] | None = None,
) -> None:
    """`save_model` for parameters that are requested one at a time, by name; `token_ids` are keys
    of config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    token_ids = {name: value for name, value in token_ids.items() if value is not None}
    dtype_name = str(dtype).removeprefix("torch.")
    values = {**config_to_hf(config), **token_ids, "dtype": dtype_name}
    if rewards:
        values["architectures"] = [FAMILIES[model_type(config)].reward_architecture]
        values |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    else:
        write_json(
            directory / "generation_config.json",
            {**token_ids, "do_sample": True, **(sampling or {})},
        )
    write_json(directory / "config.json", values)
    shapes = (reward_shapes if rewards else parameter_shapes)(config)
    stored = FAMILIES[model_type(config)].layout.stored(shapes)
    members = tensors(stored)

    def tensor(theirs: str) -> Tensor:
        parts = [_changed(parameter(name), stored[name], dtype) for name in members[theirs]]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(sizes[theirs])

    sizes = {theirs: stored_shape(stored, shapes, names) for theirs, names in members.items()}
    write_tensors(directory / WEIGHTS, sizes, dtype, tensor)


def load_model(
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """A `Transformer` from a Hugging Face directory, in evaluation mode.

    Raises `ModelError` for a missing or cut file, an unsupported family or feature, a missing,
    unexpected or misshapen tensor (each by name).
    """
    directory = Path(directory)
    if is_reward_model(directory):
        raise not_generating(directory)
    return _assembled(Transformer, ModelDirectory(directory), device, dtype)


def not_generating(directory: str | Path) -> ModelError:
    """The error for a reward model where a language model is expected."""
    return ModelError(
        f"{directory} is a reward model, which does not generate text",
        hint="name it as reward_model=, or in `khaosz eval preference`",
    )


def load_reward_model(
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> RewardModel:
    """A `RewardModel` from a directory of a one-label sequence classifier, in evaluation mode.

    Raises `ModelError` as `load_model` does, and for a directory that is not a reward model.
    """
    directory = Path(directory)
    source = ModelDirectory(directory)
    if not source.rewards:
        raise ModelError(
            f"{directory} is not a reward model",
            hint="train one with stage=rm, or name a one-label sequence classifier",
        )
    return _assembled(RewardModel, source, device, dtype)


def is_reward_model(directory: str | Path) -> bool:
    """Whether a model directory holds a sequence classifier rather than a language model."""
    try:
        values = read_json(Path(directory) / "config.json")
        rewards = {family.reward_architecture for family in FAMILIES.values()}
        return any(name in rewards for name in values.get("architectures") or [])
    except (ModelError, TypeError):
        return False


class ModelDirectory:
    """The parameters of a model directory under our names, read one at a time.

    rewards    whether it is a reward model
    shapes     by name
    """

    def __init__(self, directory: str | Path) -> None:
        """Reads headers only. Raises `ModelError` for a missing or cut file, an unsupported family
        or feature, a missing, unexpected or misshapen tensor (each by name), and for a stored head
        that is not the embedding where the two are tied."""
        directory = Path(directory)
        self.config = load_config(directory)
        if self.config.num_hidden_layers > _MAX_LAYERS:  # before their names are listed
            count = self.config.num_hidden_layers
            raise ModelError(f"{directory}: {count} layers are not supported")
        self.rewards = is_reward_model(directory)
        self.shapes = (reward_shapes if self.rewards else parameter_shapes)(self.config)
        layout = read_family(directory).layout
        self._places, self._unread = layout.stored(self.shapes), layout.unread(self.config)
        self._images = read_json(directory / "config.json")["model_type"] in WITH_IMAGES
        self._files: dict[str, tuple[TensorFile, str]] = {}  # by their tensor's name
        members = tensors(self._places)
        head = self._locate(directory, members)
        for theirs, names in members.items():
            if theirs not in self._files:
                raise ModelError(f"{directory}: tensor '{theirs}' is missing")
            file, stored = self._files[theirs]
            shape = stored_shape(self._places, self.shapes, names)
            if (actual := file.entries[stored].shape) != shape:
                raise ModelError(f"{directory}: tensor '{theirs}' is {actual}, expected {shape}")
        if head is not None and not self.rewards and not self._is_embedding(*head):
            raise ModelError(
                f"{directory}: lm_head.weight is not the embedding, yet tie_word_embeddings is true"
            )
        check_rotary(self.config, str(directory))

    def _locate(self, directory: Path, expected: Container[str]) -> tuple[TensorFile, str] | None:
        """Fill `_files`; the head of tied embeddings, if there is one."""
        head, left_out = None, read_family(directory).left_out
        for path in weight_files(directory):
            file = TensorFile(path)
            for stored, entry in file.entries.items():
                # A body saved without its head (Qwen3-Embedding) omits "model.".
                name = f"model.{stored}" if f"model.{stored}" in expected else stored
                if self._images:
                    if stored.removeprefix("model.").startswith(_IMAGES + _SOUNDS):
                        continue
                    name = next(
                        (n + stored[len(p) :] for p, n in _TEXT if stored.startswith(p)), name
                    )
                is_head = name == "lm_head.weight" and name not in self.shapes
                if (name in expected or is_head) and entry.type not in DTYPES:
                    raise ModelError(f"{path}: tensor '{name}' is {quoted(entry.type_name)[1:-1]}")
                if name in expected:
                    self._files[name] = file, stored
                elif is_head:
                    head = file, stored
                elif not (
                    name in self._unread or name.endswith(_DERIVED) or name.startswith(left_out)
                ):
                    raise ModelError(f"{path}: unexpected tensor {quoted(name)}")
        return head

    def _is_embedding(self, file: TensorFile, stored: str) -> bool:
        other, name = self._files[self._places["embed_tokens.weight"].name]
        if file.entries[stored].shape != other.entries[name].shape:
            return False
        pairs = zip(file.chunks(stored), other.chunks(name), strict=True)
        return all(torch.equal(one.float(), two.float()) for one, two in pairs)

    def dtype(self, name: str) -> torch.dtype:
        """The type that a parameter is stored in; fp32 for one that is stored as another number."""
        place = self._places[name]
        file, stored = self._files[place.name]
        return torch.float32 if place.change else DTYPES[file.entries[stored].type]

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """A parameter, by default in `dtype(name)`."""
        out = torch.empty(self.shapes[name], dtype=dtype or self.dtype(name), device=device)
        self.fill(name, out)
        return out

    def fill(self, name: str, out: Tensor) -> None:
        """Read a parameter into `out`, contiguous and of its shape."""
        place = self._places[name]
        file, stored = self._files[place.name]
        first = place.first * (out.numel() // max(1, place.count))  # elements before its rows
        if place.change is None:
            file.fill(stored, out, first)
            return
        wide = torch.empty(out.shape)
        file.fill(stored, wide, first)
        out.copy_(place.change.read(wide))


def _changed(parameter: Tensor, place: Stored, dtype: torch.dtype) -> Tensor:
    """A parameter as it is stored."""
    parameter = parameter.detach().to("cpu")
    if place.change is not None:
        parameter = place.change.write(parameter.float())
    return parameter.to(dtype)


def _assembled(
    kind: type[M], source: ModelDirectory, device: str | torch.device, dtype: torch.dtype
) -> M:
    with torch.device("meta"):
        model = kind(source.config)
    loaded = {name: source.read(name, dtype, device) for name in source.shapes}
    model.load_state_dict(loaded, assign=True)
    model.rotary = Rotary(source.config).to(device)  # derived, so not in the file
    model.requires_grad_(True)
    return model.eval()


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: one, or those of its index when it is sharded.

    The single file wins over an index, as it does for transformers.
    """
    index = directory / WEIGHTS_INDEX
    names = [WEIGHTS]
    if index.exists() and not (directory / WEIGHTS).exists():
        try:
            shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(shard_of.values()))
            leaving = [name for name in names if name == ".." or Path(name).name != name]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{index}: not an index of shards: {quoted(error)}") from None
        if leaving:
            raise ModelError(f"{index}: shard name {quoted(leaving[0])} leaves the directory")
    paths = [directory / name for name in names]
    for path in paths:
        if not path.exists():
            raise ModelError(f"{directory}: no {path.name}")
    return paths
