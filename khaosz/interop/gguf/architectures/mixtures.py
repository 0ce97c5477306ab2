"""Mixtures of experts: Qwen3 MoE and Granite MoE. In llama.cpp every layer has experts, and their
weights are divided by their sum."""

from __future__ import annotations

from khaosz.config import ModelConfig
from khaosz.errors import ModelError
from khaosz.interop.families.family import Values
from khaosz.interop.gguf.architectures.architecture import Architecture, Keys
from khaosz.interop.gguf.architectures.granite import GRANITE

_COUNT, _USED, _WIDTH = "expert_count", "expert_used_count", "expert_feed_forward_length"
# What else a mixture may have, and the values that mean what is computed here.
_SHARED = ("expert_shared_count", "expert_shared_feed_forward_length")
_SOFTMAX = (0, 1)  # 0 is unset


def _read(keys: Keys) -> Values:
    used, inner = keys.count(_USED), keys.counts("feed_forward_length", 1)[0]
    refused = [key for key in _SHARED if keys.count(key, 0)]
    refused += [key for key in ("expert_gating_func",) if keys.count(key, 0) not in _SOFTMAX]
    refused += [k for k in ("expert_weights_scale",) if keys.number(k, 0.0) not in (0.0, 1.0)]
    if not keys.value("expert_weights_norm", bool, True):
        refused.append("expert_weights_norm")
    for key in refused:
        value = keys.file.metadata[f"{keys.prefix}.{key}"]
        raise ModelError(f"{keys.source}: {keys.prefix}.{key} = {value} is not supported")
    return {
        "num_experts": keys.count(_COUNT),
        "num_experts_per_tok": used,
        "moe_intermediate_size": inner,
        "norm_topk_prob": True,
    }


def _read_qwen3(keys: Keys) -> Values:
    fields = _read(keys)
    # As in llama.cpp, older files have the width of all experts of a token together.
    width = fields["moe_intermediate_size"] // max(1, fields["num_experts_per_tok"])
    return {"qk_norm": True, **fields, "moe_intermediate_size": keys.count(_WIDTH, width)}


def _write(config: ModelConfig) -> Values:
    if config.mlp_only_layers or not config.norm_topk_prob:
        what = "layers without experts" if config.mlp_only_layers else "norm_topk_prob = false"
        raise ModelError(f"llama.cpp has no keys for {what}", hint="keep the model directory")
    return {_COUNT: config.num_experts, _USED: config.num_experts_per_tok}


QWEN3_MOE = Architecture(
    "qwen3_moe",
    read=_read_qwen3,
    write=lambda config: {**_write(config), _WIDTH: config.moe_intermediate_size},
    own=frozenset({_COUNT}),
)
GRANITE_MOE = Architecture(
    "granitemoe",
    paired=True,
    read=lambda keys: {**_read(keys), **GRANITE.read(keys)},
    write=lambda config: {
        **_write(config),
        **GRANITE.write(config),
        "feed_forward_length": config.moe_intermediate_size,
    },
    own=GRANITE.own | {_COUNT},
)
