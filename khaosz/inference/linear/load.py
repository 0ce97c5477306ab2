"""The weights a `Runner` multiplies with, whatever they are stored as.

Shapes: M rows, D hidden width, Q query heads, K key/value heads, H head width, F feed-forward
width, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from khaosz.inference.linear.native import LEAST_ROWS, MappedMatrix
from khaosz.inference.linear.packed import PackedMatrix, pack, packable
from khaosz.interop import GgufModel
from khaosz.interop.gguf.blocks import affine, dequantize, is_affine
from khaosz.model import Transformer
from khaosz.model.module import Block

_TOUCHED = 512  # rows read from a map before its pages are given back, 32 MB at most
_REFINED = 32  # tokens of each position whose logits are exact


class Matrix(Protocol):
    """(M, in) -> (M, out), in the dtype of what comes in."""

    def __call__(self, x: Tensor, /) -> Tensor: ...

    @property
    def nbytes(self) -> int: ...


@dataclass
class LayerWeights:
    """One block. `qkv` gives queries, keys and values side by side: (M, (Q + 2K) * H);
    `gate_up` gate and up: (M, 2F)."""

    input_norm: Tensor  # (D,)
    qkv: Matrix
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # (H,)
    k_norm: Tensor | None
    o: Matrix
    post_norm: Tensor
    gate_up: Matrix
    down: Matrix


@dataclass
class Weights:
    """`embed` gives fp32 rows (M, D) of token ids; the residual stream stays in fp32, and `head`
    takes it so."""

    embed: Callable[[Sequence[int]], Tensor]
    layers: Callable[[], Iterable[LayerWeights]]
    norm: Tensor
    head: Matrix


def live_weights(model: Transformer, dtype: torch.dtype) -> Weights:
    """Views of a module's parameters as they are now; cast to `dtype` where they are used."""
    table = model.embed_tokens.weight

    def embed(ids: Sequence[int]) -> Tensor:
        return table[torch.tensor(ids, device=table.device)].float()

    def matrix(*parts: nn.Linear) -> Matrix:
        matrices: list[Matrix] = [DenseMatrix(part.weight.to(dtype)) for part in parts]
        return matrices[0] if len(matrices) == 1 else SideBySide(matrices)

    def layers() -> Iterable[LayerWeights]:
        return (_layer(block, matrix, dtype) for block in model.layers)

    return Weights(
        embed=embed,
        layers=layers,
        norm=model.norm.weight,
        head=DenseMatrix(model.output_weight.to(dtype)),
    )


def _layer(block: nn.Module, matrix: Callable[..., Matrix], dtype: torch.dtype) -> LayerWeights:
    assert isinstance(block, Block), type(block)
    attention, mlp = block.self_attn, block.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases: list[Tensor] = [part.bias for part in projections if part.bias is not None]
    return LayerWeights(
        input_norm=block.input_layernorm.weight,
        qkv=matrix(*projections),
        qkv_bias=torch.cat(biases).to(dtype) if biases else None,
        q_norm=None if attention.q_norm is None else attention.q_norm.weight,
        k_norm=None if attention.k_norm is None else attention.k_norm.weight,
        o=matrix(attention.o_proj),
        post_norm=block.post_attention_layernorm.weight,
        gate_up=matrix(mlp.gate_proj, mlp.up_proj),
        down=matrix(mlp.down_proj),
    )


def gguf_weights(
    model: GgufModel, dtype: torch.dtype, library: ctypes.CDLL | None = None
) -> Weights:
    """Matrices of a GGUF file for activations of `dtype`. With a library they stay in the memory
    map; without, they are packed where PyTorch's kernel takes them, else dense.

    The embedding is read row by row from the memory map: a token needs one row.
    """
    stored = dtype if library is None else torch.bfloat16  # what is not quantised

    def matrix(*names: str) -> Matrix:
        kinds = {model.kind(name) for name in names}
        if len(kinds) > 1:
            return SideBySide([matrix(name) for name in names])
        kind, raws = kinds.pop(), [model.raw(name) for name in names]
        if library is not None and is_affine(kind) and min(map(len, raws)) >= LEAST_ROWS:
            return MappedMatrix(library, raws, kind)
        if dtype == torch.bfloat16 and is_affine(kind):
            sample = affine(raws[0][:1], kind)
            columns = sample.codes.shape[1]
            if all(packable(len(raw), columns, sample.group, sample.bits) for raw in raws):
                return pack(raws, kind)
        # Of an F32 file these are the map itself, which torch takes only writable: a copy.
        rows = [np.require(model.float32(name), requirements="W") for name in names]
        return dense([torch.from_numpy(row) for row in rows], stored)

    def vector(name: str) -> Tensor:
        return torch.from_numpy(np.array(model.float32(name)))

    def optional(name: str) -> Tensor | None:
        return vector(name) if name in model.names else None

    def layer(index: int) -> LayerWeights:
        model.file.release()  # what is packed is not needed from the map again
        block = f"layers.{index}"
        attention = f"{block}.self_attn"
        projections = [f"{attention}.{part}_proj" for part in "qkv"]
        biases = [vector(f"{p}.bias") for p in projections if f"{p}.bias" in model.names]
        return LayerWeights(
            input_norm=vector(f"{block}.input_layernorm.weight"),
            qkv=matrix(*(f"{p}.weight" for p in projections)),
            qkv_bias=torch.cat(biases).to(dtype) if biases else None,
            q_norm=optional(f"{attention}.q_norm.weight"),
            k_norm=optional(f"{attention}.k_norm.weight"),
            o=matrix(f"{attention}.o_proj.weight"),
            post_norm=vector(f"{block}.post_attention_layernorm.weight"),
            gate_up=matrix(f"{block}.mlp.gate_proj.weight", f"{block}.mlp.up_proj.weight"),
            down=matrix(f"{block}.mlp.down_proj.weight"),
        )

    # Repacking waits for the disk and for memory in turn, so two at a time are sooner done.
    with ThreadPoolExecutor(2) as pool:
        layers = list(pool.map(layer, range(model.config.num_hidden_layers)))
    tied = model.config.tie_word_embeddings
    name = "embed_tokens.weight" if tied else "lm_head.weight"
    head = matrix(name)
    if isinstance(head, PackedMatrix):
        head = RefinedHead(head, MappedRows(model, name))
    model.file.release()
    return Weights(
        embed=MappedRows(model, "embed_tokens.weight"),
        layers=lambda: layers,
        norm=vector("norm.weight"),
        head=head,
    )


def fused_weights(model: Transformer, dtype: torch.dtype) -> Weights:
    """Dense matrices of a module that will not change, side by side and in `dtype`."""

    def matrix(*parts: nn.Linear) -> Matrix:
        return dense([part.weight.detach() for part in parts], dtype)

    layers = [_layer(block, matrix, dtype) for block in model.layers]
    table = model.embed_tokens.weight.detach()
    return Weights(
        embed=lambda ids: table[torch.tensor(ids, device=table.device)].float(),
        layers=lambda: layers,
        norm=model.norm.weight.detach(),
        head=dense([model.output_weight.detach()], dtype),
    )


class SideBySide:
    """Matrices of different types whose outputs belong together."""

    def __init__(self, parts: list[Matrix]) -> None:
        self.parts = parts

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class MappedRows:
    """Rows of a matrix in a GGUF file, fp32, read from the map when they are asked for."""

    def __init__(self, model: GgufModel, name: str) -> None:
        self._file, self._rows, self._kind = model.file, model.raw(name), model.kind(name)
        self._touched = 0

    def __call__(self, ids: Sequence[int] | np.ndarray) -> Tensor:
        rows = torch.from_numpy(dequantize(self._rows[ids], self._kind))
        # A row brings its neighbours in, up to 64 KB: left alone, the whole table would stay.
        self._touched += len(ids)
        if self._touched > _TOUCHED:
            self._file.release()
            self._touched = 0
        return rows


class RefinedHead:
    """A quantised head whose likeliest tokens are computed again in fp32, from the file's rows.

    The kernel rounds its output to bf16: at a logit of 20 in steps of 1/8, which is coarser than
    the distance between rivals. That alone turned one greedy token in ninety.
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
        return F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


def dense(parts: list[Tensor], dtype: torch.dtype) -> DenseMatrix:
    return DenseMatrix(torch.cat([part.to(dtype) for part in parts]))
