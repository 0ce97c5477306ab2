"""Prepared tokens -> batches: training windows by the number of the draw.

A `TokenDataset` has no position. The batch of a step is `batch(draws_for(step, ...))`, so the order
does not depend on the world size and a resumed run needs only the step number.

Legend: B rows, T positions (the window).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import isfinite
from pathlib import Path

import numpy as np
import torch

from khaosz.data.batches.batch import IGNORE, Batch
from khaosz.data.batches.packing import PackingPlan, PackingStats, load_plan
from khaosz.data.batches.sampler import MixtureSampler
from khaosz.data.shards.manifest import Group, PreparedData
from khaosz.data.shards.mmap import PREPARE_AGAIN, MmapFileHandler
from khaosz.errors import ConfigError, DataError, TokenFileError, nearest


@dataclass(frozen=True)
class _Planned:
    """A group of shards with its plan; its shard numbers count from `first_shard`."""

    plan: PackingPlan
    first_shard: int


@dataclass(frozen=True)
class _Stream:
    """The windows that one weight draws from: those of its groups, concatenated."""

    groups: list[_Planned]

    @cached_property
    def ends(self) -> list[int]:
        return list(accumulate(group.plan.windows for group in self.groups))

    @property
    def windows(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def stats(self) -> PackingStats:
        return sum((group.plan.stats for group in self.groups), PackingStats())

    def find(self, index: int) -> tuple[_Planned, int]:
        position = bisect_right(self.ends, index)
        return self.groups[position], index - (self.ends[position - 1] if position else 0)


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """The packed training windows of prepared data, addressed by the number of the draw.

    Created by `TokenDataset.open`. `stats` count the documents of all groups in use; `masked` data
    (SFT) scores only the tokens of its loss mask.
    """

    shards: list[MmapFileHandler]
    streams: list[_Stream]
    sampler: MixtureSampler
    stats: PackingStats
    window: int
    masked: bool
    pad_id: int

    @classmethod
    def open(
        cls,
        prepared: PreparedData,
        window: int,
        split: str = "train",
        mix: dict[str, float] | None = None,
        seed: int = 0,
        pad_id: int = 0,
        plan_dir: Path | None = None,
    ) -> TokenDataset:
        """Plan the windows of a split, or read the plan of an earlier run from `plan_dir`
        (default: beside the token files).

        `mix` gives relative shares of *tokens* to languages ("zh"), sources ("wiki") or both
        ("wiki/zh"); a group named by several keys belongs to each of them, one without a key is not
        used. Within a key every window is drawn equally often. Without `mix` an epoch draws each
        window of the split once.

        Raises DataError when the split does not exist or has no window, ConfigError for an unknown
        key or an invalid weight.
        """
        groups, shards = _groups_of(prepared, split)
        selected = set(range(len(groups)))
        if mix is not None:
            for key, weight in mix.items():
                if not isfinite(weight) or weight < 0:
                    raise ConfigError(
                        f"the mix gives {key!r} the weight {weight}",
                        hint="weights are relative shares of at least 0, for example 2 and 1",
                    )
            members = {key: _members(groups, key) for key in mix}
            selected = {i for key, numbers in members.items() if mix[key] != 0 for i in numbers}
        planned: dict[int, _Planned] = {}
        first_shard = 0
        for i, group in enumerate(groups):
            if i in selected:
                folder = plan_dir or group.shards[0].path.parent
                plan = load_plan(group.shards, prepared.stage, window, folder)
                planned[i] = _Planned(plan, first_shard)
            first_shard += len(group.shards)

        if mix is None:
            streams, weights = [_Stream(list(planned.values()))], [1.0]
            if streams[0].windows == 0:
                raise _nothing_left(window, f"of the {split} split", streams[0])
        else:
            streams = [_Stream([planned[i] for i in members[key] if i in planned]) for key in mix]
            weights = []
            for (key, weight), stream in zip(mix.items(), streams, strict=True):
                if weight and stream.windows == 0:
                    raise _nothing_left(window, f"of {key!r} in the {split} split", stream)
                # Shares are of tokens, not of windows: a half-empty row counts half.
                per_window = stream.stats.inputs / stream.windows if stream.windows else 1.0
                weights.append(weight / per_window)
            if not any(weights):
                raise ConfigError(
                    "the mix gives no source a weight", hint="for example zh = 1 and en = 1"
                )
        return cls(
            shards=shards,
            streams=streams,
            sampler=MixtureSampler([stream.windows for stream in streams], weights, seed),
            stats=_Stream(list(planned.values())).stats,
            window=window,
            masked=prepared.stage == "sft",
            pad_id=pad_id,
        )

    @property
    def windows(self) -> int:
        """Number of distinct windows; without a mix, the draws of an epoch."""
        return self.stats.windows

    def epoch(self, draw: int) -> int:
        """Complete passes over the source of this draw before it."""
        return self.sampler.epoch(draw)

    def batch(self, draws: Iterable[int]) -> Batch:
        """The windows of the draws, in their order: (number of draws, T)."""
        rows: list[int] = []
        shards: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        for draw in draws:
            source, index = self.sampler.draw(draw)
            group, window = self.streams[source].find(index)
            plan = group.plan
            pieces = slice(int(plan.window_ptr[window]), int(plan.window_ptr[window + 1]))
            shards.append(plan.piece_shard[pieces] + group.first_shard)
            starts.append(plan.piece_start[pieces])
            lengths.append(plan.piece_length[pieces])
            rows.append(pieces.stop - pieces.start)
        assert rows, "a batch needs at least one draw"
        return self._assemble(rows, *map(np.concatenate, (shards, starts, lengths)))

    def _assemble(
        self, pieces_of_row: list[int], shard: np.ndarray, start: np.ndarray, length: np.ndarray
    ) -> Batch:
        """Copy pieces, of which each row has the next `pieces_of_row`, into a batch (B, T)."""
        n_rows, window = len(pieces_of_row), self.window
        row = np.repeat(np.arange(n_rows), pieces_of_row)
        start, length = start.astype(np.int64), length.astype(np.int64)
        before = np.cumsum(length) - length  # cells of all earlier pieces
        filled = np.bincount(row, weights=length, minlength=n_rows).astype(np.int64)
        assert filled.max() <= window, f"{filled.max()} inputs in a window of {window}"
        piece = np.repeat(np.arange(length.size), length)  # of every real cell, rows concatenated
        within = np.arange(piece.size) - before[piece]
        row_before = np.cumsum(filled) - filled
        cell = row[piece] * window + (before - row_before[row])[piece] + within
        first_piece = np.searchsorted(row, np.arange(n_rows))

        # Cells that no piece fills are padding, with positions of their own.
        ids = np.full(n_rows * window, self.pad_id, np.int64)
        labels = np.full(n_rows * window, IGNORE, np.int64)
        positions = np.maximum(np.arange(window)[None, :] - filled[:, None], 0).reshape(-1)
        doc_ids = np.full(n_rows * window, -1, np.int64)

        positions[cell] = within
        doc_ids[cell] = (np.arange(length.size) - first_piece[row])[piece]
        source = start[piece] + within
        for number in np.unique(shard).tolist():
            here = (shard == number)[piece]
            from_token, to_cell = source[here], cell[here]
            file = self.shards[number]
            tokens, mask = file.tokens, file.loss_mask
            ids[to_cell] = inputs = tokens[from_token]
            targets = tokens[from_token + 1].astype(np.int64)
            highest = max(int(inputs.max()), int(targets.max()))
            if highest >= file.vocab_size:  # an embedding would fail without naming the file
                raise TokenFileError(
                    f"{file.path}: token id {highest} in a vocabulary of {file.vocab_size}",
                    hint=PREPARE_AGAIN,
                )
            if self.masked:
                assert mask is not None, f"{file.path} has no loss mask"
                targets = np.where(mask[from_token + 1] != 0, targets, IGNORE)
            labels[to_cell] = targets
        rows = (each.reshape(n_rows, window) for each in (ids, labels, positions, doc_ids))
        return Batch(*map(torch.from_numpy, rows))


def _groups_of(prepared: PreparedData, split: str) -> tuple[list[Group], list[MmapFileHandler]]:
    groups = [group for group in prepared.groups if group.split == split and group.shards]
    if not groups:
        known = sorted({group.split for group in prepared.groups})
        raise DataError(
            f"the prepared data has no {split!r} split, only {', '.join(known) or 'none'}",
            hint="`khaosz data prepare --val-fraction 0.01` creates a validation split"
            if split == "val"
            else None,
        )
    return groups, [shard for group in groups for shard in group.shards]


def _members(groups: list[Group], key: str) -> list[int]:
    """The groups that a key of the mix names: a language, else a source, else source/lang."""
    langs = [group.lang for group in groups]
    sources = [group.source for group in groups]
    pairs = [f"{group.source}/{group.lang}" for group in groups]
    for names in (langs, sources, pairs):
        if key in names:
            return [i for i, name in enumerate(names) if name == key]
    known = sorted({*langs, *sources, *pairs})
    close = nearest(key, known)
    raise ConfigError(
        f"the mix names {key!r}, which is not in the prepared data",
        hint=f"did you mean {close!r}?" if close else f"known: {', '.join(known)}",
    )


def _nothing_left(window: int, what: str, stream: _Stream) -> DataError:
    stats = stream.stats
    return DataError(
        f"a window of {window} leaves nothing {what}: of {stats.documents} documents "
        f"{stats.skipped_short} are too short, {stats.skipped_long} too long and "
        f"{stats.skipped_untrained} have no trained token",
        hint="use a longer window" if stats.skipped_long else "prepare more text",
    )
