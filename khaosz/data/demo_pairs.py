"""Query-passage pairs that nobody has labelled: the demo's, and those of any text.

An idiom is to be found by what it means; a passage by a sentence that was taken out of it; an
answer by its question.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from khaosz.data.demo_texts import Unit, sentences, unit_rng

LEAST_QUERY, LEAST_PASSAGE = 8, 16  # characters; what is shorter stands for too many others
MOST_QUERY = 300  # what is longer is a table or code, and no question
KEPT = 0.1  # share of the sentences that stay in their passage
_IDIOM = re.compile(
    r"成语：(?P<word>[^。]+)。释义：(?P<meaning>.+?)(?P<rest>(?:出处|例句)：.*)?", re.DOTALL
)
_ARTICLE = re.compile(r"第[^　]{1,12}条(?:之[^　]+)?　")
_ASKED = ("python", "alpaca_zh_demo", "alpaca_en_demo")  # whose questions name their subject


def inverse_cloze(parts: Sequence[str], glue: str, rng: random.Random) -> tuple[str, str] | None:
    """A sentence and the passage it was taken from (the inverse cloze task, Lee et al. 2019,
    arXiv:1906.00300), None where one would be too short. In one of ten the sentence stays, so that
    equal words still count."""
    if len(parts) < 2:
        return None
    chosen = rng.randrange(len(parts))
    rest = parts if rng.random() < KEPT else [p for i, p in enumerate(parts) if i != chosen]
    query, passage = parts[chosen].strip(), glue.join(rest).strip()
    fits = LEAST_QUERY <= len(query) <= MOST_QUERY
    if not fits or len(passage) < LEAST_PASSAGE or query == passage:
        return None
    return query, passage


def unit_pairs(unit: Unit, seed: int) -> Iterator[dict[str, Any]]:
    """`{"query", "positive", "lang", "source"}` of one unit of the demo's sources."""
    rng = unit_rng(seed, f"pairs/{unit.source}", unit.key)
    found: list[tuple[str, str]] = []
    for document in unit.documents:
        if unit.source == "idioms":
            if (idiom := _IDIOM.fullmatch(document)) is not None:
                found.append((idiom["meaning"], f"{idiom['word']}。{idiom['rest'] or ''}"))
        else:
            found += _of_paragraphs(document, unit.lang, rng)
    if unit.source in _ASKED:
        found += [(chat.turns[0], chat.turns[1]) for chat in unit.chats if len(chat.turns[1]) > 15]
    for query, passage in found:
        yield {"query": query, "positive": passage, "lang": unit.lang, "source": unit.source}


def _of_paragraphs(document: str, lang: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Of each paragraph; of a statute the title stands above each article."""
    title, _, body = document.partition("\n")
    statute = title.startswith("《")
    # English sources break their lines anywhere, Chinese ones at paragraphs.
    for paragraph in (body if statute else document).split("\n" if lang == "zh" else "\n\n"):
        text = _ARTICLE.sub("", paragraph, count=1) if statute else " ".join(paragraph.split())
        pair = inverse_cloze(sentences(text), "" if lang == "zh" else " ", rng)
        if pair is not None:
            query, passage = pair
            yield query, f"{title}\n{passage}" if statute else passage
