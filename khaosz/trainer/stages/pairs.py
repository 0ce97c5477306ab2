"""Preference pairs as micro-batches: what reward models and DPO share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from khaosz.data.batches.sampler import draws_for, example_of
from khaosz.data.batches.sequences import (
    SequenceBatch,
    TokenSequence,
    rows_with_least_padding,
)
from khaosz.data.records.preference import EncodedPair
from khaosz.parallel import ParallelContext
from khaosz.trainer.stages.losses import preferred
from khaosz.trainer.strategy import BatchLayout, Compute, Strategy

STEPS_TO_FIT = 16


@dataclass
class PairSet:
    """Encoded pairs, and with a frozen reference the log-probabilities it gives their answers.

    A draw is one pair, or all pairs of one ranking, or of all rankings of a shared group, which
    share the forward passes of its answers and count as one pair.
    reference: (pairs, 2) fp32, chosen and rejected; NaN where it is not computed.
    """

    pairs: Sequence[EncodedPair]
    reference: Tensor | None = None
    draws: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        draw_of: dict[str, list[int]] = {}
        compared: dict[str, set[frozenset[bytes]]] = {}
        self.draws = []
        for i, pair in enumerate(self.pairs):
            if pair.group is None:
                self.draws.append([i])
                continue
            answers = frozenset((pair.chosen_ids.tobytes(), pair.rejected_ids.tobytes()))
            # The ranking begins, or the same one again.
            if pair.group not in compared or (answers in compared[pair.group] and not pair.shared):
                draw_of[pair.group], compared[pair.group] = [], set()
                self.draws.append(draw_of[pair.group])
            draw_of[pair.group].append(i)
            compared[pair.group].add(answers)


@dataclass
class PairStrategy(Strategy):
    """Micro-batches of pairs: a step's pairs are packed into rows of `window` tokens, both answers
    of a pair in one forward pass. The loss is summed over draws and counted in draws."""

    data: PairSet
    held_out: PairSet
    layout: BatchLayout  # of draws
    parallel: ParallelContext

    def __post_init__(self) -> None:
        self.progress_metrics = ("accuracy", "margin")

    @abstractmethod
    def rewards(self, model: Any, batch: SequenceBatch, compute: Compute) -> tuple[Tensor, Tensor]:
        """Rewards of the chosen and the rejected answers (P,), (P,): with DPO the implicit ones."""

    def total(self, batch: SequenceBatch, values: Tensor) -> Tensor:
        """The sum over the batch's draws of the means of `values` (P,) over the pairs of each: the
        pairs of K ranked answers have the weight 1 / (K choose 2) (Ouyang et al. 2022,
        arXiv:2203.02155, equation 1)."""
        return (values * batch.fields["weight"].to(values.dtype)).sum()

    def add_pair_metrics(self, batch: SequenceBatch, **values: Tensor) -> None:
        """Add values (P,) to the metrics, weighted as in the loss."""
        self.add_metrics(**{name: self.total(batch, value) for name, value in values.items()})

    def add_reward_metrics(self, batch: SequenceBatch, chosen: Tensor, rejected: Tensor) -> None:
        self.add_pair_metrics(
            batch,
            accuracy=preferred(chosen, rejected),
            margin=chosen - rejected,
            reward_chosen=chosen,
            reward_rejected=rejected,
        )

    def micro_batches(self, step: int) -> list[SequenceBatch]:
        return list(self.batches(self.data, self._picked(step, self.parallel.rank)))

    def _picked(self, step: int, rank: int) -> list[list[int]]:
        draws, layout = self.data.draws, self.layout
        numbers = draws_for(step, layout.per_step, rank, self.parallel.world)
        return [draws[example_of(n, len(draws), layout.seed)] for n in numbers]

    def fit_micro_rows(self) -> None:
        """Lower `micro_rows` to the number that leaves the fewest rows empty over the first steps.
        The same on all ranks."""
        steps = []
        for step in range(STEPS_TO_FIT):
            sequences, groups, _ = _sequences(self.data, self._picked(step, rank=0))
            steps.append((groups, [len(sequence.ids) for sequence in sequences]))
        layout = self.layout
        layout.micro_rows = rows_with_least_padding(steps, layout.window, layout.micro_rows)

    def batches(self, data: PairSet, draws: Sequence[Sequence[int]]) -> Iterator[SequenceBatch]:
        """Micro-batches of the given draws."""
        sequences, groups, members = _sequences(data, draws)
        of_sequence = {i: d for d, group in enumerate(groups) for i in group}
        for packed, batch in self.layout.pack(sequences, groups):
            local = {old: new for new, old in enumerate(packed)}
            drawn = sorted({of_sequence[i] for i in packed})
            triples = [triple for d in drawn for triple in members[d]]
            pairs = [data.pairs[i] for i, _, _ in triples]
            fields = {
                "pair": torch.tensor([i for i, _, _ in triples]),
                "chosen": torch.tensor([local[c] for _, c, _ in triples]),
                "rejected": torch.tensor([local[r] for _, _, r in triples]),
                "margin": torch.tensor([pair.margin or 0.0 for pair in pairs]),
                "weight": torch.tensor([1 / len(members[d]) for d in drawn for _ in members[d]]),
                "draws": torch.tensor(len(drawn)),
            }
            if data.reference is not None:
                fields["reference"] = data.reference[fields["pair"]]
            yield batch.with_fields(**fields)

    @property
    def examples(self) -> int:
        return len(self.data.draws)

    def count(self, batch: SequenceBatch) -> int:
        return int(batch.fields["draws"])


Triple = tuple[int, int, int]  # a pair, and the sequences of its chosen and rejected answer


def _sequences(
    data: PairSet, draws: Sequence[Sequence[int]]
) -> tuple[list[TokenSequence], list[list[int]], list[list[Triple]]]:
    """The sequences of some draws, the indices of each draw's sequences, and each draw's pairs. An
    answer in several pairs of a draw is one sequence."""
    sequences: list[TokenSequence] = []
    groups: list[list[int]] = []
    members: list[list[Triple]] = []
    for draw in draws:
        index: dict[bytes, int] = {}
        triples: list[Triple] = []
        for i in draw:
            pair = data.pairs[i]
            sides = []
            for answer in (pair.chosen_ids, pair.rejected_ids):
                key = answer.tobytes()
                if key not in index:
                    index[key] = len(sequences)
                    ids = [*pair.prompt_ids.tolist(), *answer.tolist()]
                    sequences.append(TokenSequence(ids, len(pair.prompt_ids)))
                sides.append(index[key])
            triples.append((i, sides[0], sides[1]))
        groups.append(sorted(index.values()))
        members.append(triples)
    return sequences, groups, members
