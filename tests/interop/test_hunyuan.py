"""Hunyuan dense: queries and keys normalised after the rotation, and a stretched base."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from family_tests import COMMON, FamilyTests

from khaosz.interop.huggingface_config import config_from_hf


class TestHunyuan(FamilyTests):
    theirs = "hunyuan_v1_dense"
    architecture = "hunyuan-dense"
    config: ClassVar[dict[str, Any]] = {
        "rope_parameters": {
            "rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 10_000.0,
        },
    }  # fmt: skip
    refused: ClassVar[list[tuple[dict[str, Any], str]]] = [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "got 'dynamic'"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
    ]


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_the_base_is_stretched(place: str) -> None:
    """As the published files say it, and as transformers 5 writes it."""
    scaling = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "mscale": 1.0}
    values = {**COMMON, "head_dim": 128, "model_type": "hunyuan_v1_dense", place: scaling}
    config = config_from_hf(values)
    # llama.cpp's converter names this number for 128 and 1,000.
    assert config.rope_theta == pytest.approx(11_158_839.9251)
    assert config.rope_scaling is None
