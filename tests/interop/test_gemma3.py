"""Gemma 3: scaled embeddings, four norms, tanh GELU, windows with a rotation of their own."""

from __future__ import annotations

from typing import Any, ClassVar

from family_tests import FamilyTests


class TestGemma3(FamilyTests):
    theirs = "gemma3_text"
    architecture = "gemma3"
    config: ClassVar[dict[str, Any]] = {
        "num_hidden_layers": 7,
        "sliding_window": 9,
        "query_pre_attn_scalar": 12,
    }
    wide: ClassVar[dict[str, Any]] = {"embedding_multiplier": 8.0}
    refused: ClassVar[list[tuple[dict[str, Any], str]]] = [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
        ({"hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported"),
        ({"layer_types": ["chunked_attention"] * 7}, "layer_types"),
    ]
