"""Phi-3 and Phi-4-mini, of Microsoft: fused tensors, rotation of a part of each head, LongRoPE."""

from __future__ import annotations

from khaosz.config import ModelConfig
from khaosz.interop.families.family import Family, Values, hf_layout
from khaosz.interop.families.llama import read_window

FUSED_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FUSED_MLP = ("mlp.gate_proj", "mlp.up_proj")
_LONG = ("longrope", "su", "yarn")  # older names: transformers reads all three as longrope


def _read(values: Values, source: str) -> Values:
    context = values.get("max_position_embeddings")
    for place in ("rope_scaling", "rope_parameters"):
        table = values.get(place)
        if not isinstance(table, dict):
            continue
        table = dict(table)
        kind = table.get("rope_type", table.get("type"))
        if kind in _LONG:
            table.pop("type", None)
            original = table.get(
                "original_max_position_embeddings",
                values.get("original_max_position_embeddings", 4096),
            )
            if isinstance(context, int) and isinstance(original, int) and original > 0:
                table.setdefault("factor", max(1.0, context / original))
            table |= {"rope_type": "longrope", "original_max_position_embeddings": original}
        values[place] = table
    fields = read_window(values, None)
    if "layer_types" in fields:
        values.pop("layer_types", None)
    return fields


def _write(config: ModelConfig, values: Values) -> None:
    part = config.partial_rotary_factor
    rope = {"rope_type": "default", **values.pop("rope_scaling", {})}
    values["rope_parameters"] = {
        "rope_theta": config.rope_theta, "partial_rotary_factor": part, **rope
    }  # fmt: skip
    values |= {"partial_rotary_factor": part, "sliding_window": config.sliding_window}
    original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    values["original_max_position_embeddings"] = original


PHI3 = Family(
    "Phi3",
    sometimes=frozenset({"partial_rotary_factor", "longrope", "layer_types"}),
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    extra={"embd_pdrop": 0.0, "resid_pdrop": 0.0},
    read=_read,
    write=_write,
    suits=lambda config: set(config.layer_types or ()) <= {"sliding_attention"},
    layout=hf_layout(
        fused={"self_attn.qkv_proj": FUSED_QKV, "mlp.gate_up_proj": FUSED_MLP},
    ),
)
