"""Quantised matrix products on PyTorch's own CPU kernels: one narrow interface, (M, K) -> (M, N).

The codes of GGUF's affine groups are kept as they are. The kernel computes with
weight = (code - 8) * scale + zero in groups of 32, codes of 4 bits; scales and zeros are rounded to
bf16, which moves a weight by at most 2**-8 of its scale or zero. Codes of 5 to 8 bits are two
columns of 4: the high half against 16 * scale and the low half against scale, over the input twice.

Shapes: M rows of input, N outputs, K inputs, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from khaosz.interop.gguf.blocks import affine
from khaosz.interop.gguf.file import TENSOR_TYPES

GROUP = 32
_LANES = 64  # rows that the AVX-512 layout interleaves
# From these rows and columns on a prompt goes through int8 products.
_WIDE, _DEEP = 128, 1024
_STRIPE = 512  # outputs at a time: 4 MB of fp32 at a width of 2,048, which the caches hold
_ROWS = 256  # rows repacked at a time: bounds what loading needs beside the result


class PackedMatrix:
    """Codes of 4 bits, interleaved for the kernel. `halves` is 2 when codes were split."""

    def __init__(self, packed: Tensor, scales_and_zeros: Tensor, halves: int) -> None:
        self.packed = packed  # uint8 (N, halves * K / 2)
        self.scales_and_zeros = scales_and_zeros  # bf16 (halves * K / 32, N, 2)
        self.halves = halves

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) >= _WIDE and x.shape[1] >= _DEEP and self.halves == 1 and _layout_is_known():
            return self._wide(x)
        if self.halves == 2:
            x = torch.cat((x, x), dim=-1)
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.packed, GROUP, self.scales_and_zeros
        )
        return out

    def _wide(self, x: Tensor) -> Tensor:
        """Many rows at once, a prompt: int8 products at several times the speed of the 4-bit
        kernel, whose work per row does not fall.

        Weights become int8 with one scale a row of N, a few hundred rows at a time: that adds a
        sixteenth of a 4-bit step. Inputs are the sum of two int8 terms, so 15 bits of the largest
        of a row are kept. Relative error of the product: 2**-7 (Frobenius).
        """
        rows, columns = len(x), x.shape[1]
        outputs = len(self.packed)
        wide = x.float()
        first_scale = (wide.abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
        first = (wide / first_scale).round_()
        second_scale = first_scale / 254
        second = ((wide - first * first_scale) / second_scale).round_()
        terms = torch.cat((first, second)).to(torch.int8)  # (2M, K)
        out = torch.empty(rows, outputs, dtype=torch.bfloat16)
        for start in range(0, outputs, _STRIPE):
            stop = min(start + _STRIPE, outputs)
            weights, scale = self._stripe(start, stop, columns)
            sums = torch._int_mm(terms, weights).float()  # (2M, N of the stripe)
            out[:, start:stop] = (sums[:rows] * first_scale + sums[rows:] * second_scale) * scale
        return out

    def _stripe(self, start: int, stop: int, columns: int) -> tuple[Tensor, Tensor]:
        """Rows of the weights as int8 (K, N) and their scales (N,)."""
        lanes, groups = (stop - start) // _LANES, columns // GROUP
        packed = self.packed[start:stop].view(lanes, groups, GROUP, _LANES // 2)
        step = self.scales_and_zeros[:, start:stop, 0].float()  # (G, N)
        zero = self.scales_and_zeros[:, start:stop, 1].float() - 8 * step
        # The largest weight that any code could mean: needs no pass over the weights.
        largest = torch.maximum(zero.abs(), (zero + 15 * step).abs()).amax(0)  # (N,)
        scale = (largest / 127).clamp_min(1e-30)

        def by_lane(values: Tensor) -> Tensor:
            return (values / scale).view(groups, lanes, _LANES).transpose(0, 1)[:, :, None]

        codes = torch.cat((packed & 15, packed >> 4), dim=-1).float()  # (lanes, G, 32, 64)
        weights = torch.addcmul(by_lane(zero), codes, by_lane(step)).round_().to(torch.int8)
        flat = weights.reshape(lanes, columns, _LANES).transpose(0, 1)
        return flat.reshape(columns, stop - start), scale

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales_and_zeros.nbytes


def packable(rows: int, columns: int, group: int, bits: int) -> bool:
    """Whether the kernel takes such a matrix: whole lanes, groups of 32, at most 8 bits."""
    return rows % _LANES == 0 and columns % GROUP == 0 and group == GROUP and 4 <= bits <= 8


def pack(raws: Sequence[np.ndarray], kind: str) -> PackedMatrix:
    """Packs GGUF tensors of one type `kind`, uint8 (rows, bytes of a row) each, stacked; each has
    whole lanes of rows."""
    sample = affine(raws[0][:1], kind)
    rows, columns = sum(map(len, raws)), sample.codes.shape[1]
    halves = 1 if sample.bits == 4 else 2
    packed = torch.empty(rows, halves * columns // 2, dtype=torch.uint8)
    both = torch.empty(halves * columns // GROUP, rows, 2, dtype=torch.bfloat16)
    first = 0
    for piece in (raw[at : at + _ROWS] for raw in raws for at in range(0, len(raw), _ROWS)):
        part = slice(first, first + len(piece))
        first += len(piece)
        if kind in ("Q4_0", "Q4_1", "Q8_0") and _layout_is_known():
            codes, scale, zero = _quick(torch.from_numpy(piece.copy()), kind)
            packed[part] = codes
        else:
            groups = affine(piece, kind)
            scale, zero = torch.from_numpy(groups.scales), torch.from_numpy(groups.offsets)
            codes = torch.from_numpy(groups.codes)
            if halves == 1:
                zero = zero + 8 * scale
            else:
                # code - base = 16 * (high - 8) + low, with a base that keeps `high` in range.
                base = 128 if groups.bits == 8 else 0
                high = (codes >> 4) + (0 if groups.bits == 8 else 8)
                codes = torch.cat((high, codes & 15), dim=1)
                zero = zero + (base + 8) * scale
            packed[part] = _interleave(codes)
        if halves == 2:
            scale = torch.cat((16 * scale, scale), dim=1)
            zero = torch.cat((torch.zeros_like(zero), zero), dim=1)
        both[:, part, 0], both[:, part, 1] = scale.t(), zero.t()
    return PackedMatrix(packed, both, halves)


def _quick(raw: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Raw rows of the three plain types straight into the kernel's layout, byte by byte: a lane of
    32 rows gives low nibbles, the next 32 rows the high ones. Loading a large model is this."""
    size = TENSOR_TYPES[kind][2]
    rows = len(raw)
    blocks = raw.view(rows, -1, size)
    heads = blocks[:, :, : 4 if kind == "Q4_1" else 2].contiguous().view(torch.float16).float()
    scale = heads[:, :, 0]
    data = blocks[:, :, -16 if kind != "Q8_0" else -32 :]
    lanes = data.reshape(rows // _LANES, 2, _LANES // 2, -1, data.shape[-1])
    first, second = lanes[:, 0], lanes[:, 1]  # (N / 64, 32, G, bytes)
    if kind == "Q8_0":
        first, second = first ^ 0x80, second ^ 0x80  # two's complement -> offset by 128
    low = (first & 15) | (second << 4)
    high = (first >> 4) | (second & 0xF0)
    if kind == "Q8_0":
        mixed = torch.cat((high.flatten(2), low.flatten(2)), dim=2)
        zero = 8 * scale
    else:
        mixed = torch.cat((low, high), dim=-1).flatten(2)  # weights i, then i + 16, of a group
        zero = torch.zeros_like(scale) if kind == "Q4_0" else heads[:, :, 1] + 8 * scale
    return mixed.transpose(1, 2).reshape(rows, -1), scale, zero


def _interleave(codes: Tensor) -> Tensor:
    """uint8 codes (R, K) -> the kernel's layout (R, K / 2)."""
    out: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return out


@cache
def _layout_is_known() -> bool:
    """Whether this processor's kernel has the layout that `_quick` makes."""
    codes = torch.arange(_LANES * GROUP).remainder(251).remainder(16)
    codes = codes.to(torch.uint8).view(_LANES, GROUP)
    lanes = codes.view(1, 2, _LANES // 2, GROUP)
    ours = (lanes[:, 0] | lanes[:, 1] << 4).transpose(1, 2).reshape(_LANES, GROUP // 2)
    return bool(torch.equal(ours, _interleave(codes)))
