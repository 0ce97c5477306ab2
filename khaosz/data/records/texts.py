"""Plain texts of any readable input, one at a time, for tokenizer training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from khaosz.data.records.chat import Message, to_messages
from khaosz.data.records.pairs import to_texts
from khaosz.data.records.preference import to_pairs, to_prompt
from khaosz.data.records.readers import detect_language, expand_inputs, records_of
from khaosz.errors import DataError


def read_texts(path: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of every usable record: a document's text, or a conversation's turns.

    Unusable records are passed over; `data prepare` reports them. Raises `DataError` for a file
    that can't be read.
    """
    for _, record in records_of(path):
        if text := _text_of(record):
            lang = record.get("lang")
            yield (lang if isinstance(lang, str) else detect_language(text)), text


def read_interleaved(paths: Sequence[Path]) -> Iterator[str]:
    """Texts of all inputs, round-robin over the files."""
    sources = [read_texts(path) for path in expand_inputs(paths)]
    while sources:
        for source in list(sources):
            item = next(source, None)
            if item is None:
                sources.remove(source)
            else:
                yield item[1]


def _text_of(record: dict[str, Any]) -> str | None:
    text = record.get("text")
    if text is None:
        messages = _messages_of(record)
        if messages is None:
            return None
        text = "\n".join(message["content"] for message in messages if message.get("content"))
    if not isinstance(text, str):
        return None
    # A lone surrogate can't be encoded as UTF-8, tokenised or counted in bytes.
    return text.encode("utf-8", errors="ignore").decode("utf-8")


def _messages_of(record: dict[str, Any]) -> list[Message] | None:
    """All texts of a record: a chat, a pair of answers, a prompt alone, or a query with its
    passages."""
    with suppress(DataError):
        return to_messages(record).messages
    with suppress(DataError):
        pairs = to_pairs(record)
        answers = [{"content": text} for pair in pairs for text in (pair.chosen, pair.rejected)]
        return [*pairs[0].prompt, *answers] if pairs else None
    with suppress(DataError):
        return to_prompt(record).prompt
    with suppress(DataError):
        texts = to_texts(record)
        return [{"content": text} for text in (texts.query, *texts.positives, *texts.negatives)]
    return None
