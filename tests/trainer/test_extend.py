"""`--extend`: a finished run continues to a greater length; checkpoints by the clock."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import Recipe, stopping_after, tiny_recipe, write_recipe

from khaosz.config import TrainConfig
from khaosz.errors import CheckpointError, ConfigError
from khaosz.trainer.checkpoint import load_state, resolve
from khaosz.trainer.extension import with_lengths
from khaosz.trainer.run import run, run_stages
from khaosz.trainer.schedule import lr_factor

QUIET = Console(quiet=True)
CONSTANT = {"name": "constant", "warmup_steps": 2}


def assert_same_run(one: Path, two: Path) -> None:
    """Weights, optimizer and losses, to the bit."""
    ends = [resolve(out / "last") for out in (one, two)]
    assert ends[0] is not None and ends[1] is not None and ends[0].name == ends[1].name
    for name in ("model", "state/optimizer", "state/rng"):
        a, b = (load_file(str(end / f"{name}.safetensors")) for end in ends if end)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    losses = [
        [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (one, two)
    ]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, prepared_dir: Path) -> TrainConfig:
    """Four steps of a schedule that decays, not to be changed."""
    config = tiny_recipe(prepared_dir, tmp_path_factory.mktemp("finished") / "run", max_steps=4)
    run(config, console=QUIET)
    return config


@pytest.fixture
def copied(finished: TrainConfig, recipe: Recipe) -> TrainConfig:
    config = recipe(max_steps=4)
    shutil.copytree(finished.out, config.out, symlinks=True)
    return config


def stop(config: TrainConfig, step: int, *, extend: bool) -> None:
    with pytest.MonkeyPatch.context() as patched, stopping_after(step, patched):
        run(config, extend=extend, console=QUIET)


def test_extension_at_a_constant_rate_equals_a_longer_run(recipe: Recipe, tmp_path: Path) -> None:
    whole = recipe(max_steps=7, schedule=CONSTANT, out=tmp_path / "whole")
    run(whole, console=QUIET)
    parts = whole.updated(out=tmp_path / "parts", max_steps=4)
    run(parts, console=QUIET)
    run(parts.updated(max_steps=7), extend=True, console=QUIET)
    assert_same_run(whole.out, parts.out)


def test_extension_starts_a_new_cycle_and_resumes_exactly(
    copied: TrainConfig, tmp_path: Path
) -> None:
    parts = copied.updated(max_steps=10)
    whole = copied.updated(max_steps=10, out=tmp_path / "whole")
    shutil.copytree(copied.out, whole.out, symlinks=True)
    run(whole, extend=True, console=QUIET)
    stop(parts, 6, extend=True)
    stop(parts, 8, extend=True)  # the same command continues it
    run(parts, resume=True, console=QUIET)
    assert_same_run(whole.out, parts.out)
    rows = [json.loads(line) for line in (whole.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    cycle = [lr_factor(whole.schedule, step, 6) for step in range(6)]
    rate = json.loads((whole.out / "train_config.json").read_text())["lr"]
    assert [row["lr"] for row in rows[4:]] == pytest.approx([rate * f for f in cycle], rel=1e-12)
    again = run(parts, extend=True, console=QUIET)
    assert again.progress.step == 10, "nothing is left to do"
    assert run(copied.updated(max_steps=11), extend=True, console=QUIET).progress.step == 11


def test_extension_by_epochs_or_minutes(copied: TrainConfig) -> None:
    """In place of the recipe's max_steps, which a resumed recipe may still have."""
    by_epochs = copied.updated(epochs=0.2)
    stopped = run(by_epochs, extend=True, console=QUIET)
    assert stopped.progress.step == -(-round(stopped.windows * 0.2) // stopped.plan.rows) > 4
    for again in ({"resume": True}, {"extend": True}):
        assert run(by_epochs, **again, console=QUIET).progress.step == stopped.progress.step
    # Twice as long as all steps took so far.
    minutes = 2 * stopped.progress.seconds / 60
    context = run(with_lengths(by_epochs, {"max_minutes": minutes}), extend=True, console=QUIET)
    assert context.plan.extended_at == stopped.progress.step < context.progress.step


def test_extension_by_two_lengths_ends_at_the_nearer(copied: TrainConfig) -> None:
    """Also where a key of the recipe had another value in the run, as an override gave it."""
    assert run(copied.updated(max_steps=None, epochs=0.2), extend=True, console=QUIET).complete
    done = load_state(copied.out / "last").progress.step
    both = copied.updated(max_steps=done + 2, epochs=9.0)
    for _ in range(2):
        assert run(both, extend=True, console=QUIET).progress.step == done + 2
    with pytest.raises(ConfigError, match="ends at step 5"):
        run(copied.updated(max_steps=5, epochs=8.0), extend=True, console=QUIET)


def test_extension_by_minutes_within_epochs(copied: TrainConfig) -> None:
    """The budget may plan more steps on the way, but never more than the epochs have."""
    long = copied.updated(max_steps=None, epochs=0.2, max_minutes=1e5)
    plan = run(long, extend=True, console=QUIET).plan
    assert plan.most_steps == plan.total_steps < 100


def test_extension_of_early_stopped_run_evaluates_with_fresh_patience(recipe: Recipe) -> None:
    config = recipe(max_steps=40, eval_every=1, early_stop=2, lr=3.0, embedding_lr=3.0)
    early = run(config, console=QUIET)
    assert early.early_stopped and early.progress.step < 40
    context = run(config.updated(max_steps=50), extend=True, console=QUIET)
    assert context.plan.extended_at == early.progress.step < context.progress.step


def test_refuses_what_cannot_be_extended(
    copied: TrainConfig, recipe: Recipe, tmp_path: Path
) -> None:
    def fails(kind: type[Exception], match: str, config: TrainConfig) -> None:
        with pytest.raises(kind, match=match):
            run(config, extend=True, console=QUIET)

    fails(CheckpointError, "no run to extend", recipe(out=tmp_path / "never"))
    assert not (tmp_path / "never").exists()
    fails(ConfigError, "as long as it was", copied)
    fails(
        ConfigError, r"max_steps=3 ends at step 3, and .* has done 4", copied.updated(max_steps=3)
    )
    fails(CheckpointError, "window", copied.updated(max_steps=8, window=64))
    with pytest.raises(ConfigError, match="the recipe has 2 stages"):
        next(iter(run_stages([copied, recipe(out=tmp_path / "b")], extend=True, console=QUIET)))
    with pytest.raises(CheckpointError, match="trained with max_steps=4, the recipe has 8"):
        run(copied.updated(max_steps=8), resume=True, console=QUIET)
    stop(copied.updated(max_steps=8), 6, extend=True)
    fails(CheckpointError, "at step 6 of 8: only a finished", copied.updated(max_steps=9))
    (copied.out / "step-000006/state/optimizer.safetensors").unlink()
    fails(CheckpointError, "optimizer.safetensors not found: the run can't be extended",
          copied.updated(max_steps=8))  # fmt: skip
    shutil.rmtree(copied.out / "step-000006/state")
    fails(CheckpointError, "the run can't be extended", copied.updated(max_steps=8))


def test_command_extends(copied: TrainConfig, tmp_path: Path) -> None:
    path = write_recipe(copied, tmp_path / "recipe.toml")
    command = [sys.executable, "-m", "khaosz", "train", str(path), "--extend"]
    same = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (
        same.returncode == 1 and "hint: " in same.stderr and "--extend max_steps=8" in same.stderr
    )
    done = subprocess.run([*command, "max_steps=6"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "extended from step 4 to 6: the learning rate starts a new cycle" in done.stderr
    assert resolve(copied.out / "last") == (copied.out / "step-000006").resolve()


def test_checkpoints_by_the_clock_change_nothing(recipe: Recipe, tmp_path: Path) -> None:
    """A nanosecond has always passed, so every step is saved."""
    settings = {"save_every": 1000, "eval_every": 1000, "max_steps": 5}
    plain = run(recipe(**settings, out=tmp_path / "plain"), console=QUIET)
    clock = run(recipe(**settings, out=tmp_path / "clock", save_minutes=1e-11), console=QUIET)
    assert [path.name for path in plain.config.out.glob("step-*")] == ["step-000005"]
    assert len(list(clock.config.out.glob("step-*"))) == 5
    assert_same_run(plain.config.out, clock.config.out)
