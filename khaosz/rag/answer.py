"""An answer from the documents, streamed, with citations that resolve to their very characters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from khaosz.rag.knowledge_base import KnowledgeBase
from khaosz.rag.models.protocols import ChatModel, Messages, Reranker
from khaosz.rag.prompt import REFUSAL, Prompt, build_prompt, language_of
from khaosz.rag.search.bm25 import coverage
from khaosz.rag.search.hit import Hit, Mode
from khaosz.rag.search.search import merge_neighbours

# Of the question's weight in terms, in the best of the passages found. 97 % of CMRC's questions
# find as much where their passage is there, 8 % where it is not (20,000 other passages).
GOOD_COVERAGE = 0.3
REWRITTEN = 64  # tokens of a question that is put anew
_MARKER = re.compile(r"[\[【]\s*(\d+(?:\s*[,，、]\s*\d+)*)\s*[\]】]")
_BEGUN = re.compile(r"[\[【][\d\s,，、]*$")  # what may still become a marker
_LONGEST = 24  # characters of one: a bracket with more digits is text


@dataclass(frozen=True)
class Citation:
    """`[number]` in the answer: characters start to end of the text with the SHA-256 `hash`."""

    number: int
    hash: str
    start: int
    end: int
    doc: str
    doc_id: str
    page: int | None


@dataclass
class Answer:
    """Iterate for the text as it comes; the rest is complete when it has ended.

    found: whether retrieval found something good; if not, no model was asked. prompt: what the
    model was sent. hits: all that was found, in the inspector's order. invalid: markers that named
    no passage and were taken out.
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

    def __iter__(self) -> Iterator[str]:
        passages = self.prompt.passages if self.prompt else ()
        stream = CitationStream(len(passages))
        for piece in self.pieces:
            yield from self._said(stream.feed(piece))
        yield from self._said(stream.finish())
        self.invalid = stream.invalid
        self.citations += citations(stream.used, passages)

    def _said(self, text: str) -> Iterator[str]:
        if text:
            self.text += text
            yield text


class CitationStream:
    """Takes pieces of an answer and hands out text in which every marker names a passage. Only
    what may still become a marker is held back."""

    def __init__(self, passages: int) -> None:
        self._passages = passages
        self._held = ""
        self.used: list[int] = []  # in the order in which they were first named
        self.invalid = 0

    def feed(self, piece: str) -> str:
        text = _MARKER.sub(self._checked, self._held + piece)
        begun = _BEGUN.search(text)
        cut = begun.start() if begun and len(text) - begun.start() <= _LONGEST else len(text)
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        rest, self._held = self._held, ""
        return rest

    def _checked(self, match: re.Match[str]) -> str:
        numbers = [int(number) for number in re.findall(r"\d+", match[1])]
        valid = [number for number in numbers if 1 <= number <= self._passages]
        self.invalid += len(numbers) - len(valid)
        self.used += [n for n in dict.fromkeys(valid) if n not in self.used]
        return "".join(f"[{number}]" for number in valid)


def citations(used: Sequence[int], passages: Sequence[Hit]) -> list[Citation]:
    """What the numbers in an answer name."""
    found = []
    for number in used:
        hit = passages[number - 1]
        span = hit.hash, hit.start, hit.end
        found.append(Citation(number, *span, hit.doc, hit.doc_id, hit.page))
    return found


def without_markers(text: str) -> str:
    """An answer's words alone."""
    return _MARKER.sub("", text)


def ask(
    base: KnowledgeBase,
    question: str,
    model: ChatModel | Callable[[], ChatModel],
    *,
    history: Messages = (),
    k: int = 5,
    mode: Mode | None = None,
    collection: str | None = None,
    reranker: Reranker | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
) -> Answer:
    """Retrieve, build the prompt, and answer while it is iterated. A function given as `model` is
    called only if something was found. Raises as `KnowledgeBase.search` and `build_prompt` do."""
    follows = any(message["role"] == "user" for message in history)
    query = standalone(question, history, _opened(model)) if follows else question
    hits = base.search(query, k, mode=mode, collection=collection, reranker=reranker)
    if not good(base, query, hits):
        return Answer(question, query, hits, False, None, iter([REFUSAL[language_of(question)]]))
    chosen = _opened(model)
    prompt = build_prompt(
        question,
        merge_neighbours(hits),
        lambda messages: chosen.count([*history, *messages]),
        chosen.context - max_tokens,
    )
    pieces = chosen.stream([*history, *prompt.messages], max_tokens, temperature)
    return Answer(question, query, hits, True, prompt, pieces)


def good(base: KnowledgeBase, query: str, hits: Sequence[Hit]) -> bool:
    """Whether any hit is about the question: it holds enough of its weight in words, or lies near
    enough in meaning, if its embedder's cosines can tell."""
    dense = [hit.legs["dense"].score for hit in hits if "dense" in hit.legs]
    embedder = base.embedder() if dense else None
    near = embedder.good_cosine if embedder is not None else None
    if near is not None and max(dense) >= near:
        return True
    # Of a follow-up, what was asked before may say what it is about: each line by itself.
    lines = [line for line in query.splitlines() if line.strip()]
    return bool(hits) and any(
        max(coverage(base.store, line, hits)) >= GOOD_COVERAGE for line in lines
    )


def standalone(question: str, history: Messages, model: ChatModel) -> str:
    """A follow-up as a question that can be searched for."""
    rewritten = model.stream(rewriting(question, history), REWRITTEN, 0.0)
    return with_context(question, history, "".join(rewritten))


def rewriting(question: str, history: Messages) -> list[dict[str, str]]:
    """What a model is asked, to say a follow-up so that it can be understood alone."""
    order = {
        "zh": "把最后一个问题改写成不看上文也能懂的一句话，只写这句话。",
        "en": "Rewrite the last question so that it can be understood alone. Write only that.",
    }[language_of(question)]
    lines = [*_asked(history)[-2:], question]
    return [{"role": "user", "content": order + "\n\n" + "\n".join(lines)}]


def with_context(question: str, history: Messages, rewritten: str) -> str:
    """A follow-up as a query. What was asked before stays in it: small models rewrite badly, and a
    search is not hurt by words too many."""
    lines = rewritten.strip().splitlines()
    first = lines[0][:500] if lines else ""
    parts = (question, first, *_asked(history)[-1:])
    return "\n".join(dict.fromkeys(text for text in parts if text))


def _asked(history: Messages) -> list[str]:
    return [message["content"] for message in history if message["role"] == "user"]


def _opened(model: ChatModel | Callable[[], ChatModel]) -> ChatModel:
    return model() if callable(model) else model
