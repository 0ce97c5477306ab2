"""Sequences in rows: nothing lost, nothing mixed up."""

from __future__ import annotations

import random

import pytest
import torch

from khaosz.data.batches.batch import IGNORE
from khaosz.data.batches.sequences import (
    TokenSequence,
    fit_rows,
    group_into_batches,
    pack_sequences,
)


def ragged(seed: int = 0, count: int = 9) -> list[TokenSequence]:
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        length = chance.randint(2, 14)
        made.append(
            TokenSequence(
                [chance.randrange(50) for _ in range(length)], chance.randint(0, length - 1)
            )
        )
    return made


@pytest.mark.parametrize("rows", [None, 12])
def test_packed_sequences_match_their_definition(rows: int | None) -> None:
    sequences = ragged()
    batch = pack_sequences(sequences, 16, 0, rows=rows)
    assert rows is None or batch.ids.shape == (rows, 16)
    for i, sequence in enumerate(sequences):
        own = batch.doc_ids == i
        assert batch.ids[own].tolist() == list(sequence.ids)
        assert batch.positions[own].tolist() == list(range(len(sequence.ids)))
        first = max(1, sequence.scored_from)
        wanted = [IGNORE] * (first - 1) + list(sequence.ids[first:]) + [IGNORE]
        assert batch.labels[own].tolist() == wanted
        assert batch.ids.reshape(-1)[batch.ends[i]] == sequence.ids[-1]
        assert batch.doc_ids.reshape(-1)[batch.ends[i]] == i
    padding = batch.doc_ids == -1
    assert (batch.labels[padding] == IGNORE).all() and (batch.ids[padding] == 0).all()
    assert batch.positions.max() < 16
    assert batch.tokens == sum(sequence.scored for sequence in sequences)


def test_rows_have_few_lengths() -> None:
    """In bf16 oneDNN keeps kernels of about 10 MB for each number of tokens."""
    batches = [pack_sequences([TokenSequence(range(n), 1)], 200, 0) for n in range(1, 201)]
    assert {batch.ids.shape[1] for batch in batches} == {64, 128, 192, 200}


def test_values_by_token_come_back() -> None:
    sequences = ragged(3)
    batch = pack_sequences(sequences, 20, 0)
    lists = [torch.arange(float(s.scored)) + 100 * i for i, s in enumerate(sequences)]
    flat = batch.per_token(lists)
    assert all(torch.equal(a, b) for a, b in zip(batch.split(flat), lists, strict=True))
    sums = batch.per_sequence(flat)
    assert sums.tolist() == [float(values.sum()) for values in lists]
    moved = batch.with_fields(old=flat).to("cpu")
    assert torch.equal(moved.fields["old"], flat) and moved.tokens == batch.tokens


def test_a_prompt_that_is_scored_whole_has_no_target_for_its_first_token() -> None:
    batch = pack_sequences([TokenSequence([5, 6, 7], 0)], 3, 0)
    assert batch.labels.tolist() == [[6, 7, IGNORE]]


@pytest.mark.parametrize("pad", [0, 9])
def test_padding_of_sequences_is_detected_by_place_not_id(pad: int) -> None:
    """A vocabulary may pad with 0, or with the token that ends a turn: both are trained on."""
    batch = pack_sequences([TokenSequence([5, 0, 9, 0, 9], 1), TokenSequence([0, 9], 0)], 8, pad)
    assert batch.labels.tolist() == [[0, 9, 0, 9, IGNORE, 9, IGNORE, IGNORE]]
    assert batch.tokens == 5 and batch.ends.tolist() == [4, 6]
    padded = pack_sequences([TokenSequence([5, 0, 9], 1)], 8, pad, rows=1)
    assert padded.labels.tolist() == [[0, 9, *[IGNORE] * 6]] and padded.tokens == 2


def test_rows_are_filled() -> None:
    lengths = [7, 3, 5, 5, 10, 2]
    rows = fit_rows(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(6))
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows)
    assert len(rows) == 4  # 32 tokens in rows of ten


def test_groups_stay_together() -> None:
    lengths = [6] * 10
    groups = [[0, 1], [2, 3, 4], [5], [6, 7, 8, 9]]
    batches = group_into_batches(groups, lengths, 10, 3)
    assert batches == [[6, 7, 8, 9], [2, 3, 4], [0, 1, 5]]  # the first needs a fourth row
    assert group_into_batches(groups, [5] * 10, 10, 3) == [[6, 7, 8, 9, 0, 1], [2, 3, 4, 5]]
    assert group_into_batches([], [], 10, 3) == []
