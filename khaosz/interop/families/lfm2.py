"""LFM2 and LFM2.5, of Liquid AI: short convolutions beside attention with QK-norm."""

from __future__ import annotations

from typing import Any

from khaosz.config import ModelConfig
from khaosz.errors import ModelError, quoted
from khaosz.interop.families.family import Family, Values, hf_layout


def _read(values: Values, source: str) -> Values:
    if values.pop("conv_bias", False):
        raise ModelError(f"{source}: conv_bias=True is not supported")
    values["tie_word_embeddings"] = values.pop("tie_embedding", values["tie_word_embeddings"])
    return {
        "qk_norm": True,
        "rms_norm_eps": values.pop("norm_eps", 1e-5),
        "conv_L_cache": values.pop("conv_L_cache", 3),
        "layer_types": _layer_types(values, source),
        "intermediate_size": _intermediate_size(values),
    }


def _layer_types(values: Values, source: str) -> Any:
    types, layers = values.pop("layer_types", None), values.get("num_hidden_layers")
    full = values.pop("full_attn_idxs", None)
    if types is None and isinstance(layers, int) and 0 < layers < 10_000:
        full = range(layers) if full is None else full
        types = ["full_attention" if i in full else "conv" for i in range(layers)]
    if isinstance(types, list) and "conv" not in types:
        raise ModelError(f"{source}: layer_types={quoted(types)} without conv are not supported")
    return types


def _intermediate_size(values: Values) -> Any:
    """Two thirds of what the configuration says, unless it says otherwise, in whole multiples."""
    size = values.pop("block_ff_dim", values.get("intermediate_size"))
    multiplier, multiple = values.pop("block_ffn_dim_multiplier", 1.0), 256
    multiple = values.pop("block_multiple_of", multiple)
    if not values.pop("block_auto_adjust_ff_dim", True) or not isinstance(size, int):
        return size
    size = int(2 * size / 3)
    if multiplier is None:
        return size
    return multiple * ((int(multiplier * size) + multiple - 1) // multiple)


def _write(config: ModelConfig, values: Values) -> None:
    del values["rms_norm_eps"], values["attention_bias"], values["attention_dropout"]
    values |= {
        "norm_eps": config.rms_norm_eps,
        "conv_L_cache": config.conv_L_cache,
        "conv_bias": False,
        "layer_types": list(config.layer_types or ()),
        "block_auto_adjust_ff_dim": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            **values.pop("rope_scaling", {}),
        },
    }


LFM2 = Family(
    "Lfm2",
    frozenset({"qk_norm", "layer_types", "conv_L_cache"}),
    defaults={
        "vocab_size": 65_536,
        "num_key_value_heads": 8,
        "max_position_embeddings": 128_000,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    },
    read=_read,
    write=_write,
    suits=lambda config: set(config.layer_types or ()) <= {"conv", "full_attention"},
    layout=hf_layout(
        {
            "input_layernorm": "operator_norm",
            "self_attn.o_proj": "self_attn.out_proj",
            "self_attn.q_norm": "self_attn.q_layernorm",
            "self_attn.k_norm": "self_attn.k_layernorm",
            "post_attention_layernorm": "ffn_norm",
            "mlp.gate_proj": "feed_forward.w1",
            "mlp.up_proj": "feed_forward.w3",
            "mlp.down_proj": "feed_forward.w2",
        },
        top={"norm": "model.embedding_norm"},
    ),
)
