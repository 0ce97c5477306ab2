"""Preference training after its first step: references, metrics, held-out pairs."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from strategies import shifted
from torch import Tensor

from khaosz.config import LoRAConfig, PreferenceConfig, RewardConfig
from khaosz.data.records.preference import EncodedPair, load_pairs
from khaosz.data.tokenizer import Tokenizer
from khaosz.model import RewardModel, Transformer
from khaosz.model.lora import add_lora, named_adapters
from khaosz.parallel import ParallelContext
from khaosz.trainer.open_run import OpenRun, RunOrigin, open_run
from khaosz.trainer.stages import reference, validation
from khaosz.trainer.stages.dpo import DPOStrategy, RMStrategy, reference_logprobs
from khaosz.trainer.stages.logprobs import token_logprobs
from khaosz.trainer.stages.pairs import PairSet
from khaosz.trainer.stages.reference import add_reference, add_references, frozen_reference
from khaosz.trainer.stages.validation import evaluate_pairs
from khaosz.trainer.strategy import BatchLayout, Compute

WINDOW = 128
CPU = ParallelContext(torch.device("cpu"))
QUIET = Console(file=io.StringIO(), quiet=True)


@pytest.fixture
def loaded(pairs_file: Path, tokenizer: Tokenizer) -> list[EncodedPair]:
    return load_pairs([pairs_file], tokenizer, WINDOW).train


def dpo(
    train: list[EncodedPair],
    held_out: list[EncodedPair] | None = None,
    micro_rows: int = 2,
    parallel: ParallelContext = CPU,
    by_adapters: bool = False,
    **config: object,
) -> DPOStrategy:
    per_step = min(8, len(train))
    return DPOStrategy(
        PairSet(train), PairSet(held_out or []), BatchLayout(per_step, WINDOW, micro_rows, 0, 0),
        parallel, config=PreferenceConfig.parse(config), by_adapters=by_adapters,
    )  # fmt: skip


def alone(model: Transformer, prompt: np.ndarray, answer: np.ndarray) -> float:
    """log P of an answer, by itself and in float64."""
    ids = torch.tensor([*prompt.tolist(), *answer.tolist()])
    with torch.no_grad():
        logits = model.logits(model(ids[None]))[0]
    own = F.log_softmax(logits, -1)[:-1].gather(-1, ids[1:, None])[:, 0]
    return float(own[len(prompt) - 1 :].sum())


def table_of(model: Transformer, pairs: list[EncodedPair]) -> Tensor:
    wide = copy.deepcopy(model).double()
    rows = [
        [alone(wide, p.prompt_ids, p.chosen_ids), alone(wide, p.prompt_ids, p.rejected_ids)]
        for p in pairs
    ]
    return torch.tensor(rows, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    # fp32 against float64 over up to 60 tokens of a few nats each.
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-5)


# The reference


def test_stored_table_is_used_for_its_model_and_pairs_only(
    model: Transformer,
    loaded: list[EncodedPair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, pairs = tmp_path / "reference.safetensors", loaded[:6]
    computed = []
    compute = reference._compute

    def counted(*arguments: Any) -> Tensor:
        computed.append(1)
        return compute(*arguments)

    monkeypatch.setattr(reference, "_compute", counted)

    def table(of: list[EncodedPair]) -> Tensor:
        strategy = dpo(of)
        add_reference(strategy, strategy.data, model, Compute(), path, QUIET)
        assert strategy.data.reference is not None
        return strategy.data.reference

    first = table(pairs)
    close(first, table_of(model, pairs))
    assert torch.equal(table(pairs), first) and len(computed) == 1
    close(table(pairs[::-1]), table_of(model, pairs[::-1]))
    shifted(model)
    close(table(pairs), table_of(model, pairs))
    assert len(computed) == 3
    last = path.read_bytes()
    path.write_bytes(last[:-3] + bytes([last[-3] ^ 1]) + last[-2:])
    close(table(pairs), table_of(model, pairs))
    assert len(computed) == 4


def test_adapters_off_are_the_reference_of_a_trained_policy(
    model: Transformer, loaded: list[EncodedPair]
) -> None:
    pairs = loaded[:6]
    base = table_of(model, pairs)
    add_lora(model, LoRAConfig(rank=4, alpha=8.0), torch.Generator().manual_seed(0))
    for layer in named_adapters(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(1))
    strategy = dpo(pairs, by_adapters=True)
    policy = table_of(model, pairs)
    assert (policy - base).abs().max() > 1
    seen = []
    for batch in strategy.micro_batches(0):
        own = batch.fields["pair"]
        chosen, rejected = strategy.answers(model, batch, Compute())
        assert chosen.reference is not None and rejected.reference is not None
        close(torch.stack((chosen.reference, rejected.reference), 1), base[own])
        close(torch.stack((chosen.logprobs, rejected.logprobs), 1).detach(), policy[own])
        assert chosen.logprobs.requires_grad and not chosen.reference.requires_grad
        seen += own.tolist()
    assert sorted(seen) == list(range(6))


def test_reference_of_a_resumed_policy_is_its_start(
    align: Any, loaded: list[EncodedPair], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Never the model of the checkpoint: a table for pairs, a model for rollouts."""
    for stage in ("dpo", "grpo"):
        new = open_run(RunOrigin(align(stage, out=tmp_path / stage)), CPU, QUIET)
        new.load_model()
        origin = RunOrigin(new.config, checkpoint=tmp_path / "somewhere")
        resumed = OpenRun(origin, CPU, QUIET, new.config, tokenizer)
        resumed.model = shifted(copy.deepcopy(new.model))
        if stage == "dpo":
            strategy = dpo(loaded[:4])
            add_references(resumed, strategy, Compute())
            assert strategy.data.reference is not None
            close(strategy.data.reference, table_of(new.model, loaded[:4]))
            continue
        frozen = frozen_reference(resumed)
        for name, parameter in frozen.named_parameters():
            assert torch.equal(parameter, new.model.state_dict()[name]), name
            assert not parameter.requires_grad
        assert not frozen.training
        fresh = frozen_reference(new)
        shifted(new.model)  # a new run's reference is a copy, and stays when the policy moves
        assert not torch.equal(fresh.norm.weight, new.model.norm.weight)


def test_log_probabilities_of_bf16_states_are_fp32() -> None:
    """A log-ratio is a difference of sums of a hundred nats: bf16 keeps three digits of either."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 32, generator=generator).bfloat16()
    weight = (torch.randn(200, 32, generator=generator) * 0.2).bfloat16()
    labels = torch.randint(0, 200, (50,), generator=generator)
    actual, entropy = token_logprobs(hidden, weight, labels, entropy=True)
    every = F.log_softmax((hidden @ weight.t()).double(), -1)  # the same bf16 logits
    assert actual.dtype == entropy.dtype == torch.float32
    # fp32 against fp64 on sums of 200 terms; bf16 would be off by 2^-8 of about five nats.
    expected = every.gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    spread = -(every.exp() * every).sum(-1)
    torch.testing.assert_close(entropy.double(), spread, rtol=1e-5, atol=1e-6)


# Metrics


def test_metrics_are_the_implicit_rewards(model: Transformer, loaded: list[EncodedPair]) -> None:
    """Margin, accuracy and log-probabilities, which a loss of 0.693 does not show."""
    pairs = loaded[:8]
    before = table_of(model, pairs)
    strategy = dpo(pairs, beta=0.3)
    strategy.data.reference = before.float()
    after = table_of(shifted(model), pairs)
    tokens = torch.tensor([[len(p.chosen_ids), len(p.rejected_ids)] for p in pairs])
    worth = 0.3 * (after - before)
    for batch in strategy.micro_batches(0):
        strategy.loss(model, batch, Compute())
    expected = {
        "accuracy": float((worth[:, 0] > worth[:, 1]).sum()),
        "margin": float((worth[:, 0] - worth[:, 1]).sum()),
        "reward_chosen": float(worth[:, 0].sum()),
        "reward_rejected": float(worth[:, 1].sum()),
        "logprob_chosen": float((after / tokens)[:, 0].sum()),
        "logprob_rejected": float((after / tokens)[:, 1].sum()),
        "kl": float((after - before).sum() / 2),
        "answer_tokens": float(tokens.sum() / 2),
        "chosen_shift": float(((after - before) / tokens)[:, 0].sum()),
    }
    assert strategy.metric_sums.keys() == expected.keys()
    assert 0 < expected["accuracy"] < 8, "a case in which some are right and some are wrong"
    for name, value in expected.items():
        # Differences of sums of up to 60 nats, each exact to a millionth.
        assert float(strategy.metric_sums[name]) == pytest.approx(value, rel=1e-3, abs=1e-3), name
    assert set(strategy.progress_metrics) <= expected.keys()


def test_held_out_numbers_are_means_over_pairs(
    model: Transformer, loaded: list[EncodedPair]
) -> None:
    """The same for one pair and for many in a micro-batch; the sums of the training step stay."""
    held_out = loaded[:7]
    table = table_of(model, held_out).float()
    shifted(model)
    actual = []
    for micro_rows in (1, 3):
        strategy = dpo(loaded[7:], held_out, micro_rows)
        strategy.held_out.reference = table
        strategy.add_metrics(accuracy=torch.tensor(100.0))
        actual.append(evaluate_pairs(strategy, model, Compute()))
        assert {name: float(v) for name, v in strategy.metric_sums.items()} == {"accuracy": 100.0}
    gap = (table_of(model, held_out) - table) @ torch.tensor([1.0, -1.0]).double()
    loss = -F.logsigmoid(0.1 * gap).mean()
    for one in actual:
        assert one["loss"] == pytest.approx(float(loss), rel=1e-4)
        assert one["accuracy"] == pytest.approx(float((gap > 0).double().mean()))
        assert one["margin"] == pytest.approx(0.1 * float(gap.mean()), rel=1e-3)


def reward_model_with_dropout(model: Transformer) -> RewardModel:
    reward_model = RewardModel.from_transformer(model)
    torch.nn.init.normal_(reward_model.score.weight, generator=torch.Generator().manual_seed(3))
    lora = LoRAConfig(rank=4, alpha=8.0, dropout=0.5)
    add_lora(reward_model, lora, torch.Generator().manual_seed(0))
    for layer in named_adapters(reward_model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(1))
    reward_model.train()  # as in the loop when it validates
    return reward_model


def rm(held_out: list[EncodedPair], parallel: ParallelContext = CPU) -> RMStrategy:
    return RMStrategy(
        PairSet(held_out),
        PairSet(held_out),
        BatchLayout(8, WINDOW, 2, 0, 0),
        parallel,
        config=RewardConfig(),
    )


def test_held_out_pairs_are_scored_without_dropout(
    model: Transformer, loaded: list[EncodedPair]
) -> None:
    reward_model = reward_model_with_dropout(model)
    before = torch.get_rng_state()
    actual = [evaluate_pairs(rm(loaded[:6]), reward_model, Compute())["loss"] for _ in range(2)]
    assert actual[0] == actual[1]
    assert torch.equal(torch.get_rng_state(), before), (
        "validation must not change the random state of training"
    )


@contextmanager
def as_rank(rank: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of values that a rank adds to the sum over ranks, without the other rank."""
    lengths: list[int] = []

    def sum_over_ranks(values: list[float], context: ParallelContext) -> list[float]:
        lengths.append(len(values))
        return [value or 1.0 for value in values]

    with monkeypatch.context() as patch:
        patch.setattr(validation, "sum_over_ranks", sum_over_ranks)
        yield lengths


def test_rank_without_held_out_pairs_sums_the_same_metrics(
    model: Transformer, loaded: list[EncodedPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One held-out pair and two ranks: a sum over tensors of different lengths hangs or fails."""
    reward_model = RewardModel.from_transformer(model)
    lengths = []
    for rank in (0, 1):
        parallel = ParallelContext(torch.device("cpu"), rank, 2)
        with as_rank(rank, monkeypatch) as summed:
            evaluate_pairs(rm(loaded[:1], parallel), reward_model, Compute())
        lengths.append(summed)
    assert lengths[0] == lengths[1]


def test_reference_logprobs_go_to_their_pairs(
    model: Transformer, loaded: list[EncodedPair]
) -> None:
    """Pairs are drawn out of order: each has its row of the table."""
    strategy = dpo(loaded)
    strategy.data.reference = torch.arange(2.0 * len(loaded)).view(-1, 2)
    drawn, table = [], table_of(model, loaded)
    for batch in strategy.micro_batches(1):
        own = batch.fields["pair"]
        drawn += own.tolist()
        expected = torch.stack((2.0 * own, 2.0 * own + 1), 1)
        assert torch.equal(batch.fields["reference"], expected)
        close(reference_logprobs(model, batch, Compute()), table[own])
    assert drawn != sorted(drawn)
