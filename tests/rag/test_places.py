"""Where a passage stands in its file: pages, lines as an editor counts them, or first words."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khaosz.rag import KnowledgeBase, StructureSplitter
from khaosz.rag.prompt import build_prompt
from khaosz.rag.search.hit import Hit, location
from khaosz.rag.search.search import merge_neighbours
from khaosz.rag.store.sql import Store

sys.path.append(str(Path(__file__).parent / "load"))
from make_documents import pdf_bytes, word, write_docx

TEXT = [
    *(
        "# 租约",
        "",
        "租金每月四千元，按月支付。",
        "",
        "",
        "## 终止",
        "",
        "任何一方可提前三十日通知解约。",
    ),
    *("The tenant returns the keys.", "", "# Appendix", "", "Inventory: two zebras and a lamp."),
]
CODE = [
    "import os",
    "",
    "",
    "def harbour():",
    '    """Ships and lighthouses."""',
    "    return os",
    "",
]
TABLE = ["city,river", "Paris,Seine", "Vienna,Danube", "上海,黄浦江"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> KnowledgeBase:
    """Files of every format, added as a user adds them."""
    place = tmp_path_factory.mktemp("places")
    folder = place / "docs"
    folder.mkdir()
    for name, ending in (("lf", "\n"), ("crlf", "\r\n"), ("cr", "\r")):
        text = ending.join(line.replace("zebras", f"zebras{name}") for line in TEXT)
        (folder / f"{name}.md").write_bytes(text.encode())
    (folder / "utf16.txt").write_bytes(
        "\r\n".join(TEXT).replace("lamp", "chandelier").encode("utf-16")
    )
    (folder / "code.py").write_text("\n".join(CODE), encoding="utf-8")
    (folder / "table.csv").write_text("\n".join(TABLE), encoding="utf-8")
    records = ["", '{"text": "A glacier\\nmoves.", "id": "g"}', "", '{"text": "火山\\n喷发。"}']
    (folder / "records.jsonl").write_text("\n".join(records), encoding="utf-8")
    pages = [
        [(72, 700, "Maple trees.")],
        [(72, 700, "Walnut wood.")],
        [(72, 700, "Bamboo shoots.")],
    ]
    (folder / "three.pdf").write_bytes(pdf_bytes(pages))  # type: ignore[arg-type]
    (folder / "one.pdf").write_bytes(pdf_bytes([[(72, 700, "Cactus spines.")]]))
    write_docx(folder / "a.docx", word("Terms", "1") + word("The warranty lasts two years."))
    write_docx(folder / "b.docx", word("The guarantee is void without the original receipt of it."))
    (folder / "p.html").write_text("<p>Gravity pulls.</p>", encoding="utf-8")
    opened = KnowledgeBase(place / "a.kb", splitter=StructureSplitter(max_chars=60))
    report = opened.add([folder])
    assert not report.problems
    return opened


@pytest.mark.parametrize(
    ("query", "place"),
    [
        ("zebraslf", "lf.md > Appendix, lines 11-13"),
        ("zebrascrlf", "crlf.md > Appendix, lines 11-13"),
        ("chandelier", "utf16.txt > Appendix, lines 11-13"),
        ("lighthouses", "code.py, lines 1-5"),
        ("Danube", "table.csv, lines 1-4"),
        ("glacier", "records.jsonl#g, line 2"),
        ("火山", "records.jsonl#4, line 4"),
        ("maple", "three.pdf, pp. 1-3"),
        ("cactus", "one.pdf, p. 1"),
        ("warranty", "a.docx > Terms"),
        ("guarantee", 'b.docx, "The guarantee is void without the origin..."'),
        ("gravity", 'p.html, "Gravity pulls."'),
    ],
)  # fmt: skip
def test_place_of_a_passage(base: KnowledgeBase, query: str, place: str) -> None:
    (hit, *_) = base.search(query, 1)
    assert hit.place == place
    if hit.line is not None and not hit.doc.startswith("records"):
        assert hit.line_end is not None
        path = Path(base.store.documents()[0].path).parent / hit.doc
        lines = re.split(
            "\r\n|\r|\n", path.read_text(encoding="utf-16" if "16" in hit.doc else "utf-8")
        )
        shown = lines[hit.line - 1 : hit.line_end]
        assert [line for line in shown if line] == [
            line for line in re.split("\r|\n", hit.text) if line
        ]


def test_carriage_returns_end_lines(base: KnowledgeBase) -> None:
    (hit, *_) = base.search("zebrascr", 1)
    assert hit.doc == "cr.md" and hit.line is not None
    lines = hit.text.strip().split("\r")
    assert (lines[-1], hit.line_end) == (TEXT[-1].replace("zebras", "zebrascr"), 13)
    assert lines == [line.replace("zebras", "zebrascr") for line in TEXT][hit.line - 1 :]


def test_pages_of_short_passages(base: KnowledgeBase, tmp_path: Path) -> None:
    pages = [[(72, 700 - 14 * i, f"{name} number {i} of many.") for i in range(9)]
             for name in ("Maple", "Walnut", "Bamboo")]  # fmt: skip
    (tmp_path / "a.pdf").write_bytes(pdf_bytes(pages))  # type: ignore[arg-type]
    with KnowledgeBase(tmp_path / "a.kb", splitter=StructureSplitter(max_chars=60)) as other:
        other.add([tmp_path / "a.pdf"])
        for page, name in enumerate(("maple", "walnut", "bamboo"), start=1):
            for hit in other.search(f"{name} number 4", 1):
                assert hit.page is not None and hit.page_end is not None
                assert hit.page <= page <= hit.page_end <= hit.page + 1
                assert ("Bamboo" in hit.text) == (hit.page_end == 3)


BREAKS = st.lists(st.sampled_from(["a", "词", " ", "\n", "\r", "x. y。", "\n\n"]), max_size=40)


@settings(max_examples=30, deadline=None)  # each makes a file
@given(pieces=BREAKS, overlap=st.sampled_from([0, 8]))
def test_lines_match_an_editor(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], overlap: int
) -> None:
    text = re.sub("\r+\n", "\n", "".join(pieces)) + "end"
    check_lines(KnowledgeBase(tmp_path_factory.mktemp("x") / "a.kb").store, text, overlap)


def test_lines_in_each_store(opener: Callable[..., Store]) -> None:
    check_lines(opener(), "\n\nAn owl. Two owls.\nThree\r\rowls\n\n\n四只猫头鹰。\nend" * 5, 8)


def check_lines(store: Store, text: str, overlap: int) -> None:
    with KnowledgeBase(store, splitter=StructureSplitter(20, overlap=overlap)) as base:
        base.add_text(text, name="a.txt")
        (document,) = base.documents()
        chunks = base.store.chunks_of(document.id)
        lines = base.store.first_lines(document.id, chunks[-1].start)
        assert lines == {c.start: len(re.findall("[\r\n]", text[: c.start])) + 1 for c in chunks}


def test_merged_and_cut_passages_have_their_own_lines(tmp_path: Path) -> None:
    lines = [f"Line {i} of the lighthouse log, with some words." for i in range(1, 31)]
    with KnowledgeBase(tmp_path / "a.kb", splitter=StructureSplitter(max_chars=150)) as base:
        base.add_text("\n".join(lines), name="log.txt")
        merged = merge_neighbours(base.search("lighthouse log", 30))
    (whole,) = merged
    assert (whole.line, whole.line_end) == (1, 30)
    prompt = build_prompt("line 17 of the log", merged, lambda m: len(m[0]["content"]), 700)
    (part,) = prompt.passages
    assert prompt.narrowed and part.line is not None and part.line_end is not None
    assert part.text.strip() == "\n".join(lines[part.line - 1 : part.line_end])


def test_record_has_the_line_of_its_file(tmp_path: Path) -> None:
    """Also where its text has lines, and its object the key of our metadata."""
    record = {"text": "Bats\n\nsleep by day.", "line": "x", "record_line": "y"}
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(record), encoding="utf-8")
    with KnowledgeBase(tmp_path / "a.kb") as base:
        base.add([tmp_path / "a.jsonl"])
        (hit,) = base.search("bats", 1)
    assert (hit.line, hit.line_end) == (2, 2)
    part = hit.part(6, len(hit.text))
    assert (part.text, part.line, part.line_end) == ("sleep by day.", 2, 2)


def test_place_without_numbers_quotes_the_text() -> None:
    none = None, None
    assert location("a.docx", (), "  Two\n\nlines ", none, none) == 'a.docx, "Two lines"'
    assert location("a.docx", ("H",), "text", none, none) == "a.docx > H"
    assert location("a.docx", (), "", none, none) == "a.docx"
    assert location("a.pdf", (), "", (3, 1204), none) == "a.pdf, pp. 3-1,204"
    assert Hit(1, "", "a", "", 0, 1, "t", (), 0.0, {}, line=7).place == "a, line 7"
