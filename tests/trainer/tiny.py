"""Shared by the trainer's tests: the smallest model, and recipes as files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from khaosz.config import ModelConfig, TrainConfig
from khaosz.config.effects import ineffective
from khaosz.data.tokenizer import Tokenizer
from khaosz.model import Transformer
from khaosz.trainer.callback import Callback
from khaosz.trainer.train_context import TrainContext
from khaosz.trainer.trainer import Trainer

Recipe = Callable[..., TrainConfig]

TINY_MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
}


def tiny_recipe(data: Path, out: Path, **changes: Any) -> TrainConfig:
    """Pretraining on prepared data for eight steps."""
    values: dict[str, Any] = {
        "stage": "pt",
        "data": data,
        "out": out,
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


def write_recipe(config: TrainConfig, path: Path) -> Path:
    """The recipe of a configuration, without keys that the tiny runs of all stages share and this
    one does not read."""
    lines = []
    values = config.model_dump(mode="json", exclude_unset=True)
    for vain in list(ineffective(config, set(values))):
        del values[vain.key]
    tables = {k: v for k, v in values.items() if isinstance(v, dict)}
    for key, value in values.items():
        if key not in tables:
            lines.append(f"{key} = {json.dumps(value)}")
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items())]
    path.write_text("\n".join(lines))
    return path


def random_model(tokenizer: Tokenizer) -> Transformer:
    """All weights random: the initialisation of training leaves blocks at the identity."""
    config = ModelConfig.parse(
        {
            **TINY_MODEL,
            "vocab_size": tokenizer.vocab_size,
            "max_position_embeddings": 256,
            "qk_norm": True,
        }
    )
    made = Transformer(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                spread = 0.5 if "embed" in name else 1.2 / parameter.shape[-1] ** 0.5
                parameter.normal_(0, spread, generator=generator)
    return made


class StopAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, context: TrainContext, metrics: dict[str, Any]) -> None:
        if metrics["step"] == self.step:
            context.stopping = "the test requests it"


@contextmanager
def stopping_after(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trainers created inside stop after that step, as with Ctrl-C."""
    built = Trainer.__init__

    def stopping(self: Trainer, *args: Any, **kwargs: Any) -> None:
        built(self, *args, **kwargs)
        self.callbacks = [*self.callbacks[:-1], StopAfter(step), *self.callbacks[-1:]]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "__init__", stopping)
        yield
