"""Answers from a knowledge base, graded mechanically: what the search refuses, what the model
refuses, what is right, and what is cited."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from khaosz.data.records.readers import Skip, open_source, parsed
from khaosz.errors import DataError
from khaosz.rag.answer import PASSAGES, ask, strip_markers
from khaosz.rag.knowledge_base import KnowledgeBase
from khaosz.rag.models.protocols import ChatModel, Reranker
from khaosz.rag.prompt import is_refusal
from khaosz.rag.scripts import to_simplified
from khaosz.rag.search.hit import Mode

MAX_TOKENS = 96  # of an answer


@dataclass(frozen=True)
class Question:
    """answers: alternatives, one of which a right answer contains; empty if the documents hold
    none. doc: the name of the document that holds it."""

    question: str
    answers: tuple[str, ...] = ()
    doc: str | None = None


@dataclass(frozen=True)
class Graded:
    """asked: whether the model was; refused: whether it, or else the search, found no answer."""

    question: str
    answerable: bool
    asked: bool
    refused: bool
    right: bool
    cited: bool
    text: str


@dataclass(frozen=True)
class AnswerReport:
    """Of the `answerable` questions: `refused_before` the model was asked and `refused_after`, both
    by mistake; `right`: the answer contains an expected one; `cited`: right, and a passage that is
    cited holds it. Of the `unanswerable`: `unasked`, rightly refused before the model, and
    `refused`, by it. Fractions; None without such questions."""

    answerable: int
    unanswerable: int
    refused_before: float | None
    refused_after: float | None
    right: float | None
    cited: float | None
    unasked: float | None
    refused: float | None

    def format(self) -> str:
        def percent(share: float | None) -> str:
            return "-" if share is None else f"{share:.1%}"

        return (
            f"{self.answerable:,} answerable: {percent(self.refused_before)} refused before the"
            f" model, {percent(self.refused_after)} by it, {percent(self.right)} right,"
            f" {percent(self.cited)} right and cited; {self.unanswerable:,} unanswerable:"
            f" {percent(self.unasked)} refused before the model, {percent(self.refused)} by it"
        )


def read_questions(file: Path, limit: int | None = None) -> list[Question]:
    """`{"question", "answer", "doc"}`: `answer` is a text, a list of alternatives, or null if the
    documents don't hold one; `doc` is optional. Raises `DataError` for another record."""
    questions: list[Question] = []
    for batch in open_source(file):
        for line, record in parsed(batch):
            if isinstance(record, Skip):
                raise DataError(f"{file} line {line}: {record.reason}")
            question, answer, doc = (record.get(key) for key in ("question", "answer", "doc"))
            answers = [answer] if isinstance(answer, str) else answer or []
            if (
                not isinstance(question, str)
                or not question.strip()
                or "answer" not in record
                or not isinstance(answers, list)
                or not all(isinstance(each, str) and _normalise(each) for each in answers)
                or not (doc is None or isinstance(doc, str))
            ):
                raise DataError(
                    f"{file} line {line}: not a question",
                    hint='{"question": "...", "answer": "..." or ["...", "..."] or null}',
                )
            questions.append(Question(question, tuple(answers), doc))
            if len(questions) == limit:
                return questions
    if not questions:
        raise DataError(f"{file} has no questions")
    return questions


def graded_answers(
    knowledge_base: KnowledgeBase,
    model: ChatModel,
    questions: Iterable[Question],
    *,
    k: int = PASSAGES,
    mode: Mode | None = None,
    reranker: Reranker | None = None,
) -> Iterator[Graded]:
    """Answers each question as `khaosz rag ask` does. Raises as `ask`."""
    for each in questions:
        reply = ask(
            knowledge_base, each.question, model,
            k=k, mode=mode, reranker=reranker, max_tokens=MAX_TOKENS,
        )  # fmt: skip
        text = "".join(reply)
        refused = not reply.asked or is_refusal(text)
        right = not refused and contains_answer(strip_markers(text), each.answers)
        passages = reply.prompt.passages if reply.prompt else ()
        cited = right and any(
            contains_answer(passage.text, each.answers) and each.doc in (None, passage.doc)
            for passage in (passages[citation.number - 1] for citation in reply.citations)
        )
        yield Graded(each.question, bool(each.answers), reply.asked, refused, right, cited, text)


def report(graded: Iterable[Graded]) -> AnswerReport:
    counts: Counter[str] = Counter()
    for each in graded:
        if each.answerable:
            counts.update(
                answerable=1,
                refused_before=not each.asked,
                refused_after=each.asked and each.refused,
                right=each.right,
                cited=each.cited,
            )
        else:
            counts.update(
                unanswerable=1, unasked=not each.asked, refused=each.asked and each.refused
            )

    def shares(of: str, *names: str) -> dict[str, Any]:
        total = counts[of]
        return {name: round(counts[name] / total, 4) if total else None for name in names}

    return AnswerReport(
        counts["answerable"],
        counts["unanswerable"],
        **shares("answerable", "refused_before", "refused_after", "right", "cited"),
        **shares("unanswerable", "unasked", "refused"),
    )


def write_graded(graded: Iterable[Graded], file: Path | None) -> Iterator[Graded]:
    """Each answer, appended to a JSONL file as it comes."""
    for each in graded:
        if file is not None:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(asdict(each), ensure_ascii=False) + "\n")
        yield each


def contains_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether the text contains one of the answers, after folding width, case, script, spaces and
    thousands separators. A number must stand alone: 7 is not in 17 or 7.5."""
    text = _normalise(text)
    return any(re.search(_pattern(_normalise(answer)), text) for answer in answers)


def _pattern(answer: str) -> str:
    before = r"(?<!\d)(?<!\d\.)" if answer[:1].isdigit() else ""
    after = r"(?!\d)(?!\.\d)" if answer[-1:].isdigit() else ""
    return before + re.escape(answer) + after


def _normalise(text: str) -> str:
    text = to_simplified(unicodedata.normalize("NFKC", text).casefold())
    return re.sub(r"(?<=\d),(?=\d)|\s", "", text)
