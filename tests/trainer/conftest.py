"""Tiny models, and a recipe whose run takes a second."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import Recipe, random_model, tiny_recipe

from khaosz.data.tokenizer import Tokenizer, load_tokenizer
from khaosz.model import Transformer


@pytest.fixture
def recipe(tmp_path: Path, prepared_dir: Path) -> Recipe:
    """`recipe(key=value)`: a tiny pretraining run on the prepared sample."""
    places = {"data": prepared_dir, "out": tmp_path / "run"}
    return lambda **changes: tiny_recipe(**{**places, **changes})


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture
def model(tokenizer: Tokenizer) -> Transformer:
    return random_model(tokenizer)
