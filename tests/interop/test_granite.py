"""Granite: four multipliers."""

from __future__ import annotations

from typing import Any, ClassVar

from family_tests import FamilyTests


class TestGranite(FamilyTests):
    theirs = "granite"
    architecture = "granite"
    config: ClassVar[dict[str, Any]] = {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    }
    refused: ClassVar[list[tuple[dict[str, Any], str]]] = [
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"logits_scaling": 0.0}, "logits_scaling"),
    ]
