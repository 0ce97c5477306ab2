"""Keys of families with experts in config.json, and Qwen3 MoE."""

from __future__ import annotations

from khaosz.config import ModelConfig
from khaosz.errors import ModelError, quoted
from khaosz.interop.families.family import Family, Values

EXPERTS = frozenset({"num_experts", "num_experts_per_tok", "moe_intermediate_size"})
COEFFICIENT = "router_aux_loss_coef"


def _read(values: Values, source: str) -> Values:
    layers = values.get("num_hidden_layers")
    step, dense = values.pop("decoder_sparse_step", 1), values.pop("mlp_only_layers", None) or []
    if type(step) is not int or step < 1:
        raise ModelError(f"{source}: decoder_sparse_step={quoted(step)} is not supported")
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise ModelError(f"{source}: mlp_only_layers={quoted(dense)} is not a list of layers")
    if isinstance(layers, int) and 0 < layers < 10_000:
        dense = [i for i in range(layers) if i in dense or (i + 1) % step]
    counts = (values.pop(key, None) for key in ("num_experts", "num_local_experts"))
    return {
        "qk_norm": True,
        "num_experts": next((count for count in counts if count is not None), 128),
        "num_experts_per_tok": values.pop("num_experts_per_tok", 8),
        "moe_intermediate_size": values.pop("moe_intermediate_size", 768),
        "norm_topk_prob": values.pop("norm_topk_prob", False),
        "mlp_only_layers": dense or None,
        COEFFICIENT: values.pop(COEFFICIENT, 0.001),
    }


def _write(config: ModelConfig, values: Values) -> None:
    values |= {key: getattr(config, key) for key in (*EXPERTS, "norm_topk_prob", COEFFICIENT)}
    values |= {"decoder_sparse_step": 1, "mlp_only_layers": list(config.mlp_only_layers or ())}


QWEN3_MOE = Family(
    "Qwen3Moe",
    EXPERTS | {"qk_norm"},
    frozenset({"norm_topk_prob", "mlp_only_layers", COEFFICIENT}),
    defaults={"max_position_embeddings": 32_768, "num_key_value_heads": 4},
    extra={"use_sliding_window": False},
    read=_read,
    write=_write,
)
