"""Mistral: every layer sees a window."""

from __future__ import annotations

from typing import Any, ClassVar

from family_tests import FamilyTests


class TestMistral(FamilyTests):
    theirs = "mistral"
    architecture = None
    config: ClassVar[dict[str, Any]] = {"sliding_window": 9}
    refused: ClassVar[list[tuple[dict[str, Any], str]]] = [
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": "wide"}, "sliding_window"),
    ]
