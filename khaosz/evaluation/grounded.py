"""Whether a model answers from the passages it is given: exactly, with the right citation, and not
at all where they do not say it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from khaosz.data.records.readers import Skip, open_source, parsed
from khaosz.errors import DataError
from khaosz.rag.answer import CitationStream, without_markers
from khaosz.rag.models.chat_model import ChatModel
from khaosz.rag.prompt import REFUSAL


@dataclass(frozen=True)
class Groundedness:
    """Shares of the `answerable` records: `exact` words of the passage and no others, `said` among
    others, `cited` by
    its number and no other, both, and wrongly `refused`. `refusals`: share of the `unanswerable`
    ones that were refused. None where there are no such records."""

    answerable: int
    unanswerable: int
    exact: float | None
    said: float | None
    cited: float | None
    both: float | None
    refused: float | None
    refusals: float | None

    def format(self) -> str:
        def shown(share: float | None) -> str:
            return "-" if share is None else f"{share:.1%}"

        of_answers = (
            f"{shown(self.exact)} exact, {shown(self.said)} said among other words,"
            f" {shown(self.cited)} rightly cited, {shown(self.both)} exact and cited,"
            f" {shown(self.refused)} wrongly refused"
        )
        return (
            f"of {self.answerable:,} answers {of_answers}; of {self.unanswerable:,} questions"
            f" without one {shown(self.refusals)} refused"
        )

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def groundedness(
    model: ChatModel, file: Path, *, limit: int | None = None, max_tokens: int = 192
) -> Groundedness:
    """Of records that `khaosz data grounded` wrote, the first `limit` of them. Answers are greedy.
    Raises `DataError` for a file of anything else, `GenerationError` for a prompt too long."""
    exact = said = cited = both = refused = right = answerable = unanswerable = 0
    for record in _records(file, limit):
        stream = CitationStream(record["passages"])
        pieces = model.stream(record["messages"][:-1], max_tokens, 0.0)
        text = "".join([stream.feed(piece) for piece in pieces]) + stream.finish()
        refusal = text.strip() in REFUSAL.values()
        if record["answer"] is None:
            unanswerable += 1
            right += refusal
            continue
        answerable += 1
        words, wanted = _plain(without_markers(text)), _plain(record["answer"])
        same = words == wanted
        said += wanted in words and not same
        named = stream.used == [record["citation"]] and not stream.invalid
        exact, cited, both = exact + same, cited + named, both + (same and named)
        refused += refusal
    return Groundedness(
        answerable,
        unanswerable,
        exact=_share(exact, answerable),
        said=_share(said, answerable),
        cited=_share(cited, answerable),
        both=_share(both, answerable),
        refused=_share(refused, answerable),
        refusals=_share(right, unanswerable),
    )


def _records(file: Path, limit: int | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for batch in open_source(file):
        for line, record in parsed(batch):
            keys = {"messages", "answer", "citation", "passages"}
            if isinstance(record, Skip) or not keys <= record.keys():
                why = record.reason if isinstance(record, Skip) else "no grounded record"
                raise DataError(f"{file} line {line}: {why}", hint="khaosz data grounded")
            found.append(record)
            if len(found) == limit:
                return found
    if not found:
        raise DataError(f"{file} holds no record", hint="khaosz data grounded")
    return found


def _plain(text: str) -> str:
    return "".join(text.split())


def _share(count: int, of: int) -> float | None:
    return round(count / of, 4) if of else None
