"""A recipe small enough that a run takes a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import TINY_MODEL, Recipe

from khaosz.config import TrainConfig


@pytest.fixture
def recipe(tmp_path: Path, prepared_dir: Path) -> Recipe:
    """`recipe(key=value)`: a tiny pretraining run on the prepared sample."""

    def build(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "stage": "pt",
            "data": prepared_dir,
            "out": tmp_path / "run",
            "size": "nano",
            "model": TINY_MODEL,
            "window": 32,
            "batch_tokens": 256,
            "micro_batch": 4,
            "max_steps": 8,
            "dtype": "fp32",
            "compile": "off",
            "eval_tokens": 500,
            "eval_every": 4,
            "save_every": 3,
            "log_every": 1,
            "keep": 10,
        }
        return TrainConfig.parse({**values, **changes})

    return build
