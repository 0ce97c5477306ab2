"""Signs that preference training destroys the model, which its loss does not show."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from khaosz.trainer.outcome import collapse_signs
from khaosz.trainer.run import run


def test_collapse_is_seen_by_the_shift_of_the_chosen_answers() -> None:
    assert collapse_signs({}, {"chosen_shift": -0.5, "kl": -40.0, "answer_tokens": 80.0}) == []
    (sign,) = collapse_signs({}, {"chosen_shift": -0.9})
    assert sign == "collapse: chosen answers lost 0.9 nats per token"
    (sign,) = collapse_signs({}, {"val_chosen_shift": -2.0, "chosen_shift": -3.0})
    assert sign == "collapse: held-out chosen answers lost 2 nats per token"


def test_collapse_without_a_reference_is_seen_from_the_start() -> None:
    start = {"logprob_chosen": -1.0, "val_logprob_chosen": -1.0}
    assert collapse_signs(start, {"logprob_chosen": -2.0, "val_logprob_chosen": -1.5}) == []
    assert len(collapse_signs(start, {"logprob_chosen": -2.0, "val_logprob_chosen": -1.8})) == 1
    assert len(collapse_signs(start, {"logprob_chosen": -2.5})) == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_exploding_kl_is_a_collapse(sign: int) -> None:
    (line,) = collapse_signs({}, {"kl": sign * 90.0, "answer_tokens": 45.0})
    assert line == f"collapse: kl {sign * 90}, 2 nats per token"
    assert collapse_signs({}, {"kl": sign * 30.0, "answer_tokens": 45.0}) == []
    # Of the data's answers a positive log-ratio means that they are learned.
    held_out = {"val_kl": sign * 90.0, "val_answer_tokens": 45.0, "val_logprob_chosen": -1.0}
    assert len(collapse_signs({}, held_out)) == (sign < 0)


def test_collapse_of_a_real_run(align: Any, tmp_path: Path) -> None:
    """A rate that is far too high: the loss looks excellent, the answers are forgotten."""
    console = Console(file=io.StringIO(), width=400)
    rates = {"lr": 0.05, "embedding_lr": 0.05}
    context = run(align("dpo", **rates, max_steps=20, eval_every=5), console=console)
    assert context.last["accuracy"] == 1.0 and context.last["loss"] < 0.1
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "warning: collapse: held-out chosen answers lost" in text
    assert any("collapse: val_kl -" in x for x in text.splitlines() if x.startswith("step"))
    healthy = Console(file=io.StringIO(), width=400)
    run(align("dpo", max_steps=6, out=tmp_path / "healthy"), console=healthy)
    assert "collapse:" not in healthy.file.getvalue()  # type: ignore[attr-defined]
