"""PPO and GRPO: rollouts as a source of micro-batches for the one loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from khaosz.config import RolloutConfig
from khaosz.data.batches.batch import IGNORE
from khaosz.data.batches.sampler import answer_seed, draws_for, example_of, permute
from khaosz.data.batches.sequences import SequenceBatch, TokenSequence
from khaosz.data.records.preference import Prompt
from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import TrainingError, quoted
from khaosz.model import RewardModel, Transformer
from khaosz.model.lora import without_lora
from khaosz.parallel import ParallelContext, sum_over_ranks
from khaosz.trainer.stages.logprobs import batch_logprobs
from khaosz.trainer.stages.losses import (
    KLController,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    group_advantages,
    kl_k1,
    kl_k2,
    kl_k3,
    token_rewards,
    whitened,
)
from khaosz.trainer.stages.reward_sources import Answer, RewardSource
from khaosz.trainer.stages.rollout import PER_TOKEN, Rollout, sample_answers
from khaosz.trainer.strategy import BatchLayout, Compute, Strategy, hidden_states


@dataclass(kw_only=True)
class RLHFStrategy(Strategy):
    """Policy optimisation on answers of the policy itself.

    `ppo` (Schulman et al. 2017, arXiv:1707.06347, as used by Ouyang et al. 2022, arXiv:2203.02155):
    the reward is given at an answer's last token, a KL penalty against the reference at every
    token; a separate critic, generalised advantages, clipped ratios.
    `grpo` (Shao et al. 2024, arXiv:2402.03300): no critic; an answer is compared with the others to
    the same prompt, KL is a term of the loss.

    Losses are summed over answer tokens and divided by their global number, so the weight of an
    answer is its length. The token that ends the turn is an action like any other; an answer cut by
    the length limit has its reward, less `missing_end_penalty`.
    """

    policy: Transformer
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    reward_source: RewardSource
    config: RolloutConfig
    layout: BatchLayout  # of prompts
    parallel: ParallelContext
    compute: Compute
    reference: Transformer | None = None  # None: the policy with its adapters off
    critic: RewardModel | None = None  # ppo
    rollout: Rollout | None = field(default=None, init=False)
    samples: list[tuple[Answer, float]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.kl = KLController(self.config.kl, self.config.kl_target, self.config.kl_horizon)
        self.progress_metrics = ("reward", "kl", "clip_fraction")
        if self.critic is not None:
            self.progress_metrics += ("explained_variance",)

    @property
    def steps_per_rollout(self) -> int:
        return self.config.epochs * self.config.minibatches

    def micro_batches(self, step: int) -> list[SequenceBatch]:
        number, within = divmod(step, self.steps_per_rollout)
        if self.rollout is None or self.rollout.number != number:
            self.rollout = self._collect(number)
        epoch, minibatch = divmod(within, self.config.minibatches)
        if members := self._members(self.rollout, epoch, minibatch):
            return list(self._batches(self.rollout, members))
        # A rank without answers takes part in the update with one of which nothing is scored.
        ids = self.rollout.sequences[0].ids
        ((_, batch),) = self.layout.pack([TokenSequence(ids, len(ids))])
        return [batch.with_fields(**{name: torch.zeros(0) for name in PER_TOKEN})]

    def _members(self, rollout: Rollout, epoch: int, minibatch: int) -> list[int]:
        """The answers of one update: a new partition of the rollout in every epoch. The first epoch
        keeps their order, the layout in which their old log-probabilities are computed."""
        total = len(rollout.sequences)
        key = self.layout.seed + 7919 * (rollout.number + 1)
        order = [permute(i, total, key, epoch) if epoch else i for i in range(total)]
        first, end = (n * total // self.config.minibatches for n in (minibatch, minibatch + 1))
        return order[first:end]

    def _batches(self, rollout: Rollout, members: Sequence[int]) -> Iterator[SequenceBatch]:
        for local, batch in self.layout.pack([rollout.sequences[i] for i in members]):
            picked = [members[i] for i in local]
            fields = {
                name: batch.per_token([values[i] for i in picked])
                for name in PER_TOKEN
                if (values := getattr(rollout, name))
            }
            yield batch.with_fields(answer=torch.tensor(picked), **fields)

    @property
    def examples(self) -> int:
        return len(self.prompts)

    def count(self, batch: SequenceBatch) -> int:
        return batch.tokens

    def loss(self, model: Transformer, batch: SequenceBatch, compute: Compute) -> Tensor:
        config, fields = self.config, batch.fields
        logprobs, entropy = batch_logprobs(
            model,
            batch,
            compute,
            temperature=config.temperature,
            entropy=config.entropy > 0,
        )
        policy, clipped = clipped_policy_loss(
            logprobs, fields["old"], fields["advantages"], config.clip
        )
        loss = policy.sum()
        self.add_metrics(
            policy_loss=policy.sum(),
            clip_fraction=clipped.sum(),
            step_kl=kl_k3(fields["old"], logprobs.detach()).sum(),
        )
        if config.entropy:
            loss = loss - config.entropy * entropy.sum()
            self.add_metrics(entropy=entropy.sum())
        if self.critic is not None:
            values = token_values(self.critic, batch, compute)
            value_loss = clipped_value_loss(
                values, fields["values"], fields["returns"], config.value_clip
            ).sum()
            loss = loss + config.value_weight * value_loss
            self.add_metrics(value_loss=value_loss)
        elif self.kl.weight:
            estimate = kl_k2 if config.kl_loss == "k2" else kl_k3
            penalty = estimate(logprobs, fields["reference"]).sum()
            loss = loss + self.kl.weight * penalty
            self.add_metrics(kl_loss=penalty)
        return loss

    # -- the rollout -------------------------------------------------------------------------

    def _collect(self, number: int) -> Rollout:
        """Sample answers, and compute their rewards and every number of the updates. Raises
        `TrainingError`."""
        seed, total, group = self.layout.seed, len(self.prompts), self.config.group
        draws = draws_for(number, self.layout.per_step, self.parallel.rank, self.parallel.world)
        picked = []
        seeds = []
        for draw in draws:
            picked.append(self.prompts[example_of(draw, total, seed)])
            seeds += [answer_seed(seed, draw * group + i) for i in range(group)]
        answers = sample_answers(self.policy, self.tokenizer, picked, self.config, seeds)
        rewards = torch.tensor(self.reward_source(answers), dtype=torch.float32)
        penalty = self.config.missing_end_penalty
        finished = torch.tensor([answer.finished for answer in answers])
        rewards = rewards - penalty * (~finished).float()
        valid = ~rewards.isnan()
        self._record_metrics(answers, rewards, finished, valid)
        # Answers without a reward are left out.
        indices = valid.nonzero()[:, 0].tolist()
        sequences = [answers[i].sequence for i in indices]
        rollout = Rollout(number, sequences, rewards[valid], finished[valid])
        self._check_minibatches(rollout)
        self._forward(rollout)
        if self.critic is None:
            self._group_advantages(rollout, rewards, valid, group)
        else:
            self._estimate_advantages(rollout)
        self.samples = [(answers[i], float(rewards[i])) for i in indices[:2]]
        return rollout

    def _record_metrics(
        self, answers: list[Answer], rewards: Tensor, finished: Tensor, valid: Tensor
    ) -> None:
        lengths = sum(len(answer.ids) for answer in answers)
        total, rewarded, reward, ended, tokens = sum_over_ranks(
            [
                float(len(answers)),
                float(valid.sum()),
                float(rewards[valid].double().sum()),
                float(finished.sum()),
                float(lengths),
            ],
            self.parallel,
        )
        mine = int(valid.sum())
        if sum_over_ranks([float(mine == 0)], self.parallel)[0]:
            example = ""
            if answers:
                question = quoted(str(answers[0].prompt.prompt[-1]["content"]))
                example = f", such as {quoted(answers[0].text)}, an answer to {question}"
            raise TrainingError(
                f"{self.reward_source.name}: no finite reward for a whole rollout{example}",
                hint="an answer without a reward is left out; of every rollout, some need one",
            )
        self.step_metrics = {
            "reward": reward / rewarded,
            "answer_tokens": tokens / total,
            "finished": ended / total,
            "without_reward": total - rewarded,
        }

    def _check_minibatches(self, rollout: Rollout) -> None:
        """Raises `TrainingError` if an update would have no answer on any rank."""
        updates = range(self.config.minibatches)
        sizes = [float(len(self._members(rollout, 0, i))) for i in updates]
        *sizes, answers = sum_over_ranks([*sizes, float(len(rollout.sequences))], self.parallel)
        if not all(sizes):
            raise TrainingError(
                f"rollout.minibatches={self.config.minibatches}, but only {answers:.0f} answers of"
                f" the rollout have a reward",
                hint="lower it, sample more answers, or return NaN for fewer of them",
            )

    @torch.no_grad()
    def _forward(self, rollout: Rollout) -> None:
        """Old and reference log-probabilities and values, in the batches of the first epoch: its
        first ratio is exactly one."""
        count = len(rollout.sequences)
        empty = torch.zeros(0)
        rollout.old = [empty] * count
        rollout.reference = [empty] * count
        rollout.values = [empty] * count if self.critic is not None else []
        device = self.parallel.device
        self.policy.train()
        plain = Rollout(rollout.number, rollout.sequences, rollout.scores, rollout.finished)
        for minibatch in range(self.config.minibatches):
            for batch in self._batches(plain, self._members(rollout, 0, minibatch)):
                members = batch.fields["answer"].tolist()
                moved = batch.to(device)
                computed = {"old": self._logprobs(self.policy, moved)}
                if self.reference is not None:
                    computed["reference"] = self._logprobs(self.reference, moved)
                else:
                    with without_lora(self.policy):
                        computed["reference"] = self._logprobs(self.policy, moved)
                if self.critic is not None:
                    computed["values"] = token_values(self.critic, moved, self.compute)
                for name, values in computed.items():
                    for i, answer in zip(members, batch.split(values.cpu().float()), strict=True):
                        getattr(rollout, name)[i] = answer

    def _logprobs(self, model: Transformer, batch: SequenceBatch) -> Tensor:
        return batch_logprobs(model, batch, self.compute, temperature=self.config.temperature)[0]

    def _record_kl(self, rollout: Rollout) -> None:
        """Record the mean KL per answer over all ranks, by its unbiased estimate k1."""
        mine = sum(
            float(kl_k1(old, ref).double().sum())
            for old, ref in zip(rollout.old, rollout.reference, strict=True)
        )
        kl, answers = sum_over_ranks([mine, float(len(rollout.old))], self.parallel)
        self.step_metrics |= {"kl": kl / answers, "kl_weight": self.kl.weight}
        self.kl.update(kl / answers, int(answers))

    def _group_advantages(
        self, rollout: Rollout, rewards: Tensor, valid: Tensor, group: int
    ) -> None:
        """GRPO's advantages. The statistics of a group are those of its answers with a reward."""
        advantages = torch.zeros_like(rewards)
        for first in range(0, len(rewards), group):
            part = slice(first, first + group)
            scores = rewards[part][valid[part]]
            if len(scores) > 1:
                advantages[part][valid[part]] = group_advantages(
                    scores, len(scores), self.config.scale_by_std
                )
        rollout.advantages = [
            torch.full_like(old, float(advantage))
            for old, advantage in zip(rollout.old, advantages[valid].tolist(), strict=True)
        ]
        self._record_kl(rollout)

    def _estimate_advantages(self, rollout: Rollout) -> None:
        """PPO's advantages and returns, whitened over all ranks' tokens."""
        config, weight = self.config, self.kl.weight
        for score, old, reference, values in zip(
            rollout.scores, rollout.old, rollout.reference, rollout.values, strict=True
        ):
            rewards = token_rewards(score, kl_k1(old, reference), weight)
            advantages, returns = gae(rewards, values, config.gamma, config.lam)
            rollout.advantages.append(advantages)
            rollout.returns.append(returns)
        returns, values = torch.cat(rollout.returns), torch.cat(rollout.values)
        explained = self._explained_variance(returns, values)
        if math.isfinite(explained):
            self.step_metrics["explained_variance"] = explained
        if config.whiten:
            mean, variance = self._moments(torch.cat(rollout.advantages))
            rollout.advantages = [
                whitened(one, torch.tensor(mean), torch.tensor(variance))
                for one in rollout.advantages
            ]
        self._record_kl(rollout)

    def _moments(self, values: Tensor) -> tuple[float, float]:
        wide = values.double()
        total, square, count = sum_over_ranks(
            [float(wide.sum()), float(wide.square().sum()), float(len(wide))], self.parallel
        )
        mean = total / count
        return mean, max(0.0, square / count - mean * mean)

    def _explained_variance(self, returns: Tensor, values: Tensor) -> float:
        """1 - Var(return - value) / Var(return): 1 for a perfect critic, 0 for a constant."""
        spread = self._moments(returns)[1]
        residual = self._moments(returns - values)[1]
        return 1 - residual / spread if spread > 1e-12 else math.nan

    # -- the state in a checkpoint -----------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        """The current rollout and the KL weight, for resuming."""
        tensors = {"kl_weight": torch.tensor(self.kl.weight, dtype=torch.float64)}
        if self.rollout is not None:
            tensors |= {f"rollout.{name}": t for name, t in self.rollout.tensors().items()}
            tensors |= {
                f"facts.{name}": torch.tensor(value, dtype=torch.float64)
                for name, value in self.step_metrics.items()
            }
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        def under(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }

        self.kl.weight = float(tensors["kl_weight"])
        if parts := under("rollout."):
            self.rollout = Rollout.from_tensors(parts)
        self.step_metrics = {name: float(tensor) for name, tensor in under("facts.").items()}


def token_values(critic: RewardModel, batch: SequenceBatch, compute: Compute) -> Tensor:
    """The critic's values (N,) of the states before each scored token: of the prompt and the answer
    so far."""
    hidden = hidden_states(critic, batch, compute)
    return critic.rewards(hidden[batch.labels != IGNORE])
