"""Ministral 3: YaRN with scaled queries."""

from __future__ import annotations

from typing import Any, ClassVar

from family_tests import FamilyTests


class TestMinistral3(FamilyTests):
    theirs = "ministral3"
    architecture = "mistral3"
    config: ClassVar[dict[str, Any]] = {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        },
    }  # fmt: skip
    refused: ClassVar[list[tuple[dict[str, Any], str]]] = [
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "mscale": 0.5,
                    "mscale_all_dim": 1.0,
                }
            },
            "mscale=0.5 is not supported",
        )
    ]
