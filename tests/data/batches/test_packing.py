"""The plan of the windows: nothing lost, nothing twice, nothing across documents."""

from __future__ import annotations

import itertools
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from khaosz.data.batches import packing
from khaosz.data.batches.packing import OPEN_BINS, PackingPlan, load_plan
from khaosz.errors import DataError, TokenFileError


@dataclass
class Shard:
    """What packing reads of a token file, without its format."""

    path: Path
    tokens: np.ndarray
    doc_offsets: np.ndarray
    loss_mask: np.ndarray | None = None


def shard_of(path: Path, lengths: list[int], masks: list[list[int]] | None = None) -> Shard:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)
    tokens = np.arange(int(offsets[-1])).astype(np.uint16)
    mask = None
    if masks is not None:
        assert [len(m) for m in masks] == lengths
        mask = np.array([bit for m in masks for bit in m], np.uint8)
    path.write_bytes(repr((lengths, masks)).encode())
    return Shard(path, tokens, offsets, mask)


def pieces_of(plan: PackingPlan) -> list[list[tuple[int, int, int]]]:
    """Per window its (shard, start, length)."""
    table = list(
        zip(
            plan.piece_shard.tolist(),
            plan.piece_start.tolist(),
            plan.piece_length.tolist(),
            strict=True,
        )
    )
    ptr = plan.window_ptr.tolist()
    return [table[a:b] for a, b in itertools.pairwise(ptr)]


def check_pt_plan(plan: PackingPlan, shards: list[Shard], window: int) -> None:
    windows = pieces_of(plan)
    assert all(windows), "no window is empty"
    assert all(sum(p[2] for p in pieces) <= window for pieces in windows)
    pairs = sorted(
        (shard, start + k)
        for pieces in windows
        for shard, start, length in pieces
        for k in range(length)
    )
    expected = []
    for number, shard in enumerate(shards):
        offsets = shard.doc_offsets.tolist()
        for begin, end in itertools.pairwise(offsets):
            expected += [(number, int(i)) for i in range(begin, end - 1)]
    assert pairs == expected  # every pair once; the last token of a document is never an input


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    documents=st.lists(st.lists(st.integers(0, 40), max_size=30), min_size=1, max_size=3),
    window=st.integers(1, 17),
)
def test_every_pair_is_planned_once(
    tmp_path: Path, documents: list[list[int]], window: int
) -> None:
    shards = [shard_of(tmp_path / f"{i}.tok", lengths) for i, lengths in enumerate(documents)]
    plan = load_plan(shards, "pt", window, tmp_path)
    check_pt_plan(plan, shards, window)
    flat = [n for lengths in documents for n in lengths]
    assert plan.stats.documents == len(flat)
    assert plan.stats.skipped_short == sum(n < 2 for n in flat)
    assert plan.stats.cut == sum(n - 1 > window for n in flat)
    assert plan.stats.inputs == sum(max(n - 1, 0) for n in flat)


def test_blocks_and_flushes_do_not_change_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    lengths = [rng.choice([1, 2, 5, 30, 200, 900]) for _ in range(3000)]
    shards = [shard_of(tmp_path / "a.tok", lengths), shard_of(tmp_path / "b.tok", lengths[:100])]
    whole = load_plan(shards, "pt", 128, tmp_path / "whole")
    check_pt_plan(whole, shards, 128)
    monkeypatch.setattr(packing, "_PIECES_PER_FLUSH", 7)
    small = load_plan(shards, "pt", 128, tmp_path / "small")
    for name in ("window_ptr", "piece_shard", "piece_start", "piece_length"):
        assert np.array_equal(getattr(whole, name), getattr(small, name)), name
    monkeypatch.setattr(packing, "_DOCUMENTS_PER_BLOCK", 64)
    blocks = load_plan(shards, "pt", 128, tmp_path / "blocks")
    check_pt_plan(blocks, shards, 128)
    assert blocks.stats == whole.stats


def test_exactly_one_window(tmp_path: Path) -> None:
    plan = load_plan([shard_of(tmp_path / "a.tok", [9])], "pt", 8, tmp_path)
    assert pieces_of(plan) == [[(0, 0, 8)]]
    assert plan.stats.fill == 1.0


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(8, [[7]]), (9, [[8]]), (10, [[8], [1]]), (17, [[8], [8]]), (18, [[8], [8], [1]])],
)
def test_cuts_at_the_edges(tmp_path: Path, tokens: int, expected: list[list[int]]) -> None:
    plan = load_plan([shard_of(tmp_path / "a.tok", [tokens])], "pt", 8, tmp_path)
    assert [[p[2] for p in pieces] for pieces in pieces_of(plan)] == expected


def test_best_fit_takes_the_tightest_window(tmp_path: Path) -> None:
    # inputs 6 and 4 open two windows of 8; 2 fits both and belongs to the first
    plan = load_plan([shard_of(tmp_path / "a.tok", [7, 5, 3])], "pt", 8, tmp_path)
    assert sorted(sorted(p[2] for p in pieces) for pieces in pieces_of(plan)) == [[2, 6], [4]]


def test_fill_on_a_real_mixture_of_lengths(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 1.0, 20_000), 3, 20_000).astype(int).tolist()
    shard = shard_of(tmp_path / "a.tok", lengths)
    stats = load_plan([shard], "pt", 1024, tmp_path).stats
    assert stats.fill > 0.98, stats
    assert stats.windows <= stats.inputs / 1024 * 1.02


def test_open_windows_are_bounded(tmp_path: Path) -> None:
    """Pieces of more than half a window never pair up: the fullest is closed, others stay open."""
    lengths = [7 + i % 2 for i in range(3 * OPEN_BINS)] + [4] * (2 * OPEN_BINS)
    shard = shard_of(tmp_path / "a.tok", lengths)
    plan = load_plan([shard], "pt", 10, tmp_path)
    check_pt_plan(plan, [shard], 10)
    # Only the 512 windows that were still open could take one of the 1024 short pieces.
    shared = [p for p in pieces_of(plan) if len(p) > 1 and max(piece[2] for piece in p) > 5]
    assert len(shared) == OPEN_BINS


def test_the_plan_is_deterministic_reused_and_memory_mapped(tmp_path: Path) -> None:
    shard = shard_of(tmp_path / "a.tok", [50] * 40)
    one = load_plan([shard], "pt", 64, tmp_path / "one")
    two = load_plan([shard], "pt", 64, tmp_path / "two")
    for name in ("window_ptr", "piece_shard", "piece_start", "piece_length"):
        array = getattr(one, name)
        assert isinstance(array, np.memmap) and not array.flags.writeable
        assert np.array_equal(array, getattr(two, name))
    (folder,) = (tmp_path / "one").iterdir()
    assert folder.name.startswith(".plan-pt-64-")
    before = folder.stat().st_mtime_ns, (folder / "piece_start.bin").stat().st_mtime_ns
    again = load_plan([shard], "pt", 64, tmp_path / "one")
    assert again.stats == one.stats
    assert (folder.stat().st_mtime_ns, (folder / "piece_start.bin").stat().st_mtime_ns) == before


def test_another_window_or_content_is_another_plan(tmp_path: Path) -> None:
    shard = shard_of(tmp_path / "a.tok", [50] * 40)
    load_plan([shard], "pt", 64, tmp_path / "plans")
    load_plan([shard], "pt", 32, tmp_path / "plans")
    load_plan([shard_of(tmp_path / "a.tok", [50] * 41)], "pt", 64, tmp_path / "plans")
    assert len(list((tmp_path / "plans").iterdir())) == 3


def test_partial_plans_are_removed_after_a_day(tmp_path: Path) -> None:
    shard = shard_of(tmp_path / "a.tok", [50] * 40)
    old, new = tmp_path / ".plan-pt-64-aa.partial-1-bb", tmp_path / ".plan-pt-64-aa.partial-2-cc"
    for folder in (old, new):
        folder.mkdir()
        (folder / "piece_start.bin").write_bytes(b"half")
    two_days_ago = time.time() - 2 * 86_400
    os.utime(old, (two_days_ago, two_days_ago))
    load_plan([shard], "pt", 64, tmp_path)
    assert not old.exists()
    assert new.exists(), "another process may still write it"


def test_concurrent_planning_uses_the_first_plan(tmp_path: Path) -> None:
    shard = shard_of(tmp_path / "a.tok", [50] * 40)
    folder = tmp_path / "plans"
    load_plan([shard], "pt", 64, folder)
    (winner,) = folder.iterdir()
    partial = folder / "late"
    partial.mkdir()
    (partial / "stats.json").write_text("{}")
    packing._publish(partial, winner)
    assert load_plan([shard], "pt", 64, folder).stats.documents == 40


def test_a_plan_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="could not write the packing plan") as caught:
        load_plan([shard_of(tmp_path / "a.tok", [5])], "pt", 8, tmp_path / "file")
    assert caught.value.hint


@pytest.mark.parametrize("damage", ["cut", "missing", "other"])
def test_a_damaged_plan_is_named(tmp_path: Path, damage: str) -> None:
    shard = shard_of(tmp_path / "a.tok", [50] * 40)
    load_plan([shard], "pt", 64, tmp_path / "plans")
    (folder,) = (tmp_path / "plans").iterdir()
    file = folder / "piece_start.bin"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(bytes(8) * 3)
    with pytest.raises(DataError, match=r"packing plan .*\.plan-pt-64") as caught:
        load_plan([shard], "pt", 64, tmp_path / "plans")
    assert caught.value.hint and "remove" in caught.value.hint


# --- SFT: U = context, A = trained


def mask(pattern: str) -> list[int]:
    return [int(c == "A") for c in pattern]


def sft(tmp_path: Path, patterns: list[str], window: int) -> PackingPlan:
    masks = [mask(p) for p in patterns]
    return load_plan(
        [shard_of(tmp_path / "a.tok", [len(m) for m in masks], masks)], "sft", window, tmp_path
    )


def test_a_conversation_that_just_fits_is_whole(tmp_path: Path) -> None:
    plan = sft(tmp_path, ["UUUAUUUAA"], 8)  # 9 tokens, 8 inputs
    assert pieces_of(plan) == [[(0, 0, 8)]] and plan.stats.cut == 0


def test_a_long_conversation_is_cut_after_its_last_whole_turn(tmp_path: Path) -> None:
    plan = sft(tmp_path, ["UUUAAUUUAA"], 8)  # 10 tokens: the second turn ends one too late
    assert pieces_of(plan) == [[(0, 0, 4)]]  # 5 tokens, the last label is the end of the turn
    assert (plan.stats.cut, plan.stats.skipped_long) == (1, 0)


def test_a_turn_that_ends_with_the_last_label_of_the_window_is_kept(tmp_path: Path) -> None:
    plan = sft(tmp_path, ["UUUAUUUUAU"], 8)  # the second turn ends at token 9 = 8 inputs + 1
    assert pieces_of(plan) == [[(0, 0, 8)]] and plan.stats.cut == 1


def test_conversations_that_cannot_be_trained_are_counted(tmp_path: Path) -> None:
    patterns = ["UUUUUUUUUUAA", "UUUU", "U", "", "A", "AU", "UA", "AUUUUUUUUUA"]
    plan = sft(tmp_path, patterns, 8)
    # "AU" and the prefix "A" of the last: the only trained token is not a label
    assert plan.stats.documents == 8
    assert plan.stats.skipped_short == 3
    assert plan.stats.skipped_untrained == 2
    assert plan.stats.skipped_long == 2
    assert pieces_of(plan) == [[(0, sum(map(len, patterns[:6])), 1)]]


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    patterns=st.lists(st.text("UA", max_size=30), min_size=1, max_size=20),
    window=st.integers(1, 20),
)
def test_every_piece_is_a_prefix_with_something_to_train(
    tmp_path: Path, patterns: list[str], window: int
) -> None:
    plan = sft(tmp_path, patterns, window)
    starts = np.cumsum([0, *map(len, patterns)]).tolist()
    by_start = {start: p for start, p in zip(starts, patterns, strict=False) if p}
    seen = 0
    for pieces in pieces_of(plan):
        assert sum(length for _, _, length in pieces) <= window
        for _, start, length in pieces:
            pattern = by_start.pop(start)  # at most one piece per conversation, at its beginning
            assert "A" in pattern[1 : length + 1]
            if length + 1 < len(pattern):
                assert len(pattern) > window + 1
                assert pattern[length] == "A" and pattern[length + 1] == "U"
            seen += 1
    stats = plan.stats
    skipped = stats.skipped_short + stats.skipped_long + stats.skipped_untrained
    assert seen + skipped == stats.documents == len(patterns)


def test_sft_needs_a_loss_mask(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.tok has no loss mask"):
        load_plan([shard_of(tmp_path / "a.tok", [5])], "sft", 8, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tok"], "nothing half-written is left"


def test_decreasing_offsets_are_detected(tmp_path: Path) -> None:
    shard = shard_of(tmp_path / "a.tok", [5, 5, 5])
    shard.doc_offsets[1:3] = [10, 5]
    with pytest.raises(TokenFileError, match=r"a\.tok: document offsets go backwards"):
        load_plan([shard], "pt", 8, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tok"]
