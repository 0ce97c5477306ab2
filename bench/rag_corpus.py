"""The texts, questions and passages of the retrieval benches, out of the shared data."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SHARED = (
    Path(os.environ.get("KHAOSZ_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
)
EVIDENCE = SHARED / "chunking"
PROSE = ("laws", "sanguo")  # of the Chinese sources, those that are running text


def rows() -> Iterator[dict[str, Any]]:
    """Documents of the training corpus in their order: text, lang, source."""
    import zstandard

    with (SHARED / "corpus/train.jsonl.zst").open("rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file)
        yield from map(json.loads, io.TextIOWrapper(stream, encoding="utf-8"))


def documents(language: str, megabytes: float, sources: Sequence[str] = ()) -> list[str]:
    """As many documents of a language as make up `megabytes` of UTF-8."""
    found: list[str] = []
    left = megabytes * 1e6
    for row in rows():
        if row["lang"] == language and (not sources or row["source"] in sources):
            found.append(row["text"])
            left -= len(row["text"].encode())
            if left <= 0:
                break
    return found


def distractors(count: int) -> Iterator[tuple[str, str]]:
    """Chinese passages of 400 characters, with a name each."""
    made = 0
    for row in rows():
        if row["lang"] != "zh" or len(row["text"]) < 100:
            continue
        for start in range(0, len(row["text"]), 400):
            if made == count:
                return
            yield f"distractor-{made}", row["text"][start : start + 400]
            made += 1


def cmrc() -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Passages by id, and questions with the id of their passage."""
    found = _cmrc()
    passages = {row["context_id"]: row["context_text"] for row in found}
    return passages, [(qa["query_text"], row["context_id"]) for row in found for qa in row["qas"]]


def _cmrc() -> list[dict[str, Any]]:
    path = SHARED / "retrieval/cmrc2018_dev_a.json"
    return list(json.loads(path.read_text(encoding="utf-8")))


Question = tuple[str, list[tuple[int, int]]]  # and where in the corpus its answer stands


def evidence(language: str) -> dict[str, tuple[str, list[Question]]]:
    """Corpora by name, with questions. Chinese: the passages of CMRC 2018 as one text, a paragraph
    each, and of every question the first answer that stands in its passage."""
    if language == "en":
        return {path.stem: _chroma(path) for path in sorted(EVIDENCE.glob("*.md"))}
    text, questions = "", []
    for row in _cmrc():
        passage = row["context_text"].strip()
        for qa in row["qas"]:
            texts = map(str, qa["answers"])  # some are numbers
            answers = [answer for answer in texts if answer and answer in passage]
            if answers:
                start = len(text) + passage.index(answers[0])
                questions.append((qa["query_text"], [(start, start + len(answers[0]))]))
        text += passage + "\n\n"
    return {"CMRC 2018": (text, questions)}


def _chroma(path: Path) -> tuple[str, list[Question]]:
    rows = json.loads(path.with_suffix(".questions.json").read_text("utf-8"))
    questions = [
        (
            row["question"],
            [(r["start_index"], r["end_index"]) for r in json.loads(row["references"])],
        )
        for row in rows
    ]
    return path.read_text("utf-8"), questions
