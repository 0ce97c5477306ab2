"""A packing plan on disk: which pieces of which documents share a window.

A plan is a folder of four headerless little-endian arrays and `stats.json`, which says how long
they are. They are read through memory maps, so a plan costs no memory however large it is.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from khaosz.errors import DataError

Piece = tuple[int, int, int]
"""(shard number, first token, number of inputs)"""

_PIECES_PER_FLUSH = 100_000
_ARRAYS: dict[str, np.dtype[Any]] = {
    "window_ptr": np.dtype("<i8"),
    "piece_shard": np.dtype("<i4"),
    "piece_start": np.dtype("<i8"),
    "piece_length": np.dtype("<i4"),
}


@dataclass(frozen=True)
class PackingStats:
    """What became of the documents.

    documents          all that were seen
    windows, pieces    what the plan holds
    skipped_short      fewer than two tokens: nothing to predict
    skipped_long       SFT: no assistant turn ends within the window
    skipped_untrained  SFT: no label is trained
    cut                longer than the window: PT into segments (nothing is lost), SFT shortened
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


def read_plan(path: Path) -> PackingPlan:
    """Raises DataError for a plan that is cut short or otherwise damaged."""
    hint = f"remove {path}: it is made again from the token files"
    try:
        stats = PackingStats(**json.loads((path / "stats.json").read_text(encoding="utf-8")))
        arrays = {
            name: _mapped(path / f"{name}.bin", dtype, stats) for name, dtype in _ARRAYS.items()
        }
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"the packing plan {path} cannot be read: {error}", hint=hint) from error
    return PackingPlan(**arrays, stats=stats)


def _mapped(path: Path, dtype: np.dtype[Any], stats: PackingStats) -> np.ndarray:
    length = stats.windows + 1 if path.stem == "window_ptr" else stats.pieces
    if path.stat().st_size != length * dtype.itemsize:
        raise ValueError(f"{path.name} holds {path.stat().st_size} bytes")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r") if length else np.empty(0, dtype)


class PlanWriter:
    """Streams windows to the files of a plan; holds at most a flush of them in memory.

    `finish` completes the plan, `close` gives the files back in any case.
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
        """Windows of one piece each that fills them."""
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
        """Make everything durable; `documents` counts what was seen and skipped."""
        self.flush()
        with open(self._folder / "stats.json", "w", encoding="utf-8") as stats:
            json.dump(asdict(documents + self._stats), stats)
            for file in (*self._files.values(), stats):
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._files.values():
            file.close()
