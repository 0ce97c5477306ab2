"""The number of steps of a run with `max_minutes` is corrected while it goes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from test_resume import assert_identical, stop_after
from tiny import Recipe

from khaosz.trainer.calibration import calibrate
from khaosz.trainer.checkpoint import load_state, resolve
from khaosz.trainer.run import run

QUIET = Console(file=io.StringIO())
MINUTES = {"max_steps": None, "max_minutes": 0.1}  # 6 s
Clock = Callable[..., None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """`clock(planned, seconds)`: a plan of so many steps, which then take so many seconds each."""

    def install(planned: int, seconds: float, later: float | None = None) -> None:
        def planned_so(*arguments: Any) -> Any:
            plan = calibrate(*arguments)
            return replace(plan, total_steps=planned, planned_steps=planned)

        times = {"now": 0.0, "calls": 0.0}

        def perf_counter() -> float:
            # The loop reads the clock four times a step, twice around and twice in it.
            times["calls"] += 1
            step = (times["calls"] - 1) // 4
            times["now"] += (later if later is not None and step >= 8 else seconds) / 3
            return times["now"]

        monkeypatch.setattr("khaosz.trainer.open_run.calibrate", planned_so)
        module = SimpleNamespace(perf_counter=perf_counter)
        monkeypatch.setattr("khaosz.trainer.trainer.time", module)

    return install


@pytest.mark.parametrize("planned", [5, 12, 40, 200])
def test_steps_fit_the_minutes(recipe: Recipe, clock: Clock, planned: int) -> None:
    """Under load a run of 40 steps was planned with 5, or with 200: 6 s are 40 steps of 0.15 s."""
    clock(planned, 0.15)
    context = run(recipe(**MINUTES, eval_every=None, save_every=None), console=QUIET)
    # Whole steps, and a change of less than 5 % is not worth a new plan.
    assert abs(context.progress.step - 40) <= 2
    assert context.progress.step == context.plan.total_steps
    assert context.plan.planned_steps == planned
    stored = json.loads((context.config.out / "plan.json").read_text())
    assert stored["total_steps"] == context.plan.total_steps
    assert len(context.plan.reasons) > 1 or planned == 40


def test_new_plan_is_in_the_checkpoint_of_its_evaluation(recipe: Recipe, clock: Clock) -> None:
    clock(60, 0.15, later=0.3)
    config = recipe(**MINUTES, eval_every=4, save_every=1000)
    context = run(config, console=QUIET)
    plans = {}
    for path in config.out.glob("step-*"):
        plans[int(path.name.removeprefix("step-"))] = load_state(path).plan.total_steps
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    evaluated = {row["step"] for row in rows if "val_loss" in row}
    assert plans.keys() <= evaluated, "checkpoints are written at evaluations"
    assert plans[4] == 40, "4 steps took 0.6 s of 6 s"
    assert context.progress.step < 30 and plans[max(plans)] == context.plan.total_steps


def test_without_held_out_data_the_plan_changes_at_checkpoints(
    recipe: Recipe, clock: Clock
) -> None:
    clock(60, 0.15)
    config = recipe(**MINUTES, eval_every=None, save_every=5)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        patched.setattr("khaosz.trainer.stages.assembly.evaluate_on", lambda *_: None)
        context = run(config, console=QUIET)
    assert abs(context.progress.step - 40) <= 2


@pytest.mark.parametrize("limit", [{"max_steps": 12}, {"max_steps": 12, "max_minutes": 0.01}])
def test_max_steps_are_never_planned_again(recipe: Recipe, clock: Clock, limit: Any) -> None:
    clock(12, 5.0)
    context = run(recipe(**limit, eval_every=2), console=QUIET)
    assert context.progress.step == context.plan.total_steps == 12


def test_epochs_and_least_steps_limit_the_new_plan(
    recipe: Recipe, clock: Clock, tmp_path: Path
) -> None:
    clock(5, 0.15)
    few = {**MINUTES, "max_minutes": 0.005, "min_steps": 9}
    assert run(recipe(**few), console=QUIET).progress.step == 9
    clock(5, 0.001)
    long = {**MINUTES, "epochs": 0.1, "out": tmp_path / "epochs"}
    context = run(recipe(**long), console=QUIET)
    assert context.progress.step == context.plan.most_steps == 13  # a tenth of 1,040 windows / 8


@pytest.mark.parametrize("stop", [4, 6])
def test_resumed_run_follows_the_new_plan(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """At step 4 a run of 8 steps becomes one of 12; nothing is measured again after a resume."""
    totals = {4: 12}

    def replanned(config: Any, plan: Any, progress: Any, rate: float) -> int:
        return totals.get(progress.step, plan.total_steps)

    def planned_so(*arguments: Any) -> Any:
        return replace(calibrate(*arguments), total_steps=8, planned_steps=8)

    monkeypatch.setattr("khaosz.trainer.callback.replanned_steps", replanned)
    monkeypatch.setattr("khaosz.trainer.open_run.calibrate", planned_so)
    settings = {"max_steps": None, "max_minutes": 10, "save_every": 1000}
    whole = run(recipe(**settings, out=tmp_path / "whole"), console=QUIET)
    assert whole.progress.step == 12
    config = recipe(**settings, out=tmp_path / "parts")
    with monkeypatch.context() as patched:
        stop_after(patched, stop, None)
        run(config, console=QUIET)
    last = resolve(config.out / "last")
    assert last is not None and load_state(last).plan.total_steps == 12
    totals.clear()
    assert run(config, resume=True, console=QUIET).progress.step == 12
    assert_identical(tmp_path / "whole", tmp_path / "parts")
