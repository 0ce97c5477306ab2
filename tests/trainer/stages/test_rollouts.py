"""PPO and GRPO: the contents of a rollout and the updates from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import Make, rlhf_strategies

from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import ConfigError, TrainingError
from khaosz.model import RewardModel, Transformer
from khaosz.trainer.stages.logprobs import batch_logprobs
from khaosz.trainer.stages.losses import gae, kl_k1, token_rewards
from khaosz.trainer.stages.reward_sources import FunctionReward, ModelReward, load_function
from khaosz.trainer.stages.rlhf import RLHFStrategy
from khaosz.trainer.strategy import BatchLayout, Compute


@pytest.fixture
def make(model: Transformer, tokenizer: Tokenizer, prompts_file: Path) -> Make:
    return rlhf_strategies(model, tokenizer, prompts_file)


def step_loss(strategy: RLHFStrategy, step: int) -> torch.Tensor:
    batches = strategy.micro_batches(step)
    losses = [strategy.loss(strategy.policy, batch, Compute()) for batch in batches]
    return torch.stack(losses).sum() / sum(map(strategy.count, batches))


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_first_ratio_is_one(make, stage: str) -> None:  # type: ignore[no-untyped-def]
    strategy = make(stage)
    for step in range(2):  # both minibatches of the first epoch
        for batch in strategy.micro_batches(step):
            new = batch_logprobs(strategy.policy, batch, Compute())[0]
            assert torch.equal(new.detach(), batch.fields["old"])
            # The reference still equals the policy.
            assert torch.equal(batch.fields["reference"], batch.fields["old"])
    assert strategy.step_metrics["kl"] == 0.0
    for batch in strategy.micro_batches(2):  # another partition of the same answers
        new = batch_logprobs(strategy.policy, batch, Compute())[0]
        torch.testing.assert_close(new.detach(), batch.fields["old"], rtol=0, atol=2e-5)


def test_old_log_probabilities_equal_those_of_sampling(make) -> None:  # type: ignore[no-untyped-def]
    """The engine and the training forward are two programs; their numbers must agree."""
    strategy = make("grpo", temperature=0.8)
    strategy.micro_batches(0)
    rollout = strategy.rollout
    assert rollout is not None
    for sequence, old in zip(rollout.sequences, rollout.old, strict=True):
        ids = torch.tensor(sequence.ids)
        logits = strategy.policy.logits(strategy.policy(ids[None]))[0].double() / 0.8
        every = logits.log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
        expected = every[sequence.scored_from - 1 :]
        torch.testing.assert_close(old.double(), expected, rtol=0, atol=5e-5)


def test_every_answer_is_trained_on_once_an_epoch(make) -> None:  # type: ignore[no-untyped-def]
    strategy = make("ppo", minibatches=3)
    epochs = []
    for epoch in range(2):
        seen = []
        for minibatch in range(3):
            for batch in strategy.micro_batches(epoch * 3 + minibatch):
                seen += batch.fields["answer"].tolist()
        epochs.append(seen)
        assert sorted(seen) == list(range(12))
    assert epochs[0] != epochs[1]
    first = strategy.rollout
    strategy.micro_batches(6)
    assert strategy.rollout is not first and strategy.rollout.number == 1


def test_ppo_rewards_and_advantages(make) -> None:  # type: ignore[no-untyped-def]
    strategy = make("ppo", whiten=False, kl=0.3, lam=0.9)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():  # a reference that differs, so that KL does
        for parameter in strategy.reference.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    strategy.micro_batches(0)
    rollout = strategy.rollout
    assert rollout is not None
    for i in range(len(rollout.sequences)):
        kl = kl_k1(rollout.old[i], rollout.reference[i])
        rewards = token_rewards(rollout.scores[i], kl, 0.3)
        advantages, returns = gae(rewards, rollout.values[i], 1.0, 0.9)
        assert torch.equal(rollout.advantages[i], advantages)
        assert torch.equal(rollout.returns[i], returns)
    mean = sum(
        float(kl_k1(o, r).sum()) for o, r in zip(rollout.old, rollout.reference, strict=True)
    )
    assert strategy.step_metrics["kl"] == pytest.approx(mean / len(rollout.old), rel=1e-5)


def test_whitened_over_all_tokens(make) -> None:  # type: ignore[no-untyped-def]
    strategy = make("ppo")
    strategy.micro_batches(0)
    every = torch.cat(strategy.rollout.advantages)
    assert every.mean().item() == pytest.approx(0, abs=1e-5)
    assert every.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_grpo_compares_answers_to_the_same_prompt(make) -> None:  # type: ignore[no-untyped-def]
    strategy = make("grpo")
    strategy.micro_batches(0)
    rollout = strategy.rollout
    prompts = [tuple(s.ids[: s.scored_from]) for s in rollout.sequences]
    assert len(set(prompts)) == 4 and all(len(set(prompts[i : i + 3])) == 1 for i in (0, 3, 6, 9))
    for first in range(0, 12, 3):
        own = rollout.scores[first : first + 3].double()
        expected = (own - own.mean()) / (own.std(correction=0) + 1e-4)
        actual = torch.stack([a[0] for a in rollout.advantages[first : first + 3]]).double()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert all((a == a[0]).all() for a in rollout.advantages[first : first + 3])


def test_value_of_a_token_depends_on_the_tokens_before_it(make) -> None:  # type: ignore[no-untyped-def]
    strategy = make("ppo")
    strategy.micro_batches(0)
    rollout, critic = strategy.rollout, strategy.critic
    sequence = rollout.sequences[0]
    n = sequence.scored_from
    for t in (0, len(sequence.ids) - n - 1):
        before = torch.tensor([sequence.ids[: n + t]])
        alone = critic.rewards(critic(before))[0, -1]
        torch.testing.assert_close(rollout.values[0][t], alone.detach(), rtol=0, atol=1e-5)


def test_rewarded_answer_becomes_more_probable(make) -> None:  # type: ignore[no-untyped-def]
    for stage in ("ppo", "grpo"):
        strategy = make(stage, epochs=1, minibatches=1, kl=0.0)
        batches = strategy.micro_batches(0)
        step_loss(strategy, 0).backward()
        with torch.no_grad():
            for parameter in strategy.policy.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.02)
        gained = 0.0
        for batch in batches:
            new = batch_logprobs(strategy.policy, batch, Compute())[0].detach()
            gained += float(((new - batch.fields["old"]) * batch.fields["advantages"]).sum())
        strategy.policy.zero_grad()
        assert gained > 0


def test_critic_loss_does_not_change_the_policy(make) -> None:  # type: ignore[no-untyped-def]
    strategy = make("ppo", epochs=1, minibatches=1)
    step_loss(strategy, 0).backward()
    assert all(p.grad is not None for p in strategy.critic.parameters())
    with_critic = {n: p.grad.clone() for n, p in strategy.policy.named_parameters()}
    strategy.policy.zero_grad()
    strategy.config = strategy.config.updated(value_weight=1e-9)
    step_loss(strategy, 0).backward()
    for name, parameter in strategy.policy.named_parameters():
        assert torch.equal(parameter.grad, with_critic[name])


def test_unfinished_answers_pay_the_penalty(make) -> None:  # type: ignore[no-untyped-def]
    plain, strict = make("grpo"), make("grpo", missing_end_penalty=5.0)
    plain.micro_batches(0), strict.micro_batches(0)
    assert not plain.rollout.finished.all()
    expected = plain.rollout.scores - 5.0 * (~plain.rollout.finished).float()
    assert torch.equal(strict.rollout.scores, expected)


def test_answer_contains_its_end_token(make, tokenizer: Tokenizer) -> None:  # type: ignore[no-untyped-def]
    strategy = make("grpo", max_new_tokens=40, prompts=8)
    strategy.micro_batches(0)
    ends = {tokenizer.end_id, tokenizer.eos_id}
    for sequence, finished in zip(
        strategy.rollout.sequences, strategy.rollout.finished.tolist(), strict=True
    ):
        answer = sequence.ids[sequence.scored_from :]
        assert (answer[-1] in ends) == finished and not ends & set(answer[:-1])
        assert len(answer) <= 40


def test_rollouts_are_a_function_of_seed_and_weights(make) -> None:  # type: ignore[no-untyped-def]
    one, two = make("ppo"), make("ppo")
    torch.manual_seed(5)
    one.micro_batches(0)
    torch.manual_seed(6)
    two.micro_batches(0)
    for name, tensor in one.state_tensors().items():
        assert torch.equal(tensor, two.state_tensors()[name]), name
    one.micro_batches(4)
    assert one.rollout.sequences != two.rollout.sequences


def test_rollout_is_stored_and_restored(make) -> None:  # type: ignore[no-untyped-def]
    one, two = make("ppo", kl_target=1.0), make("ppo", kl_target=1.0)
    one.micro_batches(1)
    two.load_state_tensors(one.state_tensors())
    two.reward_source = None  # it must not sample again
    for a, b in zip(one.micro_batches(2), two.micro_batches(2), strict=True):
        assert torch.equal(a.ids, b.ids)
        assert all(torch.equal(a.fields[n], b.fields[n]) for n in a.fields)
    assert two.kl.weight == one.kl.weight and two.step_metrics == one.step_metrics


class TestRewardSources:
    def test_function_that_raises_ends_the_run(self, make) -> None:  # type: ignore[no-untyped-def]
        def broken(messages: Any, answer: str, extra: Any) -> float:
            raise KeyError("answer")

        strategy = make("grpo", FunctionReward(broken, "mine:broken"))
        with pytest.raises(TrainingError, match=r"mine:broken failed.*KeyError"):
            strategy.micro_batches(0)

    def test_answers_without_a_finite_reward_are_left_out(self, make) -> None:  # type: ignore[no-untyped-def]
        calls = []

        def sometimes(messages: Any, answer: str, extra: Any) -> float:
            calls.append(answer)
            return math.nan if len(calls) % 3 == 0 else math.inf if len(calls) == 4 else 1.0

        for stage in ("ppo", "grpo"):
            calls.clear()
            strategy = make(stage, FunctionReward(sometimes, "sometimes"))
            loss = step_loss(strategy, 0)
            assert torch.isfinite(loss)
            assert len(strategy.rollout.sequences) == 7
            assert strategy.step_metrics["without_reward"] == 5

    def test_refuses_more_minibatches_than_answers(self, make) -> None:  # type: ignore[no-untyped-def]
        """They repeated the first answer."""
        with pytest.raises(ConfigError, match="minibatches=13 is more than the 12 answers"):
            make("grpo", minibatches=13)
        answers = iter(range(99))

        def two(messages: Any, answer: str, extra: Any) -> float:
            return 1.0 if next(answers) < 2 else math.nan

        strategy = make("grpo", FunctionReward(two, "mine:two"), minibatches=3)
        with pytest.raises(TrainingError, match="minibatches=3, but only 2 answers"):
            strategy.micro_batches(0)

    @pytest.mark.parametrize("stage", ["ppo", "grpo"])
    def test_rank_without_answers_adds_nothing(
        self, make, stage: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:  # type: ignore[no-untyped-def]
        """With one rewarded answer here and others on another rank, one update of two is empty."""
        answers = iter(range(99))

        def one(messages: Any, answer: str, extra: Any) -> float:
            return 1.0 if next(answers) < 1 else math.nan

        strategy = make(stage, FunctionReward(one, "mine:one"), minibatches=2)
        # The other rank has answers for both.
        monkeypatch.setattr(RLHFStrategy, "_check_minibatches", lambda *_: None)
        counts = []
        for step in range(2):
            batches = strategy.micro_batches(step)
            counts.append(sum(map(strategy.count, batches)))
            strategy.policy.zero_grad()
            loss = torch.stack(
                [strategy.loss(strategy.policy, batch, Compute()) for batch in batches]
            ).sum()
            loss.backward()
            gradients = [p.grad for p in strategy.policy.parameters() if p.requires_grad]
            assert all(gradient is not None for gradient in gradients)  # DDP waits for all
            if not counts[-1]:
                assert loss.item() == 0.0 and not any(float(g.abs().sum()) for g in gradients)
        assert sorted(map(bool, counts)) == [False, True]

    def test_refuses_a_rollout_without_rewards(self, make) -> None:  # type: ignore[no-untyped-def]
        strategy = make("ppo", FunctionReward(lambda *_: math.nan, "nothing"))
        with pytest.raises(
            TrainingError, match=r"nothing: no finite reward .* such as .* an answer to"
        ):
            strategy.micro_batches(0)

    def test_reward_model_scores_the_last_token(
        self, make, model: Transformer, tokenizer: Tokenizer
    ) -> None:  # type: ignore[no-untyped-def]
        reward = RewardModel.from_transformer(model)
        torch.nn.init.normal_(reward.score.weight)
        source = ModelReward(reward, Compute(), BatchLayout(4, 64, 2, tokenizer.pad_id, 0))
        strategy = make("ppo", source)
        strategy.micro_batches(0)
        for sequence, score in zip(
            strategy.rollout.sequences, strategy.rollout.scores, strict=True
        ):
            alone = reward.rewards(reward(torch.tensor([sequence.ids])))[0, -1]
            torch.testing.assert_close(score, alone.detach(), rtol=0, atol=1e-5)
        assert not any(p.requires_grad for p in reward.parameters())

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("khaosz.rewards", "does not name a function"),
            ("khaosz.rewards:nothing", "has no 'nothing'"),
            ("no.such.module:f", "can't be loaded"),
            ("khaosz.rewards:__all__", "is not a function"),
            ("/no/such/file.py:f", "file not found"),
            ("khaosz.rewards:brevitie", "has no 'brevitie'"),
            ("asyncio:sleep", "is an async function"),
            ("glob:iglob", "does not take"),
            ("math:sqrt", "does not take"),
            ("fractions:Fraction", "is a class"),
        ],
    )
    def test_refuses_unknown_function(self, name: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            load_function(name)

    def test_load_function_from_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.py"
        path.write_text("def f(messages, answer, extra):\n    return 3\n")
        assert load_function(f"{path}:f")([], "", {}) == 3
