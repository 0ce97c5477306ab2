"""Hunyuan dense (`hunyuan_v1_dense`), of Tencent: queries and keys are normalised after the
rotation, whose base is stretched by a fixed `alpha`."""

from __future__ import annotations

from typing import Any

from khaosz.errors import ModelError, quoted
from khaosz.interop.families.family import Family, Values, hf_layout


def _read(values: Values, source: str) -> Values:
    """`alpha` makes another base of the rotation, whatever the length: alpha ** (H / (H - 2))
    times as large. The published files call that "dynamic"."""
    for place in ("rope_scaling", "rope_parameters"):
        table = values.get(place)
        if not isinstance(table, dict) or "dynamic" not in (
            table.get("type"),
            table.get("rope_type"),
        ):
            continue
        alpha: Any = table.get("alpha")
        width = values.get("head_dim")
        base = table.get("rope_theta", values.get("rope_theta", 10_000.0))
        if not _positive(alpha) or not _positive(base):
            continue  # refused below as "dynamic"
        if not isinstance(width, int) or width < 3:
            raise ModelError(f"{source}: head_dim={quoted(width)} with alpha={alpha}")
        values[place] = {"rope_theta": base * alpha ** (width / (width - 2))}
        values.pop("rope_theta", None)
    return {"qk_norm": True, "qk_norm_after_rotary": True}


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < 1e15


HUNYUAN = Family(
    "HunYuanDenseV1",
    frozenset({"qk_norm", "qk_norm_after_rotary"}),
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    read=_read,
    layout=hf_layout(
        {
            "self_attn.q_norm": "self_attn.query_layernorm",
            "self_attn.k_norm": "self_attn.key_layernorm",
        }
    ),
)
