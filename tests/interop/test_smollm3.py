"""SmolLM3: every fourth layer rotates nothing."""

from __future__ import annotations

from typing import Any, ClassVar

from family_tests import FamilyTests


class TestSmolLM3(FamilyTests):
    theirs = "smollm3"
    architecture = "smollm3"
    config: ClassVar[dict[str, Any]] = {}
    refused: ClassVar[list[tuple[dict[str, Any], str]]] = [
        ({"no_rope_layers": [1, 1, 2, 0]}, "is not 0 or 1 for each layer"),
        ({"no_rope_layers": [1, 0]}, "is not 0 or 1 for each layer"),
        ({"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
    ]
