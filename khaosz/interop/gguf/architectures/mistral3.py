"""Ministral 3: queries that grow with the position, and YaRN's amplitude."""

from __future__ import annotations

import math

from khaosz.config import ModelConfig
from khaosz.errors import ModelError
from khaosz.interop.families.family import Values
from khaosz.interop.families.ministral3 import yarn_amplitude
from khaosz.interop.gguf.architectures.architecture import Architecture, Keys

_LOG, _SCALE = "rope.scaling.yarn_log_multiplier", "attention.temperature_scale"


def _read(keys: Keys) -> Values:
    if keys.value("rope.scaling.type", str, "") != "yarn":
        raise ModelError(f"{keys.source}: rope scaling other than yarn is not supported")
    factor = keys.number("rope.scaling.factor")
    return {
        "query_scaling": keys.number(_SCALE, 0.0),
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": keys.count("rope.scaling.original_context_length"),
            "attention_factor": yarn_amplitude(factor, keys.number(_LOG, 0.0)),
        },
    }


def _write(config: ModelConfig) -> Values:
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type != "yarn":
        raise ModelError("llama.cpp knows Ministral 3 with YaRN only", hint="keep it in HF")
    growth = 0.1 * math.log(scaling.factor)
    amplitude = 1 + growth if scaling.attention_factor is None else scaling.attention_factor
    multiplier = ((1 + growth) / amplitude - 1) / growth if growth else 1.0
    return {_LOG: round(multiplier, 6), _SCALE: float(config.query_scaling)}


MISTRAL3 = Architecture(
    "ministral3", paired=True, read=_read, write=_write, own=frozenset({_LOG, _SCALE})
)
