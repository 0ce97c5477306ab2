"""SmolLM3, of Hugging Face: some layers, every fourth by default, rotate nothing (NoPE)."""

from __future__ import annotations

from khaosz.config import ModelConfig
from khaosz.errors import ModelError, quoted
from khaosz.interop.families.family import Family, Values


def _read(values: Values, source: str) -> Values:
    layers, interval = values.get("num_hidden_layers"), values.pop("no_rope_layer_interval", 4)
    flags = values.pop("no_rope_layers", None)
    if not isinstance(layers, int) or not 0 < layers < 10_000:
        return {}  # refused below
    if flags is None:
        if not isinstance(interval, int) or interval < 1:
            raise ModelError(f"{source}: no_rope_layer_interval={quoted(interval)} is not a count")
        flags = [(i + 1) % interval != 0 for i in range(layers)]
    if not isinstance(flags, list) or len(flags) < layers or any(f not in (0, 1) for f in flags):
        raise ModelError(f"{source}: no_rope_layers={quoted(flags)} is not 0 or 1 for each layer")
    rotated = tuple(int(flag) for flag in flags[:layers])
    return {"no_rope_layers": None if all(rotated) else rotated}


def _write(config: ModelConfig, values: Values) -> None:
    values["no_rope_layers"] = list(config.no_rope_layers or ())


SMOLLM3 = Family(
    "SmolLM3",
    frozenset({"no_rope_layers"}),
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
    },
    extra={"mlp_bias": False, "use_sliding_window": False},
    read=_read,
    write=_write,
)
