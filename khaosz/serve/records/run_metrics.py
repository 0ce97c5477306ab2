"""Reads JSON lines that a trainer may be writing, and only the part of a file that is needed.

An incomplete last line is left for the next read, and an invalid line is skipped. The files may
come from any program, so values are not trusted either.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any

MAX_ROWS = 2000
MAX_SAMPLES = 1000
MAX_SAMPLE_BYTES = 2 << 20  # read from the end of the samples
CURVE = 40  # values
_MAX_LINE = 1 << 16  # bytes
_TAIL = 1 << 14
_FAR = 1 << 18

_PLAIN = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))

Row = dict[str, Any]  # has an int "step"; numbers are finite, texts valid Unicode


def rows_after(path: Path, after: int) -> tuple[list[Row], bool]:
    """At most `MAX_ROWS` rows of later steps, and whether some were left out. The first, the last
    and those of validations are included, unless these are too many."""
    with _opened(path) as file:
        start, end = _start_after(file, after), _end(file)
        # Two passes, since the rows of a long run would not fit into memory.
        validated = [b'"val_' in line for line in _lines(file, start, end)]
        chosen = _choose(validated)
        rows = []
        for i, line in enumerate(_lines(file, start, end)):
            if i in chosen and (row := _row(line)) is not None and row["step"] > after:
                rows.append(row)
    return rows, len(chosen) < len(validated)


def last_row(path: Path) -> Row:
    """The newest value of every metric, from the last row and the last validation."""
    with _opened(path) as file:
        end = _end(file)
        values: Row = {}
        # The last validation may be far back: there, only rows of validations are parsed.
        tail = _line_start(file, max(0, end - _TAIL))
        for line in _lines(file, _line_start(file, max(0, end - _FAR)), tail):
            if b'"val_' in line and (row := _row(line)) is not None:
                values |= row
        for line in _lines(file, tail, end):
            if (row := _row(line)) is not None:
                values |= row
    return values


def curve(path: Path) -> list[float | None]:
    """The loss at up to `CURVE` positions, evenly spaced in the file."""
    with _opened(path) as file:
        end, losses = _end(file), {}
        for i in range(CURVE):
            start = _line_start(file, end * i // CURVE)
            line = next(_lines(file, start, end), b"")
            if (row := _row(line)) is not None and "loss" in row:
                loss = row["loss"]
                losses[start] = float(loss) if isinstance(loss, int | float) else None
    return [losses[start] for start in sorted(losses)]


def read_samples(path: Path, after: int) -> list[dict[str, Any]]:
    """The newest samples after a step, oldest first."""
    samples: list[dict[str, Any]] = []
    with _opened(path) as file:
        end = _end(file)
        for line in _lines(file, _line_start(file, max(0, end - MAX_SAMPLE_BYTES)), end):
            match _row(line):
                case {"step": step, "prompt": str(prompt), "text": str(text), **rest} if (
                    step > after
                ):
                    sample: dict[str, Any] = {"step": step, "prompt": prompt, "text": text}
                    if isinstance(reward := rest.get("reward"), int | float):
                        sample["reward"] = float(reward)
                    samples.append(sample)
    return samples[-MAX_SAMPLES:]


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A regular file; an empty one if it is missing, or a link or a pipe."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | _PLAIN), "rb")
    except OSError:
        yield BytesIO()
        return
    with file:
        yield file if S_ISREG(os.fstat(file.fileno()).st_mode) else BytesIO()


def _lines(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    """Complete lines that start at `start` or later and end at `end` or earlier."""
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
    """The start of the first line that starts at `at` or later."""
    if not at:
        return 0
    file.seek(at - 1)
    return at - 1 + len(file.readline())


def _start_after(file: IO[bytes], after: int) -> int:
    """Where to start reading so that no step after `after` is missed. Looks from the end, so that
    repeated requests do not read the whole file."""
    end, size = _end(file), _TAIL
    while after and size < end:
        start = _line_start(file, end - size)
        row = _row(next(_lines(file, start, end), b""))
        if row is not None and row["step"] <= after:
            return start
        size *= 4
    return 0


def _choose(validated: Sequence[bool]) -> set[int]:
    """Indices of the rows to return; rows that are `validated` come first."""
    count = len(validated)
    if count <= MAX_ROWS:
        return set(range(count))
    must = [i for i, each in enumerate(validated) if each or i in (0, count - 1)]
    if len(must) >= MAX_ROWS:
        return set(_evenly(must, MAX_ROWS))
    rest = [i for i, each in enumerate(validated) if not each and i not in (0, count - 1)]
    return {*must, *_evenly(rest, MAX_ROWS - len(must))}


def _evenly(items: Sequence[int], count: int) -> list[int]:
    """`count` of them, evenly spaced, with the first and the last, or the middle one."""
    if count < 2:
        return [items[len(items) // 2]][:count]
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def _row(line: bytes) -> Row | None:
    """The numbers and texts of a line; None if it has no step."""
    if len(line) > _MAX_LINE:
        return None
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or type(plain(values.get("step"))) is not int:
        return None
    return {
        plain(key): plain(value)
        for key, value in values.items()
        if not isinstance(value, list | dict)
    }


def plain(value: Any) -> Any:
    """The value as valid JSON: NaN, which trainers write, and integers beyond the range of floats
    become null, lone surrogates "?"."""
    match value:
        case int() if value.bit_length() >= 1024:
            return None
        case float() if not math.isfinite(value):
            return None
        case str() if not value.isascii():
            return value.encode(errors="replace").decode()
    return value
