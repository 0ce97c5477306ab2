"""Weights -> blocks of Q4_K, Q6_K and Q5_0, and which of them each tensor of a file has.

Formats: ggml-common.h of llama.cpp; the mixtures are those of its llama-quant.cpp. As there, scales
are those of least weighted squared error among several starting points, each refitted to the codes
that it leads to. An importance matrix has the mean squared inputs of each column: what an error of
a weight there costs.

Shapes: N groups of K weights, B blocks of 256.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]  # of scales and of minima
BLOCK = 256
MIXED = {"Q4_K_M": "Q4_K", "Q6_K": "Q6_K"}  # mixtures, and the type of most of their tensors
SEARCHED = ("Q4_K", "Q6_K", "Q5_0")  # types that `quantize_mixed` writes
_LAYER = re.compile(r"blk\.(\d+)\.")
_SHORTER = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # for rows that are not whole blocks of 256
# Never quantised: small, and sensitive.
_KEPT = ("_norm.", "ffn_gate_inp", "ssm_conv1d", "shortconv.conv", "per_layer_model_proj")


def mixed_kinds(mixture: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The type of each tensor of a file, as llama.cpp chooses it. `shapes` are by the tensors'
    names in the file."""
    kinds = {}
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    by_layer = sorted(shapes, key=lambda name: int((_LAYER.match(name) or "00")[1]))
    values = [name for name in by_layer if ".attn_v." in name or ".attn_qkv." in name]
    down = [name for name in by_layer if ".ffn_down" in name]
    for name, shape in shapes.items():
        if len(shape) < 2 or any(part in name for part in _KEPT):
            kinds[name] = "F32"
            continue
        kind = MIXED[mixture]
        if name == head or any(
            name in part and _has_more_bits(part.index(name), len(part)) for part in (values, down)
        ):
            kind = "Q6_K"
        if shape[-1] % BLOCK:
            # llama.cpp looks at the head before it chooses the head's type.
            kind = "F16" if shape[-1] % 32 else "Q8_0" if name == head else _SHORTER[kind]
        kinds[name] = kind
    return kinds


def _has_more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth, and every third layer between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def quantize_mixed(weights: np.ndarray, kind: str, importance: np.ndarray | None) -> np.ndarray:
    """Raw rows, uint8 (R, bytes of a row), of float32 (R, C); `importance`: float32 (C,)."""
    rows = len(weights)
    if importance is not None:
        # A column that no text has reached counts little, not nothing.
        floor = max(float(importance.mean()) * 1e-3, 1e-30)
        importance = np.broadcast_to(np.maximum(importance, floor), weights.shape)
    match kind:
        case "Q4_K":
            raw = _q4_k(weights.reshape(-1, 8, 32), importance)
        case "Q6_K":
            raw = _q6_k(weights.reshape(-1, 16, 16), importance)
        case "Q5_0":
            raw = _q5_0(weights.reshape(-1, 32), importance)
        case _:
            raise AssertionError(kind)
    return raw.reshape(rows, -1)


def _q4_k(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """(B, 8, 32) -> (B, 144)."""
    if importance is None:
        cost = np.sqrt(np.square(x).mean(axis=2, keepdims=True)) + np.abs(x)
    else:
        spread = 2 * np.square(x).mean(axis=(1, 2), keepdims=True)
        cost = importance.reshape(x.shape) * np.sqrt(spread + np.square(x))
    scales, minima = _fit_with_minimum(x.reshape(-1, 32), cost.reshape(-1, 32))
    units = _unit(scales.reshape(-1, 8)), _unit(minima.reshape(-1, 8))
    factors = _six_bits(scales.reshape(-1, 8), units[0]), _six_bits(minima.reshape(-1, 8), units[1])
    for _ in range(3):
        codes = _q4_codes(x, units, factors)
        units = _fit_units(x, cost, codes, units, factors)
        factors = _fit_factors(x, cost, codes, units, factors)
    codes = _q4_codes(x, units, factors).astype(np.uint8).reshape(-1, 4, 2, 32)
    a, b = (f.astype(np.uint8) for f in factors)  # of eight groups, the last four cut in two
    first, second = (f[:, :4] | f[:, 4:] >> 4 << 6 for f in (a, b))
    packed = (first, second, (a[:, 4:] & 15) | b[:, 4:] << 4)
    data = (codes[:, :, 0] | codes[:, :, 1] << 4).reshape(-1, 128)
    return np.concatenate((_half(units[0]), _half(units[1]), *packed, data), axis=1)


def _q4_codes(x: np.ndarray, units: Pair, factors: Pair) -> np.ndarray:
    """The nearest codes (B, 8, 32), in fp32."""
    scale, minimum = (u[:, None] * f for u, f in zip(units, factors, strict=True))
    codes = np.floor((x + minimum[:, :, None]) * _inverse(scale)[:, :, None] + np.float32(0.5))
    return np.clip(codes, 0, 15, out=codes)


def _fit_units(
    x: np.ndarray, cost: np.ndarray, codes: np.ndarray, units: Pair, factors: Pair
) -> Pair:
    """Units (B,) of least error with these codes and factors, as fp16 holds them; the given ones
    where there are none, or not positive ones."""
    steps, minima = codes * factors[0][:, :, None], factors[1]
    costly = cost * steps
    a, b = _sums(costly, steps).sum(1), (costly.sum(2) * minima).sum(1)
    c = (cost.sum(2) * np.square(minima)).sum(1)
    p, q = _sums(costly, x).sum(1), (_sums(cost, x) * minima).sum(1)
    determinant = a * c - b * b
    inverse = _inverse(determinant)
    scale, minimum = (p * c - b * q) * inverse, (p * b - a * q) * inverse
    fits = (determinant > 1e-6 * a * c) & (scale > 0) & (minimum > 0)
    return (
        _as_half(np.where(fits, scale, units[0])),
        _as_half(np.where(fits, minimum, units[1])),
    )


def _fit_factors(
    x: np.ndarray, cost: np.ndarray, codes: np.ndarray, units: Pair, factors: Pair
) -> Pair:
    """Factors (B, 8) of less error with these codes and units: one more or less for the scale, and
    what is best then for the minimum."""
    costly = cost * codes
    squares, once, total = _sums(costly, codes), costly.sum(2), cost.sum(2)
    product, linear = _sums(costly, x), _sums(cost, x)
    best, other = factors
    least = np.full_like(best, np.inf)
    for change in (0, -1, 1):
        factor = np.clip(factors[0] + change, 0, 63)
        scale = units[0][:, None] * factor
        minimum = (scale * once - linear) * _inverse(total * units[1][:, None])
        beside = factors[1] if not change else np.clip(np.rint(minimum), 0, 63)
        low = units[1][:, None] * beside
        error = scale * (scale * squares - 2 * low * once - 2 * product)
        error += low * (low * total + 2 * linear)
        better = error < least
        best, other = np.where(better, factor, best), np.where(better, beside, other)
        least = np.where(better, error, least)
    return best, other


def _sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(B, G, K) and (B, G, K) -> (B, G)."""
    return np.einsum("bgi,bgi->bg", a, b)


def _q6_k(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """(B, 16, 16) -> (B, 210)."""
    cost = np.square(x) if importance is None else importance.reshape(x.shape)
    scales = _fit(x.reshape(-1, 16), cost.reshape(-1, 16), 32).reshape(-1, 16)
    widest = np.take_along_axis(scales, np.abs(scales).argmax(axis=1)[:, None], axis=1)
    unit = _as_half(widest / -128)  # (B, 1)
    factors = np.clip(np.rint(scales * _inverse(unit)), -128, 127)
    inverse = _inverse(unit * factors)[:, :, None]
    codes = (np.clip(np.rint(x * inverse), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = ((codes[:, :, :2] & 15) | codes[:, :, 2:] << 4).reshape(-1, 128)
    high = codes >> 4 << np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    high = np.bitwise_or.reduce(high, axis=2).reshape(-1, 64)
    return np.concatenate(
        (low, high, factors.astype(np.int8).view(np.uint8), _half(unit[:, 0])), axis=1
    )


def _q5_0(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """(B, 32) -> (B, 22)."""
    cost = np.ones_like(x) if importance is None else importance.reshape(x.shape)
    scale = _as_half(_fit(x, cost, 16))
    codes = np.clip(np.rint(x * _inverse(scale)[:, None]), -16, 15) + 16
    codes = codes.astype(np.uint8)
    fifth = np.packbits(codes >> 4, axis=1, bitorder="little")
    return np.concatenate((_half(scale), fifth, (codes[:, :16] & 15) | codes[:, 16:] << 4), axis=1)


def _fit(x: np.ndarray, cost: np.ndarray, most: int) -> np.ndarray:
    """Scales (N,) for x = scale * code with codes from -most to most - 1, of little squared error
    weighted by `cost`. A scale has either sign: the code -most is for the widest weight."""
    widest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)[:, 0]
    best, largest = widest / -most, np.zeros(len(x), dtype=np.float32)
    weighted = cost * x
    for shift in np.linspace(-0.9, 0.9, 13, dtype=np.float32):
        codes = np.rint(x * (-(most + shift) * _inverse(widest))[:, None])
        np.clip(codes, -most, most - 1, out=codes)
        product = np.einsum("ni,ni->n", weighted, codes)
        inverse = _inverse(np.einsum("ni,ni,ni->n", cost, codes, codes))
        gain = product * product * inverse  # by which the error is less than that of zeros
        better = gain > largest
        best = np.where(better, product * inverse, best)
        largest = np.where(better, gain, largest)
    return best


def _fit_with_minimum(x: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for x = scale * code - minimum with codes from 0 to 15: scales and minima (N,), none
    of them negative."""
    low = np.minimum(x.min(axis=1), 0)
    span = x.max(axis=1) - low
    best, least = span / 15, low
    largest = np.full(len(x), -np.inf, dtype=np.float32)
    weighted, shifted = cost * x, x - low[:, None]
    total, linear = cost.sum(axis=1), weighted.sum(axis=1)
    for shift in np.linspace(-1.0, 1.0, 13, dtype=np.float32):
        codes = np.floor(shifted * ((15 + shift) * _inverse(span))[:, None] + np.float32(0.5))
        np.clip(codes, 0, 15, out=codes)
        costly = cost * codes
        once, product = costly.sum(axis=1), np.einsum("ni,ni->n", weighted, codes)
        twice = np.einsum("ni,ni->n", costly, codes)
        determinant = _inverse(total * twice - once * once)
        scale = (total * product - linear * once) * determinant
        offset = (twice * linear - once * product) * determinant
        alone = offset > 0
        scale = np.where(alone, product * _inverse(twice), scale)
        offset = np.where(alone, 0, offset)
        gain = scale * (2 * product - scale * twice - 2 * offset * once)
        gain += offset * (2 * linear - offset * total)
        better = (gain > largest) & (scale > 0)
        best, least = np.where(better, scale, best), np.where(better, offset, least)
        largest = np.where(better, gain, largest)
    return best, -least


def _unit(values: np.ndarray) -> np.ndarray:
    """(B, 8) -> (B,), so that 63 units are the largest."""
    return _as_half(values.max(axis=1) / 63)


def _six_bits(values: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Whole factors (B, 8) below 64, in fp32."""
    return np.clip(np.rint(values * _inverse(unit)[:, None]), 0, 63)


def _as_half(values: np.ndarray) -> np.ndarray:
    """Rounded as fp16 holds them."""
    return values.astype("<f2").astype(np.float32)


def _half(values: np.ndarray) -> np.ndarray:
    """(B,) -> (B, 2) bytes."""
    return np.ascontiguousarray(values.astype("<f2")).view(np.uint8).reshape(-1, 2)


def _inverse(x: np.ndarray) -> np.ndarray:
    """1 / x, but 0 where that is not finite."""
    return np.divide(1, x, out=np.zeros_like(x), where=np.abs(x) > 1e-30)
