"""Tiny embedders, and pairs that one can learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY_MODEL, random_model
from translation import translation_pairs, written

from khaosz.config import TrainConfig
from khaosz.data.tokenizer import Tokenizer, load_tokenizer
from khaosz.model import Transformer

Embed = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture
def model(tokenizer: Tokenizer) -> Transformer:
    return random_model(tokenizer)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("texts") / "pairs.jsonl", translation_pairs(40, 0))


@pytest.fixture
def embedder(tmp_path: Path, tokenizer_dir: Path, pairs_file: Path) -> Embed:
    """`embedder(key=value)`: a tiny run of the stage."""

    def build(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "stage": "embed",
            "data": pairs_file,
            "out": tmp_path / "run",
            "tokenizer": tokenizer_dir,
            "size": "nano",
            "model": TINY_MODEL,
            "window": 64,
            "batch_pairs": 8,
            "micro_batch": 1,
            "max_steps": 6,
            "optimizer": "adamw",
            "lr": 1e-3,
            "embedding_lr": 1e-3,
            "dtype": "fp32",
            "compile": "off",
            "eval_every": 3,
            "save_every": 2,
            "log_every": 1,
            "keep": 10,
            "val_fraction": 0.2,
            "embed": {"query_prefix": "q: ", "passage_prefix": "p: ", "max_length": 48},
            "schedule": {"name": "constant", "warmup_steps": 0},
        }
        return TrainConfig.parse({**values, **changes})

    return build
