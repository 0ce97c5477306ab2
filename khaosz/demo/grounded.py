"""Fine-tuning records for answers from passages, with citation and refusal.

Small models overlook answers in their context, answer from memory, and cite passages that do not
support the answer. These records teach the three things that `khaosz rag ask` needs: the passage's
own words, its number after them, and the refusal when no passage has the answer. The prompt is that
of `build_prompt`, so that training and use agree.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from khaosz.demo.facts import Fact
from khaosz.errors import GenerationError
from khaosz.rag.prompt import REFUSAL, build_prompt, numbered
from khaosz.rag.search.hit import Hit

MISSING = 0.25  # share of the questions without their passage
NEAR = 0.5  # share of the other passages from the same document
_OTHERS = (0, 1, 2, 3)  # possible numbers of other passages, equally likely

Count = Callable[[list[dict[str, str]]], int]


def grounded_records(
    facts: Sequence[Fact], count: Count, room: int, seed: int
) -> Iterator[dict[str, Any]]:
    """`{"messages", "lang", "source", "answer", "citation", "passages"}` of each fact that fits.

    The other passages come from other `facts`: split before, so that nothing held out is used.
    `answer` and `citation` (the marker's number) are None where the refusal is correct, also when
    the passage did not fit into the prompt. count, room: as for `build_prompt`.
    """
    by_source: dict[str, list[Fact]] = {}
    by_doc: dict[str, list[Fact]] = {}
    for fact in facts:
        by_source.setdefault(fact.source, []).append(fact)
        by_doc.setdefault(fact.doc, []).append(fact)
    for fact in facts:
        rng = random.Random(f"{seed}/grounded/{fact.source}/{fact.unit}/{fact.question}")
        near, far = by_doc[fact.doc], by_source[fact.source]
        others = [
            rng.choice(near if rng.random() < NEAR else far) for _ in range(rng.choice(_OTHERS))
        ]
        passages = {other.passage: other for other in others if fact.answer not in other.passage}
        if rng.random() < MISSING and passages:
            context = list(passages.values())
        else:
            context = [*passages.values(), fact]
        rng.shuffle(context)
        try:
            prompt = build_prompt(fact.question, [_hit(each) for each in context], count, room)
        except GenerationError:
            continue
        holding = [i for i, hit in enumerate(prompt.passages, 1) if fact.answer in hit.text]
        number = holding[0] if holding else None
        answer = REFUSAL[prompt.language] if number is None else numbered(fact.answer, number)
        if number is not None and answer.removesuffix(f"[{number}]").rstrip() not in prompt.text:
            continue  # the prompt has escaped marks in it, so it can't be copied
        yield {
            "messages": [*prompt.messages, {"role": "assistant", "content": answer}],
            "lang": prompt.language,
            "source": fact.source,
            "answer": None if number is None else fact.answer,
            "citation": number,
            "passages": len(prompt.passages),
        }


def _hit(fact: Fact) -> Hit:
    digest = hashlib.sha256(fact.passage.encode()).hexdigest()
    return Hit(
        *(0, fact.doc, fact.doc, digest, 0, len(fact.passage), fact.passage, fact.headings),
        score=0.0,
        legs={},
    )
