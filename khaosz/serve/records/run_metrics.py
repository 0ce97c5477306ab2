"""Files of JSON lines that a trainer is writing, read without reading all of them where that can
be helped. A last line without its end is left for the next time, and a line that cannot be read is
passed over. The files may have been made by anything, so values are not trusted either."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any

MAX_ROWS = 2000
MAX_SAMPLES = 1000
MAX_SAMPLE_BYTES = 2 << 20  # of samples, read from the end
CURVE = 40  # values
_MAX_LINE = 1 << 16  # bytes
_TAIL = 1 << 14
_FAR = 1 << 18

_PLAIN = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))

Row = dict[str, Any]  # "step" is there, and an int; numbers are finite, texts valid Unicode


def rows_after(path: Path, after: int) -> tuple[list[Row], bool]:
    """At most `MAX_ROWS` rows of later steps, and whether some were left out. The first, the last
    and those with a validation are kept, as long as they are not too many themselves."""
    with _opened(path) as file:
        if file is None:
            return [], False
        start, end = _behind(file, after), _end(file)
        # First only which lines there are: a long run's would not fit into memory.
        kinds = [b'"val_' in line for line in _lines(file, start, end)]
        kept = _kept(kinds)
        rows = []
        for i, line in enumerate(_lines(file, start, end)):
            if i in kept and (row := _row(line)) is not None and row["step"] > after:
                rows.append(row)
    return rows, len(kept) < len(kinds)


def last_row(path: Path) -> Row | None:
    """The newest value of every metric: those of the last row, and of the last validation."""
    with _opened(path) as file:
        if file is None:
            return None
        end = _end(file)
        found: Row = {}
        # A validation may lie far behind; then only its rows are looked at.
        tail = _line_start(file, max(0, end - _TAIL))
        for line in _lines(file, _line_start(file, max(0, end - _FAR)), tail):
            if b'"val_' in line and (row := _row(line)) is not None:
                found |= row
        for line in _lines(file, tail, end):
            if (row := _row(line)) is not None:
                found |= row
    return found or None


def curve(path: Path) -> list[float | None]:
    """The loss at up to `CURVE` places spread evenly over the file."""
    with _opened(path) as file:
        if file is None:
            return []
        end, found = _end(file), {}
        for i in range(CURVE):
            start = _line_start(file, end * i // CURVE)
            line = next(_lines(file, start, end), b"")
            if (row := _row(line)) is not None and "loss" in row:
                loss = row["loss"]
                found[start] = float(loss) if isinstance(loss, int | float) else None
    return [found[start] for start in sorted(found)]


def read_samples(path: Path, after: int) -> list[dict[str, Any]]:
    """The newest, oldest first."""
    found: list[dict[str, Any]] = []
    with _opened(path) as file:
        if file is None:
            return []
        end = _end(file)
        for line in _lines(file, _line_start(file, max(0, end - MAX_SAMPLE_BYTES)), end):
            match _row(line):
                case {"step": step, "prompt": str(prompt), "text": str(text), **rest} if (
                    step > after
                ):
                    sample: dict[str, Any] = {"step": step, "prompt": prompt, "text": text}
                    if isinstance(reward := rest.get("reward"), int | float):
                        sample["reward"] = float(reward)
                    found.append(sample)
    return found[-MAX_SAMPLES:]


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes] | None]:
    """A regular file, or None: no link, no pipe, and nothing that is not there."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | _PLAIN), "rb")
    except OSError:
        yield None
        return
    with file:
        yield file if S_ISREG(os.fstat(file.fileno()).st_mode) else None


def _lines(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    """Whole lines that begin at `start` or later and end before `end`."""
    file.seek(start)
    at = start
    while at < end:
        line = file.readline()
        at += len(line)
        if not line.endswith(b"\n") or at > end:
            return
        yield line


def _end(file: IO[bytes]) -> int:
    return file.seek(0, os.SEEK_END)


def _line_start(file: IO[bytes], at: int) -> int:
    """Where the first line begins that begins at `at` or later."""
    if not at:
        return 0
    file.seek(at - 1)
    return at - 1 + len(file.readline())


def _behind(file: IO[bytes], after: int) -> int:
    """Where to begin reading so that no later step is missed: who asks again and again is told
    without the whole file being read."""
    end, size = _end(file), _TAIL
    while after and size < end:
        start = _line_start(file, end - size)
        row = _row(next(_lines(file, start, end), b""))
        if row is not None and row["step"] <= after:
            return start
        size *= 4
    return 0


def _kept(validated: Sequence[bool]) -> set[int]:
    """Which of the rows are shown, `validated` of each whether it must be."""
    count = len(validated)
    if count <= MAX_ROWS:
        return set(range(count))
    must = [i for i, each in enumerate(validated) if each or i in (0, count - 1)]
    if len(must) >= MAX_ROWS:
        return set(_evenly(must, MAX_ROWS))
    rest = [i for i, each in enumerate(validated) if not each and i not in (0, count - 1)]
    return {*must, *_evenly(rest, MAX_ROWS - len(must))}


def _evenly(items: Sequence[int], count: int) -> list[int]:
    """`count` of them with the first and the last, or the middle one."""
    if count < 2:
        return [items[len(items) // 2]][:count]
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def _row(line: bytes) -> Row | None:
    """Numbers and texts of a line with a step."""
    if len(line) > _MAX_LINE:
        return None
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or type(plain(found.get("step"))) is not int:
        return None
    return {
        plain(key): plain(value)
        for key, value in found.items()
        if not isinstance(value, list | dict)
    }


def plain(value: Any) -> Any:
    """What can stand in an answer: no NaN, though trainers write it, no lone surrogate, and no
    whole number beyond what a float can be."""
    match value:
        case int() if value.bit_length() >= 1024:
            return None
        case float() if not math.isfinite(value):
            return None
        case str() if not value.isascii():
            return value.encode(errors="replace").decode()
    return value
