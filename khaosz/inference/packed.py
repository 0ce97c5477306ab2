"""Quantised matrix products on PyTorch's own CPU kernels: one narrow interface, (M, K) -> (M, N).

GGUF's affine groups are carried over code by code. The kernel computes with
weight = (code - 8) * scale + zero in groups of 32, codes of 4 bits; scales and zeros are rounded to
bf16, which moves a weight by at most 2**-8 of its scale or zero. Codes of 5 to 8 bits are two
columns of 4: the high half against 16 * scale and the low half against scale, over the input twice.

Shapes: M rows of input, N outputs, K inputs, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from khaosz.interop.gguf_blocks import AffineGroups

GROUP = 32
_LANES = 64  # rows that the AVX-512 layout interleaves
_ROWS = 1024  # rows repacked at a time: bounds what loading needs beside the result


class PackedMatrix:
    """Codes of 4 bits, interleaved for the kernel. `halves` is 2 when codes were split."""

    def __init__(self, packed: Tensor, scales_and_zeros: Tensor, halves: int) -> None:
        self.packed = packed  # uint8 (N, halves * K / 2)
        self.scales_and_zeros = scales_and_zeros  # bf16 (halves * K / 32, N, 2)
        self.halves = halves

    def __call__(self, x: Tensor) -> Tensor:
        if self.halves == 2:
            x = torch.cat((x, x), dim=-1)
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.packed, GROUP, self.scales_and_zeros
        )
        return out

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales_and_zeros.nbytes


def packable(rows: int, columns: int, group: int, bits: int) -> bool:
    """Whether the kernel takes such a matrix: whole lanes, groups of 32, at most 8 bits."""
    return rows % _LANES == 0 and columns % GROUP == 0 and group == GROUP and 4 <= bits <= 8


def pack(rows: int, bits: int, read: Callable[[int, int], AffineGroups]) -> PackedMatrix:
    """Packs `rows` rows that `read(first, last)` gives piece by piece."""
    halves = 1 if bits == 4 else 2
    packed: list[Tensor] = []
    scales: list[Tensor] = []
    for first in range(0, rows, _ROWS):
        groups = read(first, min(first + _ROWS, rows))
        codes = groups.codes
        scale, zero = groups.scales, groups.offsets
        if halves == 1:
            both = np.stack((scale, zero + 8 * scale), axis=-1)  # (R, G, 2)
        else:
            # code - base = 16 * (high - 8) + low, with a base that keeps the high half in range.
            base = 128 if bits == 8 else 0
            high = (codes >> 4) + (0 if bits == 8 else 8)
            codes = np.concatenate((high, codes & 15), axis=1)
            rest = zero + (base + 8) * scale
            both = np.concatenate(
                (np.stack((16 * scale, np.zeros_like(scale)), -1), np.stack((scale, rest), -1)),
                axis=1,
            )
        packed.append(_interleave(torch.from_numpy(codes)))
        scales.append(torch.from_numpy(both).to(torch.bfloat16))
    joined = torch.cat(scales).transpose(0, 1).contiguous()  # (G, N, 2)
    return PackedMatrix(torch.cat(packed), joined, halves)


def _interleave(codes: Tensor) -> Tensor:
    """uint8 codes (R, K) -> the kernel's layout (R, K / 2)."""
    rows, columns = codes.shape
    if _layout_is_known():
        lanes = codes.view(rows // _LANES, 2, _LANES // 2, columns)
        mixed = lanes[:, 0] | lanes[:, 1] << 4  # (R / 64, 32, K)
        return mixed.transpose(1, 2).contiguous().view(rows, columns // 2)
    out: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return out


@cache
def _layout_is_known() -> bool:
    """Whether this processor's kernel has the layout we make directly, several times as fast."""
    codes = torch.arange(_LANES * GROUP).remainder(251).remainder(16)
    codes = codes.to(torch.uint8).view(_LANES, GROUP)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    lanes = codes.view(1, 2, _LANES // 2, GROUP)
    ours = (lanes[:, 0] | lanes[:, 1] << 4).transpose(1, 2).reshape(_LANES, GROUP // 2)
    return bool(torch.equal(ours, theirs))
