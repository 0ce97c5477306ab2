"""Texts, questions and passages of the retrieval benches, from the shared data; and evidence.

Evidence is how much of what answers a question is in the five chunks that BM25 returns. English:
the corpora of Chroma's chunking evaluation in shared/data/chunking; recall and IoU of characters as
they define them (Smith and Troynikov, 2024, "Evaluating Chunking Strategies for Retrieval").
Chinese: the passages of CMRC 2018 as one text, and the answers to its questions.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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


def evidence_corpora(language: str) -> dict[str, tuple[str, list[Question]]]:
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


Spans = dict[str, list[tuple[int, int]]]


class Okapi:
    """BM25 (Robertson et al., TREC-3, 1994), k1 1.5 and b 0.75, over words."""

    def __init__(self, texts: Sequence[str], words: Callable[[str], list[str]]) -> None:
        self.words = words
        counts = [Counter(words(text)) for text in texts]
        lengths = [sum(count.values()) for count in counts]
        average = sum(lengths) / len(lengths)
        seen = Counter(word for count in counts for word in count)
        self.postings: dict[str, list[tuple[int, float]]] = {}
        for index, count in enumerate(counts):
            norm = 1.5 * (0.25 + 0.75 * lengths[index] / average)
            for word, n in count.items():
                idf = math.log(1 + (len(texts) - seen[word] + 0.5) / (seen[word] + 0.5))
                self.postings.setdefault(word, []).append((index, idf * n * 2.5 / (n + norm)))

    def top(self, question: str, k: int) -> list[int]:
        scores: Counter[int] = Counter()
        for word in self.words(question):
            for index, score in self.postings.get(word, ()):
                scores[index] += score
        return sorted(scores, key=lambda index: (-scores[index], index))[:k]


def words_of(language: str) -> Callable[[str], list[str]]:
    """Lowercase words; for Chinese, characters and their pairs; the same for every contender."""
    if language == "en":
        return lambda text: re.findall(r"\w+", text.lower())
    from khaosz.rag.terms import terms

    return terms


def locate(text: str, chunks: Sequence[str]) -> list[tuple[int, int]]:
    """Where the chunks stand in the text; peers may have trimmed them."""
    spans, at = [], 0
    for chunk in chunks:
        start = text.find(chunk, at)
        if start < 0:
            start = text.find(chunk)
        assert start >= 0, chunk[:80]
        spans.append((start, start + len(chunk)))
        at = start + 1
    return spans


def evidence(
    spans: Spans, corpora: dict[str, tuple[str, list[Question]]], language: str, k: int = 5
) -> dict[str, Any]:
    """Recall, precision and IoU in percent: means over the questions of all corpora."""
    pieces = [(name, a, b) for name, found in spans.items() for a, b in found]
    index = Okapi([corpora[name][0][a:b] for name, a, b in pieces], words_of(language))
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for name in spans:
        for question, wanted in corpora[name][1]:
            found = [pieces[i] for i in index.top(question, k)]
            hit: set[int] = set()
            for corpus, a, b in found:
                if corpus == name:
                    for start, end in wanted:
                        hit.update(range(max(a, start), min(b, end)))
            relevant = set().union(*(range(start, end) for start, end in wanted))
            retrieved = sum(b - a for _, a, b in found)
            missed = len(relevant) - len(hit)
            rows.setdefault(name, []).append(
                (
                    len(hit) / len(relevant),
                    len(hit) / max(retrieved, 1),
                    len(hit) / (retrieved + missed),
                )
            )
    rows["all"] = [row for found in list(rows.values()) for row in found]
    result: dict[str, Any] = {
        name: [100 * sum(column) / len(found) for column in zip(*found, strict=True)]
        for name, found in rows.items()
    }
    result["chunks"] = len(pieces)
    result["mean"] = sum(b - a for _, a, b in pieces) / len(pieces)
    return result
