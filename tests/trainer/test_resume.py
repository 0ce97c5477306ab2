"""A run that stops at any step, also within its accumulation, resumes to the same result."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import Recipe, tiny_recipe, write_recipe

from khaosz.config import TrainConfig
from khaosz.errors import CheckpointError, ModelError
from khaosz.trainer.callback import Callback
from khaosz.trainer.checkpoint import resolve
from khaosz.trainer.run import run
from khaosz.trainer.train_context import TrainContext
from khaosz.trainer.trainer import Trainer

QUIET = Console(file=io.StringIO())


def final_state(out: Path) -> dict[str, torch.Tensor]:
    last = resolve(out / "last")
    assert last is not None
    state = load_file(str(last / "model.safetensors"))
    optimizer = load_file(str(last / "state/optimizer.safetensors"))
    return {**state, **{f"optimizer/{name}": value for name, value in optimizer.items()}}


def assert_identical(a: Path, b: Path) -> None:
    first, second = final_state(a), final_state(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    rows = [(p / "metrics.jsonl").read_text().splitlines() for p in (a, b)]
    losses = [[(json.loads(r)["step"], json.loads(r)["loss"]) for r in part] for part in rows]
    assert losses[0] == losses[1]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, micro_batch: int | None) -> None:
    """Request a stop as a signal does: after a step, or within its accumulation."""
    accumulate = Trainer._accumulate

    def stopping(self: Trainer, batches: list[Any], count: float) -> torch.Tensor | None:
        if micro_batch is not None and self.context.progress.step == step:
            self.context.stopping = "test"
        return accumulate(self, batches, count)

    def on_step(self: Callback, context: TrainContext, metrics: dict[str, Any]) -> None:
        if micro_batch is None and metrics["step"] == step:
            context.stopping = "test"

    monkeypatch.setattr(Trainer, "_accumulate", stopping)
    monkeypatch.setattr("khaosz.trainer.plots.LossCurve.on_step", on_step, raising=False)


@pytest.fixture(scope="module", params=["muon", "adamw"])
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, prepared_dir: Path
) -> TrainContext:
    """An uninterrupted run of eight steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return run(tiny_recipe(prepared_dir, out, optimizer=request.param), console=QUIET)


@pytest.mark.parametrize(("step", "micro"), [(1, None), (4, None), (5, 0)])
def test_resumed_equals_uninterrupted(
    recipe: Recipe, whole: TrainContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    step: int, micro: int | None,
) -> None:  # fmt: skip
    assert whole.progress.step == 8
    optimizer = whole.config.optimizer
    config = recipe(optimizer=optimizer, out=tmp_path / "parts")
    with monkeypatch.context() as patched:
        stop_after(patched, step, micro)
        stopped = run(config, console=QUIET)
    assert stopped.progress.step == step
    torch.manual_seed(12345)  # a resumed process starts with another random state
    resumed = run(config, resume=True, console=QUIET)
    assert resumed.progress.step == 8
    assert_identical(whole.config.out, tmp_path / "parts")


def cli(*arguments: str, **kwargs: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "khaosz", *arguments],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **kwargs,
    )  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGTERM to one process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_exits_cleanly_and_resumes(
    recipe: Recipe, tmp_path: Path, number: signal.Signals
) -> None:
    settings = {"max_steps": 1500, "save_every": 10_000, "eval_every": 10_000}
    config = recipe(**settings, out=tmp_path / "signalled")
    path = write_recipe(config, tmp_path / "recipe.toml")
    process = cli("train", str(path))
    metrics = config.out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert errors.splitlines()[-1].startswith(f"stopped by {number.name}")
    last = resolve(config.out / "last")
    assert last is not None
    stopped = int(last.name.removeprefix("step-"))
    assert 0 < stopped < 1500
    done = stopped + 10

    # The step count is part of the plan, so both runs are cut at the same place by a callback.
    def until(callback: Callback, context: TrainContext, metrics: dict[str, Any]) -> None:
        if metrics["step"] == done:
            context.stopping = "enough"

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("khaosz.trainer.plots.LossCurve.on_step", until, raising=False)
        run(config, resume=True, console=QUIET)
        run(recipe(**settings, out=tmp_path / "whole"), console=QUIET)
    assert_identical(tmp_path / "whole", config.out)


def test_resume_refuses_another_run(recipe: Recipe, tmp_path: Path) -> None:
    run(recipe(max_steps=2), console=QUIET)
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    with pytest.raises(CheckpointError, match="window"):
        run(recipe(max_steps=2, window=64), resume=True, console=QUIET)
    with pytest.raises(CheckpointError, match="model"):
        model = {**recipe().model, "num_hidden_layers": 3}
        run(recipe(max_steps=2, model=model), resume=True, console=QUIET)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before


def test_resume_of_a_finished_run_does_nothing(recipe: Recipe, finished: TrainConfig) -> None:
    config = recipe(max_steps=2)
    shutil.copytree(finished.out, config.out, symlinks=True)
    before = final_state(config.out)
    run(config, resume=True, console=QUIET)
    after = final_state(config.out)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_dropout_of_a_resumed_run_is_that_of_an_unbroken_one(
    recipe: Recipe, finished: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, optimizer and random state to the bit; at the start of the loop the random state is
    that of the checkpoint, so nothing drew from it in between."""
    settings: dict[str, Any] = {
        "size": None, "model": {}, "init_from": finished.out / "last", "prompts": ["The"],
        "lora": {"rank": 2, "dropout": 0.2}, "lr": 1e-2, "max_steps": 6, "save_every": 2,
    }  # fmt: skip
    starts: list[torch.Tensor] = []
    step = Trainer.step

    def recording(self: Trainer, number: int) -> Any:
        if number in (0, 3):
            starts.append(torch.get_rng_state())
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", recording)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(recipe(**settings, out=whole), console=QUIET)
    assert torch.equal(starts[0], torch.Generator().manual_seed(0).get_state())
    config = recipe(**settings, out=parts)
    with monkeypatch.context() as patched:
        stop_after(patched, 3, None)
        run(config, console=QUIET)
    torch.manual_seed(12345)
    run(config, resume=True, console=QUIET)
    assert_identical(whole, parts)
    saved = load_file(str(parts / "step-000003/state/rng.safetensors"))
    assert torch.equal(starts[-1], saved["cpu"])
    for name in ("step-000004", "step-000006"):
        one, two = (load_file(str(out / name / "state/rng.safetensors")) for out in (whole, parts))
        assert one.keys() == two.keys() == {"cpu"} and torch.equal(one["cpu"], two["cpu"])
        for path in (whole / name).rglob("*.safetensors"):
            assert path.read_bytes() == (parts / path.relative_to(whole)).read_bytes(), path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, prepared_dir: Path) -> TrainConfig:
    """The recipe of a finished run of two steps, not to be changed."""
    config = tiny_recipe(prepared_dir, tmp_path_factory.mktemp("finished") / "run", max_steps=2)
    run(config, console=QUIET)
    return config


READ_BY_RESUME = ["state/state.json", "state/optimizer.safetensors", "state/rng.safetensors",
                  "state/files.json", "model.safetensors", "train_config.json", "config.json",
                  "tokenizer.json", "tokenizer_config.json"]  # fmt: skip


@pytest.mark.parametrize("name", READ_BY_RESUME)
def test_refuses_a_damaged_checkpoint(recipe: Recipe, finished: TrainConfig, name: str) -> None:
    """Cut short, missing, or with one bit flipped anywhere: the file is named."""
    config = recipe(max_steps=2)
    shutil.copytree(finished.out, config.out, symlinks=True)
    path = config.out / "step-000002" / name
    content = path.read_bytes()
    flipped = [bytearray(content) for _ in range(3)]
    for copy, place in zip(flipped, (0, len(content) // 2, len(content) - 1), strict=True):
        copy[place] ^= 0x40
    for damaged in (*flipped, content[: len(content) // 2], None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"broken") as caught:
            run(config, resume=True, console=QUIET)
        assert str(path) in str(caught.value) or name == "state/files.json"


def test_refuses_optimizer_tensors_that_do_not_fit(recipe: Recipe, finished: TrainConfig) -> None:
    """Of a checkpoint without hashes, as earlier versions wrote them."""
    config = recipe(max_steps=2)
    shutil.copytree(finished.out, config.out, symlinks=True)
    state = config.out / "step-000002/state"
    (state / "files.json").unlink()
    saved = json.loads((state / "state.json").read_text(encoding="utf-8"))
    assert saved.pop("files") == "state/files.json"
    (state / "state.json").write_text(json.dumps(saved), encoding="utf-8")
    run(config, resume=True, console=QUIET)
    tensors = load_file(str(state / "optimizer.safetensors"))
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    rest = {key: tensor for key, tensor in tensors.items() if key != name}
    for wrong, what in [
        ({**rest, name: tensors[name].T.contiguous()}, "expected"),
        ({**tensors, "other/exp_avg": torch.zeros(1)}, "belongs to no parameter"),
        (rest, "is missing"),
    ]:
        save_file(wrong, str(state / "optimizer.safetensors"))
        with pytest.raises(CheckpointError, match=f"optimizer.safetensors: broken .*{what}"):
            run(config, resume=True, console=QUIET)
