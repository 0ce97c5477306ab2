"""Pairs and prompts from real text, and recipes of tiny runs for every stage but pretraining."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY_MODEL
from translation import translation_pairs, written

from khaosz.config import TrainConfig

Align = Callable[..., TrainConfig]
Embed = Callable[..., TrainConfig]


# Of every tiny run of these stages.
SHORT_RUN: dict[str, Any] = {
    "size": "nano",
    "model": TINY_MODEL,
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
    "schedule": {"name": "constant", "warmup_steps": 0},
}


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Path:
    """Sixteen pairs of ragged length in both languages."""
    lines = corpus_file.read_text(encoding="utf-8").splitlines()
    texts = [text for line in lines if len(text := json.loads(line)["text"]) > 40]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    records = []
    for i in range(16):
        text = texts[i]
        record = {
            "prompt": text[: 8 + 2 * i],
            "chosen": text[20 : 24 + 5 * (i % 7)],
            "rejected": texts[i + 20][: 4 + 6 * (i % 5)],
        }
        records.append(json.dumps(record, ensure_ascii=False))
    path.write_text("\n".join(records) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = ["你好", "Hello", "数数", "Count", "春天", "Spring", "水", "Water"]
    lines = [json.dumps({"prompt": t, "answer": t[0]}, ensure_ascii=False) for t in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def align(tmp_path: Path, tokenizer_dir: Path, pairs_file: Path, prompts_file: Path) -> Align:
    """`align("dpo", key=value)`: a tiny alignment run."""

    def build(stage: str, **changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            **SHORT_RUN,
            "stage": stage,
            "data": pairs_file if stage in ("rm", "dpo") else prompts_file,
            "out": tmp_path / "run",
            "tokenizer": tokenizer_dir,
            "window": 128,
            "batch_pairs": 4,
            "micro_batch": 2,
        }
        if stage in ("ppo", "grpo"):
            values |= {
                "reward_function": "khaosz.rewards:brevity",
                "rollout": {
                    "prompts": 4,
                    "group": 3,
                    "max_new_tokens": 8,
                    "epochs": 2,
                    "minibatches": 2,
                },
            }
        return TrainConfig.parse({**values, **changes})

    return build


@pytest.fixture(scope="session")
def text_pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("texts") / "pairs.jsonl", translation_pairs(40, 0))


@pytest.fixture
def embedder(tmp_path: Path, tokenizer_dir: Path, text_pairs_file: Path) -> Embed:
    """`embedder(key=value)`: a tiny run of the stage."""

    def build(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            **SHORT_RUN,
            "stage": "embed",
            "data": text_pairs_file,
            "out": tmp_path / "run",
            "tokenizer": tokenizer_dir,
            "window": 64,
            "batch_pairs": 8,
            "micro_batch": 1,
            "embed": {"query_prefix": "q: ", "passage_prefix": "p: ", "max_length": 48},
        }
        return TrainConfig.parse({**values, **changes})

    return build
