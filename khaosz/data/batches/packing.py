"""Which pieces of which documents share a window: best-fit packing, planned once, stored on disk.

A window has T inputs. A document of L tokens (with `<|bos|>` and `<|eos|>`) has L - 1 pairs of an
input and the token that follows it; a *piece* is a run of such pairs of one document.

PT   A document longer than the window is cut into consecutive segments: inputs [kT, (k+1)T).
     Full segments are windows by themselves; remainders and short documents are packed together.
SFT  A conversation is never split into several pieces: the second would be trained without its
     beginning. One that is longer than the window is cut after the last assistant turn that fits,
     and skipped when none does. A piece without trained labels is skipped.

Packing is best fit over at most `OPEN_BINS` open windows: a piece goes where it leaves the least
free space; when there are too many open windows, the fullest is closed. The set of free sizes is
one integer used as a bitmask, so a piece costs a shift and a lowest-bit search, however many
windows are open. (Best fit for pretraining documents: Ding et al., "Fewer Truncations Improve
Language Modeling", 2024.)

A plan on disk is a folder of four headerless little-endian arrays and `stats.json`, which says how
long they are. The arrays are read through memory maps, so a plan costs no memory at any size.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from khaosz.data.records.chat import cut_at_turn
from khaosz.data.shards.mmap import MmapFileHandler
from khaosz.errors import DataError, TokenFileError
from khaosz.files import disk_error, publish, write_json

OPEN_BINS = 512
_FORMAT = 2  # part of the digest: a plan made by another algorithm is never reused
_DOCUMENTS_PER_BLOCK = 1 << 14
_PIECES_PER_FLUSH = 100_000
_ARRAYS: dict[str, np.dtype[Any]] = {
    "window_ptr": np.dtype("<i8"),
    "piece_shard": np.dtype("<i4"),
    "piece_start": np.dtype("<i8"),
    "piece_length": np.dtype("<i4"),
}
Piece = tuple[int, int, int]
"""(shard number, first token, number of inputs)"""


@dataclass(frozen=True)
class PackingStats:
    """Counts of documents, windows and pieces.

    documents          all documents read
    windows, pieces    in the plan
    skipped_short      fewer than two tokens: nothing to predict
    skipped_long       SFT: no assistant turn ends within the window
    skipped_untrained  SFT: no label is trained
    cut                longer than the window: PT into segments (lossless), SFT shortened
    inputs, cells      real positions, and windows * T
    """

    documents: int = 0
    windows: int = 0
    pieces: int = 0
    skipped_short: int = 0
    skipped_long: int = 0
    skipped_untrained: int = 0
    cut: int = 0
    inputs: int = 0
    cells: int = 0

    @property
    def fill(self) -> float:
        """Share of the cells that hold a token rather than padding; 0 without windows."""
        return self.inputs / self.cells if self.cells else 0.0

    def __add__(self, other: PackingStats) -> PackingStats:
        mine, theirs = asdict(self), asdict(other)
        return PackingStats(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True, eq=False)
class PackingPlan:
    """The windows of one group of shards; the arrays are read-only memory maps.

    Window w holds pieces [window_ptr[w], window_ptr[w + 1]). Piece p has `piece_length[p]` inputs
    from token `piece_start[p]` of shard number `piece_shard[p]`; its labels are one token later.
    """

    window_ptr: np.ndarray  # (windows + 1,) int64
    piece_shard: np.ndarray  # (pieces,) int32
    piece_start: np.ndarray  # (pieces,) int64
    piece_length: np.ndarray  # (pieces,) int32
    stats: PackingStats

    @property
    def windows(self) -> int:
        return self.window_ptr.shape[0] - 1


def load_plan(
    shards: Sequence[MmapFileHandler], stage: str, window: int, folder: Path
) -> PackingPlan:
    """The plan of a group of shards: read from `folder` if an earlier run wrote it, else computed.

    The plan's folder is `.plan-{stage}-{window}-{digest of the shards' headers}`; it gets that name
    when it is complete. Several processes may compute the same plan at the same time.

    Raises DataError when SFT shards have no loss mask and when the plan cannot be written.
    """
    assert stage in ("pt", "sft") and window >= 1, f"stage {stage!r}, window {window}"
    path = folder / f".plan-{stage}-{window}-{_digest(shards)}"
    if not path.is_dir():
        _remove_stale(folder)
        partial = folder / f"{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            partial.mkdir(parents=True)
            _write_plan(partial, shards, stage, window)
            _publish(partial, path)
        except OSError as error:
            raise DataError(
                f"could not write the packing plan {path}: {error.strerror or error}",
                hint="free some disk space, or name a writable folder for the plan",
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return read_plan(path)


def read_plan(path: Path) -> PackingPlan:
    """Raises DataError for a plan that is cut short or otherwise damaged."""
    hint = f"remove {path}: it is computed again from the token files"
    try:
        stats = PackingStats(**json.loads((path / "stats.json").read_text(encoding="utf-8")))
        arrays = {
            name: _mapped(path / f"{name}.bin", dtype, stats) for name, dtype in _ARRAYS.items()
        }
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"the packing plan {disk_error(error, path)}", hint=hint) from error
    return PackingPlan(**arrays, stats=stats)


def _mapped(path: Path, dtype: np.dtype[Any], stats: PackingStats) -> np.ndarray:
    length = stats.windows + 1 if path.stem == "window_ptr" else stats.pieces
    if path.stat().st_size != length * dtype.itemsize:
        raise ValueError(f"{path.name} holds {path.stat().st_size} bytes")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r") if length else np.empty(0, dtype)


def _remove_stale(folder: Path) -> None:
    """Remove partial plans of killed processes: no planning takes a day."""
    for partial in folder.glob(".plan-*.partial-*"):
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime > 86_400:
                shutil.rmtree(partial, ignore_errors=True)


def _digest(shards: Sequence[MmapFileHandler]) -> str:
    """Identifies the shards' contents: a header holds counts and checksums of its sections."""
    digest = hashlib.sha256(f"khaosz packing plan {_FORMAT}".encode())
    for shard in shards:
        with open(shard.path, "rb") as file:
            digest.update(hashlib.sha256(file.read(4096)).digest())
    return digest.hexdigest()[:16]


def _publish(partial: Path, path: Path) -> None:
    try:
        publish(partial, path)
    except OSError:
        if not path.is_dir():  # otherwise another process published the same plan first
            raise


def _write_plan(folder: Path, shards: Sequence[MmapFileHandler], stage: str, window: int) -> None:
    stats = PackingStats()
    with closing(PlanWriter(folder, window)) as writer:
        bins = _BestFit(window, writer)
        for number, shard in enumerate(shards):
            for offsets in _offset_blocks(shard):
                if stage == "pt":
                    stats += _plan_texts(offsets, window, number, writer, bins)
                else:
                    stats += _plan_conversations(offsets, window, number, shard, bins)
        bins.finish()
        writer.finish(stats)


class PlanWriter:
    """Streams windows to the files of a plan, buffering at most `_PIECES_PER_FLUSH` pieces.

    `finish` completes the plan; `close` closes the files in any case.
    """

    def __init__(self, folder: Path, window: int) -> None:
        self._folder = folder
        self._window = window
        self._files = {name: open(folder / f"{name}.bin", "wb") for name in _ARRAYS}  # noqa: SIM115
        self._append("window_ptr", np.zeros(1, np.int64))
        self._pieces: list[Piece] = []
        self._sizes: list[int] = []  # pieces per buffered window
        self._stats = PackingStats()

    def _append(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(values.astype(_ARRAYS[name]).tobytes())

    def window(self, pieces: list[Piece]) -> None:
        self._pieces.extend(pieces)
        self._sizes.append(len(pieces))
        if len(self._pieces) >= _PIECES_PER_FLUSH:
            self.flush()

    def full_windows(self, shard: int, starts: np.ndarray) -> None:
        """Add windows that one piece each fills."""
        self.flush()
        n = starts.size
        self._write(np.full(n, shard), starts, np.full(n, self._window), np.ones(n, np.int64))

    def flush(self) -> None:
        table = np.array(self._pieces, dtype=np.int64).reshape(-1, 3)
        self._write(table[:, 0], table[:, 1], table[:, 2], np.array(self._sizes, np.int64))
        self._pieces, self._sizes = [], []

    def _write(
        self, shard: np.ndarray, start: np.ndarray, length: np.ndarray, sizes: np.ndarray
    ) -> None:
        self._append("window_ptr", self._stats.pieces + np.cumsum(sizes))
        self._append("piece_shard", shard)
        self._append("piece_start", start)
        self._append("piece_length", length)
        self._stats += PackingStats(
            windows=sizes.size,
            pieces=start.size,
            inputs=int(length.sum()),
            cells=sizes.size * self._window,
        )

    def finish(self, documents: PackingStats) -> None:
        """Write the buffer and `stats.json`; `documents` counts documents read and skipped."""
        self.flush()
        write_json(self._folder / "stats.json", asdict(documents + self._stats))

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _offset_blocks(shard: MmapFileHandler) -> Iterator[np.ndarray]:
    """The document bounds of a shard, some documents at a time: (documents + 1,) int64 each.

    Raises TokenFileError when offsets decrease, which opening a shard does not check.
    """
    n_documents = len(shard.doc_offsets) - 1
    for first in range(0, n_documents, _DOCUMENTS_PER_BLOCK):
        last = min(first + _DOCUMENTS_PER_BLOCK, n_documents)
        offsets = shard.doc_offsets[first : last + 1].astype(np.int64)
        if (np.diff(offsets) < 0).any():
            raise TokenFileError(
                f"{shard.path}: document offsets go backwards",
                hint="the file is damaged: prepare the data again",
            )
        yield offsets


def _plan_texts(
    offsets: np.ndarray, window: int, shard: int, writer: PlanWriter, bins: _BestFit
) -> PackingStats:
    lengths = np.maximum(np.diff(offsets) - 1, 0)  # inputs per document
    starts = offsets[:-1]
    full = lengths // window
    # Segment k of a document starts at k * window: k is the rank within the repeated document.
    rank = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    if rank.size:
        writer.full_windows(shard, np.repeat(starts, full) + rank * window)
    rest = lengths - full * window
    packed = rest > 0
    bins.add(shard, (starts + full * window)[packed].tolist(), rest[packed].tolist())
    return PackingStats(
        documents=lengths.size,
        skipped_short=int((lengths == 0).sum()),
        cut=int((lengths > window).sum()),
    )


def _plan_conversations(
    offsets: np.ndarray, window: int, number: int, shard: MmapFileHandler, bins: _BestFit
) -> PackingStats:
    if shard.loss_mask is None:
        raise DataError(
            f"{shard.path} has no loss mask, which SFT needs",
            hint="prepare the data again with stage sft",
        )
    base = int(offsets[0])
    mask = np.asarray(shard.loss_mask[base : int(offsets[-1])])
    starts, lengths = offsets[:-1], np.diff(offsets) - 1  # -1 for an empty document
    # Trained labels per document; its first token is never a label. Empty documents have no
    # entry in the mask, and reduceat would count their neighbour's token.
    trained = np.zeros(lengths.size, np.int64)
    filled = lengths >= 0
    if filled.any():
        first = starts[filled] - base
        trained[filled] = np.add.reduceat(mask, first, dtype=np.int64) - mask[first]
    short, long = lengths <= 0, lengths > window
    untrained = ~short & (trained == 0)
    keep = ~short & ~untrained
    skipped_long = 0
    for i in np.flatnonzero(long & keep).tolist():
        begin = int(starts[i]) - base
        prefix = cut_at_turn(mask[begin : begin + int(lengths[i]) + 1], window + 1)
        if mask[begin + 1 : begin + prefix].any():
            lengths[i] = prefix - 1
        else:
            keep[i] = False
            skipped_long += 1
    bins.add(number, starts[keep].tolist(), lengths[keep].tolist())
    return PackingStats(
        documents=lengths.size,
        skipped_short=int(short.sum()),
        skipped_long=skipped_long,
        skipped_untrained=int(untrained.sum()),
        cut=int((long & keep).sum()),
    )


class _BestFit:
    """At most `OPEN_BINS` open windows, indexed by their free size."""

    def __init__(self, window: int, writer: PlanWriter) -> None:
        self._window = window
        self._writer = writer
        self._by_free: dict[int, list[list[Piece]]] = {}
        self._free_sizes = 0  # bit f is set when a window with f free cells is open
        self._open = 0

    def add(self, shard: int, starts: list[int], lengths: list[int]) -> None:
        for start, length in zip(starts, lengths, strict=True):
            fitting = self._free_sizes >> length
            if fitting:
                free = length + (fitting & -fitting).bit_length() - 1
                pieces = self._take(free)
            else:
                free, pieces = self._window, []
                self._open += 1
            pieces.append((shard, start, length))
            left = free - length
            if left == 0:
                self._close(pieces)
                continue
            self._by_free.setdefault(left, []).append(pieces)
            self._free_sizes |= 1 << left
            if self._open > OPEN_BINS:
                self._close(self._take_fullest())

    def finish(self) -> None:
        while self._free_sizes:
            self._close(self._take_fullest())

    def _take_fullest(self) -> list[Piece]:
        return self._take((self._free_sizes & -self._free_sizes).bit_length() - 1)

    def _take(self, free: int) -> list[Piece]:
        candidates = self._by_free[free]
        pieces = candidates.pop()
        if not candidates:
            self._free_sizes ^= 1 << free
        return pieces

    def _close(self, pieces: list[Piece]) -> None:
        self._writer.window(pieces)
        self._open -= 1
