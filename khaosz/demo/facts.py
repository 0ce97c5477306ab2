"""Questions whose answers are verbatim in a passage of the demo's idioms, statutes or Python's
documentation."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from khaosz.demo.corpus import held_out, units_by_source
from khaosz.demo.fetch import DemoSources
from khaosz.demo.texts import Unit, unit_rng

LONGEST_ANSWER = 160  # characters: a small model copies no more without errors
_IDIOM = re.compile(
    r"成语：(?P<word>[^。]+)。释义：(?P<meaning>.+?)(?:出处：(?P<origin>.+?))?(?:例句：.*)?",
    re.DOTALL,
)
_ARTICLE = re.compile(r"(?P<number>第[^　]{1,12}条(?:之[^　]+)?)　(?P<text>.+)")
_FUNCTION = re.compile(r"(?P<name>\w+): (?P<text>.{40,400}?[.])(?:\n\n|$)", re.DOTALL)


@dataclass(frozen=True)
class Fact:
    """`answer` is a substring of `passage`. doc and headings name its source; facts of one `unit`
    stay in one split."""

    unit: str
    source: str
    lang: str
    question: str
    answer: str
    passage: str
    doc: str
    headings: tuple[str, ...] = ()


def split_facts(sources: DemoSources, seed: int, limit: int) -> tuple[list[Fact], list[Fact]]:
    """At most `limit` facts, an equal share of each source as far as it has them, and the facts of
    the units that the demo's corpus holds out."""
    train: dict[str, list[Fact]] = {}
    validation: list[Fact] = []
    for source, members in units_by_source(sources, seed).items():
        held_out_keys = held_out(members, seed)
        for unit in members:
            facts = unit_facts(unit, seed)
            if unit.key in held_out_keys:
                validation += facts
            else:
                train.setdefault(source, []).extend(facts)
    rng = random.Random(f"{seed}/facts")
    chosen: list[Fact] = []
    # The smallest first: the unused rest of its share goes to the others.
    for done, source_facts in enumerate(sorted(train.values(), key=len)):
        share = (limit - len(chosen)) // (len(train) - done)
        chosen += rng.sample(source_facts, min(share, len(source_facts)))
    rng.shuffle(chosen)
    return chosen, validation


def unit_facts(unit: Unit, seed: int) -> Iterator[Fact]:
    """The facts of one unit with answers of at most `LONGEST_ANSWER` characters."""
    rng = unit_rng(seed, f"facts/{unit.source}", unit.key)
    for document in unit.documents:
        candidates: list[tuple[str, str, str, tuple[str, ...]]] = []
        match unit.source:
            case "idioms":
                doc = "成语词典"
                if (idiom := _IDIOM.fullmatch(document)) is not None:
                    word, origin = idiom["word"], idiom["origin"]
                    template = rng.choice(
                        ("“{}”是什么意思？", "请解释成语“{}”。", "{}的意思是什么？")
                    )
                    candidates.append((template.format(word), idiom["meaning"], document, ()))
                    if origin is not None and rng.random() < 0.3:
                        template = rng.choice(("“{}”出自哪里？", "成语{}的出处是什么？"))
                        candidates.append((template.format(word), origin, document, ()))
            case "laws":
                title, *lines = document.split("\n")
                doc, chapter = title.strip("《》"), ""
                for line in lines:
                    if (article := _ARTICLE.fullmatch(line)) is None:
                        chapter = line if len(line) < 40 else chapter
                        continue
                    template = rng.choice(("规定了什么？", "是怎么规定的？", "的内容是什么？"))
                    heading = (chapter,) if chapter else ()
                    question = f"{title}{article['number']}{template}"
                    candidates.append((question, article["text"], line, heading))
            case "python":
                doc = unit.key
                for named in _FUNCTION.finditer(document):
                    template = rng.choice(("What does {} do in {}?", "What is {} of {} for?"))
                    text = named["text"].strip()
                    question = template.format(named["name"], unit.key)
                    candidates.append((question, text, f"{named['name']}: {text}", ()))
            case _:
                return
        for question, answer, passage, heads in candidates:
            if len(answer) <= LONGEST_ANSWER and "\n" not in answer:
                yield Fact(unit.key, unit.source, unit.lang, question, answer, passage, doc, heads)
