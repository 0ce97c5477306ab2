"""LFM2: layers without key/value heads are convolutions."""

from __future__ import annotations

import numpy as np

from khaosz.config import ModelConfig
from khaosz.errors import ModelError
from khaosz.interop.families.family import Values
from khaosz.interop.gguf.architectures.architecture import Architecture, Keys, gguf_layout

_HEADS, _WIDTH = "attention.head_count_kv", "shortconv.l_cache"


def _read(keys: Keys) -> Values:
    heads = keys.counts(_HEADS, keys.count("block_count"))
    most = max(heads, default=0)
    if not keys.value("attention.causal", bool, True):
        raise ModelError(f"{keys.source}: attention in both directions is not supported")
    if set(heads) != {0, most}:
        raise ModelError(f"{keys.source}: {keys.prefix}.{_HEADS} is not 0 and another number")
    return {
        "qk_norm": True,
        "num_key_value_heads": most,
        "layer_types": tuple("full_attention" if count else "conv" for count in heads),
        "conv_L_cache": keys.count(_WIDTH),
    }


def _write(config: ModelConfig) -> Values:
    heads = np.array([heads for heads, _ in config.cache_shapes], np.int32)
    return {_HEADS: heads, _WIDTH: config.conv_L_cache}


LFM2 = Architecture(
    "lfm2",
    read=_read,
    write=_write,
    own=frozenset({_HEADS}),
    layout=gguf_layout(
        parts={
            "conv.conv": "shortconv.conv",
            "conv.in_proj": "shortconv.in_proj",
            "conv.out_proj": "shortconv.out_proj",
        },
        top={"norm": "token_embd_norm"},  # so they call the last norm, too
    ),
)
