"""Preference accuracy: how often a model prefers the answer that people preferred."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from khaosz.config import ColumnsConfig, PreferenceConfig
from khaosz.data.records.preference import load_pairs
from khaosz.errors import ModelError
from khaosz.interop.huggingface import is_reward_model, load_reward_model
from khaosz.interop.models import load_model, open_tokenizer
from khaosz.model import RewardModel, Transformer
from khaosz.parallel import ParallelContext
from khaosz.trainer.checkpoint import stored_window
from khaosz.trainer.stages.dpo import DPOStrategy, RMStrategy, reference_logprobs
from khaosz.trainer.stages.losses import preferred
from khaosz.trainer.stages.pairs import PairSet, PairStrategy
from khaosz.trainer.stages.reward_sources import check_same_tokenizer
from khaosz.trainer.stages.validation import calibration_table, pair_gaps
from khaosz.trainer.strategy import BatchLayout, Compute

_ROWS = 8  # per forward pass, each one window


@dataclass(frozen=True)
class PreferenceAccuracy:
    """Agreement on the pairs of a file.

    judged_by    "reward" (a reward model), "implicit" (a policy's log-ratio to its reference),
                 "likelihood" (a policy's log-probability per token)
    accuracy     over pairs and rankings: the pairs of a ranking count as one pair
    interval     95 % confidence interval of the accuracy (Wilson 1927)
    examples     pairs and rankings
    calibration  (confidence, accuracy, pairs) per bin, for reward models
    skipped      records that were not used; `report` has the reasons as lines
    """

    judged_by: Literal["reward", "implicit", "likelihood"]
    accuracy: float
    interval: tuple[float, float]
    margin: float
    pairs: int
    skipped: int
    calibration: list[tuple[float, float, int]]
    examples: int
    report: tuple[str, ...] = ()

    def format(self) -> str:
        low, high = self.interval
        once = f" in {self.examples:,} rankings and pairs" if self.examples < self.pairs else ""
        lines = [
            f"agrees with {self.accuracy:.1%} of {self.pairs:,} pairs{once} (95 %: {low:.1%} to"
            f" {high:.1%}), judged by {self.judged_by}, mean margin {self.margin:+.3f}"
        ]
        if self.skipped:
            lines.append(f"{self.skipped:,} unusable records skipped")
        lines += [
            f"  confidence {confidence:4.0%}: accuracy {accuracy:4.0%} ({pairs} pairs)"
            for confidence, accuracy, pairs in self.calibration
        ]
        return "\n".join(lines)


def preference_accuracy(
    model_dir: Path,
    file: Path,
    *,
    reference: Path | None = None,
    window: int | None = None,
    device: str = "cpu",
    columns: ColumnsConfig | None = None,
    allow_unread: bool = False,
) -> PreferenceAccuracy:
    """Judge every pair of `file` with the model in `model_dir`; a ranking counts as one pair.

    A reward model is judged by its reward; a policy by its implicit reward log pi - log ref, where
    `reference` is the model it started from; a policy without a reference by its log-probability
    per token. Raises `ModelError`, `DataError` (also when more than 1 % of the records cannot be
    read, unless they are allowed), `ConfigError` (a reference with another tokenizer).
    """
    is_reward = is_reward_model(model_dir)
    if is_reward and reference is not None:
        raise ModelError(
            f"{model_dir} is a reward model and takes no reference", hint="drop --reference"
        )
    model: Transformer
    model = (load_reward_model if is_reward else load_model)(model_dir, device=device)
    tokenizer = open_tokenizer(model_dir)
    window = window or stored_window(model_dir) or model.config.max_position_embeddings
    loaded = load_pairs([file], tokenizer, window, columns=columns, allow_unread=allow_unread)
    data = PairSet(loaded.train)
    parallel = ParallelContext(torch.device(device))
    layout = BatchLayout(1, window, _ROWS, tokenizer.pad_id, seed=0)
    compute = Compute()
    strategy: PairStrategy
    if is_reward:
        strategy = RMStrategy(PairSet([]), data, layout, parallel)
    elif reference is None:
        config = PreferenceConfig(loss="simpo", beta=1.0)
        strategy = DPOStrategy(PairSet([]), data, layout, parallel, config=config)
    else:
        frozen = load_model(reference, device=device)
        check_same_tokenizer(tokenizer, open_tokenizer(reference), reference)
        config = PreferenceConfig(beta=1.0)
        strategy = DPOStrategy(PairSet([]), data, layout, parallel, config=config)
        data.reference = _reference_table(strategy, frozen, compute)
    gaps, weights = pair_gaps(strategy, model, compute)
    correct = float(preferred(gaps, torch.zeros_like(gaps)) @ weights)
    examples = len(data.draws)
    return PreferenceAccuracy(
        judged_by="reward" if is_reward else "likelihood" if reference is None else "implicit",
        accuracy=correct / examples,
        interval=wilson(correct, examples),
        margin=float(gaps @ weights) / examples,
        pairs=len(gaps),
        skipped=sum(
            reason["count"] for entry in loaded.report.inputs for reason in entry.skipped.values()
        ),
        calibration=calibration_table(gaps, weights) if isinstance(model, RewardModel) else [],
        examples=examples,
        report=tuple(loaded.report.lines()),
    )


def wilson(successes: float, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion."""
    z = 1.959964
    share = successes / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    half /= 1 + z * z / total
    return max(0.0, middle - half), min(1.0, middle + half)


def _reference_table(strategy: DPOStrategy, model: Transformer, compute: Compute) -> torch.Tensor:
    data = strategy.held_out
    table = torch.zeros(len(data.pairs), 2)
    for batch in strategy.batches(data, data.draws):
        on_device = batch.to(strategy.parallel.device)
        table[batch.fields["pair"]] = reference_logprobs(model, on_device, compute).cpu()
    return table
