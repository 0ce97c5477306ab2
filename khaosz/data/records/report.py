"""What became of the records of an input file, and the hash that finds duplicates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from khaosz.errors import DataError, TokenizerError

EXAMPLE_LINES = 20


# Reasons quote the input at times; a file of nonsense must not grow the report without bound.
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
        """What is wrong with the record of this line skips it."""
        try:
            yield
        except (DataError, TokenizerError, RecursionError) as error:
            self.skip(line, str(error))

    def lines(self) -> list[str]:
        """For people: how many records, and which were skipped why."""
        out = [f"{self.path}: {self.records:,} records, {self.kept:,} kept"]
        for reason, found in sorted(self.skipped.items(), key=lambda item: -item[1]["count"]):
            where = ", ".join(map(str, found["lines"]))
            more = ", ..." if found["count"] > len(found["lines"]) else ""
            out.append(f"  skipped {found['count']:,}: {reason} (line {where}{more})")
        return out


HASH_BYTES = 16


def text_hash(text: str) -> bytes:
    """16 bytes; equal for texts that differ at most in white space around them."""
    return blake2b(text.strip().encode("utf-8"), digest_size=HASH_BYTES).digest()


def worst_reason(inputs: Iterable[InputReport]) -> str:
    """The most frequent reason for skipping, with a place to look at, or ""."""
    reasons = [
        (skipped["count"], reason, entry.path, skipped["lines"][0])
        for entry in inputs
        for reason, skipped in entry.skipped.items()
    ]
    if not reasons:
        return ""
    count, reason, path, line = max(reasons)
    return f": {count} records skipped as {reason}, first {path} line {line}"
