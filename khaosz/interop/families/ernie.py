"""ERNIE 4.5 without experts (`ernie4_5`), of Baidu: Llama, but pairs (i, i + 1) are rotated."""

from __future__ import annotations

from khaosz.errors import ModelError, quoted
from khaosz.interop.families.family import Family, Values


def _read(values: Values, source: str) -> Values:
    if bias := values.pop("use_bias", False):
        raise ModelError(f"{source}: use_bias={quoted(bias)} is not supported")
    return {"rope_interleaved": True}


ERNIE = Family(
    "Ernie4_5",
    frozenset({"rope_interleaved"}),
    defaults={
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    },
    extra={"use_bias": False},
    read=_read,
)
