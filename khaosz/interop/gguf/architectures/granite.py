"""Granite: its four multipliers."""

from __future__ import annotations

from khaosz.config import ModelConfig
from khaosz.errors import ModelError
from khaosz.interop.families.family import Values
from khaosz.interop.families.granite import attention_multiplier
from khaosz.interop.gguf.architectures.architecture import Architecture, Keys

_ROTATES = "rope.scaling.finetuned"  # in this architecture: whether anything is rotated
_FIELDS = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


def _read(keys: Keys) -> Values:
    if not keys.value(_ROTATES, bool, True):
        raise ModelError(f"{keys.source}: {keys.prefix}.{_ROTATES} = False is not supported")
    # llama.cpp takes 0 as unset.
    fields: Values = {ours: keys.number(key, 1.0) or 1.0 for key, ours in _FIELDS.items()}
    width = keys.count("embedding_length") // max(1, keys.count("attention.head_count"))
    scale = keys.number("attention.scale", 0.0) or None
    fields["attention_multiplier"] = attention_multiplier(
        scale, keys.count("attention.key_length", width)
    )
    return fields


def _write(config: ModelConfig) -> Values:
    scale = config.attention_multiplier or config.head_dim**-0.5
    return {
        **{key: float(getattr(config, ours)) for key, ours in _FIELDS.items()},
        "attention.scale": float(scale),
    }


GRANITE = Architecture(
    "granite",
    paired=True,
    read=_read,
    write=_write,
    own=frozenset({*_FIELDS, "attention.scale"}),
)
