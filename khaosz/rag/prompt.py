"""Passages and a question as one visible string, within a model's context.

The instruction follows the passages, and every sentence of a passage ends with its number: a small
model copies the number with the sentence. Both were chosen by measurement (`python -m bench
answers`).

Passages come from the user's documents, which may contain prompt injections: delimiters and numbers
like ours are broken up, so that a passage cannot end early or pose as another one, and what the
user wants is said last. That lowers the probability that a model follows instructions in a
passage. It does not make it zero.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from khaosz.errors import GenerationError
from khaosz.rag.scripts import to_simplified
from khaosz.rag.search.hit import Hit
from khaosz.rag.split.sentence import SENTENCE_MARKS, is_item, sentence_spans
from khaosz.rag.split.structure import StructureSplitter
from khaosz.rag.terms import normalise, terms

_DELIMITERS = re.compile(r"<(?=[/\s]*passage\b|\|)", re.IGNORECASE)  # and tokens <|...|>
# What looks like our numbers: footnotes, not `array[1]`.
_NUMBER = re.compile(r"(?<![A-Za-z0-9_)\]])[\[【]\s*(\d+)\s*[\]】]")
_SHORTEST = 60  # characters of a passage that can still answer a question
FIRST_CJK = "\u2e80"
_HAN = re.compile("[㐀-鿿]")

# A sentence that forbids to follow the passages' instructions was tried here: a model of 1.5B
# wrote it into four of five Chinese answers instead of the number. The more the last sentence says
# about answers that are missing, the more of those that are there the model refuses.
_INSTRUCTION = {
    "zh": (
        "请根据上面的资料，用一句完整的话回答下面的问题，并像资料中那样在句末写上编号，如 [1]。"
        "如果资料讲的是另一回事，回答：{refusal}"
    ),
    "en": (
        "Answer the question in one sentence from the passages above, and end it with the passage"
        " number in brackets, as in the passages. If they are about something else, answer:"
        " {refusal}"
    ),
}
_QUESTION = {"zh": "问题：", "en": "Question: "}
REFUSAL = {"zh": "资料中没有找到答案。", "en": "The documents do not contain the answer."}
# Models change the sentence a little, and write it in the script of the question.
_REFUSED = re.compile(
    r"(?:资料|文档|文件|文章|文中|段落|原文|材料)[^。！？\n]{0,8}(?:没有|并未|未能|未|找不到|不包含|无)"
    r"[^。！？\n]{0,12}(?:答案|信息|内容)"
    r"|\b(?:documents?|passages?|texts?|sources?)\b[^.!?\n]{0,20}\b(?:do|does|did)(?: not|n't|n’t)"
    r" (?:\w+ )?(?:contain|hold|provide|include|mention|have|give|specify|state)\b[^.!?\n]{0,24}"
    r"\b(?:answer|information)\b"
)
_SENTENCE = re.compile(r"[^。！？!?\n]*?(?:[。！？!?\n]|\.(?:\s|$)|$)")


@dataclass(frozen=True)
class Prompt:
    """text: the whole user message. passages: those in it; `[1]` is the first. left_out: how many
    retrieved passages did not fit in the context. narrowed: not even the best passage fits, and
    only its most relevant part is in the prompt."""

    text: str
    passages: tuple[Hit, ...]
    left_out: int
    language: str
    narrowed: bool = False

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.text}]


def language_of(question: str) -> str:
    return "zh" if _HAN.search(question) else "en"


def is_refusal(answer: str) -> bool:
    """Whether an answer says, in its first sentence, that the documents don't contain one: in
    either language and script, with or without markers."""
    text = to_simplified(normalise(answer)).strip()
    return _REFUSED.search(_SENTENCE.match(text)[0]) is not None  # type: ignore[index]


def build_prompt(
    question: str, hits: Sequence[Hit], count: Callable[[list[dict[str, str]]], int], budget: int
) -> Prompt:
    """A prompt of at most `budget` tokens with as many passages as fit, best first; if the best
    alone is too long, with the part of it that has most of the question's terms.

    Raises `GenerationError` if a few lines of it are still too long.
    """
    language = language_of(question)

    def with_passages(passages: Sequence[Hit], narrowed: bool = False) -> Prompt:
        parts = [_passage(i, hit) for i, hit in enumerate(passages, 1)]
        instruction = _INSTRUCTION[language].format(refusal=REFUSAL[language])
        parts += [instruction, _QUESTION[language] + question.strip()]
        left_out = len(hits) - len(passages)
        return Prompt("\n\n".join(parts), tuple(passages), left_out, language, narrowed)

    def tokens(number: int) -> int:
        return count(with_passages(hits[:number]).messages)

    if fitting := bisect_right(range(1, len(hits) + 1), budget, key=tokens):
        return with_passages(hits[:fitting])
    size = len(hits[0].text) // 2
    while size >= _SHORTEST:
        narrowed = with_passages([_most_relevant_part(question, hits[0], size)], narrowed=True)
        if count(narrowed.messages) <= budget:
            return narrowed
        size = size * 3 // 4
    raise GenerationError(
        f"question and best passage need {tokens(1):,} tokens; the prompt may have {budget:,}",
        hint="use a model with a longer context, or fewer --max-tokens",
    )


def _most_relevant_part(question: str, hit: Hit, size: int) -> Hit:
    """The part, of at most `size` characters, with most of the question's terms."""
    query_terms = set(terms(question))
    best = max(
        StructureSplitter(max_chars=size).split(hit.text),
        key=lambda part: sum(len(term) for term in query_terms.intersection(terms(part.text))),
    )
    return hit.part(best.start, best.end)


def _passage(number: int, hit: Hit) -> str:
    source = hit.doc if hit.page is None else f"{hit.doc}, p. {hit.page}"
    title = " > ".join((source, *hit.headings))
    start = f'[{number}] <passage id="{number}" source="{_attribute(title)}">'
    return f"{start}\n{numbered(_defuse(hit.text), number)}\n</passage>"


def numbered(text: str, number: int) -> str:
    """`[number]` after every sentence and list item, in code only at the end: a heading or a row of
    a table gets none."""
    parts: list[str] = []
    for start, end in sentence_spans(text):
        sentence = text[start:end].rstrip()
        gap = text[start + len(sentence) : end]
        if end == len(text) or (
            "```" not in text and (sentence[-1:] in SENTENCE_MARKS or is_item(text, start))
        ):
            # In Chinese, a number after a space would seem to begin the next sentence.
            sentence += f"[{number}]" if sentence[-1:] >= FIRST_CJK else f" [{number}]"
            gap = gap or " "
        parts += (sentence, gap)
    return "".join(parts).rstrip()


def _defuse(text: str) -> str:
    """Breaks up our delimiters, control tokens, and numbers that look like those of our passages;
    the rest is unchanged."""
    return _NUMBER.sub(r"(\1)", _DELIMITERS.sub("< ", text)).strip()


def _attribute(text: str) -> str:
    return " ".join(_defuse(text).replace('"', "'").split())
