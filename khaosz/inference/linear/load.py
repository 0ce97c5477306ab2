"""The weights a `Runner` computes with, whatever they are stored as.

Shapes: M rows, D hidden width, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from khaosz.config import ModelConfig
from khaosz.inference.linear.native import LEAST_ROWS, MappedMatrix
from khaosz.inference.linear.packed import PackedMatrix, pack, packable
from khaosz.interop.gguf.blocks import affine, dequantize, is_affine
from khaosz.interop.gguf.model import GgufModel
from khaosz.interop.models import ModelSource
from khaosz.model import Transformer
from khaosz.model.module import Block
from khaosz.model.part import Linear, Part, RMSNorm
from khaosz.model.per_layer import PerLayerInputs

_TOUCHED = 512  # rows read from a map before its pages are released, 32 MB at most
_REFINED = 32  # tokens of each position whose logits are exact


class Matrix(Protocol):
    """(M, in) -> (M, out), in the dtype of what comes in."""

    def __call__(self, x: Tensor, /) -> Tensor: ...

    @property
    def nbytes(self) -> int: ...


@dataclass
class Weights:
    """The network's blocks and final norm, and what an engine puts in the place of its other
    parts: `linear` multiplies for the blocks, `embed` gives fp32 rows (M, D) of token ids. The
    residual stream stays in fp32, and `head` takes it so. `inputs` and the rows of its embedding
    (M, L * P) are there in models that have them."""

    blocks: Sequence[Block] | nn.ModuleList
    norm: RMSNorm
    linear: Linear
    embed: Callable[[Sequence[int]], Tensor]
    head: Matrix
    inputs: PerLayerInputs | None = None
    embed_per_layer: Callable[[Sequence[int]], Tensor] | None = None


def live_weights(model: Transformer, dtype: torch.dtype) -> Weights:
    """A module's own blocks and parameters as they are now; cast to `dtype` where they are used."""

    def linear(
        part: Part, names: tuple[str, ...], x: Tensor, rows: Tensor | None = None
    ) -> list[Tensor]:
        layers, x = [part.linear_layer(name) for name in names], x.to(dtype)
        biases = [None if layer.bias is None else layer.bias.to(dtype) for layer in layers]
        return [F.linear(x, y.weight.to(dtype), b) for y, b in zip(layers, biases, strict=True)]

    table, head = model.embed_tokens.weight, DenseMatrix(model.output_weight.to(dtype))
    second = model.embed_per_layer
    rows = None if second is None else partial(_rows, second.weight)
    inputs = model.per_layer_inputs
    return Weights(model.layers, model.norm, linear, partial(_rows, table), head, inputs, rows)


def dense_weights(
    source: ModelSource, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Weights:
    """Dense matrices in `dtype` of a model that will not change, those with one input side by side.
    They are read straight into their places, so nothing is in memory twice."""

    def matrix(*names: str) -> Matrix:
        return dense(source, names, dtype, device)

    def vector(name: str) -> Tensor:
        return source.read(name, torch.float32, device)

    blocks, inputs, products = _frozen(source.config, matrix, vector, dtype)
    embedding, tied = "embed_tokens.weight", source.config.tie_word_embeddings
    head = dense(source, (embedding if tied else "lm_head.weight",), dtype, device)
    stored = source.dtype(embedding)
    # The rows are as exact as they are stored, and the head's own where those are.
    exact = tied and torch.promote_types(dtype, stored) == dtype
    table = head.weight if exact else source.read(embedding, stored, device)
    rows = None
    if inputs is not None:
        name = "embed_per_layer.weight"
        rows = partial(_rows, source.read(name, source.dtype(name), device))
    norm = _norm(source, device)
    return Weights(blocks, norm, products, partial(_rows, table), head, inputs, rows)


def gguf_weights(
    model: GgufModel,
    dtype: torch.dtype,
    unquantised: torch.dtype,
    library: ctypes.CDLL | None = None,
) -> Weights:
    """Matrices of a GGUF file for activations of `dtype`. With a library they stay in the memory
    map; without, they are packed where PyTorch's kernel takes them, else dense. F32, F16 and BF16
    are dense, in the dtype `unquantised`.

    Embeddings are read row by row from the memory map: a token needs one row.
    """

    def matrix(*names: str) -> Matrix:
        kinds = {model.kind(name) for name in names}
        if len(kinds) > 1:
            return SideBySide([matrix(name) for name in names])
        kind, raws = kinds.pop(), [model.raw(name) for name in names]
        order = model.columns(names[0])

        def in_our_order(stored: Matrix) -> Matrix:
            return stored if order is None else OtherOrder(stored, order)

        if library is not None and is_affine(kind) and min(map(len, raws)) >= LEAST_ROWS:
            return in_our_order(MappedMatrix(library, raws, kind))
        model.file.release()  # what is packed is not needed from the map again
        if dtype == torch.bfloat16 and is_affine(kind):
            sample = affine(raws[0][:1], kind)
            columns = sample.codes.shape[1]
            if all(packable(len(raw), columns, sample.group, sample.bits) for raw in raws):
                return in_our_order(pack(raws, kind))
        whole = torch.float32 if library is not None else dtype
        return dense(model, names, whole if is_affine(kind) else unquantised)

    def vector(name: str) -> Tensor:
        return model.read(name, torch.float32)

    blocks, inputs, products = _frozen(model.config, matrix, vector, dtype)
    tied = model.config.tie_word_embeddings
    name = "embed_tokens.weight" if tied else "lm_head.weight"
    head = matrix(name)
    if isinstance(head, PackedMatrix) or (
        isinstance(head, DenseMatrix) and head.weight.dtype == torch.bfloat16
    ):
        head = RefinedHead(head, MappedRows(model, name))
    model.file.release()
    rows = MappedRows(model, "embed_tokens.weight")
    second = None if inputs is None else MappedRows(model, "embed_per_layer.weight")
    return Weights(blocks, _norm(model, "cpu"), products, rows, head, inputs, second)


def _norm(source: ModelSource, device: str | torch.device) -> RMSNorm:
    norm = RMSNorm(source.config.hidden_size, source.config.rms_norm_eps)
    weight = source.read("norm.weight", torch.float32, device)
    norm.weight = nn.Parameter(weight, requires_grad=False)
    return norm


def _frozen(
    config: ModelConfig,
    matrix: Callable[..., Matrix],
    vector: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> tuple[list[Block], PerLayerInputs | None, Products]:
    """The blocks of a network that will not change, and its inputs of each layer; their vectors by
    name, and the products that take the place of their linear layers, which stay on the meta
    device."""
    with torch.device("meta"):
        blocks = [Block(config, index) for index in range(config.num_hidden_layers)]
        inputs = PerLayerInputs(config) if config.hidden_size_per_layer_input else None
    places: list[tuple[str, nn.Module]] = [(f"layers.{i}", block) for i, block in enumerate(blocks)]
    if inputs is not None:
        places.append(("per_layer_inputs", inputs))

    def products(place: tuple[str, nn.Module]) -> dict[tuple[str, ...], Product]:
        prefix, root = place
        made: dict[tuple[str, ...], Product] = {}
        linear: set[nn.Module] = set()
        for path, part in root.named_modules(prefix=prefix):
            if isinstance(part, Part):
                for names in part.products():
                    layers = {f"{path}.{name}": part.linear_layer(name) for name in names}
                    linear.update(layers.values())
                    biases = [vector(f"{n}.bias") for n, y in layers.items() if y.bias is not None]
                    made[names] = Product(
                        matrix(*(f"{name}.weight" for name in layers)),
                        [layer.out_features for layer in layers.values()],
                        torch.cat(biases).to(dtype) if biases else None,
                    )
        for path, module in root.named_modules(prefix=prefix):
            for name, _ in [] if module in linear else module.named_parameters(recurse=False):
                value = nn.Parameter(vector(f"{path}.{name}"), requires_grad=False)
                module.register_parameter(name, value)
        return made

    # Repacking waits for the disk and for memory in turn, so two at a time are sooner done.
    with ThreadPoolExecutor(2) as pool:
        return blocks, inputs, Products(list(pool.map(products, places)), dtype)


def _rows(table: Tensor, ids: Sequence[int]) -> Tensor:
    return table[torch.tensor(ids, device=table.device)].float()


@dataclass
class Product:
    """Linear layers with one input as one matrix; `sizes` are the outputs of each."""

    matrix: Matrix
    sizes: list[int]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        y = self.matrix(x)
        if self.bias is not None:
            y = y + self.bias
        return y.split_with_sizes(self.sizes, -1) if len(self.sizes) > 1 else (y,)


class Products:
    """`Linear` of frozen blocks: by layer, the product of each group of linear layers."""

    def __init__(
        self, layers: Sequence[dict[tuple[str, ...], Product]], dtype: torch.dtype
    ) -> None:
        self.layers, self.dtype = layers, dtype

    def __call__(
        self, part: Part, names: tuple[str, ...], x: Tensor, rows: Tensor | None = None
    ) -> Sequence[Tensor]:
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        return self.layers[part.layer][names](x)

    @property
    def nbytes(self) -> int:
        return sum(product.matrix.nbytes for layer in self.layers for product in layer.values())


class SideBySide:
    """Matrices of different types, outputs side by side."""

    def __init__(self, parts: list[Matrix]) -> None:
        self.parts = parts

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class OtherOrder:
    """A matrix whose columns are stored in another order, which its inputs take."""

    def __init__(self, matrix: Matrix, columns: np.ndarray) -> None:
        self.matrix, self.inputs = matrix, torch.from_numpy(np.argsort(columns))

    def __call__(self, x: Tensor) -> Tensor:
        return self.matrix(x[..., self.inputs])

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes


class MappedRows:
    """Rows of a matrix in a GGUF file, fp32, read from the map on demand."""

    def __init__(self, model: GgufModel, name: str) -> None:
        self._file, self._rows, self._kind = model.file, model.raw(name), model.kind(name)
        self._touched = 0

    def __call__(self, ids: Sequence[int] | np.ndarray) -> Tensor:
        rows = torch.from_numpy(dequantize(self._rows[ids], self._kind))
        # A row loads up to 64 KB around it: without this, the whole table would stay in memory.
        self._touched += len(ids)
        if self._touched > _TOUCHED:
            self._file.release()
            self._touched = 0
        return rows


class RefinedHead:
    """A head whose likeliest tokens are computed again in fp32, from the file's rows.

    Its products are rounded to bf16: at a logit of 20 in steps of 1/8, which is coarser than
    the distance between the best tokens. That alone changed one greedy token in ninety.
    """

    def __init__(self, coarse: Matrix, rows: MappedRows) -> None:
        self._coarse, self._rows = coarse, rows

    def __call__(self, x: Tensor) -> Tensor:
        logits = self._coarse(x.to(torch.bfloat16)).float()  # (M, V)
        likely = logits.topk(min(_REFINED, logits.shape[1])).indices  # (M, R)
        for row, ids in enumerate(likely):
            logits[row, ids] = self._rows(ids.numpy()) @ x[row]
        return logits

    @property
    def nbytes(self) -> int:
        return self._coarse.nbytes


class DenseMatrix:
    """Rows of several matrices in one product."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return F.linear(x, self.weight)
        return F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


def dense(
    source: ModelSource,
    names: Sequence[str],
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
) -> DenseMatrix:
    """Matrices of one width, one below the other."""
    rows = [source.shapes[name][0] for name in names]
    weight = torch.empty(sum(rows), source.shapes[names[0]][1], dtype=dtype, device=device)
    for name, part in zip(names, weight.split(rows), strict=True):
        source.fill(name, part)
    return DenseMatrix(weight)
