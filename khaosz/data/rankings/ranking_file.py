"""Files of rankings: one JSON line each, as `khaosz preference collect` and the page write them.

    {"prompt": [messages], "answers": [texts], "ranking": [1, [0, 2]], "annotator": "li", ...}

What wrote the answers is in `model` and `sampling` of all of them, or in `sources`: of each answer
a list of {"model", "sampling"}, several where models gave the same text. Several programs may
append to a file and take rankings back at the same time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from khaosz.data.records.comparisons import ranking_levels
from khaosz.data.records.preference import prompt_key, to_prompt
from khaosz.data.records.readers import Skip, parse_line
from khaosz.data.records.report import text_hash
from khaosz.data.records.turns import Message
from khaosz.errors import DataError
from khaosz.files import append, disk_hint, locked, write_atomic

_LINE_START = b'{"prompt": ['  # of every line that we write


@dataclass(frozen=True)
class Ranking:
    """`levels`: indices of `answers`, best first, ties together. `models`: of each answer, the
    names of those that wrote it; empty where the record does not say. `item`: the same for all
    rankings of these answers to this prompt, in any order."""

    prompt: list[Message]
    answers: list[str]
    levels: list[list[int]]
    annotator: str
    models: list[list[str]]
    item: str
    record: dict[str, Any]


def read_rankings(paths: Iterable[Path]) -> list[Ranking]:
    """All rankings of some files, in order. A record without `annotator` has its file's name.
    Raises DataError with file and line."""
    return [
        _ranking_at(path, number, line)
        for path in paths
        for number, line in enumerate(_lines(path), start=1)
        if line.strip()
    ]


def to_ranking(record: Any, default_annotator: str = "") -> Ranking:
    """Raises DataError for a record that is not a ranking."""
    if not isinstance(record, dict) or not {"answers", "ranking"} <= record.keys():
        raise DataError("not a ranking: answers or ranking is missing")
    prompt = to_prompt(record).prompt
    answers, levels = ranking_levels(record)
    if len({*answers}) < len(answers):
        raise DataError("two answers are the same")
    annotator = record.get("annotator") or default_annotator
    if not isinstance(annotator, str):
        raise DataError("annotator is not a text")
    item = text_hash(json.dumps([prompt_key(prompt), sorted(answers)])).hex()
    return Ranking(prompt, answers, levels, annotator, _models(record, answers), item, record)


def _models(record: dict[str, Any], answers: Sequence[str]) -> list[list[str]]:
    sources, model = record.get("sources"), record.get("model")
    if sources is None:
        return [[model] if isinstance(model, str) else [] for _ in answers]
    try:
        models = [[str(source["model"]) for source in each] for each in sources]
    except (TypeError, KeyError):
        raise DataError("sources is not a list of {model, sampling} for each answer") from None
    if len(models) != len(answers):
        raise DataError(f"{len(models)} sources for {len(answers)} answers")
    return models


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _ranking_at(path: Path, number: int, line: bytes) -> Ranking:
    record = parse_line(line)
    try:
        if isinstance(record, Skip):
            raise DataError(record.reason)
        return to_ranking(record, path.stem)
    except DataError as error:
        hint = error.hint or "a line is what `khaosz preference collect` writes"
        raise DataError(f"{path}, line {number}: {error}", hint=hint) from None


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replace a file by these lines, atomically. Raises DataError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (_line(record) for record in records))
    except OSError as error:
        raise _not_written(path, error) from error


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append a line, durably. Raises DataError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            append(path, _line(record))
    except OSError as error:
        raise _not_written(path, error) from error


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def _not_written(path: Path, error: OSError) -> DataError:
    what = f"cannot write {path}: {error.strerror or error}"
    return DataError(what, hint=disk_hint(error))


def is_torn(line: bytes) -> bool:
    """Whether a last line without a line end is an incomplete line of ours."""
    ours = line.startswith(_LINE_START) or _LINE_START.startswith(line)
    return ours and isinstance(parse_line(line), Skip)


def repair_last_line(path: Path) -> bool:
    """Remove an incomplete last line of ours, left by a crash, and end a complete one; whether one
    was removed. Raises OSError."""
    with locked(path):
        raw = path.read_bytes()
        last = raw.rpartition(b"\n")[2]
        if last and is_torn(last):
            os.truncate(path, len(raw) - len(last))
            return True
        if last:
            append(path, b"\n")
        return False


def take_back(path: Path, annotator: str | None) -> dict[str, Any] | None:
    """Remove the last ranking of an annotator from a file, and return it; None if there is none.
    With annotator None: the last one without a name. The file is replaced atomically. Raises
    OSError."""
    if not path.exists():
        return None
    with locked(path):
        lines = path.read_bytes().splitlines(keepends=True)
        for i, record in reversed(list(_records(lines))):
            if record.get("annotator") == annotator:
                write_atomic(path, [*lines[:i], *lines[i + 1 :]])
                return record
    return None


def _records(lines: Sequence[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, line in enumerate(lines):
        if not isinstance(record := parse_line(line), Skip):
            yield i, record
