"""The block formats of GGUF tensors, in numpy, whole rows at a time.

Sources: ggml-common.h and ggml-quants.c of llama.cpp, the format's reference; MXFP4 is of OCP's
microscaling formats, version 1.0. Every quantised format here is affine in groups: weight = code *
scale + offset, with an unsigned `code`. Values equal those of gguf-py to the bit.

Shapes: R rows, C columns, G = C / group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from khaosz.errors import ModelError
from khaosz.interop.gguf.file import TENSOR_TYPES, GgufFile

# Weights dequantised at a time, which takes several copies of them.
_CHUNK = 1 << 20

# What a 4-bit code stands for, in units of the scale: numbers of MXFP4 are doubled.
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_CENTRED = np.array([_IQ4, _FP4], dtype=np.int16) + 128
_IQ4_CODES, _FP4_CODES = _CENTRED.astype(np.uint8)


@dataclass(frozen=True)
class AffineGroups:
    """codes: uint8 (R, C) below 2**bits; scales, offsets: float32 (R, G); zero: the code of weight
    0, of types without stored minima."""

    codes: np.ndarray
    bits: int
    group: int
    scales: np.ndarray
    offsets: np.ndarray
    zero: int | None

    @np.errstate(invalid="ignore", over="ignore")  # as in `affine`
    def dense(self) -> np.ndarray:
        """float32 (R, C)."""
        rows, columns = self.codes.shape
        grouped = self.codes.reshape(rows, -1, self.group).astype(np.float32)
        if self.zero is None:
            grouped *= self.scales[:, :, None]
            grouped += self.offsets[:, :, None]
        else:  # rounded once: a code of 8 bits and a scale of 17 are more than fp32 holds
            grouped -= self.zero
            grouped *= self.scales[:, :, None]
        return grouped.reshape(rows, columns)


def is_affine(kind: str) -> bool:
    return kind not in ("F32", "F16", "BF16")


@np.errstate(
    invalid="ignore", over="ignore"
)  # a broken file's scales may be NaN; it is read anyway
def affine(raw: np.ndarray, kind: str) -> AffineGroups:
    """Codes, scales and offsets of raw rows, uint8 (R, bytes of a row), of a quantised type."""
    size = TENSOR_TYPES[kind][2]
    rows = len(raw)
    blocks = np.ascontiguousarray(raw).reshape(-1, size)  # (B, bytes)
    zero: int | None = None
    offsets: np.ndarray | None = None
    shifts: np.ndarray
    match kind:
        case "Q4_0" | "Q4_1" | "Q5_0" | "Q5_1":
            has_minimum, five = kind.endswith("1"), kind.startswith("Q5")
            scales = _halves(blocks, 0)
            at = 4 if has_minimum else 2
            codes = _nibbles(blocks[:, -16:])
            if five:
                codes |= _bits(blocks[:, at : at + 4]) << 4
            if has_minimum:
                offsets = _halves(blocks, 2)
            else:
                zero = 16 if five else 8
            bits = 5 if five else 4
        case "Q8_0":
            scales = _halves(blocks, 0)
            codes = blocks[:, 2:] ^ np.uint8(0x80)  # two's complement -> offset by 128
            zero, bits = 128, 8
        case "IQ4_NL":
            scales, codes = _halves(blocks, 0), _IQ4_CODES[_nibbles(blocks[:, 2:])]
            zero, bits = 128, 8
        case "IQ4_XS":
            shifts = 2 * np.arange(8, dtype=np.uint16)
            high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> shifts & 3
            low = np.stack((blocks[:, 4:8] & 0xF, blocks[:, 4:8] >> 4), axis=2).reshape(-1, 8)
            factors = (low | high << 4).astype(np.float32) - 32  # (B, 8)
            scales = _halves(blocks, 0)[:, None] * factors
            codes = _IQ4_CODES[_nibbles(blocks[:, 8:].reshape(-1, 16))]
            zero, bits = 128, 8
        case "MXFP4":
            scales = _powers_of_two(blocks[:, 0])
            codes, zero, bits = _FP4_CODES[_nibbles(blocks[:, 1:])], 128, 8
        case "Q2_K":
            factors = blocks[:, :16]
            scales = _halves(blocks, 80)[:, None] * (factors & 0xF).astype(np.float32)
            offsets = -(_halves(blocks, 82)[:, None] * (factors >> 4).astype(np.float32))
            codes, bits = _quarters(blocks[:, 16:80]), 2
        case "Q3_K":
            # Byte j of the first 32 has the highest bit of weights j, j + 32 and so on.
            shifts = np.arange(8, dtype=np.uint8)[:, None]
            high = ((blocks[:, None, :32] >> shifts) & 1).reshape(-1, 256)
            codes, zero, bits = _quarters(blocks[:, 32:96]) | high << 2, 4, 3
            low = np.concatenate((blocks[:, 96:104] & 0xF, blocks[:, 96:104] >> 4), axis=1)
            shifts = 2 * np.arange(4, dtype=np.uint8)[:, None]
            high = (blocks[:, None, 104:108] >> shifts & 3).reshape(-1, 16)
            factors = (low | high << 4).astype(np.float32) - 32  # (B, 16)
            scales = _halves(blocks, 108)[:, None] * factors
        case "Q4_K" | "Q5_K":
            factors, minima = _k_scales(blocks[:, 4:16])  # (B, 8)
            scales = _halves(blocks, 0)[:, None] * factors
            offsets = -(_halves(blocks, 2)[:, None] * minima)
            # 64 weights take 32 bytes: low nibbles first, then high ones.
            quarters = blocks[:, -128:].reshape(-1, 4, 32)
            codes = np.stack((quarters & 0xF, quarters >> 4), axis=2).reshape(-1, 8, 32)
            if kind == "Q5_K":
                high = blocks[:, 16:48]  # bit i of byte j: weight j of group i
                shifts = np.arange(8, dtype=np.uint8)[:, None]
                codes |= ((high[:, None, :] >> shifts) & 1) << 4
            codes, bits = codes.reshape(-1, 256), 5 if kind == "Q5_K" else 4
        case "Q6_K":
            low = blocks[:, :128].reshape(-1, 2, 1, 2, 32)  # (B, half, -, l or l + 32, 32)
            high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
            nibbles = np.concatenate((low & 0xF, low >> 4), axis=2).reshape(-1, 2, 4, 32)
            shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
            codes = (nibbles | ((high >> shifts) & 3) << 4).reshape(-1, 256)
            factors = blocks[:, 192:208].view(np.int8).astype(np.float32)  # (B, 16)
            scales = _halves(blocks, 208)[:, None] * factors
            zero, bits = 32, 6
        case "Q8_K":  # 256 codes with one fp32 scale, and sums that only products need
            scales = np.repeat(np.ascontiguousarray(blocks[:, :4]).view("<f4"), 8, axis=1)
            codes, zero, bits = blocks[:, 4:260] ^ np.uint8(0x80), 128, 8
        case _:
            raise AssertionError(kind)
    scales, codes = scales.reshape(rows, -1), codes.reshape(rows, -1)
    if offsets is None:
        assert zero is not None
        offsets = scales * np.float32(-zero)
    offsets = offsets.reshape(rows, -1)
    return AffineGroups(codes, bits, codes.shape[1] // scales.shape[1], scales, offsets, zero)


def dequantize(raw: np.ndarray, kind: str) -> np.ndarray:
    """float32 (R, C) of raw rows, uint8 (R, bytes of a row)."""
    match kind:
        case "F32":
            return np.ascontiguousarray(raw).view("<f4")
        case "F16":
            return np.ascontiguousarray(raw).view("<f2").astype(np.float32)
        case "BF16":
            wide = np.ascontiguousarray(raw).view("<u2").astype(np.uint32) << 16
            return wide.view(np.float32)
        case _:
            return affine(raw, kind).dense()


def read_array(file: GgufFile, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A dequantised tensor, float32, in memory of its own. Raises `ModelError` where it is missing
    or does not have `shape`."""
    tensor = file.tensors.get(name)
    if tensor is None:
        raise ModelError(f"{file.source}: tensor '{name}' is missing")
    if shape is not None and tensor.shape != shape:
        raise ModelError(f"{file.source}: tensor '{name}' is {tensor.shape}, not {shape}")
    raw, array = file.raw(name), np.empty(tensor.shape, np.float32)
    rows = array.reshape(len(raw), -1)
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(raw), step):
        rows[start : start + step] = dequantize(raw[start : start + step], tensor.type)
    file.release()
    return array


def quantize(weights: np.ndarray, kind: str, *, search: bool = False) -> np.ndarray:
    """Raw rows, uint8 (R, bytes of a row), of float32 (R, C).

    Rounding is that of ggml's reference. With `search`, 4-bit scales are those of least squared
    error that a few starting points and least-squares fits find. C must be a multiple of 32 for the
    quantised types.
    """
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    rows = len(weights)
    match kind:
        case "F32":
            return weights.view(np.uint8)
        case "F16":
            return weights.astype("<f2").view(np.uint8)
        case "BF16":
            bits = weights.view(np.uint32)
            nearest_even = bits + 0x7FFF + ((bits >> 16) & 1)
            return (nearest_even >> 16).astype("<u2").view(np.uint8)
    groups = weights.reshape(-1, 32)
    match kind:
        case "Q8_0":
            scale = np.abs(groups).max(axis=1) / np.float32(127)
            signed = _away_from_zero(groups * _inverse(scale)[:, None]).astype(np.int8)
            packed, heads = signed.view(np.uint8), [scale]
        case "Q4_0":
            widest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
            scale = widest[:, 0] / np.float32(-8)
            if search:
                scale = _search_scale(groups, scale)
            packed = _pack_nibbles(_centred_codes(groups, scale).astype(np.uint8))
            heads = [scale]
        case "Q4_1":
            low = groups.min(axis=1)
            scale = (groups.max(axis=1) - low) / np.float32(15)
            if search:
                scale, low = _search_scale_and_minimum(groups, scale, low)
            packed = _pack_nibbles(_codes(groups, scale, low).astype(np.uint8))
            heads = [scale, low]
        case _:
            raise AssertionError(kind)
    halves = np.stack(heads, axis=1).astype("<f2").view(np.uint8)
    return np.concatenate((halves, packed), axis=1).reshape(rows, -1)


def _search_scale(groups: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Scales (B,) for weight = scale * (code - 8), codes 0 to 15, of little squared error: scales
    around the given one, each refitted to the codes that it leads to."""
    best, least = scale, np.full(len(groups), np.inf, dtype=np.float32)
    for factor in np.linspace(0.8, 1.15, 8, dtype=np.float32):
        trial = scale * factor
        for _ in range(2):
            codes = _centred_codes(groups, trial) - 8
            squares = np.einsum("bi,bi->b", codes, codes)
            fitted = np.einsum("bi,bi->b", codes, groups) * _inverse(squares)
            trial = np.where(squares > 0, fitted, trial)
        trial = trial.astype("<f2").astype(np.float32)
        codes = _centred_codes(groups, trial) - 8
        error = np.square(codes * trial[:, None] - groups).sum(axis=1)
        best, least = np.where(error < least, trial, best), np.minimum(error, least)
    return best


def _search_scale_and_minimum(
    groups: np.ndarray, scale: np.ndarray, low: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same for weight = scale * code + minimum: narrower ranges than the whole one, each with
    a linear regression of the weights on their codes."""
    best, best_low = scale, low
    least = np.full(len(groups), np.inf, dtype=np.float32)
    middle, means = low + scale * np.float32(7.5), groups.mean(axis=1)
    for factor in np.linspace(0.7, 1.0, 8, dtype=np.float32):
        trial, minimum = scale * factor, middle - scale * factor * np.float32(7.5)
        for _ in range(2):
            codes = _codes(groups, trial, minimum)
            centred = codes - codes.mean(axis=1, keepdims=True)
            spread = np.einsum("bi,bi->b", centred, centred)
            slope = np.einsum("bi,bi->b", centred, groups) * _inverse(spread)
            fits = slope > 0
            trial = np.where(fits, slope, trial)
            minimum = np.where(fits, means - slope * codes.mean(axis=1), minimum)
        trial, minimum = (x.astype("<f2").astype(np.float32) for x in (trial, minimum))
        codes = _codes(groups, trial, minimum)
        error = np.square(codes * trial[:, None] + minimum[:, None] - groups).sum(axis=1)
        better = error < least
        best, best_low = np.where(better, trial, best), np.where(better, minimum, best_low)
        least = np.minimum(error, least)
    return best, best_low


def _centred_codes(groups: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Codes of Q4_0, 0 to 15, with 8 for zero."""
    shifted = groups * _inverse(scale)[:, None] + np.float32(8.5)
    return np.clip(np.floor(shifted), 0, 15)


def _codes(groups: np.ndarray, scale: np.ndarray, low: np.ndarray) -> np.ndarray:
    shifted = (groups - low[:, None]) * _inverse(scale)[:, None] + np.float32(0.5)
    return np.clip(np.floor(shifted), 0, 15)


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """float32 (B,) of the half-precision number at byte `at` of every block."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")[:, 0].astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """(B, 16) bytes -> (B, 32) codes: weight i in the low half of byte i, i + 16 in the high."""
    return np.concatenate((packed & 0xF, packed >> 4), axis=1)


def _quarters(packed: np.ndarray) -> np.ndarray:
    """(B, 64) bytes -> (B, 256) codes: 32 bytes are 128 weights, the lowest bits of all first."""
    shifts = 2 * np.arange(4, dtype=np.uint8)[:, None]
    halves = packed.reshape(-1, 2, 1, 32)
    return (halves >> shifts & 3).reshape(-1, 256)


def _powers_of_two(exponents: np.ndarray) -> np.ndarray:
    """float32 of 2**(exponent - 128), half of what a scale of MXFP4 means. 0 and 1 give subnormal
    numbers."""
    wide = exponents.astype(np.uint32)
    return np.where(wide < 2, 0x200000 << (wide & 1), (wide - 1) << 23).astype("<u4").view("<f4")


def _pack_nibbles(codes: np.ndarray) -> np.ndarray:
    return codes[:, :16] | codes[:, 16:] << 4


def _bits(packed: np.ndarray) -> np.ndarray:
    """(B, 4) bytes -> (B, 32) bits, the lowest first."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def _k_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """6-bit factors and minima (B, 8), float32, of the 12 bytes of a K block."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    factors = np.concatenate((first & 63, (third & 0xF) | (first >> 6) << 4), axis=1)
    minima = np.concatenate((second & 63, third >> 4 | (second >> 6) << 4), axis=1)
    return factors.astype(np.float32), minima.astype(np.float32)


def _inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale, but 0 where the scale is less than fp16 can hold, or its inverse not finite."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > 1e-30)


def _away_from_zero(x: np.ndarray) -> np.ndarray:
    """C's roundf: halves away from zero. (x + 0.5 itself would round 0.49999997 up.)"""
    whole = np.trunc(x)
    return whole + np.copysign(np.abs(x - whole) >= np.float32(0.5), x)
