"""Ministral 3, of Mistral AI: YaRN, and queries that grow with the position (as in Llama 4)."""

from __future__ import annotations

import math

from khaosz.config import ModelConfig
from khaosz.errors import ModelError, quoted
from khaosz.interop.families.family import Family, Values

# What transformers takes where config.json says nothing of the rotation.
_ROPE = {
    "rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0,
    "original_max_position_embeddings": 16_384, "mscale": 1.0, "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}  # fmt: skip


def yarn_amplitude(factor: float, multiplier: float) -> float:
    """The factor on cosines and sines of a YaRN with `mscale_all_dim`, where
    `mscale` is 1."""
    if factor <= 1:
        return 1.0
    return (0.1 * math.log(factor) + 1) / (0.1 * multiplier * math.log(factor) + 1)


def _read(values: Values, source: str) -> Values:
    place = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = values.get(place) or _ROPE
    if not isinstance(rope, dict):
        return {}  # refused below
    rope = dict(rope)
    beta = rope.pop("llama_4_scaling_beta", None)
    rope.pop("max_position_embeddings", None)
    scales = {key: rope.pop(key, None) for key in ("mscale", "mscale_all_dim")}
    if all(scales.values()) and rope.get("attention_factor") is None:
        factor, (one, other) = rope.get("factor"), scales.values()
        if not isinstance(factor, int | float) or one != 1 or not isinstance(other, int | float):
            raise ModelError(f"{source}: {place} with mscale={quoted(one)} is not supported")
        rope["attention_factor"] = yarn_amplitude(factor, other)
    values[place] = rope
    return {"query_scaling": 0.0 if beta is None else beta}


def _write(config: ModelConfig, values: Values) -> None:
    values["rope_parameters"] = {
        "rope_theta": config.rope_theta,
        **values.pop("rope_scaling"),
        "llama_4_scaling_beta": config.query_scaling,
    }


MINISTRAL3 = Family(
    "Ministral3",
    frozenset({"query_scaling"}),
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-5,
        "rope_theta": None,
    },
    read=_read,
    write=_write,
)
