"""`eval preference` and `lora merge` on real runs."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from khaosz.cli import app
from khaosz.errors import ConfigError, ModelError
from khaosz.evaluation import preference_accuracy
from khaosz.evaluation.preference import wilson
from khaosz.interop.models import load_model
from khaosz.trainer.run import run
from khaosz.trainer.stages.validation import calibration_table

QUIET = Console(file=io.StringIO())


def test_trained_reward_model_agrees_with_its_pairs(align: Any, pairs_file: Path) -> None:
    config = align("rm", max_steps=30, val_fraction=0.0, embedding_lr=5e-3, lr=5e-3)
    run(config, console=QUIET)
    actual = preference_accuracy(config.out / "last", pairs_file)
    assert actual.judged_by == "reward" and actual.pairs == 16 and actual.skipped == 0
    assert actual.accuracy >= 0.9 and actual.margin > 0
    assert sum(pairs for _, _, pairs in actual.calibration) == 16
    with pytest.raises(ModelError, match="takes no reference"):
        preference_accuracy(config.out / "last", pairs_file, reference=config.out / "last")


def test_policy_is_compared_with_its_start(align: Any, pairs_file: Path, tmp_path: Path) -> None:
    start = align("dpo", out=tmp_path / "start", max_steps=1, lr=1e-9, embedding_lr=1e-9)
    run(start, console=QUIET)
    base = start.out / "last"
    config = align(
        "dpo", max_steps=20, val_fraction=0.0, init_from=base, size=None, model={}, tokenizer=None
    )
    run(config, console=QUIET)
    runner = CliRunner()
    command = ["eval", "preference", str(config.out / "last"), str(pairs_file), "--json"]
    done = runner.invoke(app, [*command, "--reference", str(base)])
    actual = json.loads(done.stdout)
    assert actual["judged_by"] == "implicit" and actual["accuracy"] > 0.7
    same = preference_accuracy(base, pairs_file, reference=base)
    assert same.accuracy == 0.5 and same.margin == 0.0
    plain = json.loads(runner.invoke(app, command).stdout)
    assert plain["judged_by"] == "likelihood"


def test_refuses_a_reference_with_another_tokenizer(
    align: Any, pairs_file: Path, tmp_path: Path
) -> None:
    one, two = (
        align("dpo", max_steps=1),
        align("dpo", max_steps=1, out=tmp_path / "two", tokenizer=None, vocab_size=300),
    )
    run(one, console=QUIET), run(two, console=QUIET)
    with pytest.raises(ConfigError, match="another tokenizer"):
        preference_accuracy(one.out / "last", pairs_file, reference=two.out / "last")


def test_wilson_interval() -> None:
    # Newcombe 1998, table I: 81 of 263 -> 0.2553 to 0.3662.
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == pytest.approx(1.0)


def test_calibration_bins() -> None:
    gaps = torch.tensor([0.1, -0.1, 3.0, 3.0, 3.0, -3.0])
    low, high = calibration_table(gaps, bins=2)
    assert low[2] == high[2] == 3
    assert low[0] < high[0] and high[1] == pytest.approx(2 / 3)
    assert high[0] == pytest.approx(1 / (1 + math.exp(-3)))


def test_adapter_is_merged_into_its_base(align: Any, tmp_path: Path) -> None:
    start = align("dpo", out=tmp_path / "start", max_steps=2)
    run(start, console=QUIET)
    config = align(
        "dpo",
        max_steps=3,
        lora={"rank": 4},
        init_from=start.out / "last",
        size=None,
        model={},
        tokenizer=None,
    )
    run(config, console=QUIET)
    out = tmp_path / "merged"
    runner = CliRunner()
    command = ["lora", "merge", str(config.out / "last/adapter"), "--out", str(out)]
    done = runner.invoke(app, command)
    assert done.exit_code == 0, done.output
    merged, served = load_model(out), load_model(config.out / "last")
    for name, value in served.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value)
    with pytest.raises(ModelError, match="exists"):
        runner.invoke(app, command, catch_exceptions=False)
