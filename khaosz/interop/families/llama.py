"""Llama, Qwen2, Qwen3 and Mistral: the common names and keys."""

from __future__ import annotations

from khaosz.config import ModelConfig
from khaosz.interop.families.family import Family, Values

LLAMA = Family("Llama", defaults={"max_position_embeddings": 2048}, extra={"mlp_bias": False})
_QWEN = {"max_position_embeddings": 32_768, "num_key_value_heads": 32}
QWEN2 = Family(
    "Qwen2",
    frozenset({"qkv_bias"}),
    defaults=_QWEN,
    extra={"use_sliding_window": False},
    read=lambda _values, _source: {"qkv_bias": True},
)
QWEN3 = Family(
    "Qwen3",
    frozenset({"qk_norm"}),
    defaults={**_QWEN, "head_dim": 128},
    extra={"use_sliding_window": False},
    read=lambda _values, _source: {"qk_norm": True},
)


def read_window(values: Values, otherwise: int | None) -> Values:
    """Every layer sees a window, unless that is the whole context."""
    context = values.get("max_position_embeddings")
    window = values.pop("sliding_window", otherwise)
    whole = type(window) is int and type(context) is int and window >= context
    if window is None or whole:
        return {}
    layers = values.get("num_hidden_layers")
    count = layers if isinstance(layers, int) and 0 < layers < 10_000 else 1
    return {"sliding_window": window, "layer_types": ("sliding_attention",) * count}


def _write_window(config: ModelConfig, values: Values) -> None:
    values["sliding_window"] = config.sliding_window


MISTRAL = Family(
    "Mistral",
    frozenset({"layer_types"}),
    defaults={"max_position_embeddings": 131_072, "num_key_value_heads": 8},
    read=lambda values, _: read_window(values, 4096),
    write=_write_window,
    suits=lambda config: set(config.layer_types or ()) == {"sliding_attention"},
)
