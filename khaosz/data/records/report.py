"""Counts of the records of input files, used and skipped, and the hash that finds duplicates.

A record is skipped because it cannot be read, or left out on purpose: an empty text, an answer
labelled undesirable, a prompt longer than the window (`LeftOut`). All are reported. A share of
unread records above 1 % is an error unless the caller allows it: such data is usually of another
layout than it seems.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

from khaosz.config import ColumnsConfig
from khaosz.data.records.readers import InputFiles, Skip, open_source, parsed
from khaosz.data.records.turns import LeftOut
from khaosz.errors import DataError, TokenizerError

HASH_BYTES = 16
EXAMPLE_LINES = 20
MAX_UNREAD = 0.01
# Some reasons quote the input: a damaged file must not grow the report without bound.
_MAX_REASONS = 50
_OTHER_REASONS = "other reasons"
_SHOWN_REASONS = 12
_SHOWN_PLACES = 3


@dataclass
class InputReport:
    """One input file. `skipped`: reason -> {"count", "lines" (the first 20 line numbers)}, and
    "left_out" for a reason on purpose. `unread`: records that could not be read. `notes`: lines on
    what was left out of the folders of all inputs, in the first of them."""

    path: str
    encoding: str = "utf-8"
    records: int = 0
    kept: int = 0
    duplicates: int = 0
    bytes: int = 0
    tokens: int = 0
    characters: int = 0
    skipped: dict[str, dict[str, Any]] = field(default_factory=dict)
    unread: int = 0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._unread_line = -1

    def skip(self, line: int, reason: str, *, unread: bool = True) -> None:
        """A record can be skipped for several reasons, as a ranking whose pairs are unusable."""
        if unread and line != self._unread_line:
            self.unread += 1
            self._unread_line = line
        if reason not in self.skipped and len(self.skipped) >= _MAX_REASONS:
            reason = _OTHER_REASONS
        entry = self.skipped.setdefault(reason, {"count": 0, "lines": []})
        entry["count"] += 1
        if not unread:
            entry["left_out"] = True
        if len(entry["lines"]) < EXAMPLE_LINES:
            entry["lines"].append(line)

    @contextmanager
    def skipping(self, line: int) -> Iterator[None]:
        """Skip the record of this line if the block raises what is wrong with it."""
        try:
            yield
        except LeftOut as error:
            self.skip(line, str(error), unread=False)
        except (DataError, TokenizerError, RecursionError) as error:
            self.skip(line, str(error))

    def lines(self) -> list[str]:
        """For people: the counts, and which records were skipped and why."""
        out = [f"{self.path}: {self._counts()}"]
        for reason, entry in sorted(self.skipped.items(), key=lambda item: -item[1]["count"]):
            numbers = ", ".join(map(str, entry["lines"]))
            more = ", ..." if entry["count"] > len(entry["lines"]) else ""
            out.append(f"  skipped {entry['count']:,}: {reason} (line {numbers}{more})")
        return out + [f"  {note}" for note in self.notes]

    def _counts(self) -> str:
        duplicates = f", {self.duplicates:,} duplicates" if self.duplicates else ""
        encoding = "" if self.encoding == "utf-8" else f", encoding={self.encoding}"
        return f"{self.records:,} records, {self.kept:,} kept{duplicates}{encoding}"


def open_reports(files: InputFiles) -> list[InputReport]:
    """A report of each file."""
    reports = [InputReport(str(path)) for path in files]
    if reports:
        reports[0].notes += files.notes
    return reports


def summary(inputs: Sequence[InputReport]) -> list[str]:
    """For people: the counts of all inputs together, and the reasons for skipping with the first
    places of each as file:line."""
    total = InputReport(inputs[0].path if len(inputs) == 1 else f"{len(inputs):,} files")
    for name in ("records", "kept", "duplicates", "unread"):
        setattr(total, name, sum(getattr(entry, name) for entry in inputs))
    total.encoding = " and ".join({entry.encoding: None for entry in inputs})
    unread = f", {total.unread:,} not read" if total.unread else ""
    reasons = _reasons(inputs)
    out = [f"{total.path}: {total._counts()}{unread}"]
    out += [f"  skipped {line}" for line in reasons[:_SHOWN_REASONS]]
    if len(reasons) > _SHOWN_REASONS:
        out.append(f"  and {len(reasons) - _SHOWN_REASONS} other reasons")
    return out + [f"  {note}" for entry in inputs for note in entry.notes]


def _reasons(inputs: Iterable[InputReport], *, unread: bool = False) -> list[str]:
    """Reasons for skipping with their counts and first places, the most frequent first; `unread`:
    only of records that could not be read."""
    reasons: dict[str, tuple[int, list[str]]] = {}
    for entry in inputs:
        for reason, skipped in entry.skipped.items():
            if not (unread and skipped.get("left_out")):
                count, places = reasons.get(reason, (0, []))
                places += [f"{Path(entry.path).name}:{line}" for line in skipped["lines"]]
                reasons[reason] = (count + skipped["count"], places[:_SHOWN_PLACES])
    return [
        f"{count:,}: {reason} ({', '.join(places)}{', ...' if count > len(places) else ''})"
        for reason, (count, places) in sorted(reasons.items(), key=lambda item: -item[1][0])
    ]


def refuse_unread(inputs: Sequence[InputReport], allow: bool) -> None:
    """Raises `DataError` if more than 1 % of the records cannot be read, unless the caller allows
    it."""
    unread, records = sum(e.unread for e in inputs), sum(e.records for e in inputs)
    if not allow and unread > MAX_UNREAD * records:
        reasons = _reasons(inputs, unread=True)
        more = f"; {len(reasons) - 3} other reasons" if len(reasons) > 3 else ""
        raise DataError(
            f"{unread:,} of {records:,} records cannot be read: {'; '.join(reasons[:3])}{more}",
            hint="mend the data, name its columns in [columns], or leave these records out with"
            " --allow-unread (in a recipe: allow_unread = true)",
        )


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
        return summary(self.inputs)


def usable_records(
    entry: InputReport, columns: ColumnsConfig | None = None, *, every_column: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of an input with their line numbers; other records are counted as skipped.
    `every_column`: of tables, also those that no layout knows.

    Raises DataError for a file that cannot be read.
    """
    for batch in open_source(entry.path, columns, every_column=every_column):
        entry.encoding = batch.encoding
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
