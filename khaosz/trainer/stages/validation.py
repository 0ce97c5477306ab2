"""What is looked at while an alignment run goes on: held-out pairs, sampled answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from khaosz.data.batches.sequences import SequenceBatch
from khaosz.model import RewardModel
from khaosz.parallel import across
from khaosz.trainer.callback import Callback, is_last
from khaosz.trainer.loggers import append_row, drop_later_rows
from khaosz.trainer.stages.dpo import DPOStrategy, sequence_rewards
from khaosz.trainer.stages.losses import preferred
from khaosz.trainer.stages.pairs import PairStrategy
from khaosz.trainer.stages.rlhf import RLHFStrategy
from khaosz.trainer.strategy import Compute
from khaosz.trainer.train_context import TrainContext


def held_out_batches(strategy: PairStrategy) -> list[SequenceBatch]:
    """This rank's micro-batches of the held-out pairs."""
    parallel = strategy.parallel
    # A rank without any looks at the first, and counts it as nothing: all must know what to sum.
    mine = strategy.held_out.draws[parallel.rank :: parallel.world] or strategy.held_out.draws[:1]
    return list(strategy.batches(strategy.held_out, mine))


@torch.no_grad()
def evaluate_pairs(strategy: PairStrategy, model: Any, compute: Compute) -> dict[str, float]:
    """Loss and every number the strategy notes, as means over all held-out pairs."""
    before, strategy.tally = strategy.tally, {}
    total = torch.zeros(())
    count = 0
    was_training = model.training
    model.eval()
    try:
        for batch in held_out_batches(strategy):
            total += strategy.loss(model, batch.to(strategy.parallel.device), compute).cpu()
            count += strategy.count(batch)
        names, sums = list(strategy.tally), [float(value) for value in strategy.tally.values()]
    finally:
        strategy.tally = before
        model.train(was_training)
    counted = strategy.parallel.rank < len(strategy.held_out.draws)
    mine = [float(count), float(total), *sums]
    every, loss, *noted = across([x if counted else 0.0 for x in mine], strategy.parallel)
    means = {name: value / every for name, value in zip(names, noted, strict=True)}
    return {"loss": loss / every, **means}


class PairValidation(Callback):
    """Scores the held-out pairs every `every` steps and at the end; adds `val_*` to the metrics."""

    def __init__(self, strategy: PairStrategy, compute: Compute, every: int) -> None:
        self.strategy, self.compute, self.every = strategy, compute, every

    def on_step(self, context: TrainContext, metrics: dict[str, Any]) -> None:
        if metrics["step"] % self.every and not is_last(context):
            return
        found = evaluate_pairs(self.strategy, context.model, self.compute)
        metrics |= {f"val_{name}": value for name, value in found.items()}
        context.progress.judged(found["loss"])


class RolloutSamples(Callback):
    """Shows an answer of each rollout beside its reward: what the policy has learned to say. It is
    kept in OUT/samples.jsonl."""

    def __init__(self, path: Path, strategy: RLHFStrategy, console: Console) -> None:
        self.path, self.strategy, self.console = path, strategy, console
        self._shown = -1

    def on_start(self, context: TrainContext) -> None:
        drop_later_rows(self.path, context.progress.step)

    def on_step(self, context: TrainContext, metrics: dict[str, Any]) -> None:
        rollout = self.strategy.rollout
        due = metrics["step"] % context.config.log_every == 0 or metrics["step"] == 1
        if rollout is None or rollout.number == self._shown or not (due or is_last(context)):
            return
        self._shown = rollout.number
        for answer, reward in self.strategy.samples[:1]:
            prompt = str(answer.prompt.prompt[-1]["content"])
            row = {"step": metrics["step"], "prompt": prompt, "text": answer.text, "reward": reward}
            append_row(self.path, row)
            said = answer.text.replace("\n", " ")[:120]
            asked = prompt.replace("\n", " ")[:60]
            end = "" if answer.finished else " ..."
            self.console.print(f"  {reward:+.2f}  {asked} -> {said}{end}", markup=False)


@torch.no_grad()
def pair_gaps(strategy: PairStrategy, model: Any, compute: Compute) -> Tensor:
    """reward(chosen) - reward(rejected) of every held-out pair of this rank (P,): the reward
    model's, or the policy's implicit one."""
    gaps = []
    for batch in held_out_batches(strategy):
        moved = batch.to(strategy.parallel.device)
        if isinstance(model, RewardModel):
            rewards = sequence_rewards(model, moved, compute)
            chosen, rejected = rewards[moved.fields["chosen"]], rewards[moved.fields["rejected"]]
        else:
            assert isinstance(strategy, DPOStrategy)
            chosen, rejected = strategy.rewards(model, moved, compute)
        gaps.append((chosen - rejected).cpu())
    return torch.cat(gaps)


def calibration_table(gaps: Tensor, bins: int = 5) -> list[tuple[float, float, int]]:
    """How often the model is right when it is how sure: (mean confidence, accuracy, pairs) of
    equally filled bins. Confidence is sigma(|gap|), the probability the model itself gives to the
    answer it prefers."""
    order = gaps.abs().argsort()
    table = []
    for part in torch.tensor_split(order, min(bins, len(order))):
        own = gaps[part]
        right = preferred(own, torch.zeros_like(own)).mean()
        table.append((float(own.abs().sigmoid().mean()), float(right), len(own)))
    return table
