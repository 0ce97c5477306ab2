"""One run at a time in an output directory, and what `--resume` finds there."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from tiny import Recipe, stopping_after, tiny_recipe, write_recipe

from khaosz.config import TrainConfig
from khaosz.errors import CheckpointError, ConfigError, TrainingError
from khaosz.files import FolderInUse, exclusive
from khaosz.trainer.checkpoint import point, resolve, rotate
from khaosz.trainer.run import run

QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, prepared_dir: Path) -> TrainConfig:
    config = tiny_recipe(prepared_dir, tmp_path_factory.mktemp("finished") / "run", save_every=2)
    run(config, console=QUIET)
    return config


@pytest.fixture
def copied(finished: TrainConfig, recipe: Recipe) -> TrainConfig:
    """The finished run with checkpoints at 2, 4, 6 and 8, stopped at 4."""
    config = recipe(save_every=2)
    shutil.copytree(finished.out, config.out, symlinks=True)
    point(config.out / "last", config.out / "step-000004")
    return config


@pytest.mark.parametrize("name", ["last", "step-000008", "last/more", "best/data/x"])
def test_a_checkpoint_of_another_run_is_no_output_directory(
    finished: TrainConfig, recipe: Recipe, name: str
) -> None:
    before = sorted(path.name for path in (finished.out / "last").iterdir())
    with pytest.raises(ConfigError, match="is a checkpoint of another run"):
        run(recipe(out=finished.out / name), console=QUIET)
    assert sorted(path.name for path in (finished.out / "last").iterdir()) == before


def test_lock_excludes_processes_and_threads_until_the_holder_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from khaosz.files import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(FolderInUse, match=f"process {holder.pid} on "), exclusive(out):
        pass
    holder.kill()
    holder.communicate()
    with exclusive(out) as is_held:
        assert is_held
        errors: list[BaseException] = []

        def second() -> None:
            try:
                with exclusive(out):
                    pass
            except FolderInUse as error:
                errors.append(error)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert str(os.getpid()) in str(errors[0])
    assert list(out.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGKILL")
def test_second_run_in_one_directory_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    """Neither a new run nor a resumed one; after a SIGKILL the directory is free."""
    settings = {"max_steps": 100_000, "save_every": 5, "eval_every": 100_000}
    config = recipe(**settings)
    path = write_recipe(config, tmp_path / "recipe.toml")
    command = [sys.executable, "-m", "khaosz", "train", str(path)]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while resolve(config.out / "last") is None:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.02)
    for resume in (False, True):
        with pytest.raises(
            TrainingError, match=rf"in use: process {first.pid} on \S+ trains there"
        ):
            run(config, resume=resume, console=QUIET)
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    last = resolve(config.out / "last")
    assert last is not None
    with (
        pytest.MonkeyPatch.context() as patched,
        stopping_after(int(last.name.removeprefix("step-")) + 1, patched),
    ):
        run(config, resume=True, console=QUIET)


def test_stale_checkpoint_is_replaced_not_adopted(copied: TrainConfig) -> None:
    whole = (copied.out / "step-000006/model.safetensors").read_bytes()
    for step in (6, 8):  # of another run, or never linked
        (copied.out / f"step-00000{step}/model.safetensors").write_bytes(b"stale")
    run(copied, resume=True, console=QUIET)
    assert (copied.out / "step-000006/model.safetensors").read_bytes() == whole
    assert (copied.out / "step-000008/model.safetensors").read_bytes() != b"stale"
    assert not list(copied.out.glob(".step-*"))


def test_resume_that_trains_no_step_leaves_its_checkpoint_alone(
    copied: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (copied.out / "step-000004").stat()
    started = threading.Event()
    monkeypatch.setattr("khaosz.trainer.trainer.Trainer.step", lambda self, step: started.set())
    run(copied, resume=True, console=QUIET)
    assert started.is_set() and (copied.out / "step-000004").stat().st_ino == before.st_ino


def test_rotation_is_by_number_and_leaves_later_checkpoints(tmp_path: Path) -> None:
    for step in (99_998, 99_999, 999_999, 1_000_000, 1_000_001, 1_000_009):
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / ".step-000007.partial").mkdir()
    (tmp_path / "step-notes").mkdir()
    point(tmp_path / "last", tmp_path / "step-1000001")
    point(tmp_path / "best", tmp_path / "step-099998")
    rotate(tmp_path, keep=2)
    left = {int(path.name[5:]) for path in tmp_path.glob("step-[0-9]*")}
    assert left == {99_998, 1_000_000, 1_000_001, 1_000_009}
    assert (tmp_path / "step-notes").exists() and not list(tmp_path.glob(".step*"))


@pytest.mark.parametrize("state", ["absent", "empty", "killed before its first checkpoint"])
def test_resume_starts_where_nothing_was_saved(recipe: Recipe, state: str) -> None:
    config = recipe(max_steps=1)
    if state != "absent":
        config.out.mkdir()
    if state.startswith("killed"):
        (config.out / "tokenizer").mkdir()
        (config.out / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 9.0}) + "\n")
        (config.out / ".step-000001.partial").mkdir()
    said = io.StringIO()
    context = run(config, resume=True, console=Console(file=said, width=1000))
    assert f"nothing to resume in {config.out}: starting from the beginning" in said.getvalue()
    assert context.progress.step == 1 and resolve(config.out / "last") is not None
    assert len((config.out / "metrics.jsonl").read_text().splitlines()) == 1


def test_resume_does_not_start_where_something_is(
    recipe: Recipe, copied: TrainConfig, tmp_path: Path
) -> None:
    other = recipe(out=tmp_path / "other")
    other.out.mkdir()
    (other.out / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"nothing to resume, .* holds thesis.txt"):
        run(other, resume=True, console=QUIET)
    assert [path.name for path in other.out.iterdir()] == ["thesis.txt"]

    (copied.out / "last").unlink()  # as a copy without links
    with pytest.raises(CheckpointError, match=r"last, the newest .* missing") as caught:
        run(copied, resume=True, console=QUIET)
    assert "ln -sfn step-000008" in str(caught.value.hint)
    with pytest.raises(CheckpointError, match="already contains a run"):
        run(copied, console=QUIET)
    shutil.copytree(copied.out / "step-000004", copied.out / "last")  # or with copies for links
    with pytest.raises(CheckpointError, match="is not a link"):
        run(copied, resume=True, console=QUIET)
    shutil.rmtree(copied.out / "last")
    (copied.out / "last").symlink_to("step-000777")  # of a checkpoint that was removed
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"already contains a run|leads nowhere"):
            run(copied, resume=resume, console=QUIET)


def test_damaged_checkpoint_names_an_earlier_one(copied: TrainConfig) -> None:
    (copied.out / "step-000004/state/rng.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"rng.safetensors is broken: it is missing"
    ) as caught:
        run(copied, resume=True, console=QUIET)
    assert "ln -sfn step-000002" in str(caught.value.hint)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that takes no file")
def test_place_that_takes_no_folder_suggests_another(recipe: Recipe) -> None:
    with pytest.raises(TrainingError, match="/proc/") as error:
        run(recipe(out=Path("/proc/khaosz"), max_steps=1), console=QUIET)
    assert error.value.hint == "choose another out="
