"""Reward models and DPO on packed pairs: exact at step 0, independent of the layout."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from khaosz.config import PreferenceConfig, RewardConfig
from khaosz.data.batches.sequences import SequenceBatch
from khaosz.data.records.preference import EncodedPair, load_pairs
from khaosz.data.tokenizer import Tokenizer
from khaosz.model import RewardModel, Transformer
from khaosz.parallel import ParallelContext
from khaosz.trainer.stages.dpo import DPOStrategy, RMStrategy, reference_logprobs, sequence_rewards
from khaosz.trainer.stages.logprobs import batch_logprobs
from khaosz.trainer.stages.pairs import PairSet
from khaosz.trainer.strategy import BatchLayout, Compute

WINDOW = 128
CPU = ParallelContext(torch.device("cpu"))


@pytest.fixture
def pairs(pairs_file: Path, tokenizer: Tokenizer) -> list[EncodedPair]:
    return load_pairs([pairs_file], tokenizer, WINDOW).train


def dpo(
    pairs: list[EncodedPair],
    per_step: int = 8,
    micro_rows: int = 2,
    window: int = WINDOW,
    pad_id: int = 0,
    **config: object,
) -> DPOStrategy:
    return DPOStrategy(
        PairSet(pairs), PairSet([]), BatchLayout(per_step, window, micro_rows, pad_id, 0), CPU,
        config=PreferenceConfig.parse(config),
    )  # fmt: skip


def with_reference(strategy: DPOStrategy, model: Transformer) -> DPOStrategy:
    table = torch.zeros(len(strategy.data.pairs), 2)
    for batch in strategy.batches(strategy.data, strategy.data.draws):
        table[batch.fields["pair"]] = reference_logprobs(model, batch, Compute())
    strategy.data.reference = table
    return strategy


def gradients(
    strategy: DPOStrategy | RMStrategy, model: torch.nn.Module, steps: int = 2
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients summed over the pairs of some steps."""
    model.zero_grad()
    total, count = 0.0, 0
    for step in range(steps):
        for batch in strategy.micro_batches(step):
            loss = strategy.loss(model, batch, Compute())
            loss.backward()
            total += loss.item()
            count += strategy.count(batch)
    actual = {n: p.grad.clone() / count for n, p in model.named_parameters() if p.grad is not None}
    return total / count, actual


def slow_logprob(model: Transformer, prompt: np.ndarray, answer: np.ndarray) -> float:
    """log P of an answer alone, whole logits in float64."""
    ids = torch.tensor([*prompt.tolist(), *answer.tolist()])
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        logits = wide.logits(wide(ids[None]))[0]
    own = F.log_softmax(logits, -1)[:-1].gather(-1, ids[1:, None])[:, 0]
    return float(own[len(prompt) - 1 :].sum())


def test_log_probabilities_of_packed_answers(model: Transformer, pairs: list[EncodedPair]) -> None:
    strategy = dpo(pairs, per_step=len(pairs))
    seen = 0
    for batch in strategy.micro_batches(0):
        sums = batch.per_sequence(batch_logprobs(model, batch, Compute())[0])
        for pair, chosen, rejected in zip(
            *(batch.fields[n].tolist() for n in ("pair", "chosen", "rejected")), strict=True
        ):
            own = pairs[pair]
            for index, answer in ((chosen, own.chosen_ids), (rejected, own.rejected_ids)):
                expected = slow_logprob(model, own.prompt_ids, answer)
                # fp32 against float64 over up to 60 tokens of a few nats each.
                assert sums[index].item() == pytest.approx(expected, rel=2e-5)
            seen += 1
    assert seen == len(pairs)


def test_step_0_is_ln_2(model: Transformer, pairs: list[EncodedPair]) -> None:
    strategy = dpo(pairs, per_step=len(pairs))
    table = torch.full((len(pairs), 2), math.nan)
    for batch in strategy.micro_batches(0):  # the layout of training
        table[batch.fields["pair"]] = reference_logprobs(model, batch, Compute())
    strategy.data.reference = table
    loss, _ = gradients(strategy, model, steps=1)
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    cached = with_reference(dpo(pairs, per_step=3, micro_rows=5), model)  # another layout
    assert gradients(cached, model)[0] == pytest.approx(math.log(2), abs=1e-3)


def moved(model: Transformer) -> Transformer:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo", "orpo"])
def test_dpo_loss_is_that_of_each_pair_alone(
    model: Transformer, pairs: list[EncodedPair], loss: str
) -> None:
    strategy = with_reference(dpo(pairs, loss=loss, beta=0.3), model)
    before = {
        i: (slow_logprob(model, p.prompt_ids, p.chosen_ids),
            slow_logprob(model, p.prompt_ids, p.rejected_ids))
        for i, p in enumerate(pairs)
    }  # fmt: skip
    moved(model)
    total = 0.0
    for i, pair in enumerate(pairs):
        pc = slow_logprob(model, pair.prompt_ids, pair.chosen_ids)
        pr = slow_logprob(model, pair.prompt_ids, pair.rejected_ids)
        gap = (pc - before[i][0]) - (pr - before[i][1])
        nc, nr = len(pair.chosen_ids), len(pair.rejected_ids)
        match loss:
            case "sigmoid":
                total += math.log1p(math.exp(-0.3 * gap))
            case "ipo":
                total += (gap - 1 / 0.6) ** 2
            case "simpo":
                total += math.log1p(math.exp(-(0.3 * (pc / nc - pr / nr) - 0.5)))
            case "orpo":
                odds = [m - math.log(-math.expm1(m)) for m in (pc / nc, pr / nr)]
                total += -pc / nc + 0.3 * math.log1p(math.exp(-(odds[0] - odds[1])))
    actual, _ = gradients(strategy, model, steps=2)
    assert actual == pytest.approx(total / len(pairs), rel=1e-4)  # fp32 log-probabilities


LAYOUTS = [
    {"per_step": 8, "micro_rows": 1},
    {"per_step": 8, "micro_rows": 6},
    {"per_step": 8, "micro_rows": 2, "window": 160, "pad_id": 7},
    {"per_step": 16, "micro_rows": 3},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_do_not_depend_on_the_layout(
    model: Transformer, pairs: list[EncodedPair], layout: dict[str, int]
) -> None:
    """Accumulation split, packing, order, amount and id of padding."""
    plain = with_reference(dpo(pairs), model)
    other = dpo(pairs, **layout)
    other.data.reference = plain.data.reference
    moved(model)
    loss, expected = gradients(plain, model, steps=len(pairs) // 8)
    again, actual = gradients(other, model, steps=len(pairs) // layout["per_step"])
    assert again == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        # fp32 sums in another order, relative to the largest entry of each tensor.
        scale = float(gradient.abs().max())
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=2e-5 * scale)


def test_rows_of_one_shape_change_nothing(model: Transformer, pairs: list[EncodedPair]) -> None:
    plain = with_reference(dpo(pairs), model)
    padded = dpo(pairs)
    padded.data.reference, padded.layout.one_shape = plain.data.reference, True
    moved(model)
    assert {tuple(b.ids.shape) for b in padded.micro_batches(0)} == {(2, WINDOW)}
    loss, _ = gradients(plain, model)
    assert gradients(padded, model)[0] == pytest.approx(loss, rel=1e-6)


def test_masked_positions_change_nothing(model: Transformer, pairs: list[EncodedPair]) -> None:
    """A NaN wherever nothing is scored (prompts, padding) changes neither loss nor gradients."""
    strategy = with_reference(dpo(pairs), model)

    class Poisoned(Transformer):
        def forward(self, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
            hidden = super().forward(ids, *rest)
            return torch.where(self.masked[..., None], math.nan, hidden)

    batch = strategy.micro_batches(0)[0]
    plain = strategy.loss(model, batch, Compute())
    plain.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.__class__, model.masked = Poisoned, batch.labels == -100
    poisoned = strategy.loss(model, batch, Compute())
    poisoned.backward()
    assert torch.equal(poisoned, plain)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, expected[name])


def test_packed_neighbours_do_not_change_an_answer(
    model: Transformer, pairs: list[EncodedPair]
) -> None:
    """The log-probability of an answer does not depend on packed neighbours."""
    first, second = pairs[0], pairs[1]
    other = replace(second, chosen_ids=second.chosen_ids[::-1].copy())

    def of_first(members: list[EncodedPair]) -> torch.Tensor:
        (batch,) = dpo(members, per_step=2, micro_rows=4).micro_batches(0)
        index = batch.fields["pair"].tolist().index(0)
        return reference_logprobs(model, batch, Compute())[index]

    assert torch.equal(of_first([first, second]), of_first([first, other]))


def test_missing_reference_raises(model: Transformer, pairs: list[EncodedPair]) -> None:
    from khaosz.errors import TrainingError

    strategy = with_reference(dpo(pairs), model)
    assert strategy.data.reference is not None
    strategy.data.reference[3] = math.nan
    with pytest.raises(TrainingError, match="no reference"):
        gradients(strategy, model)


def rm(
    pairs: list[EncodedPair], per_step: int = 8, micro_rows: int = 2, **config: object
) -> RMStrategy:
    return RMStrategy(
        PairSet(pairs), PairSet([]), BatchLayout(per_step, WINDOW, micro_rows, 0, 0), CPU,
        config=RewardConfig.parse(config),
    )  # fmt: skip


def test_rewards_are_those_of_the_last_real_token(
    model: Transformer, pairs: list[EncodedPair], tokenizer: Tokenizer
) -> None:
    reward_model = RewardModel.from_transformer(model)
    torch.nn.init.normal_(reward_model.score.weight)
    batch = rm(pairs).micro_batches(0)[0]
    assert (batch.ids.reshape(-1)[batch.ends] == tokenizer.end_id).all()
    actual = sequence_rewards(reward_model, batch, Compute())
    for pair, chosen in zip(
        batch.fields["pair"].tolist(), batch.fields["chosen"].tolist(), strict=True
    ):
        ids = torch.tensor([[*pairs[pair].prompt_ids, *pairs[pair].chosen_ids]])
        alone = reward_model.rewards(reward_model(ids))[0, -1]
        torch.testing.assert_close(actual[chosen], alone, rtol=0, atol=1e-5)  # fp32, another shape


def test_new_reward_model_gives_equal_rewards(model: Transformer, pairs: list[EncodedPair]) -> None:
    reward_model = RewardModel.from_transformer(model)
    strategy = rm(pairs)
    loss, _ = gradients(strategy, reward_model)
    assert loss == math.log(2) or loss == pytest.approx(math.log(2), abs=1e-7)
    assert float(strategy.metric_sums["accuracy"]) == len(pairs) / 2


def test_margins_and_centring_change_the_loss(model: Transformer, pairs: list[EncodedPair]) -> None:
    reward_model = RewardModel.from_transformer(model)
    torch.nn.init.normal_(reward_model.score.weight)
    marked = [replace(pair, margin=0.5) for pair in pairs]
    plain = gradients(rm(marked, use_margins=False), reward_model)[0]
    assert gradients(rm(pairs), reward_model)[0] == pytest.approx(plain, rel=1e-6)
    assert gradients(rm(marked), reward_model)[0] > plain
    assert gradients(rm(pairs, centre=0.1), reward_model)[0] > plain


def test_ranked_answers_share_their_forward_pass(
    model: Transformer, pairs: list[EncodedPair]
) -> None:
    """Three ranked answers are three pairs, one draw and three sequences, not six."""
    a, b, c = pairs[0].chosen_ids, pairs[1].chosen_ids, pairs[2].chosen_ids
    prompt = pairs[0].prompt_ids
    ranked = [
        EncodedPair(prompt, better, worse, group="g") for better, worse in ((a, b), (a, c), (b, c))
    ]
    strategy = rm([*ranked, *pairs[3:]], per_step=4, micro_rows=1)
    assert len(strategy.data.draws) == len(pairs) - 2
    batches = [b for step in range(4) for b in strategy.micro_batches(step)]
    together: list[SequenceBatch] = [b for b in batches if 0 in b.fields["pair"].tolist()]
    for batch in together:
        assert {0, 1, 2} <= set(batch.fields["pair"].tolist())
        of_group = [i for i, pair in enumerate(batch.fields["pair"].tolist()) if pair < 3]
        used = {int(batch.fields[s][i]) for i in of_group for s in ("chosen", "rejected")}
        assert len(used) == 3


def test_every_pair_comes_once_an_epoch(pairs: list[EncodedPair]) -> None:
    for world in (1, 2):
        seen: list[int] = []
        for step in range(len(pairs) // 4):
            for rank in range(world):
                strategy = dpo(pairs, per_step=4)
                strategy.parallel = ParallelContext(torch.device("cpu"), rank, world)
                for batch in strategy.micro_batches(step):
                    seen += batch.fields["pair"].tolist()
        assert sorted(seen) == list(range(len(pairs)))


def test_compiled_rows_are_fitted_to_the_pairs() -> None:
    """Two answers of 24 tokens in rows of 32 need two rows a pair: of up to five, four at once
    leave none empty over steps of two pairs."""
    answer = np.arange(20, 40, dtype=np.int32)
    same = [EncodedPair(answer[:4], answer + i, answer + i + 1) for i in range(6)]
    strategy = dpo(same, per_step=2, window=32, micro_rows=5)
    strategy.fit_micro_rows()
    assert strategy.layout.micro_rows == 4
    strategy.layout.one_shape = True
    assert [batch.ids.shape for batch in strategy.micro_batches(0)] == [(4, 32)]
