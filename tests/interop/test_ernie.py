"""ERNIE 4.5: pairs (i, i + 1) of a head are rotated."""

from __future__ import annotations

from typing import Any, ClassVar

from family_tests import FamilyTests


class TestErnie(FamilyTests):
    theirs = "ernie4_5"
    architecture = "ernie4_5"
    config: ClassVar[dict[str, Any]] = {}
    refused: ClassVar[list[tuple[dict[str, Any], str]]] = [
        ({"use_bias": True}, "use_bias=True is not supported")
    ]
