"""Tiny models, and a recipe whose run takes a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import TINY_MODEL, Recipe, random_model

from khaosz.config import TrainConfig
from khaosz.data.tokenizer import Tokenizer, load_tokenizer
from khaosz.model import Transformer


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


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture
def model(tokenizer: Tokenizer) -> Transformer:
    return random_model(tokenizer)
