"""Qwen3 MoE and Granite MoE: a router and experts."""

from __future__ import annotations

from typing import Any, ClassVar

from family_tests import FamilyTests

from khaosz.config.model_config import EXPERTS


class TestQwen3Moe(FamilyTests):
    theirs = "qwen3_moe"
    architecture = "qwen3moe"
    config: ClassVar[dict[str, Any]] = {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
    }
    wide: ClassVar[dict[str, Any]] = {"moe_intermediate_size": 32}
    structural = frozenset({*EXPERTS, "router_aux_loss_coef"})


class TestGraniteMoe(FamilyTests):
    theirs = "granitemoe"
    architecture = "granitemoe"
    config: ClassVar[dict[str, Any]] = {
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    }
    wide: ClassVar[dict[str, Any]] = {"moe_intermediate_size": 96}
    structural = frozenset(EXPERTS)
