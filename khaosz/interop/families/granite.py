"""Granite without experts, of IBM: Llama with four multipliers."""

from __future__ import annotations

import math

from khaosz.config import ModelConfig
from khaosz.interop.families.family import Family, Values

_KEYS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


def attention_multiplier(scale: object, width: object) -> object:
    """None for the scale that attention has anyway with heads of this width."""
    if isinstance(scale, int | float) and isinstance(width, int) and width > 0:
        return None if math.isclose(scale, width**-0.5, rel_tol=1e-7) else scale
    return scale


def _read(values: Values, source: str) -> Values:
    width, heads = values.get("head_dim"), values.get("num_attention_heads")
    if width is None and isinstance(heads, int) and isinstance(values.get("hidden_size"), int):
        width = values["hidden_size"] // max(1, heads)
    scale = attention_multiplier(values.pop("attention_multiplier", 1.0), width)
    return {"attention_multiplier": scale, **{key: values.pop(key, 1.0) for key in _KEYS}}


def _write(config: ModelConfig, values: Values) -> None:
    values |= {key: getattr(config, key) for key in _KEYS}
    values["attention_multiplier"] = config.attention_multiplier or config.head_dim**-0.5


GRANITE = Family(
    "Granite",
    sometimes=frozenset({"attention_multiplier", *_KEYS}),
    defaults={"max_position_embeddings": 2048},
    extra={"mlp_bias": False},
    read=_read,
    write=_write,
)
