"""Logs of metrics and samples: JSON lines always, TensorBoard and others on request."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from khaosz.errors import ConfigError
from khaosz.files import append, finite, write_atomic
from khaosz.trainer.callback import Callback, is_last, plain
from khaosz.trainer.train_context import TrainContext

Sample = Callable[[TrainContext, str], str]


class JsonLines(Callback):
    """OUT/metrics.jsonl: one object per logged step. A resumed run drops the lines after its
    checkpoint, so that every step is there once."""

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def on_start(self, context: TrainContext) -> None:
        drop_later_rows(self.path, context.progress.step)

    def on_step(self, context: TrainContext, metrics: dict[str, Any]) -> None:
        first = metrics["step"] == 1
        if first or metrics["step"] % self.every == 0 or "val_loss" in metrics or is_last(context):
            append_row(self.path, metrics)


class Samples(Callback):
    """Samples a text for each prompt every `every` steps, prints it, and appends it to
    OUT/samples.jsonl: step, prompt, text."""

    def __init__(
        self, path: Path, sample: Sample, prompts: list[str], every: int, console: Console
    ) -> None:
        self.path, self.sample, self.prompts = path, sample, prompts
        self.every, self.console = every, console

    def on_start(self, context: TrainContext) -> None:
        drop_later_rows(self.path, context.progress.step)

    def on_step(self, context: TrainContext, metrics: dict[str, Any]) -> None:
        if metrics["step"] % self.every and not is_last(context):
            return
        for prompt in self.prompts:
            text = self.sample(context, prompt)
            append_row(self.path, {"step": metrics["step"], "prompt": prompt, "text": text})
            one_line = plain(text.replace("\n", " "))
            line = f"  [dim]sample[/dim] {plain(prompt)}[green]{one_line}[/green]"
            self.console.print(line, highlight=False, soft_wrap=True)


def logger_module(name: str) -> Any:
    """The module of an external logger. Raises `ConfigError` if it can't be imported."""
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError:
        raise ConfigError(
            f"logger '{name}' is not installed", hint=f"pip install {name}, or drop it"
        ) from None


class ExternalLogger(Callback):
    """The same metrics to TensorBoard, trackio, SwanLab or Weights & Biases (all of them can work
    offline; none is imported unless the recipe names it)."""

    def __init__(self, name: str, out: Path, every: int) -> None:
        self.name, self.out, self.every = name, out, every
        self._module = logger_module(name)
        self._writer: Any = None

    def on_start(self, context: TrainContext) -> None:
        if self.name == "tensorboard":
            self._writer = self._module.SummaryWriter(str(self.out / "tensorboard"))
        else:
            settings = context.config.model_dump(mode="json")
            self._module.init(project="khaosz", name=self.out.name, config=settings)

    def on_step(self, context: TrainContext, metrics: dict[str, Any]) -> None:
        if metrics["step"] % self.every and "val_loss" not in metrics:
            return
        values = {k: v for k, v in metrics.items() if k != "step"}
        if self._writer is None:
            self._module.log(values)
            return
        for key, value in values.items():
            self._writer.add_scalar(key, value, metrics["step"])

    def on_end(self, context: TrainContext) -> None:
        if self._writer is not None:
            self._writer.close()
        else:
            self._module.finish()


def smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average with the bias of its first values removed. A value that is not
    finite is left out, and is NaN in the result."""
    average, count, result = 0.0, 0, []
    for value in values:
        if not math.isfinite(value):
            result.append(math.nan)
            continue
        count += 1
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**count))
    return result


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a metrics file, with NaN for what was not finite: null, and in files of
    earlier versions NaN and Infinity. A line cut short by a kill is skipped."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append({name: math.nan if v is None else v for name, v in row.items()})
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a line of JSON; a number that is not finite is written as null."""
    append(path, _line(row).encode(), durable=False)


def drop_later_rows(path: Path, step: int) -> None:
    """Remove the rows after the checkpoint that a run continues from: it writes them again."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    write_atomic(path, [_line(row).encode() for row in rows])


def _line(row: dict[str, Any]) -> str:
    return json.dumps(finite(row), allow_nan=False) + "\n"
