"""Qwen3.5: keys of Mamba's for its DeltaNet, whose value heads llama.cpp stores in another order.

It lets value head v read with key head v modulo their number, where v divided by the heads of each
is meant: the first value heads of all key heads come first.
"""

from __future__ import annotations

import numpy as np
import torch

from khaosz.config import ModelConfig
from khaosz.errors import ModelError
from khaosz.interop.families.family import Change, Values
from khaosz.interop.families.qwen35 import qwen35_layers
from khaosz.interop.gguf.architectures.architecture import (
    Architecture,
    Keys,
    Order,
    gguf_layout,
)

_INTERVAL, _NEXT, _ROTARY = (
    "full_attention_interval",
    "nextn_predict_layers",
    "rope.dimension_count",
)


def _blocks(keys: Keys) -> tuple[int, int]:
    """Layers, and those behind them which predict tokens beyond the next."""
    blocks, more = keys.count("block_count"), keys.count(_NEXT, 0)
    if not 0 <= more < max(1, blocks):
        raise ModelError(f"{keys.source}: {more} of {blocks} blocks predict tokens beyond the next")
    return blocks - more, more


def _read(keys: Keys) -> Values:
    layers, interval = _blocks(keys)[0], keys.count(_INTERVAL, 4)
    heads, head_dim = keys.count("attention.head_count"), keys.count("attention.key_length", 0)
    head_dim = head_dim or keys.count("embedding_length") // heads
    if interval < 1:
        raise ModelError(f"{keys.source}: {keys.prefix}.{_INTERVAL} = {interval} is not supported")
    value_heads = keys.count("ssm.time_step_rank")
    return {
        "num_hidden_layers": layers,
        "qk_norm": True,
        "attn_output_gate": True,
        "partial_rotary_factor": keys.count(_ROTARY, head_dim) / max(1, head_dim),
        "layer_types": qwen35_layers(layers, interval),
        "linear_num_key_heads": keys.count("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": keys.count("ssm.state_size"),
        "linear_value_head_dim": keys.count("ssm.inner_size") // max(1, value_heads),
        "linear_conv_kernel_dim": keys.count("ssm.conv_kernel"),
    }


def _write(config: ModelConfig) -> Values:
    types, heads = config.layer_types or (), config.linear_num_value_heads or 0
    interval = 1 + types.index("full_attention") if "full_attention" in types else len(types) + 1
    if types != qwen35_layers(len(types), interval):
        raise ModelError(
            "llama.cpp lets every n-th layer of Qwen3.5 be attention: these layer_types cannot be"
            " written to GGUF",
            hint="keep it in HF",
        )
    width = config.linear_value_head_dim or 0
    if width != config.linear_key_head_dim:
        raise ModelError("llama.cpp has one width for keys and values of Qwen3.5's DeltaNet")
    half = config.rotary_dim // 2
    return {
        _INTERVAL: interval,
        # Pairs that rotate with each axis of an image: of text all have one position.
        "rope.dimension_sections": np.array(
            [half - 2 * (half // 3), half // 3, half // 3, 0], np.int32
        ),
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": heads,
        "ssm.state_size": width,
        "ssm.inner_size": heads * width,
    }


def _left_out(keys: Keys) -> tuple[str, ...]:
    layers, more = _blocks(keys)
    return tuple(f"blk.{layers + i}." for i in range(more))


def _order(name: str, config: ModelConfig) -> Order:
    part = name.partition("linear_attn.")[2]
    if config.linear_num_value_heads == config.linear_num_key_heads or not part:
        return None, None
    assert config.linear_num_value_heads and config.linear_num_key_heads
    heads = np.arange(config.linear_num_value_heads)
    heads = heads.reshape(-1, config.linear_num_key_heads).T.ravel()
    if part in ("A_log", "dt_bias", "in_proj_a.weight", "in_proj_b.weight"):
        return heads, None
    width = config.linear_value_head_dim or 0
    values = (heads[:, None] * width + np.arange(width)).ravel()
    if part in ("in_proj_qkv.weight", "conv1d.weight"):
        keys = 2 * config.linear_num_key_heads * (config.linear_key_head_dim or 0)
        return np.concatenate((np.arange(keys), keys + values)), None
    if part == "in_proj_z.weight":
        return values, None
    return (None, values) if part == "out_proj.weight" else (None, None)


_PARTS = {
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
_DECAY = Change(lambda stored: torch.log(-stored), lambda ours: -torch.exp(ours))

QWEN35 = Architecture(
    "qwen3_5_text",
    read=_read,
    write=_write,
    own=frozenset({_ROTARY}),
    left_out=_left_out,
    order=_order,
    layout=gguf_layout(parts=_PARTS, changes={"linear_attn.A_log": _DECAY}),
)
