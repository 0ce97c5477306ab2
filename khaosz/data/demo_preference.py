"""The demo's preference pairs: an answer to the question that was asked, against one to another.

A model of a few million parameters, after minutes of training, answers fluently what nobody asked.
That is what its pairs are about; the preferences of people that the demo's package carries are of
long answers, which such a model can't tell apart.
"""

from __future__ import annotations

import random
from typing import Any

MOST_PAIRS = 640


def swapped_answers(
    chats: list[dict[str, Any]], seed: int, limit: int = MOST_PAIRS
) -> list[dict[str, Any]]:
    """`{"prompt", "chosen", "rejected", "lang"}` of the first turns of distinct questions: the
    rejected answer is another question's, of the same language and another wording."""
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
