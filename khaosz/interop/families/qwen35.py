"""Qwen3.5 for text, of Alibaba: three layers of four are a gated DeltaNet, the fourth is attention
with a gate on its output, which rotates a quarter of each head."""

from __future__ import annotations

from typing import Any

from khaosz.config import ModelConfig
from khaosz.config.model_config import DELTA_NET
from khaosz.errors import ModelError, quoted
from khaosz.interop.families.family import ONE_PLUS, Family, Values, hf_layout

# What transformers takes for keys that are missing.
_DELTA_NET = dict(zip(DELTA_NET, (16, 32, 128, 128, 4), strict=True))
_PART = 0.25
# Of the three axes on which images are rotated: text has the same position on each.
_IMAGES = ("mrope_section", "mrope_interleaved")


def qwen35_layers(layers: int, interval: int = 4) -> tuple[str, ...]:
    """Every `interval`-th layer is attention."""
    return tuple(
        "linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)
    )


def _layer_types(values: Values) -> Any:
    types, layers = values.pop("layer_types", None), values.get("num_hidden_layers")
    interval = values.pop("full_attention_interval", None) or 4
    if types is not None or not isinstance(layers, int) or not 0 < layers < 10_000:
        return types
    if not isinstance(interval, int) or interval < 1:
        return interval  # refused as a list of layers
    return qwen35_layers(layers, interval)


def _read(values: Values, source: str) -> Values:
    for key, only in {"attn_output_gate": True, "mlp_only_layers": []}.items():
        if (value := values.pop(key, only)) not in (only, None):
            raise ModelError(f"{source}: {key}={quoted(value)} is not supported")
    part = values.get("partial_rotary_factor")
    for place in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := values.get(place), dict):
            rope = {key: value for key, value in rope.items() if key not in _IMAGES}
            part = rope.get("partial_rotary_factor", part)
            values[place] = rope
    if part is None:
        values["partial_rotary_factor"] = _PART
    fields: Values = {"qk_norm": True, "attn_output_gate": True}
    types = _layer_types(values)
    if isinstance(types, list | tuple) and "linear_attention" not in types:
        raise ModelError(f"{source}: layer_types without linear_attention are not supported")
    return {**fields, "layer_types": types, **{name: values.get(name) for name in DELTA_NET}}


def _write(config: ModelConfig, values: Values) -> None:
    values |= {name: getattr(config, name) for name in ("attn_output_gate", *DELTA_NET)}
    values["layer_types"] = list(config.layer_types or ())
    values["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": config.partial_rotary_factor,
        **values.pop("rope_scaling", {}),
    }


_NORMS = (
    "input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm", "norm",
)  # fmt: skip

QWEN35 = Family(
    "Qwen3_5",
    frozenset({"qk_norm", "attn_output_gate", "layer_types", *DELTA_NET}),
    frozenset({"partial_rotary_factor"}),
    defaults={
        "vocab_size": 248_320,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 32_768,
        **_DELTA_NET,
    },
    read=_read,
    write=_write,
    layout=hf_layout(changes=dict.fromkeys(_NORMS, ONE_PLUS)),
    left_out=("mtp.",),  # predict tokens beyond the next, from what this model computes
)
