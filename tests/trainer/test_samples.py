"""Samples of a run in training are stored once for each step and prompt."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import Recipe, stopping_after

from khaosz.trainer.run import run

PROMPTS = ["春天", "The law\nsays"]


def rows(out: Path) -> list[dict[str, Any]]:
    text = (out / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_samples_are_stored_and_printed(recipe: Recipe) -> None:
    shown = io.StringIO()
    config = recipe(prompts=PROMPTS, sample_every=3)
    run(config, console=Console(file=shown, width=10_000))
    actual = rows(config.out)
    steps = [(row["step"], row["prompt"]) for row in actual]
    assert steps == [(step, prompt) for step in (3, 6, 8) for prompt in PROMPTS]
    assert all(row["text"] for row in actual)
    lines = [line for line in shown.getvalue().splitlines() if line.startswith("  sample ")]
    assert len(lines) == len(actual) and "The law" in lines[1]
    plan = json.loads((config.out / "plan.json").read_text(encoding="utf-8"))
    assert plan["total_steps"] == 8


def test_resumed_run_stores_each_sample_once(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = Console(file=io.StringIO())
    settings = {"prompts": PROMPTS, "sample_every": 3, "save_every": 3}
    whole = recipe(**settings, out=tmp_path / "whole")
    run(whole, console=quiet)
    config = recipe(**settings, out=tmp_path / "parts")
    with stopping_after(5, monkeypatch):
        run(config, console=quiet)
    # As after a kill: samples after the checkpoint, the last of them cut short.
    with (config.out / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "prompt": "x", "text": "y"}\n{"step": 7, "pro')
    run(config, resume=True, console=quiet)
    assert rows(config.out) == rows(whole.out)
