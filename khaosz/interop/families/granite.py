"""Granite and Granite MoE, of IBM: Llama with four multipliers, and with experts."""

from __future__ import annotations

import math

from khaosz.config import ModelConfig
from khaosz.interop.families.family import Family, Values, hf_layout
from khaosz.interop.families.mixtures import COEFFICIENT, EXPERTS

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


def _read_experts(values: Values, source: str) -> Values:
    return {
        **_read(values, source),
        "num_experts": values.pop("num_local_experts", 8),
        "num_experts_per_tok": values.pop("num_experts_per_tok", 2),
        "moe_intermediate_size": values.get("intermediate_size"),
        "norm_topk_prob": True,
        COEFFICIENT: values.pop(COEFFICIENT, 0.001),
    }


def _write_experts(config: ModelConfig, values: Values) -> None:
    _write(config, values)
    values |= {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "intermediate_size": config.moe_intermediate_size,
        COEFFICIENT: config.router_aux_loss_coef,
    }


GRANITE_MOE = Family(
    "GraniteMoe",
    always=EXPERTS | {"norm_topk_prob"},
    sometimes=frozenset({"attention_multiplier", *_KEYS, COEFFICIENT}),
    defaults={"max_position_embeddings": 2048},
    read=_read_experts,
    write=_write_experts,
    layout=hf_layout(
        {"mlp.gate": "block_sparse_moe.router.layer"},
        stacked={
            "block_sparse_moe.input_linear": ("gate_proj", "up_proj"),
            "block_sparse_moe.output_linear": ("down_proj",),
        },
    ),
)
