"""Validation and pictures of an alignment run: held-out pairs, sampled answers, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from khaosz.data.batches.sequences import SequenceBatch
from khaosz.files import disk_error
from khaosz.model import evaluating
from khaosz.parallel import sum_over_ranks
from khaosz.trainer.callback import Callback, is_last
from khaosz.trainer.loggers import append_row, drop_later_rows
from khaosz.trainer.plots import LossCurve, Panel, can_draw, draw_calibration
from khaosz.trainer.stages.losses import preferred
from khaosz.trainer.stages.pairs import PairStrategy
from khaosz.trainer.stages.rlhf import RLHFStrategy
from khaosz.trainer.strategy import Compute
from khaosz.trainer.train_context import TrainContext

_PAIR_PANELS: Sequence[Panel] = (
    ("loss", [("loss", "training"), ("val_loss", "held out")]),
    ("accuracy", [("accuracy", "training"), ("val_accuracy", "held out")]),
    ("margin of rewards", [("margin", "training"), ("val_margin", "held out")]),
    (
        "log-probability per token",
        [("val_logprob_chosen", "chosen, held out"), ("val_logprob_rejected", "rejected")],
    ),
)
ROLLOUT_PANELS: Sequence[Panel] = (
    ("reward", [("reward", "mean of a rollout")]),
    ("KL against the reference", [("kl", "nats per answer")]),
    ("answers", [("finished", "ended by themselves"), ("clip_fraction", "ratios clipped")]),
    ("critic", [("explained_variance", "explained variance")]),
)


def held_out_batches(strategy: PairStrategy) -> list[SequenceBatch]:
    """This rank's micro-batches of the held-out pairs."""
    parallel = strategy.parallel
    # A rank without any computes the first with a weight of zero: all must sum the same metrics.
    mine = strategy.held_out.draws[parallel.rank :: parallel.world] or strategy.held_out.draws[:1]
    return list(strategy.batches(strategy.held_out, mine))


@torch.no_grad()
def evaluate_pairs(strategy: PairStrategy, model: Any, compute: Compute) -> dict[str, float]:
    """Loss and every metric of the strategy, as means over all held-out pairs and rankings."""
    before, strategy.metric_sums = strategy.metric_sums, {}
    total = torch.zeros(())
    count = 0
    try:
        with evaluating(model):
            for batch in held_out_batches(strategy):
                total += strategy.loss(model, batch.to(strategy.parallel.device), compute).cpu()
                count += strategy.count(batch)
        names = list(strategy.metric_sums)
        sums = [float(value) for value in strategy.metric_sums.values()]
    finally:
        strategy.metric_sums = before
    counted = strategy.parallel.rank < len(strategy.held_out.draws)
    mine = [float(count), float(total), *sums]
    pairs, loss, *totals = sum_over_ranks([x if counted else 0.0 for x in mine], strategy.parallel)
    means = {name: value / pairs for name, value in zip(names, totals, strict=True)}
    return {"loss": loss / pairs, **means}


class RolloutSamples(Callback):
    """Prints an answer of each logged rollout with its reward, and appends it to
    OUT/samples.jsonl."""

    def __init__(self, path: Path, strategy: RLHFStrategy, console: Console) -> None:
        self.path, self.strategy, self.console = path, strategy, console
        self._printed = -1

    def on_start(self, context: TrainContext) -> None:
        drop_later_rows(self.path, context.progress.step)

    def on_step(self, context: TrainContext, metrics: dict[str, Any]) -> None:
        rollout = self.strategy.rollout
        due = metrics["step"] % context.config.log_every == 0 or metrics["step"] == 1
        if rollout is None or rollout.number == self._printed or not (due or is_last(context)):
            return
        self._printed = rollout.number
        for answer, reward in self.strategy.samples[:1]:
            prompt = str(answer.prompt.prompt[-1]["content"])
            row = {"step": metrics["step"], "prompt": prompt, "text": answer.text, "reward": reward}
            append_row(self.path, row)
            question = prompt.replace("\n", " ")[:60]
            text = answer.text.replace("\n", " ")[:120]
            end = "" if answer.finished else " ..."
            self.console.print(f"  {reward:+.2f}  {question} -> {text}{end}", markup=False)


@torch.no_grad()
def pair_gaps(strategy: PairStrategy, model: Any, compute: Compute) -> tuple[Tensor, Tensor]:
    """reward(chosen) - reward(rejected) of every held-out pair of this rank (P,), the reward
    model's or the policy's implicit one, and the weight of each pair (P,): those of a ranking sum
    to 1."""
    gaps, weights = [], []
    for batch in held_out_batches(strategy):
        moved = batch.to(strategy.parallel.device)
        chosen, rejected = strategy.rewards(model, moved, compute)
        gaps.append((chosen - rejected).cpu())
        weights.append(batch.fields["weight"])
    return torch.cat(gaps), torch.cat(weights)


def calibration_table(
    gaps: Tensor, weights: Tensor | None = None, bins: int = 5
) -> list[tuple[float, float, int]]:
    """Accuracy by confidence: (mean confidence, accuracy, pairs) of bins with equally many pairs.
    Confidence is sigma(|gap|), the model's own probability of the answer it prefers. `weights`
    (P,) of the pairs in both means, by default equal."""
    order = gaps.abs().argsort()
    weights = torch.ones_like(gaps) if weights is None else weights
    table = []
    for part in torch.tensor_split(order, min(bins, len(order))):
        bin_gaps, shares = gaps[part], weights[part] / weights[part].sum()
        right = preferred(bin_gaps, torch.zeros_like(bin_gaps))
        confidence = bin_gaps.abs().sigmoid()
        table.append((float(confidence @ shares), float(right @ shares), len(bin_gaps)))
    return table


class PreferenceCurve(LossCurve):
    """OUT/loss.png, and for a reward model with held-out pairs OUT/calibration.png."""

    def __init__(
        self, out: Path, console: Console, strategy: PairStrategy, compute: Compute
    ) -> None:
        super().__init__(out, console, _PAIR_PANELS)
        self.strategy, self.compute = strategy, compute

    def on_end(self, context: TrainContext) -> None:
        super().on_end(context)
        enough = len(self.strategy.held_out.pairs) >= 5 and context.parallel.world == 1
        if context.config.stage == "rm" and enough and can_draw():
            gaps, weights = pair_gaps(self.strategy, context.model, self.compute)
            path = self.out / "calibration.png"
            try:
                draw_calibration(calibration_table(gaps, weights), path, self.title(context))
            except OSError as error:
                self.console.print(f"  no calibration: {disk_error(error, path)}")
            else:
                self.console.print(f"  calibration: {path}")
