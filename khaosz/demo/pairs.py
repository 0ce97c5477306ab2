"""Pairs for embedders and preferences, made of the demo's units without labels.

The query of an idiom is its meaning; of a passage, a sentence taken out of it; of an answer, its
question. A rejected answer is that of another question.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

from khaosz.data.records.pairs import inverse_cloze
from khaosz.demo.texts import Unit, sentences, unit_rng

MOST_PAIRS = 640
_IDIOM = re.compile(
    r"成语：(?P<word>[^。]+)。释义：(?P<meaning>.+?)(?P<rest>(?:出处|例句)：.*)?", re.DOTALL
)
_ARTICLE = re.compile(r"第[^　]{1,12}条(?:之[^　]+)?　")
_WITH_QUESTIONS = ("python", "alpaca_zh_demo", "alpaca_en_demo")  # that name their subject


def unit_pairs(unit: Unit, seed: int) -> Iterator[dict[str, Any]]:
    """`{"query", "positive", "lang", "source"}` of one unit of the demo's sources."""
    rng = unit_rng(seed, f"pairs/{unit.source}", unit.key)
    pairs: list[tuple[str, str]] = []
    for document in unit.documents:
        if unit.source == "idioms":
            if (idiom := _IDIOM.fullmatch(document)) is not None:
                pairs.append((idiom["meaning"], f"{idiom['word']}。{idiom['rest'] or ''}"))
        else:
            pairs += _of_paragraphs(document, unit.lang, rng)
    if unit.source in _WITH_QUESTIONS:
        pairs += [(chat.turns[0], chat.turns[1]) for chat in unit.chats if len(chat.turns[1]) > 15]
    for query, passage in pairs:
        yield {"query": query, "positive": passage, "lang": unit.lang, "source": unit.source}


def _of_paragraphs(document: str, lang: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """One pair per paragraph; a statute's title precedes each article."""
    title, _, body = document.partition("\n")
    statute = title.startswith("《")
    # English sources wrap their lines, Chinese ones have one line per paragraph.
    for paragraph in (body if statute else document).split("\n" if lang == "zh" else "\n\n"):
        text = _ARTICLE.sub("", paragraph, count=1) if statute else " ".join(paragraph.split())
        pair = inverse_cloze(sentences(text), "" if lang == "zh" else " ", rng)
        if pair is not None:
            query, passage = pair
            yield query, f"{title}\n{passage}" if statute else passage


def swapped_answers(
    chats: list[dict[str, Any]], seed: int, limit: int = MOST_PAIRS
) -> list[dict[str, Any]]:
    """`{"prompt", "chosen", "rejected", "lang"}` of the first turns of distinct questions; the
    rejected answer is a different one, to another question in the same language."""
    rng = random.Random(f"{seed}/preference")
    by_lang: dict[str, dict[str, str]] = {}
    for chat in chats:
        question, answer = (message["content"] for message in chat["messages"][:2])
        by_lang.setdefault(chat["lang"], {}).setdefault(question, answer)
    pairs = []
    for lang, answers in sorted(by_lang.items()):
        questions = sorted(answers)
        rng.shuffle(questions)
        for question, other in zip(questions, questions[1:] + questions[:1], strict=True):
            if answers[question] != answers[other]:
                pairs.append(
                    {
                        "prompt": question,
                        "chosen": answers[question],
                        "rejected": answers[other],
                        "lang": lang,
                    }
                )
    rng.shuffle(pairs)
    return pairs[:limit]
