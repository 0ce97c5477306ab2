"""Calibration: its decisions, an unchanged model, and a missing compiler."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import Recipe

from khaosz.errors import ConfigError, DeviceError
from khaosz.trainer.calibration import compiler_problem
from khaosz.trainer.run import run

QUIET = Console(file=io.StringIO())


def test_minutes_become_steps(recipe: Recipe) -> None:
    context = run(
        recipe(max_steps=None, max_minutes=0.01, eval_every=10_000, save_every=10_000),
        console=QUIET,
    )
    plan = context.plan
    assert plan.planned_steps == int(0.01 * 60 / plan.seconds_per_step)
    assert context.progress.step == plan.total_steps


def test_calibration_changes_no_weight(recipe: Recipe, tmp_path: Path) -> None:
    """`auto` times several candidates before the first step; the run must be the same."""
    fixed = run(recipe(max_steps=3), console=QUIET)
    auto = run(recipe(max_steps=3, dtype="auto", compile="auto", out=tmp_path / "b"), console=QUIET)
    if auto.plan.dtype == "fp32":
        for name, parameter in fixed.model.named_parameters():
            assert torch.equal(parameter, dict(auto.model.named_parameters())[name])
    assert len(auto.plan.reasons) >= 3


def test_without_a_compiler(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in (compiler_problem(torch.device("cpu")) or "")
    context = run(recipe(max_steps=1, compile="auto"), console=QUIET)
    assert not context.plan.compiled
    assert any("no C++ compiler" in reason for reason in context.plan.reasons)


def test_compile_on_requires_a_compiler(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    with pytest.raises(DeviceError, match="compile=on, but no C\\+\\+ compiler"):
        run(recipe(max_steps=1, compile="on"), console=QUIET)


def test_refuses_a_window_longer_than_the_context(recipe: Recipe, tmp_path: Path) -> None:
    pt = run(recipe(max_steps=1), console=QUIET)
    config = recipe(
        init_from=pt.config.out / "last", size=None, model={}, window=4096, out=tmp_path / "b"
    )
    with pytest.raises(ConfigError, match="longer than the model's context"):
        run(config, console=QUIET)


@pytest.mark.parametrize(
    ("limits", "compiled"),
    [
        ({"max_steps": 3}, False),
        ({"max_steps": 10**8}, True),
        ({"max_steps": None, "epochs": 0.01}, False),
        ({"max_steps": None, "epochs": 10**6}, True),
        ({"max_steps": 3, "max_minutes": 600}, False),
        ({"max_steps": None, "epochs": 10**6, "max_minutes": 1}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["fp32", "auto"])
def test_compilation_is_chosen_by_the_planned_work(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, limits: Any, compiled: bool, dtype: str
) -> None:
    def try_compiled(self: Any, dtype: torch.dtype) -> tuple[bool, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("khaosz.trainer.calibration._Timing.try_compiled", try_compiled)
    monkeypatch.setattr("khaosz.trainer.calibration.compiler_problem", lambda device: None)
    monkeypatch.setattr("khaosz.trainer.trainer.Trainer.run", lambda self: self.context)
    config = recipe(**limits, dtype=dtype, compile="auto")
    if compiled:
        with pytest.raises(KeyboardInterrupt):
            run(config, console=QUIET)
    else:
        reasons = run(config, console=QUIET).plan.reasons
        assert any("too short for compilation" in reason for reason in reasons)


@pytest.mark.slow
# torch's compiler raises warnings and suppresses some of them, which "error" forbids.
@pytest.mark.filterwarnings("ignore")
def test_compiled_runs_resume_bit_exactly(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_resume import assert_identical, stop_after

    settings = {"compile": "on", "max_steps": 6}
    run(recipe(**settings, out=tmp_path / "whole"), console=QUIET)
    config = recipe(**settings, out=tmp_path / "parts")
    with monkeypatch.context() as patched:
        stop_after(patched, 3, None)
        run(config, console=QUIET)
    run(config, resume=True, console=QUIET)
    assert_identical(tmp_path / "whole", tmp_path / "parts")
