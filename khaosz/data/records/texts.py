"""Plain texts of any readable input, one at a time, for tokenizer training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from khaosz.config import ColumnsConfig
from khaosz.data.records.comparisons import Rated
from khaosz.data.records.conversations import Conversation
from khaosz.data.records.layouts import Kind, Texts, read_record
from khaosz.data.records.readers import detect_language, expand_inputs
from khaosz.data.records.report import InputReport, open_reports, usable_records
from khaosz.data.records.turns import LeftOut

_KINDS: tuple[Kind, ...] = ("text", "chat", "comparison", "rated", "passages", "prompt")


def read_texts(
    path: Path, report: InputReport | None = None, columns: ColumnsConfig | None = None
) -> Iterator[tuple[str, str]]:
    """(language, text) of every usable record: a document's text, or all texts of a conversation,
    of answers that are compared, or of a query and its passages.

    `report` counts the records that were read, and says why others are skipped. Raises `DataError`
    for a file that can't be read.
    """
    report = report or InputReport(str(path))
    for line, record in usable_records(report, columns):
        text = ""
        with report.skipping(line):
            text = _text_of(record, columns)
            if not text or text.isspace():
                raise LeftOut("empty text")
            report.kept += 1
        if text and not text.isspace():
            lang = record.get("lang")
            yield (lang if isinstance(lang, str) else detect_language(text)), text


def read_interleaved(
    paths: Sequence[Path],
    reports: list[InputReport] | None = None,
    columns: ColumnsConfig | None = None,
) -> Iterator[str]:
    """Texts of all inputs, round-robin over the files; `reports` gets one of each file."""
    files = expand_inputs(paths)
    entries = open_reports(files)
    if reports is not None:
        reports += entries
    sources = [read_texts(path, entry, columns) for path, entry in zip(files, entries, strict=True)]
    while sources:
        for source in list(sources):
            item = next(source, None)
            if item is None:
                sources.remove(source)
            else:
                yield item[1]


def _text_of(record: dict[str, Any], columns: ColumnsConfig | None) -> str:
    text = record.get("text") if columns is None else None
    if not isinstance(text, str):
        text = _texts_in(read_record(record, _KINDS, columns))
    # A lone surrogate can't be encoded as UTF-8, tokenised or counted in bytes.
    return text.encode("utf-8", errors="ignore").decode("utf-8")


def _texts_in(item: Any) -> str:
    """All texts that a record holds, each on lines of its own."""
    match item:
        case str():
            return item
        case Conversation():
            parts = [message.get("content") for message in item.messages]
        case Rated():
            parts = [message.get("content") for message in item.prompt] + [item.answer]
        case Texts():
            parts = [item.query, *item.positives, *item.negatives]
        case [{}, *_]:  # the messages of a prompt
            parts = [message.get("content") for message in item]
        case [first, *_]:
            answers = chain.from_iterable((pair.chosen, pair.rejected) for pair in item)
            parts = [message.get("content") for message in first.prompt]
            parts += dict.fromkeys(answers)
        case _:
            parts = []
    return "\n".join(part for part in parts if part)
