"""Groundedness: whether a model quotes the passages in its prompt, cites the right one, and refuses
when they lack the answer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from khaosz.data.records.readers import Skip, open_source, parsed
from khaosz.errors import DataError
from khaosz.rag.answer import CitationStream, strip_markers
from khaosz.rag.models.protocols import ChatModel
from khaosz.rag.prompt import REFUSAL


@dataclass(frozen=True)
class Groundedness:
    """Fractions of the `answerable` records: `exact` (the expected words only), `said` (among other
    words), `cited` (the right number only), `both` exact and cited, `refused` by mistake.
    `refusals`: refused fraction of the `unanswerable` records. None without such records."""

    answerable: int
    unanswerable: int
    exact: float | None
    said: float | None
    cited: float | None
    both: float | None
    refused: float | None
    refusals: float | None

    def format(self) -> str:
        def percent(share: float | None) -> str:
            return "-" if share is None else f"{share:.1%}"

        return (
            f"{self.answerable:,} answerable: {percent(self.exact)} exact, {percent(self.said)}"
            f" among other words, {percent(self.cited)} cited correctly, {percent(self.both)} exact"
            f" and cited, {percent(self.refused)} refused by mistake; {self.unanswerable:,}"
            f" unanswerable: {percent(self.refusals)} refused"
        )


def groundedness(
    model: ChatModel, file: Path, *, limit: int | None = None, max_tokens: int = 192
) -> Groundedness:
    """Evaluate the first `limit` records of a file that `khaosz data grounded` wrote; answers are
    greedy. Raises `DataError` for another file, `GenerationError` for a prompt that is too long."""
    counts: Counter[str] = Counter()
    for record in _records(file, limit):
        stream = CitationStream(record["passages"])
        pieces = model.stream(record["messages"][:-1], max_tokens, 0.0)
        text = "".join([stream.feed(piece) for piece in pieces]) + stream.finish()
        refusal = text.strip() in REFUSAL.values()
        if record["answer"] is None:
            counts.update(unanswerable=1, refusals=refusal)
            continue
        words, expected = _without_spaces(strip_markers(text)), _without_spaces(record["answer"])
        is_exact = words == expected
        is_cited = stream.used == [record["citation"]] and not stream.invalid
        counts.update(
            answerable=1,
            exact=is_exact,
            said=expected in words and not is_exact,
            cited=is_cited,
            both=is_exact and is_cited,
            refused=refusal,
        )
    answerable, unanswerable = counts["answerable"], counts["unanswerable"]
    names = ("exact", "said", "cited", "both", "refused")
    return Groundedness(
        answerable,
        unanswerable,
        **{name: _share(counts[name], answerable) for name in names},
        refusals=_share(counts["refusals"], unanswerable),
    )


def _records(file: Path, limit: int | None) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for batch in open_source(file):
        for line, record in parsed(batch):
            keys = {"messages", "answer", "citation", "passages"}
            if isinstance(record, Skip) or not keys <= record.keys():
                why = record.reason if isinstance(record, Skip) else "not a grounded record"
                raise DataError(f"{file} line {line}: {why}", hint="khaosz data grounded")
            records.append(record)
            if len(records) == limit:
                return records
    if not records:
        raise DataError(f"{file} has no records", hint="khaosz data grounded")
    return records


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _share(count: int, of: int) -> float | None:
    return round(count / of, 4) if of else None
