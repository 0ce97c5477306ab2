"""Models in GGUF files <-> our names, row order and configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch

from khaosz.config import ModelConfig
from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import ModelError, quoted
from khaosz.interop.families.family import Change, Stored, stored_shape, tensors
from khaosz.interop.gguf.architectures import ARCHITECTURES
from khaosz.interop.gguf.architectures.architecture import RERANK_HEAD, Keys, Order
from khaosz.interop.gguf.blocks import dequantize, quantize, read_array
from khaosz.interop.gguf.config import (
    FILE_TYPES,
    ROPE_FACTORS,
    architecture_of,
    config_from_metadata,
    config_to_metadata,
    llama3_factors,
    with_llama3,
)
from khaosz.interop.gguf.file import TENSOR_TYPES, GgufFile, TensorToWrite, write_gguf
from khaosz.interop.gguf.mixed import MIXED, SEARCHED, mixed_kinds, quantize_mixed
from khaosz.interop.gguf.sampling import sampling_to_metadata
from khaosz.interop.gguf.tokenizer import tokenizer_from_metadata, tokenizer_to_metadata
from khaosz.interop.huggingface_config import check_rotary
from khaosz.model import Transformer, is_router, parameter_shapes
from khaosz.model.rotary import Rotary

# Weights converted at a time: looking for scales takes about ten fp32 copies of them.
_CHUNK = 1 << 18
_LARGEST_HALF, _LARGEST_SINGLE = 65_504.0, 3.3e38  # what rounds to a finite number


class GgufModel:
    """One model in a GGUF file, tensors under our names and in our row order."""

    def __init__(self, file: GgufFile) -> None:
        """Raises `ModelError` for an architecture or feature that is not supported, and for tensors
        that are missing, unexpected or misshapen, by name."""
        self.file = file
        self.config = config_from_metadata(file)
        self.architecture = ARCHITECTURES[file.metadata["general.architecture"]]
        self.shapes = shapes = parameter_shapes(self.config)
        self.places = self.architecture.layout.stored(shapes)
        members = tensors(self.places)
        for stored, names in members.items():
            tensor = file.tensors.get(stored)
            if tensor is None:
                raise ModelError(f"{file.source}: tensor '{stored}' is missing")
            shape = _stored_shape(self.places, shapes, names)
            if tensor.shape != shape:
                raise ModelError(f"{file.source}: tensor '{stored}' is {tensor.shape}, not {shape}")
        known = {ROPE_FACTORS, *self.architecture.own}
        known |= self.architecture.layout.unread(self.config)
        unexpected = file.tensors.keys() - members.keys() - known
        left_out = self.architecture.left_out(Keys(file, file.metadata["general.architecture"]))
        unexpected = {name for name in unexpected if not name.startswith(left_out)}
        if unexpected:
            raise ModelError(f"{file.source}: unexpected tensor {quoted(min(unexpected))}")
        # Only now are the sizes checked against tensors, and their cost bounded.
        if ROPE_FACTORS in file.tensors and ROPE_FACTORS not in self.architecture.own:
            self.config = with_llama3(self.config, file)
        check_rotary(self.config, file.source)

    @classmethod
    def open(cls, path: str | Path) -> GgufModel:
        return cls(GgufFile.open(path))

    def tokenizer(self) -> Tokenizer:
        tokenizer = tokenizer_from_metadata(self.file.metadata, self.file.source)
        if tokenizer.vocab_size > self.config.vocab_size:
            raise ModelError(
                f"{self.file.source}: {tokenizer.vocab_size} tokens, but only"
                f" {self.config.vocab_size} rows of embedding"
            )
        return tokenizer

    @property
    def rerank_head(self) -> torch.Tensor | None:
        """Of a reranker, fp32 (2, D): the output rows of yes and no. It may have no others."""
        if RERANK_HEAD not in self.file.tensors:
            return None
        rows = read_array(self.file, RERANK_HEAD, (2, self.config.hidden_size))
        return torch.from_numpy(rows)

    def kind(self, name: str) -> str:
        """The tensor type that one of our parameters is stored as."""
        return self.file.tensors[self.places[name].name].type

    @property
    def matrix_kinds(self) -> set[str]:
        """The tensor types of all matrices that are multiplied as they are stored; others are F32
        in any file."""
        matrices = (name for name, shape in self.shapes.items() if len(shape) == 2)
        return {self.kind(name) for name in matrices if not is_router(name)}

    def is_reordered(self, name: str) -> bool:
        """Whether `raw` of a parameter is a copy."""
        return self.architecture.reordered(name, self.config)[0] is not None

    def columns(self, name: str) -> np.ndarray | None:
        """Of each of our columns of a parameter the number of that of `raw`, where they differ. Not
        reordered there: a block of a quantised row has several."""
        rows, columns = self.architecture.reordered(name, self.config)
        return rows if len(self.shapes[name]) == 1 else columns

    def nbytes(self, name: str) -> int:
        """Bytes of a parameter in the file."""
        place = self.places[name]
        tensor = self.file.tensors[place.name]
        rows = tensor.shape[0] if len(tensor.shape) == 1 else prod(tensor.shape[:-1])
        return tensor.nbytes // rows * place.count

    def raw(self, name: str) -> np.ndarray:
        """uint8 (rows, bytes of a row): a view of the file, except for rows that are stored in
        another order (of queries and keys in pairs), which are copied into ours; no row is
        requantised."""
        place = self.places[name]
        raw, rows = self.file.raw(place.name), self.architecture.reordered(name, self.config)[0]
        if len(self.shapes[name]) == 1:  # a vector is one row
            return raw
        raw = raw[place.first : place.first + place.count]
        return raw if rows is None else raw[rows]

    def float32(self, name: str) -> np.ndarray:
        """The dequantised parameter, in memory of its own."""
        return self.read(name, torch.float32).numpy()

    def dtype(self, name: str) -> torch.dtype:
        """The smallest type that holds a parameter: fp32 for what is quantised."""
        return {"F16": torch.float16, "BF16": torch.bfloat16}.get(self.kind(name), torch.float32)

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> torch.Tensor:
        """A dequantised parameter, by default in `dtype(name)`; read pages are released."""
        out = torch.empty(self.shapes[name], dtype=dtype or self.dtype(name), device=device)
        self.fill(name, out)
        self.file.release()
        return out

    def fill(self, name: str, out: torch.Tensor) -> None:
        """Dequantise a parameter into `out`, contiguous and of its shape, some rows at a time."""
        raw, kind = self.raw(name), self.kind(name)
        rows, columns, change = out.view(len(raw), -1), self.columns(name), self.places[name].change
        step = max(1, _CHUNK // rows.shape[1])
        for start in range(0, len(raw), step):
            part = dequantize(raw[start : start + step], kind)
            part = part if columns is None else part[:, columns]
            # Of an F32 file this is the map itself: read-only, which torch does not take.
            numbers = torch.from_numpy(np.require(part, requirements="W"))
            rows[start : start + step] = numbers if change is None else change.read(numbers)


def load_gguf(path: str | Path | GgufModel, *, dtype: torch.dtype = torch.float32) -> Transformer:
    """The dequantised model, in evaluation mode: slower than a `Runner`, and its reference."""
    source = path if isinstance(path, GgufModel) else GgufModel.open(path)
    with torch.device("meta"):
        model = Transformer(source.config)
    loaded = {name: source.read(name, dtype) for name in source.shapes}
    model.load_state_dict(loaded, assign=True)
    model.rotary = Rotary(source.config)
    return model.requires_grad_(True).eval()


def save_gguf(
    model: Transformer, tokenizer: Tokenizer, path: Path, kind: str = "F16", *, search: bool = False
) -> None:
    """Write a model for llama.cpp and for us; `kind` and `search` as for `write_model`."""
    parameters = dict(model.named_parameters())
    write_model(model.config, parameters.__getitem__, tokenizer, path, kind, search)


def write_model(
    config: ModelConfig,
    parameter: Callable[[str], torch.Tensor],
    tokenizer: Tokenizer,
    path: Path,
    kind: str,
    search: bool = False,
    importance: Mapping[str, np.ndarray] | None = None,
    progress: Callable[[int, int], None] | None = None,
    sampling: Mapping[str, float] | None = None,
) -> None:
    """Write a .gguf; its parameters are requested one at a time, by name. `kind`: F32, F16, BF16,
    Q8_0, Q4_0, Q4_1, or the mixtures of types Q4_K_M and Q6_K; `search` looks for better scales
    than ggml's reference rounding, as mixtures always do. `importance`: what errors of each column
    of a matrix cost, float32 (C,) by name, for the K types and Q5_0. `progress` is called with the
    number of tensors that are written, and of all. `sampling`: what the model recommends.

    Vectors stay F32. With 4 bits the embedding and the head are Q8_0: they are few, and quality
    depends on them most; mixtures are llama.cpp's. Raises `ModelError` for rows that are not whole
    blocks of 32.
    """
    kind = kind.upper() if kind.upper() in FILE_TYPES else kind
    if kind not in FILE_TYPES:
        raise ModelError(f"cannot write tensors of type '{kind}'", hint=", ".join(FILE_TYPES))
    shapes, architecture = parameter_shapes(config), ARCHITECTURES[architecture_of(config)]
    entries: list[TensorToWrite] = []
    places = architecture.layout.stored(shapes)
    members = tensors(places)
    mixed = {}
    if kind in MIXED:
        mixed = mixed_kinds(
            kind, {t: _stored_shape(places, shapes, names) for t, names in members.items()}
        )
    for tensor, names in members.items():
        name, stored = names[0], kind
        shape = _stored_shape(places, shapes, names)
        if len(shapes[name]) != 2 or is_router(name):
            stored = "F32"
        elif mixed:
            stored = mixed[tensor]
        elif kind.startswith("Q4") and name.startswith(("embed_tokens", "lm_head")):
            stored = "Q8_0"
        if shape[-1] % TENSOR_TYPES[stored][1]:
            raise ModelError(
                f"{stored} takes blocks of 32, '{name}' has rows of {shape[-1]}", hint="use F16"
            )
        parts = [
            partial(
                _rows,
                parameter,
                each,
                stored,
                architecture.reordered(each, config),
                places[each].change,
                search,
                (importance or {}).get(each),
            )
            for each in names
        ]
        rows = partial(_joined, parts, partial(progress or _silent, len(entries), len(members)))
        entries.append(TensorToWrite(tensor, stored, shape, rows))
    more = architecture.tensors(config)
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        more[ROPE_FACTORS] = llama3_factors(config)
    for tensor, values in more.items():
        entries.append(TensorToWrite(tensor, "F32", values.shape, partial(_bytes, values)))
    metadata = {
        **config_to_metadata(config, kind),
        **tokenizer_to_metadata(tokenizer, config.vocab_size),
        **sampling_to_metadata(sampling or {}),
    }
    write_gguf(path, metadata, entries)


def _bytes(values: np.ndarray) -> list[np.ndarray]:
    return [values.view(np.uint8)]


def _silent(done: int, all: int) -> None:
    pass


def _joined(
    parts: Sequence[Callable[[], Iterator[np.ndarray]]], begin: Callable[[], None]
) -> Iterator[np.ndarray]:
    begin()
    for part in parts:
        yield from part()


def _rows(
    parameter: Callable[[str], torch.Tensor],
    name: str,
    kind: str,
    order: Order,
    change: Change | None,
    search: bool,
    importance: np.ndarray | None,
) -> Iterator[np.ndarray]:
    weights = parameter(name).detach().cpu()
    if change is not None:
        weights = change.write(weights.float())
    for axis, numbers in enumerate(order):
        if numbers is not None:  # of ours among the stored ones, so that this is the other way
            weights = weights.index_select(axis, torch.from_numpy(np.argsort(numbers)))
            if axis == 1 and importance is not None:
                importance = importance[np.argsort(numbers)]
    weights = weights[None] if weights.dim() == 1 else weights.flatten(1)
    step = max(1, _CHUNK // weights.shape[1])

    def converted(start: int) -> np.ndarray:
        part = weights[start : start + step].float()
        largest = float(part.abs().max())
        # Scales are fp16 as well. `not <=` is true of NaN, too.
        if not largest <= (_LARGEST_HALF if kind not in ("F32", "BF16") else _LARGEST_SINGLE):
            raise ModelError(f"'{name}' has a weight of {largest:g}, which {kind} cannot hold")
        if kind in SEARCHED:
            return quantize_mixed(part.numpy(), kind, importance)
        return quantize(part.numpy(), kind, search=search)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # numpy lets others run
        yield from pool.map(converted, range(0, len(weights), step))


def _stored_shape(
    places: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]
) -> tuple[int, ...]:
    """Of parameters in one tensor; that of a convolution has no axis of one."""
    shape = stored_shape(places, shapes, names)
    return shape if len(shapes[names[0]]) < 3 else (shape[0], *shape[2:])
