"""Shared by the trainer's tests: the smallest model, and recipes as files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from khaosz.config import TrainConfig

Recipe = Callable[..., TrainConfig]

TINY_MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
}


def write_recipe(config: TrainConfig, path: Path) -> Path:
    lines = []
    values = config.model_dump(mode="json", exclude_unset=True)
    tables = {k: v for k, v in values.items() if isinstance(v, dict)}
    for key, value in values.items():
        if key not in tables:
            lines.append(f"{key} = {json.dumps(value)}")
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items())]
    path.write_text("\n".join(lines))
    return path
