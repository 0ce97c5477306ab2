"""Random rows of every GGUF tensor type, and scalar decoders of those types."""

from __future__ import annotations

import math
import struct

import numpy as np

from khaosz.interop.gguf.file import TENSOR_TYPES

# Where the half-precision scales and minima of a block are.
_HALVES = {
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}
_IQ4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
_FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def random_blocks(
    kind: str, rows: int, columns: int, seed: int = 0, scale: float = 1.0
) -> np.ndarray:
    """uint8 (rows, bytes of a row): codes are random, scales are normal, times `scale`."""
    rng = np.random.default_rng(seed)
    _, block, size = TENSOR_TYPES[kind]
    raw = rng.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    for at in _HALVES.get(kind, ()):
        raw[:, at : at + 2] = (scale * rng.normal(size=(len(raw), 1))).astype("<f2").view(np.uint8)
    if kind == "MXFP4":
        raw[:, 0] = rng.integers(120, 130, len(raw)) + round(math.log2(scale))
    elif kind == "Q8_K":
        raw[:, :4] = (scale * rng.normal(size=(len(raw), 1))).astype("<f4").view(np.uint8)
    return raw.reshape(rows, -1)


def half(raw: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", raw, at)[0])


def decode_block(kind: str, raw: bytes) -> list[float]:
    """One block, weight by weight, from the format's description."""
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        minimum, five = kind[3] == "1", kind[1] == "5"
        d, m = half(raw, 0), half(raw, 2) if minimum else 0.0
        high = int.from_bytes(raw[4 if minimum else 2 :][:4], "little") if five else 0
        data, out = raw[-16:], []
        for i in range(32):
            code = data[i] & 15 if i < 16 else data[i - 16] >> 4
            code |= ((high >> i) & 1) << 4
            out.append(code * d + m if minimum else (code - (16 if five else 8)) * d)
        return out
    if kind == "Q8_0":
        return [q * half(raw, 0) for q in struct.unpack_from("<32b", raw, 2)]
    if kind == "Q8_K":
        (d,) = struct.unpack_from("<f", raw)
        return [q * d for q in struct.unpack_from("<256b", raw, 4)]
    if kind == "IQ4_NL":
        return [half(raw, 0) * _IQ4[code] for code in _nibbles(raw[2:])]
    if kind == "MXFP4":
        scale = 2.0 ** (raw[0] - 127)
        return [scale * _FP4[c & 7] * (-1 if c & 8 else 1) for c in _nibbles(raw[1:])]
    if kind == "IQ4_XS":
        (high,), out = struct.unpack_from("<H", raw, 2), []
        for group in range(8):
            low = raw[4 + group // 2] >> (4 * (group % 2)) & 15
            scale = half(raw, 0) * ((low | (high >> 2 * group & 3) << 4) - 32)
            out += [scale * _IQ4[code] for code in _nibbles(raw[8 + 16 * group :][:16])]
        return out
    if kind in ("Q2_K", "Q3_K"):
        start, out = 16 if kind == "Q2_K" else 32, []
        for i in range(256):
            part, group = i // 32, i // 16
            code = raw[start + part // 4 * 32 + i % 32] >> (2 * (part % 4)) & 3
            if kind == "Q2_K":
                d, low = half(raw, 80) * (raw[group] & 15), half(raw, 82) * (raw[group] >> 4)
                out.append(d * code - low)
                continue
            factor = raw[96 + group % 8] >> (4 * (group // 8)) & 15
            factor |= (raw[104 + group % 4] >> (2 * (group // 4)) & 3) << 4
            code -= 0 if raw[i % 32] >> part & 1 else 4
            out.append(half(raw, 108) * (factor - 32) * code)
        return out
    if kind in ("Q4_K", "Q5_K"):
        d, dmin, packed, out = half(raw, 0), half(raw, 2), raw[4:16], []
        for group in range(8):
            if group < 4:
                scale, low = packed[group] & 63, packed[group + 4] & 63
            else:
                scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6) << 4
                low = (packed[group + 4] >> 4) | (packed[group] >> 6) << 4
            for i in range(32):
                byte = raw[-128 + group // 2 * 32 + i]
                code = byte >> 4 if group % 2 else byte & 15
                if kind == "Q5_K":
                    code |= ((raw[16 + i] >> group) & 1) << 4
                out.append(d * scale * code - dmin * low)
        return out
    assert kind == "Q6_K"
    low, high, scales, d = raw[:128], raw[128:192], raw[192:208], half(raw, 208)
    out = []
    for i in range(256):
        part, rest = divmod(i, 128)
        quarter, j = divmod(rest, 32)
        byte = low[part * 64 + (quarter % 2) * 32 + j]
        code = byte >> 4 if quarter >= 2 else byte & 15
        code |= ((high[part * 32 + j] >> (2 * quarter)) & 3) << 4
        scale = struct.unpack_from("<b", scales, i // 16)[0]
        out.append(d * scale * (code - 32))
    return out


def _nibbles(raw: bytes) -> list[int]:
    return [byte & 15 for byte in raw] + [byte >> 4 for byte in raw]
