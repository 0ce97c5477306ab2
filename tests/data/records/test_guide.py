"""The record layouts of docs/*/data.md, each read as the guide says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from khaosz.data.records.columns import named
from khaosz.data.records.comparisons import Pair, Rated
from khaosz.data.records.conversations import Conversation
from khaosz.data.records.layouts import LAYOUTS, Texts, read_record
from khaosz.data.records.preference import to_prompt

DOCS = Path(__file__).parents[3] / "docs"
HI = {"role": "user", "content": "Hi"}


def examples(language: str) -> list[Any]:
    """The records of the guide's table of layouts."""
    guide = (DOCS / language / "data.md").read_text(encoding="utf-8")
    return [json.loads(cell) for cell in re.findall(r"^\| .*? \| `(\{\".*\})` \|$", guide, re.M)]


EXAMPLES = examples("en")


def test_both_guides_list_the_same_layouts_and_every_row_has_an_example() -> None:
    assert examples("zh") == EXAMPLES and len(EXAMPLES) > 30
    used = set()
    for record in EXAMPLES:
        fitting = [row.name for row in LAYOUTS if not row.missing(named(record))]
        used.update(fitting)
    assert {row.name for row in LAYOUTS} == used


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: ",".join(record)[:60])
def test_layouts_of_the_guide_are_read(record: dict[str, Any]) -> None:
    before = json.dumps(record)
    kinds = [row.kind for row in LAYOUTS if not row.missing(named(record))]
    kind = next((kind for kind in kinds if kind in ("comparison", "rated")), kinds[0])
    read = read_record(record, (kind,))
    asked = {"Hi", "The sky is", "1 + 1?", "Translate.\n你好", "What is it?\nA cat.", "Bye"}
    answered = {"Hello.", " blue.", "2", "A cat.", "Bye."}
    match read:
        case str():
            assert read == "..."
        case Conversation():
            assert [m["role"] for m in read.messages[-2:]] == ["user", "assistant"]
            assert read.messages[-2]["content"] in asked
            assert read.messages[-1]["content"] in answered
            systems = [m["content"] for m in read.messages if m["role"] == "system"]
            is_system = record.get("system") or record.get("system_prompt")
            assert systems == (["Be brief."] if is_system else [])
        case Rated():
            assert (read.prompt, read.answer, read.score >= 1) == ([HI], "Hello.", True)
        case Texts():
            assert (read.positives, read.negatives) == (("The sky is blue.",), ("Grass is green.",))
        case [Pair(), *_]:
            assert {pair.chosen for pair in read} in ({"Hello."}, {" blue."})
            assert {pair.prompt[-1]["content"] for pair in read} <= asked
            system = [{"role": "system", "content": "Be brief."}] if "system" in record else []
            assert all(pair.prompt[:-1] == system for pair in read)
            assert not {pair.rejected for pair in read} & {pair.chosen for pair in read}
        case _:
            assert read == [HI]
    if kind in ("comparison", "chat", "rated", "prompt"):
        assert to_prompt(record).prompt[-1]["content"] in asked
    assert json.dumps(record) == before  # the caller's record stays as it was
