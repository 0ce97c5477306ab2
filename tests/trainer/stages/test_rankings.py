"""A ranking of K answers counts as one comparison, not as K(K-1)/2: against float64 arithmetic."""

from __future__ import annotations

import copy
import io
import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_pairs import WINDOW, dpo, gradients, moved, rm, slow_logprob, with_reference
from typer.testing import CliRunner

from khaosz.cli import app
from khaosz.data.records.preference import EncodedPair, load_pairs
from khaosz.data.tokenizer import Tokenizer
from khaosz.model import RewardModel, Transformer
from khaosz.trainer.run import run
from khaosz.trainer.stages.pairs import PairSet
from khaosz.trainer.stages.validation import evaluate_pairs, pair_gaps
from khaosz.trainer.strategy import Compute

ANSWERS = ["水是生命", "Water.", "I do not know that", "雨"]
RECORDS: list[dict[str, Any]] = [
    {"prompt": "What is water?", "answers": ANSWERS, "ranking": [1, 0, 3, 2]},
    {"prompt": "你好", "chosen": "你好！", "rejected": "no"},
    {"prompt": "What is water?", "answers": ANSWERS, "ranking": [1, 0, 3, 2]},  # another person
    {"prompt": "What is water?", "answers": ANSWERS, "ranking": [3, [0, 1], 2]},
    {"prompt": "Name a fruit.", "chosen": "An apple", "rejected": "A car, which is red"},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rankings.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def pairs(file: Path, tokenizer: Tokenizer) -> list[EncodedPair]:
    return load_pairs([file], tokenizer, WINDOW).train


def comparisons() -> list[list[tuple[str, str]]]:
    """The pairs of each record, by hand."""
    listed = []
    for record in RECORDS:
        if "ranking" not in record:
            listed.append([(record["chosen"], record["rejected"])])
            continue
        levels = [level if isinstance(level, list) else [level] for level in record["ranking"]]
        listed.append(
            [
                (ANSWERS[better], ANSWERS[worse])
                for above, below in combinations(levels, 2)
                for better in above
                for worse in below
            ]
        )
    return listed


def by_text(pairs: list[EncodedPair], tokenizer: Tokenizer) -> dict[str, EncodedPair]:
    own = {}
    for pair in pairs:
        for ids in (pair.chosen_ids, pair.rejected_ids):
            own[tokenizer.decode(ids[:-1].tolist())] = (pair.prompt_ids, ids)
    return own


def mean_over_records(values: dict[tuple[str, str], float]) -> float:
    """(1/N) sum over records, (1 / (K choose 2)) sum over the pairs of each."""
    records = [[values[pair] for pair in record] for record in comparisons()]
    return sum(sum(record) / len(record) for record in records) / len(records)


def test_a_record_is_a_draw(pairs: list[EncodedPair]) -> None:
    assert [len(draw) for draw in PairSet(pairs).draws] == [6, 1, 6, 5, 1]


@pytest.mark.parametrize("per_step", [1, 5])
def test_reward_loss_of_rankings(
    model: Transformer, pairs: list[EncodedPair], tokenizer: Tokenizer, per_step: int
) -> None:
    reward_model = RewardModel.from_transformer(model)
    generator = torch.Generator().manual_seed(3)
    torch.nn.init.normal_(reward_model.score.weight, generator=generator)
    wide = copy.deepcopy(reward_model).double()
    rewards = {}
    for text, (prompt, answer) in by_text(pairs, tokenizer).items():
        ids = torch.tensor([[*prompt.tolist(), *answer.tolist()]])
        with torch.no_grad():
            rewards[text] = float(wide.rewards(wide(ids))[0, -1])
    both = {pair for record in comparisons() for pair in record}
    losses = {(c, r): math.log1p(math.exp(rewards[r] - rewards[c])) for c, r in both}
    right = {(c, r): float(rewards[c] > rewards[r]) for c, r in both}
    gaps = {(c, r): rewards[c] - rewards[r] for c, r in both}

    strategy = rm(pairs, per_step=per_step)
    loss, _ = gradients(strategy, reward_model, steps=5 // per_step)
    count = len(RECORDS)
    assert loss == pytest.approx(mean_over_records(losses), abs=1e-6)  # fp32
    metrics = {name: float(value) / count for name, value in strategy.metric_sums.items()}
    assert metrics["accuracy"] == pytest.approx(mean_over_records(right), abs=1e-6)
    assert metrics["margin"] == pytest.approx(mean_over_records(gaps), abs=1e-5)

    held_out = rm(pairs)
    held_out.held_out = held_out.data
    scores = evaluate_pairs(held_out, reward_model, Compute())
    assert scores["loss"] == pytest.approx(mean_over_records(losses), abs=1e-6)
    assert scores["accuracy"] == pytest.approx(mean_over_records(right), abs=1e-6)
    differences, weights = pair_gaps(held_out, reward_model, Compute())
    assert len(differences) == 19 and float(weights.sum()) == pytest.approx(count)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "simpo"])
def test_preference_loss_of_rankings(
    model: Transformer, pairs: list[EncodedPair], tokenizer: Tokenizer, kind: str
) -> None:
    own = by_text(pairs, tokenizer)
    before = {text: slow_logprob(model, *ids) for text, ids in own.items()}
    strategy = with_reference(dpo(pairs, per_step=5, loss=kind, beta=0.3), model)
    moved(model)
    after = {text: slow_logprob(model, *ids) for text, ids in own.items()}
    tokens = {text: len(answer) for text, (_, answer) in own.items()}
    losses = {}
    for chosen, rejected in {pair for record in comparisons() for pair in record}:
        gap = after[chosen] - before[chosen] - after[rejected] + before[rejected]
        means = [after[text] / tokens[text] for text in (chosen, rejected)]
        losses[chosen, rejected] = {
            "sigmoid": math.log1p(math.exp(-0.3 * gap)),
            "ipo": (gap - 1 / 0.6) ** 2,
            "simpo": math.log1p(math.exp(-(0.3 * (means[0] - means[1]) - 0.5))),
        }[kind]
    loss, _ = gradients(strategy, model, steps=1)
    # fp32 log-probabilities of up to 60 nats, against float64.
    assert loss == pytest.approx(mean_over_records(losses), rel=1e-4)


def test_a_ranking_weighs_as_a_pair_in_the_gradient(
    model: Transformer, pairs: list[EncodedPair]
) -> None:
    """The gradient of all records is the mean of the gradients of each."""
    whole = gradients(rm(pairs, per_step=5), RewardModel.from_transformer(model), steps=1)[1]
    alone = []
    for draw in PairSet(pairs).draws:
        reward_model = RewardModel.from_transformer(model)
        alone.append(gradients(rm([pairs[i] for i in draw], 1), reward_model, steps=1)[1])
    for name, gradient in whole.items():
        expected = torch.stack([one[name] for one in alone]).mean(0)
        # fp32 sums in another order, relative to the largest entry.
        scale = max(float(expected.abs().max()), 1e-6)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=2e-5 * scale)


def test_evaluation_counts_a_ranking_once(align: Any, file: Path, tmp_path: Path) -> None:
    config = align("rm", data=file, max_steps=2, val_fraction=0.0, batch_pairs=2)
    context = run(config, console=Console(file=io.StringIO()))
    command = ["eval", "preference", str(config.out / "last"), str(file)]
    done = CliRunner().invoke(app, [*command, "--json"])
    actual = json.loads(done.stdout)
    assert (actual["pairs"], actual["examples"]) == (19, 5)
    strategy = rm(load_pairs([file], context.tokenizer, WINDOW).train)
    strategy.held_out = strategy.data
    scores = evaluate_pairs(strategy, context.model, Compute())
    assert actual["accuracy"] == pytest.approx(scores["accuracy"])
    assert actual["margin"] == pytest.approx(scores["margin"], abs=1e-6)
    text = CliRunner().invoke(app, command).stdout
    assert "of 19 pairs in 5 rankings and pairs" in text
