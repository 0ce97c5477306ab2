"""Counts of the records of input files, used and skipped, and the hash that finds duplicates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from typing import Any

from khaosz.data.records.readers import Skip, open_source, parsed
from khaosz.errors import DataError, TokenizerError

HASH_BYTES = 16
EXAMPLE_LINES = 20
# Some reasons quote the input: a damaged file must not grow the report without bound.
_MAX_REASONS = 50
_OTHER_REASONS = "other reasons"


@dataclass
class InputReport:
    """One input file. `skipped`: reason -> {"count", "lines" (the first 20 line numbers)}."""

    path: str
    encoding: str = "utf-8"
    records: int = 0
    kept: int = 0
    duplicates: int = 0
    bytes: int = 0
    tokens: int = 0
    characters: int = 0
    skipped: dict[str, dict[str, Any]] = field(default_factory=dict)

    def skip(self, line: int, reason: str) -> None:
        if reason not in self.skipped and len(self.skipped) >= _MAX_REASONS:
            reason = _OTHER_REASONS
        entry = self.skipped.setdefault(reason, {"count": 0, "lines": []})
        entry["count"] += 1
        if len(entry["lines"]) < EXAMPLE_LINES:
            entry["lines"].append(line)

    @contextmanager
    def skipping(self, line: int) -> Iterator[None]:
        """Skip the record of this line if the block raises what is wrong with it."""
        try:
            yield
        except (DataError, TokenizerError, RecursionError) as error:
            self.skip(line, str(error))

    def lines(self) -> list[str]:
        """For people: the counts, and which records were skipped and why."""
        duplicates = f", {self.duplicates:,} duplicates" if self.duplicates else ""
        encoding = "" if self.encoding == "utf-8" else f", encoding={self.encoding}"
        counts = f"{self.records:,} records, {self.kept:,} kept{duplicates}{encoding}"
        out = [f"{self.path}: {counts}"]
        for reason, entry in sorted(self.skipped.items(), key=lambda item: -item[1]["count"]):
            numbers = ", ".join(map(str, entry["lines"]))
            more = ", ..." if entry["count"] > len(entry["lines"]) else ""
            out.append(f"  skipped {entry['count']:,}: {reason} (line {numbers}{more})")
        return out


@dataclass
class LoadReport:
    """What was loaded from `inputs`, in pairs or prompts: `kept`, of which `validation` are held
    out."""

    inputs: list[InputReport]
    kept: int = 0
    validation: int = 0

    @property
    def read(self) -> int:
        """Records in all inputs."""
        return sum(entry.records for entry in self.inputs)

    def lines(self) -> list[str]:
        """The report for people."""
        return [line for entry in self.inputs for line in entry.lines()]


def usable_records(entry: InputReport) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of an input with their line numbers; other records are counted as skipped.

    Raises DataError for a file that cannot be read.
    """
    for batch in open_source(entry.path):
        unread = [(line, Skip(reason)) for line, reason in batch.skipped]
        for line, record in chain(unread, parsed(batch)):
            entry.records += 1
            if isinstance(record, Skip):
                entry.skip(line, record.reason)
            else:
                yield line, record


def in_validation(text: str, seed: int, fraction: float) -> bool:
    """Whether `text` is held out: its hash and `seed` decide, for `fraction` of all texts."""
    key = text_hash(f"{seed} {text}")
    return int.from_bytes(key) < fraction * 2.0 ** (8 * len(key))


def nothing_to_train_on(report: LoadReport, hint: str) -> DataError:
    reason = worst_reason(report.inputs)
    return DataError(f"nothing to train on in {report.read} records{reason}", hint=hint)


def text_hash(text: str) -> bytes:
    """16 bytes; equal for texts that differ only in surrounding white space."""
    return blake2b(text.strip().encode("utf-8"), digest_size=HASH_BYTES).digest()


def worst_reason(inputs: Iterable[InputReport]) -> str:
    """The most frequent reason for skipping with an example line, or ""."""
    reasons = [
        (skipped["count"], reason, entry.path, skipped["lines"][0])
        for entry in inputs
        for reason, skipped in entry.skipped.items()
    ]
    if not reasons:
        return ""
    count, reason, path, line = max(reasons)
    return f": {count} records skipped as {reason}, first {path} line {line}"
