"""Phi-3: fused tensors, LongRoPE's factors as tensors. llama.cpp leaves its windows out."""

from __future__ import annotations

import numpy as np

from khaosz.config import ModelConfig
from khaosz.errors import ModelError
from khaosz.interop.families.family import Values
from khaosz.interop.families.llama import read_window
from khaosz.interop.families.phi3 import FUSED_MLP, FUSED_QKV
from khaosz.interop.gguf.architectures.architecture import Architecture, Keys, gguf_layout
from khaosz.interop.gguf.blocks import dequantize
from khaosz.model.rotary import rotary_frequencies

_FACTORS = {"rope_factors_short.weight": "short_factor", "rope_factors_long.weight": "long_factor"}
_WINDOW, _ROTARY = "attention.sliding_window", "rope.dimension_count"
_ORIGINAL, _AMPLITUDE = "rope.scaling.original_context_length", "rope.scaling.attn_factor"


def _read(keys: Keys) -> Values:
    context, heads = keys.count("context_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", keys.count("embedding_length") // heads)
    rotated = keys.count(_ROTARY, head_dim)
    values = {
        "max_position_embeddings": context,
        "num_hidden_layers": keys.count("block_count"),
        "sliding_window": keys.count(_WINDOW, 0) or None,
    }
    fields = {**read_window(values, None), "partial_rotary_factor": rotated / max(1, head_dim)}
    tensors = keys.file.tensors
    if found := _FACTORS.keys() & tensors.keys():
        original = keys.count(_ORIGINAL)
        for name in _FACTORS:
            if name not in found or tensors[name].shape != (rotated // 2,):
                raise ModelError(f"{keys.source}: '{name}' does not fit the rotation of its heads")
        factors = {
            ours: tuple(dequantize(keys.file.raw(name), tensors[name].type).ravel().tolist())
            for name, ours in _FACTORS.items()
        }
        fields["rope_scaling"] = {
            "rope_type": "longrope",
            "factor": max(1.0, context / max(1, original)),
            "original_max_position_embeddings": original,
            "attention_factor": keys.number(_AMPLITUDE, 1.0),
            **factors,
        }
    return fields


def _write(config: ModelConfig) -> Values:
    values: Values = {_WINDOW: config.sliding_window or 0}
    if config.rope_border is None:
        return {**values, _ORIGINAL: config.max_position_embeddings}
    return {**values, _ORIGINAL: config.rope_border, _AMPLITUDE: rotary_frequencies(config)[1]}


def _tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    scaling = config.rope_scaling
    if scaling is None or config.rope_border is None:
        return {}
    return {name: np.array(getattr(scaling, ours), np.float32) for name, ours in _FACTORS.items()}


PHI3 = Architecture(
    "phi3",
    read=_read,
    write=_write,
    tensors=_tensors,
    own=frozenset({_WINDOW, _ROTARY, _AMPLITUDE, "longrope", *_FACTORS}),
    layout=gguf_layout({"attn_qkv": FUSED_QKV, "ffn_up": FUSED_MLP}),
)
