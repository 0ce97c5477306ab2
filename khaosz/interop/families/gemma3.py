"""Gemma 3 for text, of Google: scaled embeddings, four norms in a block, tanh GELU, QK-norm, and
five layers of six that see a window and have a rotation of their own."""

from __future__ import annotations

from typing import Any

from khaosz.config import ModelConfig
from khaosz.errors import ModelError, quoted
from khaosz.interop.families.family import ONE_PLUS, Family, Values, hf_layout
from khaosz.interop.families.granite import attention_multiplier

_PLAIN: dict[str, Any] = {"rope_type": "default"}


def _layer_types(values: Values) -> Any:
    types, layers = values.pop("layer_types", None), values.get("num_hidden_layers")
    pattern = values.pop("sliding_window_pattern", None) or 6
    values.pop("_sliding_window_pattern", None)
    if types is not None or not isinstance(layers, int) or not 0 < layers < 10_000:
        return types
    if not isinstance(pattern, int) or pattern < 1:
        return pattern  # refused as a list of layers
    return gemma3_layers(layers, pattern)


def gemma3_layers(layers: int, pattern: int = 6) -> tuple[str, ...]:
    """Every `pattern`-th layer sees everything."""
    return tuple(
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)
    )


def _read(values: Values, source: str) -> Values:
    for key, harmless in {
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }.items():
        if (value := values.pop(key, harmless)) not in (harmless, None, False):
            raise ModelError(f"{source}: {key}={quoted(value)} is not supported")
    types, window = _layer_types(values), values.pop("sliding_window", 4096)
    sliding = isinstance(types, list | tuple) and "sliding_attention" in types
    bidirectional = bool(values.pop("use_bidirectional_attention", None))
    if bidirectional and isinstance(window, int):
        window = window // 2 + 1  # config.json has both sides of an embedder's window
    local = _read_rotations(values, source)
    width = values.get("hidden_size")
    scalar = values.pop("query_pre_attn_scalar", 256)
    scale = scalar**-0.5 if isinstance(scalar, int | float) and scalar > 0 else scalar
    fields = {
        "qk_norm": True,
        "output_norms": True,
        "hidden_act": "gelu_pytorch_tanh",
        "embedding_multiplier": width**0.5 if isinstance(width, int) and width > 0 else 1.0,
        "attention_multiplier": attention_multiplier(scale, values.get("head_dim")),
        "bidirectional": bidirectional,
    }
    if sliding:
        fields |= {"layer_types": types, "sliding_window": window, "rope_local_theta": local}
    elif isinstance(types, list | tuple) and any(kind != "full_attention" for kind in types):
        fields["layer_types"] = types  # refused by name
    return fields


def _read_rotations(values: Values, source: str) -> Any:
    """Leaves in `values` the rotation of layers that see everything; returns the other's base."""
    rotations = values.get("rope_parameters")
    local = values.pop("rope_local_base_freq", 10_000.0)
    if not isinstance(rotations, dict) or not (rotations.keys() & _KINDS):
        values.setdefault("rope_theta", 1_000_000.0)
        return local
    near = {**_PLAIN, "rope_theta": local, **(rotations.get("sliding_attention") or {})}
    if near["rope_type"] != "default" or near.keys() != {"rope_type", "rope_theta"}:
        raise ModelError(f"{source}: a scaled rotation of sliding layers is not supported")
    far = {**(rotations.get("full_attention") or _PLAIN)}
    far.setdefault("rope_theta", values.pop("rope_theta", 1_000_000.0))
    values["rope_parameters"] = far
    return near["rope_theta"]


_KINDS = {"full_attention", "sliding_attention"}


def _write(config: ModelConfig, values: Values) -> None:
    values.pop("hidden_act")
    theta, local = values.pop("rope_theta"), config.rope_local_theta or 10_000.0
    scale = config.attention_multiplier
    values |= {
        "hidden_activation": config.hidden_act,
        "query_pre_attn_scalar": config.head_dim if scale is None else round(scale**-2),
        "sliding_window": _stored_window(config),
        "use_bidirectional_attention": config.bidirectional,
        "layer_types": list(
            config.layer_types or ("full_attention",) * config.num_hidden_layers
        ),
        "rope_parameters": {
            "full_attention": {
                **_PLAIN, "rope_theta": theta, **values.pop("rope_scaling", {})
            },
            "sliding_attention": {**_PLAIN, "rope_theta": local},
        },
    }  # fmt: skip


def _stored_window(config: ModelConfig) -> int:
    window = config.sliding_window or 4096
    return 2 * (window - 1) if config.bidirectional else window


def _suits(config: ModelConfig) -> bool:
    """Its constants follow from the sizes, and its scale from a whole number."""
    scale = config.attention_multiplier
    whole = scale is None or round(scale**-2) ** -0.5 == scale
    return config.embedding_multiplier == config.hidden_size**0.5 and whole


_NORMS = (
    "input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "attention_output_norm",
    "post_attention_layernorm", "mlp_output_norm", "norm",
)  # fmt: skip

# Of Gemma 4 too.
DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
NORM_NAMES = {
    "attention_output_norm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}

GEMMA3 = Family(
    "Gemma3",
    frozenset({"qk_norm", "output_norms", "hidden_act", "embedding_multiplier"}),
    frozenset({"attention_multiplier", "layer_types", "rope_local_theta", "bidirectional"}),
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    suits=_suits,
    layout=hf_layout(
        NORM_NAMES,
        changes=dict.fromkeys(_NORMS, ONE_PLUS),
    ),
)
