"""Whole sequences of one step, packed into rows, for alignment.

Pretraining packs a corpus once; preference pairs and rollouts are packed in their step. Sequences
are not padded to the longest: a row holds as many as fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from khaosz.data.batches.batch import IGNORE, Batch, padded


@dataclass(frozen=True)
class TokenSequence:
    """Tokens of which those from `scored_from` on (an answer) are scored."""

    ids: Sequence[int]
    scored_from: int

    @property
    def scored(self) -> int:
        return len(self.ids) - max(1, self.scored_from)  # the first token is never a target


@dataclass(frozen=True, eq=False)
class SequenceBatch(Batch):
    """A `Batch` whose `doc_ids` number the S sequences of the whole batch, -1 in the padding.

    sequences   S
    ends        (S,) int64: index of each sequence's last token in the flattened (B * T)
    order       the sequences in row-major order: the order of per-token values
    fields      more values, per sequence (S, ...) or per scored token (N,) in row-major order
    """

    sequences: int
    ends: Tensor
    order: tuple[int, ...]
    fields: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Self:
        moved = {name: value.to(device) for name, value in self.fields.items()}
        return super().to(device).with_fields(**moved)

    def with_fields(self, **fields: Tensor) -> Self:
        return self._replaced(fields={**self.fields, **fields})

    @property
    def owners(self) -> Tensor:
        """(N,) int64: the sequence that each scored token belongs to."""
        return self.doc_ids[self.labels != IGNORE]

    def per_sequence(self, values: Tensor) -> Tensor:
        """Sums (S,) of per-token values (N,) over each sequence."""
        return values.new_zeros(self.sequences).index_add(0, self.owners, values)

    def per_token(self, lists: Sequence[Tensor]) -> Tensor:
        """One tensor per sequence, concatenated (N,) in the order of the scored tokens."""
        return torch.cat([lists[i] for i in self.order])

    def split(self, values: Tensor) -> list[Tensor]:
        """The reverse of `per_token`: per-token values (N,) as one tensor per sequence."""
        lengths = torch.bincount(self.owners, minlength=self.sequences).tolist()
        parts = torch.split(values, [lengths[i] for i in self.order])
        lists: list[Tensor] = [values[:0]] * self.sequences
        for i, part in zip(self.order, parts, strict=True):
            lists[i] = part
        return lists


_OPEN_BATCHES = 16  # latest batches tried per group: time is linear in the number of groups


def fit_rows(lengths: Sequence[int], window: int) -> list[list[int]]:
    """First-fit decreasing: the sequences of each row. None may be longer than `window`."""
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row, space in enumerate(free):
            if lengths[i] <= space:
                rows[row].append(i)
                free[row] -= lengths[i]
                break
        else:
            rows.append([i])
            free.append(window - lengths[i])
    return rows


def packed_shape(
    lengths: Sequence[int], placed: Sequence[Sequence[int]], window: int
) -> tuple[int, int]:
    """Rows and their length, for sequences `placed` by `fit_rows`."""
    fullest = max(sum(lengths[i] for i in row) for row in placed)
    return len(placed), min(window, padded(fullest))


def group_into_batches(
    groups: Sequence[Sequence[int]], lengths: Sequence[int], window: int, rows: int
) -> list[list[int]]:
    """Micro-batches of at most `rows` rows that keep every group of sequences together: longest
    groups first, each into the first of the latest micro-batches that it fits.

    groups: sequence numbers that must share a forward pass (a pair). A group that needs more rows
    gets its own micro-batch.
    """
    batches: list[list[int]] = []
    for group in sorted(groups, key=lambda group: -sum(lengths[i] for i in group)):
        for batch in batches[-_OPEN_BATCHES:]:
            if len(fit_rows([lengths[i] for i in (*batch, *group)], window)) <= rows:
                batch.extend(group)
                break
        else:
            batches.append(list(group))
    return batches


def rows_with_least_padding(
    steps: Sequence[tuple[Sequence[Sequence[int]], Sequence[int]]], window: int, most: int
) -> int:
    """How many rows of one shape, at most `most`, leave the fewest empty. A step is its groups and
    the lengths of its sequences."""

    def computed(rows: int) -> int:
        total = 0
        for groups, lengths in steps:
            for batch in group_into_batches(groups, lengths, window, rows):
                total += max(rows, len(fit_rows([lengths[i] for i in batch], window)))
        return total

    # On a tie the largest: fewer passes.
    return min(range(most, 0, -1), key=computed)


def pack_sequences(
    sequences: Sequence[TokenSequence], window: int, pad_id: int, *, rows: int | None = None
) -> SequenceBatch:
    """Pack into rows of `window` tokens; with `rows`, into at least that many, so that a compiled
    model sees one shape. Without `rows`, all rows are as long as the fullest one, in whole steps of
    `SHAPE_STEP`."""
    lengths = [len(s.ids) for s in sequences]
    assert max(lengths) <= window, f"a sequence of {max(lengths)} tokens in a window of {window}"
    placed = fit_rows(lengths, window)
    shape = packed_shape(lengths, placed, window)
    if rows is not None:
        shape = max(rows, len(placed)), window
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    positions = torch.zeros(shape, dtype=torch.int64)
    doc_ids = torch.full(shape, -1, dtype=torch.int64)
    ends = torch.zeros(len(sequences), dtype=torch.int64)
    for row, members in enumerate(placed):
        start = 0
        for i in members:
            tokens = torch.as_tensor(sequences[i].ids, dtype=torch.int64)
            first, end = max(1, sequences[i].scored_from), start + len(tokens)
            ids[row, start:end] = tokens
            labels[row, start + first - 1 : end - 1] = tokens[first:]
            positions[row, start:end] = torch.arange(len(tokens))
            doc_ids[row, start:end] = i
            ends[i] = row * shape[1] + end - 1
            start = end
        # Padding has positions too, which stay within the model's context.
        positions[row, start:] = torch.arange(shape[1] - start)
    positions[len(placed) :] = torch.arange(shape[1])
    order = tuple(i for row in placed for i in row)
    return SequenceBatch(ids, labels, positions, doc_ids, len(sequences), ends, order)
