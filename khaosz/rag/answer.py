"""Answers from documents, streamed, with citations that resolve to exact characters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from khaosz.rag.knowledge_base import KnowledgeBase
from khaosz.rag.models.protocols import ChatModel, Messages, Reranker
from khaosz.rag.prompt import FIRST_CJK, REFUSAL, Prompt, build_prompt, is_refusal, language_of
from khaosz.rag.quote import PASSAGES as QUOTE_PASSAGES
from khaosz.rag.quote import Quote, find_quote
from khaosz.rag.relevance import has_relevant
from khaosz.rag.search.hit import Hit, Mode
from khaosz.rag.search.search import merge_neighbours

PASSAGES = 3  # in a prompt; of five, small models cite the wrong one more often
REWRITE_TOKENS = 64  # of a rewritten question
_MARKER = re.compile(r"[\[【]\s*(\d+(?:\s*[,，、]\s*\d+)*)\s*[\]】]")
_OPEN_MARKER = re.compile(r"[\[【][\d\s,，、]*$")  # may still become a marker
_MAX_MARKER = 24  # characters: a bracket with more digits is text


@dataclass(frozen=True)
class Citation:
    """`[number]` in the answer: characters start to end of the text with the SHA-256 `hash`; pages
    and lines as in `Hit`."""

    number: int
    hash: str
    start: int
    end: int
    doc: str
    doc_id: str
    page: int | None
    page_end: int | None = None
    line: int | None = None
    line_end: int | None = None
    headings: tuple[str, ...] = ()


@dataclass
class Answer:
    """Iterate over it for the text as it streams; the other fields are complete at the end.

    found: False if no hit is relevant, and at the end also if the model says that the answer is
    not in the passages. prompt: as sent to the model; None if it was not asked. quote: the answer
    without a model. hits: all of them, best first. invalid: how many markers named no passage and
    were removed.
    """

    question: str
    query: str
    hits: list[Hit]
    found: bool
    prompt: Prompt | None
    pieces: Iterator[str]
    text: str = ""
    citations: list[Citation] = field(default_factory=list)
    invalid: int = 0
    quote: Quote | None = None

    @property
    def passages(self) -> Sequence[Hit]:
        """What the numbers in the answer name."""
        if self.quote is not None:
            return (self.quote.hit,)
        return self.prompt.passages if self.prompt else ()

    def __iter__(self) -> Iterator[str]:
        passages = self.passages
        if self.quote is not None:
            yield from self._emit(self.quote.text)  # brackets in it are the document's
            yield from self._emit("[1]" if self.text[-1] >= FIRST_CJK else " [1]")
            self.citations += citations([1], passages)
            return
        stream = CitationStream(len(passages))
        for piece in self.pieces:
            yield from self._emit(stream.feed(piece))
        yield from self._emit(stream.finish())
        self.invalid = stream.invalid
        self.citations += citations(stream.used, passages)
        self.found = self.found and not is_refusal(self.text)

    @property
    def asked(self) -> bool:
        """Whether the model was asked."""
        return self.prompt is not None

    def _emit(self, text: str) -> Iterator[str]:
        if text:
            self.text += text
            yield text


class CitationStream:
    """Takes pieces of an answer and returns text in which every marker names a passage. Only text
    that may still become a marker is held back."""

    def __init__(self, passages: int) -> None:
        self._passages = passages
        self._pending = ""
        self.used: list[int] = []  # in the order in which they were first named
        self.invalid = 0

    def feed(self, piece: str) -> str:
        text, ended, out = self._pending + piece, 0, ""
        for match in _MARKER.finditer(text):
            out += text[ended : match.start()] + self._valid_markers(match)
            ended = match.end()
        # Not of what is left of a marker: what surrounded it would join to another one.
        marker = _OPEN_MARKER.search(text, ended)
        cut = marker.start() if marker and len(text) - marker.start() <= _MAX_MARKER else len(text)
        self._pending = text[cut:]
        return out + text[ended:cut]

    def finish(self) -> str:
        rest, self._pending = self._pending, ""
        return rest

    def _valid_markers(self, match: re.Match[str]) -> str:
        numbers = [int(number) for number in re.findall(r"\d+", match[1])]
        valid = [number for number in numbers if 1 <= number <= self._passages]
        self.invalid += len(numbers) - len(valid)
        self.used += [n for n in dict.fromkeys(valid) if n not in self.used]
        return "".join(f"[{number}]" for number in valid)


def citations(used: Sequence[int], passages: Sequence[Hit]) -> list[Citation]:
    """The passages that the numbers in an answer name."""
    hits = [(number, passages[number - 1]) for number in used]
    return [
        Citation(
            *(number, hit.hash, hit.start, hit.end, hit.doc, hit.doc_id, hit.page),
            *(hit.page_end, hit.line, hit.line_end, hit.headings),
        )
        for number, hit in hits
    ]


def strip_markers(text: str) -> str:
    return _MARKER.sub("", text)


def ask(
    knowledge_base: KnowledgeBase,
    question: str,
    model: ChatModel | Callable[[], ChatModel] | None,
    *,
    history: Messages = (),
    k: int = PASSAGES,
    mode: Mode | None = None,
    collection: str | None = None,
    reranker: Reranker | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    anyway: bool = False,
) -> Answer:
    """Retrieve, build the prompt, and generate the answer while it is iterated. `model` may be a
    function that opens it, called only if it is needed; without one the answer is quoted (`Quote`),
    and `max_tokens`, `temperature` and `anyway` are not used. anyway: ask the model although no
    passage seems relevant. Raises the errors of `KnowledgeBase.search` and `build_prompt`."""
    is_follow_up = any(message["role"] == "user" for message in history)
    query = question
    if model is None:
        return _quoted(
            knowledge_base, question, contextual_query(question, history, ""),
            max(k, QUOTE_PASSAGES), mode=mode, collection=collection, reranker=reranker,
        )  # fmt: skip
    if is_follow_up:
        rewritten = _opened(model).stream(rewrite_messages(question, history), REWRITE_TOKENS, 0.0)
        query = contextual_query(question, history, "".join(rewritten))
    hits = knowledge_base.search(query, k, mode=mode, collection=collection, reranker=reranker)
    found = has_relevant(knowledge_base, query, hits)
    if not hits and (found or anyway):
        hits = knowledge_base.first_hits(k, collection=collection)
    if not hits or not (found or anyway):
        return Answer(question, query, hits, False, None, iter([REFUSAL[language_of(question)]]))
    chat_model = _opened(model)
    prompt = build_prompt(
        question,
        merge_neighbours(hits),
        lambda messages: chat_model.count([*history, *messages]),
        chat_model.context - max_tokens,
    )
    pieces = chat_model.stream([*history, *prompt.messages], max_tokens, temperature)
    return Answer(question, query, hits, found, prompt, pieces)


def _quoted(
    knowledge_base: KnowledgeBase, question: str, query: str, k: int, **search: Any
) -> Answer:
    hits = knowledge_base.search(query, k, **search)
    quote = find_quote(knowledge_base, question, hits, query=query)
    refusal = [] if quote else [REFUSAL[language_of(question)]]
    return Answer(question, query, hits, quote is not None, None, iter(refusal), quote=quote)


def rewrite_messages(question: str, history: Messages) -> list[dict[str, str]]:
    """A prompt to rewrite a follow-up as a standalone question."""
    instruction = {
        "zh": "把最后一个问题改写成不看上文也能懂的一句话，只写这句话。",
        "en": "Rewrite the last question so that it can be understood alone. Write only that.",
    }[language_of(question)]
    lines = [*_user_messages(history)[-2:], question]
    return [{"role": "user", "content": instruction + "\n\n" + "\n".join(lines)}]


def contextual_query(question: str, history: Messages, rewritten: str) -> str:
    """A follow-up as a query. It keeps the question before: small models rewrite badly, and
    additional words do not hurt a search."""
    lines = rewritten.strip().splitlines()
    first = lines[0][:500] if lines else ""
    parts = (question, first, *_user_messages(history)[-1:])
    return "\n".join(dict.fromkeys(text for text in parts if text))


def _user_messages(history: Messages) -> list[str]:
    return [message["content"] for message in history if message["role"] == "user"]


def _opened(model: ChatModel | Callable[[], ChatModel]) -> ChatModel:
    return model() if callable(model) else model
