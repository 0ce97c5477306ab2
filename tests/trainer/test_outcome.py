"""How a run ends: a run that learned nothing fails, what looks wrong is said, numbers stay JSON."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import Recipe, write_recipe
from typer.testing import CliRunner

from khaosz.cli import app
from khaosz.config import TrainConfig
from khaosz.errors import TrainingError
from khaosz.files import finite, write_json
from khaosz.trainer.callback import Callback, ProgressLine, Summary, Validation
from khaosz.trainer.checkpoint import load_state, resolve
from khaosz.trainer.loggers import JsonLines, append_row, drop_later_rows, read_metrics, smoothed
from khaosz.trainer.outcome import next_commands, run_warnings
from khaosz.trainer.plots import draw_curve
from khaosz.trainer.run import run, run_stages
from khaosz.trainer.strategy import PTStrategy
from khaosz.trainer.train_context import TrainContext

QUIET = Console(file=io.StringIO())


def validation_losses(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """The validation losses of the runs that follow."""
    built, values = Validation.__init__, iter(losses)

    def init(self: Validation, _: Any, every: int) -> None:
        def evaluate(context: TrainContext) -> dict[str, float]:
            loss = next(values)
            return {"loss": loss, "bits_per_byte": loss}

        built(self, evaluate, every)

    monkeypatch.setattr(Validation, "__init__", init)


def strict_rows(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl as JSON of the standard, in which NaN is an error."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.fixture
def broken_loss(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`broken_loss(steps)`: the training loss is NaN in the steps with these numbers."""

    def install(steps: set[int]) -> None:
        batches, loss = PTStrategy.micro_batches, PTStrategy.loss
        current = -1

        def micro_batches(self: PTStrategy, step: int) -> Any:
            nonlocal current
            current = step
            return batches(self, step)

        def broken(self: PTStrategy, *arguments: Any) -> torch.Tensor:
            value = loss(self, *arguments)
            return value * math.nan if current in steps else value

        monkeypatch.setattr(PTStrategy, "micro_batches", micro_batches)
        monkeypatch.setattr(PTStrategy, "loss", broken)

    return install


def test_run_without_an_update_fails_also_when_resumed(recipe: Recipe, broken_loss: Any) -> None:
    broken_loss(set(range(8)))
    config = recipe()
    for resume in (False, True):
        with pytest.raises(TrainingError, match=r"nothing was learned: .* in any of 8 steps"):
            run(config, resume=resume, console=QUIET)
    rows = strict_rows(config.out)
    assert [row["loss"] for row in rows] == [None] * 8
    assert math.isnan(read_metrics(config.out / "metrics.jsonl")[0]["loss"])


def test_loss_that_ends_not_finite_fails(recipe: Recipe, broken_loss: Any) -> None:
    broken_loss({7})
    with pytest.raises(TrainingError, match="the loss is not finite at the last step, 8"):
        run(recipe(), console=QUIET)


def test_skipped_steps_are_a_warning(recipe: Recipe, broken_loss: Any) -> None:
    broken_loss({2, 3})
    console = Console(file=io.StringIO(), width=200)
    run(recipe(), console=console)
    assert "warning: 2 of 8 steps changed nothing" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_validation_that_is_not_finite_is_never_the_best(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    validation_losses(monkeypatch, value, value)
    config = recipe()
    with pytest.raises(TrainingError, match="the validation loss is not finite"):
        run(config, console=QUIET)
    assert resolve(config.out / "best") is None
    assert [row["val_loss"] for row in strict_rows(config.out) if "val_loss" in row] == [None] * 2
    last = resolve(config.out / "last")
    assert last is not None and load_state(last).progress.best is None


def test_one_validation_that_is_not_finite_is_not_the_end(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN is neither better nor worse than what follows it."""
    validation_losses(monkeypatch, math.nan, 3.0)
    context = run(recipe(), console=QUIET)
    assert context.progress.best == 3.0 and context.progress.best_step == 8


def test_weights_that_are_not_finite_are_not_saved(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimizer can overflow though the gradient is finite; good checkpoints stay."""

    def on_step(self: Callback, context: TrainContext, metrics: dict[str, Any]) -> None:
        if metrics["step"] == 5:
            with torch.no_grad():
                context.model.norm.weight[0] = math.inf

    monkeypatch.setattr(JsonLines, "on_step", on_step)
    config = recipe(val=None, eval_every=100)
    with pytest.raises(TrainingError, match=r"norm.weight is not finite, so nothing is saved"):
        run(config, console=QUIET)
    assert [path.name for path in config.out.glob("step-*")] == ["step-000003"]


def test_rising_validation_loss_is_a_warning(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation_losses(monkeypatch, 3.0, 2.5, 3.25, 3.25)
    console = Console(file=io.StringIO(), width=400)
    context = run(recipe(eval_every=2), console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    best = context.config.out / "best"
    assert "warning: the validation loss ended at 3.250, above its first value 3.000" in text
    assert f"the lowest, 2.500, is in {best}" in text
    assert next_commands(context)[0].split()[-3] == str(best)


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_rising_training_loss_is_a_warning(recipe: Recipe, held_out: float) -> None:
    """Of a run without validation, and of one that is validated only when it has diverged."""
    fast: dict[str, Any] = {"lr": 30.0, "embedding_lr": 30.0, "eval_every": 1000}
    context = run(recipe(**fast, val_fraction=held_out), console=QUIET)
    (warning,) = run_warnings(context)
    assert re.match(r"the loss ended at \d+\.\d{3}, above its first value [567]\.", warning)


def test_zero_gradient_in_every_step_is_a_warning(recipe: Recipe) -> None:
    context = run(recipe(max_steps=2), console=QUIET)
    assert run_warnings(context) == []
    context.progress.idle = 2
    (warning,) = run_warnings(context)
    assert "the gradient was zero in every step" in warning


def test_early_stop_ends_its_stage_only(recipe: Recipe, tmp_path: Path) -> None:
    slow = {"lr": 1e-12, "embedding_lr": 1e-12, "early_stop": 2, "eval_every": 1, "max_steps": 50}
    stages = [recipe(**slow, out=tmp_path / "a"), recipe(max_steps=2, out=tmp_path / "b")]
    first, second = run_stages(stages, console=QUIET)
    assert first.progress.step < 50 and second.progress.step == 2
    again, _ = run_stages(stages, resume=True, console=QUIET)
    assert again.progress.step == first.progress.step, "a complete run does not continue"


def test_collapse_is_in_the_progress_line_and_the_summary(recipe: Recipe) -> None:
    context = run(recipe(max_steps=2), console=QUIET)
    console = Console(file=io.StringIO(), width=400)
    metrics = {**context.last, "chosen_shift": -1.5, "kl": -300.0, "answer_tokens": 20.0}
    ProgressLine(console, 1, 1.0, None).on_step(context, metrics)
    context.last = metrics
    Summary(console).on_end(context)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    for expected in ("chosen answers lost 1.5 nats per token", "kl -300, 15 nats per token"):
        assert expected in lines[0] and any(expected in line for line in lines[1:])


# Metrics


def test_lines_are_json_of_the_standard_and_old_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": -Infinity}\n[1]\n{"step": 3, "l')
    append_row(path, {})  # ends the line that was cut short
    append_row(path, {"step": 4, "loss": math.inf, "nested": [math.nan, {"x": 1.5}]})
    rows = read_metrics(path)
    assert [row.get("step") for row in rows] == [1, 2, 4]
    assert not any(math.isfinite(row["loss"]) for row in rows)
    drop_later_rows(path, 2)
    assert [row["loss"] for row in strict_rows(tmp_path)] == [None, None]
    assert finite({"a": (math.nan, 2)}) == {"a": [None, 2]}
    write_json(tmp_path / "a.json", {"a": math.nan})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None}


def test_curve_with_gaps(tmp_path: Path) -> None:
    losses = [3.0, math.nan, 2.0, math.nan]
    rows = [
        {"step": i, "tokens": i * 10, "loss": loss, "lr": 1e-3, "tokens_per_s": 5.0,
         "val_loss": loss, "val_bits_per_byte": loss}
        for i, loss in enumerate(losses, start=1)
    ]  # fmt: skip
    draw_curve(rows, tmp_path / "loss.png", "gaps")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    after = smoothed(losses, 0.5)
    assert after[0] == 3.0 and after[2] == pytest.approx((3.0 * 0.25 + 2.0 * 0.5) / 0.75)
    assert math.isnan(after[1]) and math.isnan(after[3])


# The commands


def test_command_of_a_diverging_run_fails(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(lr=1e30, embedding_lr=1e30, max_steps=6, optimizer="adamw")
    path = write_recipe(config, tmp_path / "recipe.toml")
    command = [sys.executable, "-m", "khaosz", "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert "error: " in done.stderr and "not finite" in done.stderr
    assert "Traceback" not in done.stderr


def test_next_commands_work(recipe: Recipe, tmp_path: Path, corpus_file: Path) -> None:
    out = tmp_path / "run with 'quotes'"
    config = recipe(val=corpus_file, out=out, max_steps=2, prompts=["It's 中国"])
    done = CliRunner().invoke(app, ["train", str(write_recipe(config, tmp_path / "recipe.toml"))])
    assert done.exit_code == 0 and done.stdout.splitlines() == [str(out / "last")]
    lines = [line for line in done.stderr.splitlines() if line.startswith("next:  ")]
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line.removeprefix("next:  "))
        words = words[1:] if words[0] == "khaosz" else words[3:]
        assert CliRunner().invoke(app, [*words, "--json"]).exit_code == 0, line


@pytest.mark.parametrize(("stage", "count"), [("pt", 1), ("sft", 2), ("rm", 0), ("dpo", 2)])
def test_next_commands_name_files_that_exist(recipe: Recipe, stage: str, count: int) -> None:
    context = run(recipe(max_steps=2), console=QUIET)
    values = {**context.config.__dict__, "stage": stage}
    context.config = TrainConfig.model_construct(**values)
    lines = next_commands(context)
    assert len(lines) == count  # prepared data is not evaluated
    assert (context.config.out / "last").exists()
    assert all(str(context.config.out / "last") in line for line in lines)
