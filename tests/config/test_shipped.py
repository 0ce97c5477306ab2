"""Recipes are found by name, from any directory, and name nothing that only the repository has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from khaosz.cli import app
from khaosz.config import TrainConfig, find_recipe, load_stages, shipped_recipes
from khaosz.errors import ConfigError, KhaoszError

ROOT = Path(__file__).parents[2]


def test_recipes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pt").mkdir()  # a folder is not a recipe
    assert {"pt", "sft", "rm", "dpo", "ppo", "grpo", "embed", "demo"} <= shipped_recipes().keys()
    for name, first in shipped_recipes().items():
        assert first and load_stages(Path(name)) == load_stages(Path(f"{name}.toml"))
    assert load_stages(Path("dpo"))[0].data.is_file()
    own = tmp_path / "sft"
    own.write_text('stage = "pt"\ndata = "a"\nout = "b"\nmax_steps = 5\n')
    assert find_recipe(Path("sft")) == Path("sft"), "a file comes first"
    with pytest.raises(ConfigError, match=r"recipe not found: recipes/ptt.toml") as error:
        find_recipe(Path("recipes/ptt.toml"))
    assert error.value.hint == "did you mean 'pt'?"


def test_samples_are_found_by_name() -> None:
    values = {"stage": "dpo", "out": "o", "size": "nano", "max_steps": 1}
    config = TrainConfig.parse({**values, "data": "sample:preference", "val": "sample:preference"})
    assert config.val == config.data and config.data.is_file()
    with pytest.raises(ConfigError, match="sample 'prefs' not found"):
        TrainConfig.parse({**values, "data": "sample:prefs"})


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_recipes_name_no_path_of_the_repository(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(recipes|docs|tests|bench)/", text)


def test_recipes_are_package_data() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"]["force-include"] == {"recipes": "khaosz/recipes"}


def test_recipes_are_listed_and_printed() -> None:
    listed = CliRunner().invoke(app, ["recipes"]).output
    assert all(f"\n{name} " in f"\n{listed}" for name in shipped_recipes())
    printed = CliRunner().invoke(app, ["recipes", "pt"]).output
    assert printed == (ROOT / "recipes/pt.toml").read_text(encoding="utf-8")


def test_dry_run_derives_everything_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["train", "dpo", "--dry-run"])
    assert done.exit_code == 0, done.output
    for shown in ("dpo: ", "hidden_size = 256", "lr = ", "parameters: ", "steps: "):
        assert shown in done.output
    refused = CliRunner().invoke(app, ["train", "dpo", "--dry-run", "window=100000"])
    assert isinstance(refused.exception, KhaoszError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_recipe_of_an_installed_wheel(tmp_path: Path) -> None:
    """The wheel in a directory of its own, with the dependencies of this environment."""
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target"]
    subprocess.run([*pip, str(tmp_path / "site"), str(ROOT)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    work = tmp_path / "work"
    work.mkdir()

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(tmp_path / "site") in run("-c", "import khaosz; print(khaosz.__file__)")
    run("-m", "khaosz", "train", "dpo", "max_steps=2", "compile=off")
    assert (work / "runs/dpo/last/model.safetensors").exists()
