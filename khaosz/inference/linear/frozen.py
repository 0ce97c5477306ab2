"""A model whose matrices stay as they are in its files, to train adapters on."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor, nn

from khaosz.inference.linear.native import LEAST_ROWS, dequantise, library
from khaosz.interop.gguf.blocks import dequantize, is_affine
from khaosz.interop.gguf.model import GgufModel
from khaosz.interop.models import ModelSource
from khaosz.model import Transformer
from khaosz.model.frozen import FrozenEmbedding, FrozenLinear, StoredMatrix
from khaosz.model.rotary import Rotary

_CHUNK = 1 << 18  # weights that numpy dequantises at a time


class Buffer:
    """Memory for one dequantised matrix at a time, instead of new pages for each product."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        size = rows * columns * dtype.itemsize
        if size > len(self._memory):
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size].view(dtype).view(rows, columns)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32


class GgufMatrix:
    """A matrix of a GGUF file, dequantised from the memory map on demand: `StoredMatrix`."""

    def __init__(
        self, model: GgufModel, name: str, native: ctypes.CDLL | None, buffer: Buffer
    ) -> None:
        rows, columns = model.shapes[name]
        self.shape, self._buffer = (rows, columns), buffer
        self._raw, self._kind, self._native = model.raw(name), model.kind(name), native
        order = model.columns(name)
        self._order = None if order is None else torch.from_numpy(order)
        assert model.places[name].change is None, name  # of vectors only

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        raw = self._raw[start:stop]
        return self._into(torch.empty(len(raw), self.shape[1], dtype=_exact(dtype)), raw).to(dtype)

    def for_product(self, dtype: torch.dtype) -> Tensor:
        return self._into(self._buffer.matrix(*self.shape, _exact(dtype)), self._raw).to(dtype)

    def _into(self, out: Tensor, raw: np.ndarray) -> Tensor:
        if self._native is not None and is_affine(self._kind) and len(raw) >= LEAST_ROWS:
            dequantise(self._native, raw, self._kind, out)
        else:
            step = max(1, _CHUNK // self.shape[1])
            for at in range(0, len(raw), step):
                out[at : at + step] = _numbers(raw[at : at + step], self._kind)
        return out if self._order is None else out[:, self._order]

    def rows(self, ids: Tensor) -> Tensor:
        out = _numbers(self._raw[ids.numpy()], self._kind)
        return out if self._order is None else out[:, self._order]


class TensorMatrix:
    """A matrix in the type of a model directory: `StoredMatrix`."""

    def __init__(self, weight: Tensor) -> None:
        rows, columns = weight.shape
        self.shape, self._weight = (rows, columns), weight

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return self._weight[start:stop].to(dtype)

    def for_product(self, dtype: torch.dtype) -> Tensor:
        return self._weight.to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        return self._weight[ids].float()


def _numbers(raw: np.ndarray, kind: str) -> Tensor:
    # Of an F32 file this is the map itself: read-only, which torch does not take.
    return torch.from_numpy(np.require(dequantize(raw, kind), requirements="W"))


def frozen_model(model: ModelSource) -> Transformer:
    """A `Transformer` on the CPU in evaluation mode, no parameter of which is trained: matrices of
    linear layers and embeddings stay as they are stored (those of a GGUF file in its memory map),
    the other parameters are fp32."""
    native, buffer = library(), Buffer()

    def matrix(name: str) -> StoredMatrix:
        if isinstance(model, GgufModel):
            return GgufMatrix(model, name, native, buffer)
        return TensorMatrix(model.read(name, model.dtype(name)))

    with torch.device("meta"):
        built = Transformer(model.config)
    for path, module in list(built.named_modules()):
        name = f"{path}.weight"
        if isinstance(module, nn.Embedding):
            built.set_submodule(path, FrozenEmbedding(matrix(name)))
        elif isinstance(module, nn.Linear):
            bias = None if module.bias is None else _read(model, f"{path}.bias")
            built.set_submodule(path, FrozenLinear(matrix(name), bias))
    for path, module in built.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                module.register_parameter(name, _read(model, f"{path}.{name}"))
    built.rotary = Rotary(model.config)
    return built.requires_grad_(False).eval()


def _read(model: ModelSource, name: str) -> nn.Parameter:
    return nn.Parameter(model.read(name, torch.float32), requires_grad=False)
