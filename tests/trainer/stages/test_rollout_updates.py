"""PPO and GRPO after an update of the policy, where all terms of the loss differ."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import CPU, Make, rlhf_strategies, shifted
from torch import Tensor, nn

from khaosz.config import LoRAConfig, TrainConfig
from khaosz.data.tokenizer import Tokenizer
from khaosz.model import Transformer
from khaosz.model.lora import add_lora, named_adapters
from khaosz.parallel import ParallelContext
from khaosz.trainer.optimizer import build_optimizers
from khaosz.trainer.stages import rlhf
from khaosz.trainer.stages.rlhf import RLHFStrategy
from khaosz.trainer.stages.rollout import Rollout
from khaosz.trainer.strategy import Compute
from khaosz.trainer.train_context import Plan, TrainContext
from khaosz.trainer.trainer import Trainer


@pytest.fixture
def make(model: Transformer, tokenizer: Tokenizer, prompts_file: Path) -> Make:
    """Strategies whose reference is not their policy."""
    strategies = rlhf_strategies(model, tokenizer, prompts_file)
    return partial(strategies, reference_shift=0.05, minibatches=1)


def rollout_of(strategy: RLHFStrategy) -> Rollout:
    assert strategy.rollout is not None
    return strategy.rollout


def every_logprob(model: Transformer, ids: list[int], first: int, temperature: float) -> Tensor:
    """log-probabilities (L, V) before each answer token, the answer alone, in float64."""
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([ids])))[0] / temperature
    return logits.log_softmax(-1)[first - 1 : -1]


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_loss_of_an_update_equals_its_formula(make: Make, stage: str) -> None:
    """Policy, critic and reference all differ, the temperature is not 1, and the clip applies on
    both sides: no term equals another."""
    strategy = make(
        stage, temperature=0.8, entropy=0.01, kl=0.3, clip=0.1, value_clip=0.05, value_weight=0.7
    )
    strategy.micro_batches(0)
    rollout, config = rollout_of(strategy), strategy.config
    shifted(strategy.policy, 5, 0.03)
    if strategy.critic is not None:
        shifted(strategy.critic, 6, 0.03)
    policy = copy.deepcopy(strategy.policy).double()
    critic = copy.deepcopy(strategy.critic).double() if strategy.critic is not None else None
    sums = dict.fromkeys(("policy", "entropy", "value", "k3", "clipped", "moved"), 0.0)
    ratios = []
    for i, sequence in enumerate(rollout.sequences):
        ids, first = list(sequence.ids), sequence.scored_from
        logprobs = every_logprob(policy, ids, first, 0.8)
        own = torch.tensor(ids[first:])
        new = logprobs.gather(-1, own[:, None])[:, 0].tolist()
        sums["entropy"] -= float((logprobs.exp() * logprobs).sum())
        for t, now in enumerate(new):
            old, ref = float(rollout.old[i][t]), float(rollout.reference[i][t])
            advantage = float(rollout.advantages[i][t])
            ratio = math.exp(now - old)
            ratios.append(ratio)
            bounded = min(max(ratio, 0.9), 1.1)
            sums["policy"] -= min(ratio * advantage, bounded * advantage)
            sums["clipped"] += bounded * advantage < ratio * advantage
            sums["k3"] += math.exp(ref - now) - 1 - (ref - now)
            sums["moved"] += math.exp(now - old) - 1 - (now - old)
        if critic is not None:
            with torch.no_grad():
                values = critic.rewards(critic(torch.tensor([ids])))[0, first - 1 : -1].tolist()
            for t, value in enumerate(values):
                old, target = float(rollout.values[i][t]), float(rollout.returns[i][t])
                near = old + min(max(value - old, -0.05), 0.05)
                sums["value"] += max((value - target) ** 2, (near - target) ** 2) / 2
    assert min(ratios) < 0.9 and max(ratios) > 1.1
    expected = sums["policy"] - 0.01 * sums["entropy"]
    expected += 0.7 * sums["value"] if critic is not None else 0.3 * sums["k3"]
    for step in (0, 1):  # the second epoch has the same answers in another layout
        batches = strategy.micro_batches(step)
        assert strategy.rollout is rollout
        strategy.metric_sums.clear()
        loss = sum(strategy.loss(strategy.policy, batch, Compute()).item() for batch in batches)
        assert sum(map(strategy.count, batches)) == len(ratios)
        # fp32 against float64 through ratios of up to a few, summed over some seventy tokens.
        assert loss == pytest.approx(expected, rel=1e-3)
        actual = {name: float(value) for name, value in strategy.metric_sums.items()}
        assert actual["policy_loss"] == pytest.approx(sums["policy"], rel=1e-3, abs=1e-3)
        assert actual["entropy"] == pytest.approx(sums["entropy"], rel=1e-3)
        assert actual["step_kl"] == pytest.approx(sums["moved"], rel=1e-3)
        assert actual["clip_fraction"] == sums["clipped"]
        if critic is not None:
            assert actual["value_loss"] == pytest.approx(sums["value"], rel=1e-3)
        else:
            assert actual["kl_loss"] == pytest.approx(sums["k3"], rel=1e-3)
    assert config.temperature == 0.8


def test_penalty_of_ppo_is_the_log_ratio_to_the_reference(make: Make) -> None:
    """The reward of a token is -kl (log pi - log ref), computed without `losses`."""
    strategy = make("ppo", kl=0.3, whiten=False, lam=1.0, gamma=1.0, temperature=0.8)
    strategy.micro_batches(0)
    rollout, reference = rollout_of(strategy), strategy.reference
    assert reference is not None
    wide, policy = copy.deepcopy(reference).double(), copy.deepcopy(strategy.policy).double()
    gone = 0.0
    for i, sequence in enumerate(rollout.sequences):
        ids, first = list(sequence.ids), sequence.scored_from
        own = torch.tensor(ids[first:])[:, None]
        log_pi = every_logprob(policy, ids, first, 0.8).gather(-1, own)[:, 0]
        log_ref = every_logprob(wide, ids, first, 0.8).gather(-1, own)[:, 0]
        k1 = log_pi - log_ref
        gone += float(k1.sum())
        # With lambda = gamma = 1 the return of a token is the sum of all rewards from it on.
        expected = float(rollout.scores[i]) - 0.3 * k1.flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(rollout.returns[i].double(), expected, rtol=1e-4, atol=1e-4)
    assert strategy.step_metrics["kl"] == pytest.approx(gone / len(rollout.sequences), rel=1e-3)


def test_whitening_is_one_map_for_all_tokens(make: Make) -> None:
    """Not one per answer or micro-batch, which would give a bad answer the values of a good one."""
    plain, white = make("ppo", whiten=False), make("ppo")
    plain.micro_batches(0), white.micro_batches(0)
    before, after = (torch.cat(rollout_of(s).advantages).double() for s in (plain, white))
    expected = (before - before.mean()) / before.std(correction=0)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)  # fp32 of a double's moments
    for a, b in zip(rollout_of(plain).returns, rollout_of(white).returns, strict=True):
        assert torch.equal(a, b), "the critic learns returns as they are"


def test_moments_are_those_of_all_ranks(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum over ranks is replaced: it adds the tokens of another rank."""
    mine, theirs = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([10.0, -3.0])

    def sum_over_ranks(values: list[float], context: ParallelContext) -> list[float]:
        others = [float(theirs.sum()), float(theirs.square().sum()), float(len(theirs))]
        return [a + b for a, b in zip(values, others, strict=True)]

    monkeypatch.setattr(rlhf, "sum_over_ranks", sum_over_ranks)
    mean, variance = make("ppo")._moments(mine)
    every = torch.cat((mine, theirs)).double()
    assert mean == pytest.approx(float(every.mean()), rel=1e-12)
    assert variance == pytest.approx(float(every.var(correction=0)), rel=1e-12)


def test_adapters_off_are_the_reference_of_a_rollout(make: Make, model: Transformer) -> None:
    base = copy.deepcopy(model).double()
    add_lora(model, LoRAConfig(rank=4, alpha=8.0), torch.Generator().manual_seed(0))
    for layer in named_adapters(model).values():
        nn.init.normal_(layer.lora_B, std=0.05, generator=torch.Generator().manual_seed(1))
    strategy = make("grpo", by_adapters=True)
    strategy.micro_batches(0)
    rollout = rollout_of(strategy)
    for sequence, actual in zip(rollout.sequences, rollout.reference, strict=True):
        ids, first = list(sequence.ids), sequence.scored_from
        own = torch.tensor(ids[first:])[:, None]
        expected = every_logprob(base, ids, first, 1.0).gather(-1, own)[:, 0]
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=5e-5)
    assert all(layer.enabled for layer in named_adapters(model).values())
    assert abs(strategy.step_metrics["kl"]) > 1e-3


class Watched(nn.Module):
    """Wraps the module as DDP does, and records when a forward pass runs inside it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.inside = module, False

    def forward(self, batch: Any) -> Tensor:
        self.inside = True
        try:
            return self.module(batch)
        finally:
            self.inside = False


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_gradients_are_computed_inside_the_wrapper(
    make: Make, stage: str, tokenizer: Tokenizer, align: Any
) -> None:
    """DDP reduces the gradients of a forward pass that goes through it, and of parameters that it
    knows: policy and critic."""
    strategy = make(stage, minibatches=2)
    config: TrainConfig = align(stage, weight_decay=0.0, max_steps=4)
    plan = Plan(4, "fp32", False, 1, rows=4, micro_rows=2, seconds_per_step=0.0)
    trained: list[Transformer] = [strategy.policy]
    if strategy.critic is not None:
        trained.append(strategy.critic)
    optimizers = [o for model in trained for o in build_optimizers(model, config)]
    context = TrainContext(config, strategy.policy, tokenizer, CPU, plan, optimizers)
    context.critic, context.rollouts = strategy.critic, strategy
    trainer = Trainer(context, strategy, Compute())
    watched = Watched(trainer.module)
    trainer.module = watched
    passes = []

    def seen(module: nn.Module, arguments: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            passes.append(watched.inside)

    for model in trained:
        model.norm.register_forward_hook(seen)
    before = {name: p.detach().clone() for name, p in context.trained().items()}
    assert trainer.step(0) is not None
    assert passes and all(passes)
    known = {id(p) for p in watched.parameters()}
    for name, parameter in context.trained().items():
        assert id(parameter) in known, f"{name} is unknown to the wrapper"
        assert not torch.equal(parameter, before[name]), f"{name} is not trained"
