"""Checkpoints are atomic, rotate, and their links are replaced atomically."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tiny import Recipe, write_recipe

from khaosz.trainer.checkpoint import point, resolve, rotate, swap_by_two_renames
from khaosz.trainer.run import run

QUIET = Console(file=io.StringIO())


def test_rotation_keeps_the_newest_checkpoints(recipe: Recipe) -> None:
    config = recipe(max_steps=9, save_every=1, keep=2, eval_every=100)
    run(config, console=QUIET)
    steps = sorted(path.name for path in config.out.glob("step-*"))
    assert steps == ["step-000008", "step-000009"]


def test_best_survives_rotation(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        (tmp_path / f"step-{step:06d}").mkdir()
    point(tmp_path / "best", tmp_path / "step-000001")
    point(tmp_path / "last", tmp_path / "step-000004")
    rotate(tmp_path, keep=1)
    assert {p.name for p in tmp_path.iterdir()} == {"step-000001", "step-000004", "best", "last"}


def test_link_is_replaced_atomically(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        point(tmp_path / "last", tmp_path / name)
        assert resolve(tmp_path / "last") == tmp_path / name
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "last"}


def test_swap_by_two_renames_recovers(tmp_path: Path) -> None:
    """As on Windows; a crash between the two renames leaves .last.new and .last.old."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    link, new, old = tmp_path / "last", tmp_path / ".last.new", tmp_path / ".last.old"
    for name in ("a", "b"):
        new.symlink_to(name, target_is_directory=True)
        swap_by_two_renames(new, link)
        assert resolve(link) == tmp_path / name
    assert not old.is_symlink() and not new.is_symlink()
    new.symlink_to("a", target_is_directory=True)
    link.rename(old)  # a crash between the renames
    assert resolve(link) == tmp_path / "a"
    assert not old.is_symlink()
    link.rename(old)  # or before the new link is created
    assert resolve(link) == tmp_path / "a"
    assert resolve(tmp_path / "never") is None


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from rich.console import Console
from khaosz.config import load_recipe
from khaosz.errors import TrainingError
from khaosz.trainer.run import run
import khaosz.trainer.callback as callback

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = callback.save_checkpoint
def save_on_a_full_disk(context):
    if context.progress.step > 3:  # files may no longer grow beyond 4 KB
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    return save(context)
callback.save_checkpoint = save_on_a_full_disk
try:
    run(load_recipe(Path(sys.argv[1])), console=Console(quiet=True))
except TrainingError as error:
    print("TrainingError:", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX")
def test_full_disk_leaves_the_earlier_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(save_every=3, eval_every=100)
    path = write_recipe(config, tmp_path / "recipe.toml")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=120
    )
    assert "TrainingError: could not write checkpoint" in done.stdout, done.stderr
    assert [p.name for p in config.out.glob("step-*")] == ["step-000003"]
    assert not list(config.out.glob(".step-*"))
    assert resolve(config.out / "last") == (config.out / "step-000003").resolve()
    run(config, resume=True, console=QUIET)
    assert resolve(config.out / "last") == (config.out / "step-000008").resolve()
