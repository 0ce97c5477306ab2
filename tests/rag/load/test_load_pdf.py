"""PDF: reading order, wrapped lines, headings, and page offsets."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
from make_documents import Placed, load, load_one, pdf_bytes, pdf_file, problem_of

pytest.importorskip("pypdfium2")
from khaosz.rag.load import Limits
from khaosz.rag.load.document import Parsed
from khaosz.rag.load.pdf import parse
from khaosz.rag.load.pdf_lines import Line, in_reading_order, join_lines


def parse_pdf(raw: bytes) -> Parsed:
    return parse(raw, Limits())


def lines(text: str, x: float = 72, top: float = 720, pitch: float = 15) -> list[Placed]:
    return [(x, top - pitch * n, line) for n, line in enumerate(text.split("\n")) if line]


ENGLISH = (
    "The committee met on Tuesday to consider the proposal and\n"
    "found that its cost had been underestimated by a large mar-\n"
    "gin. A well-known expert was heard, and another, no less well-\n"
    "known, was not.\n"
    "The decision was put off."
)
CHINESE = (
    "　　委员会于星期二召开会议，审议该项提案，认为其费用被严\n"
    "重低估。会议听取了一位著名专家的意见，决定推迟至下月再行\n"
    "表决。\n"
    "　　特此公告。"
)


def test_wrapped_lines_are_joined_and_paragraphs_stay_separate() -> None:
    text, _, pages = parse_pdf(pdf_bytes([lines(ENGLISH)]))
    assert text == (
        "The committee met on Tuesday to consider the proposal and found that its cost had been "
        "underestimated by a large margin. A well-known expert was heard, and another, no less "
        "well-known, was not.\nThe decision was put off."
    )
    assert pages == ()


def test_chinese_lines_are_joined_without_spaces() -> None:
    text, _, _ = parse_pdf(pdf_bytes([lines(CHINESE)]))
    assert text == CHINESE.replace("　", "").replace("严\n重", "严重").replace("行\n表", "行表")


def test_offsets_are_where_pages_start(tmp_path: Path) -> None:
    path = tmp_path / "年报.pdf"
    first, last = lines("First page."), lines("最后一页。")
    path.write_bytes(pdf_bytes([first, [], lines("Third."), last], title="年度报告 2025"))
    document = load_one(path)
    assert document.metadata == {"format": "pdf", "title": "年度报告 2025"}
    starts = (0, *document.pages, len(document.text))
    pages = [document.text[a:b].strip() for a, b in pairwise(starts)]
    assert pages == ["First page.", "", "Third.", "最后一页。"]


def test_columns_are_read_in_order() -> None:
    left = lines("\n".join(f"left {n}" for n in range(12)))
    right = lines("\n".join(f"right {n}" for n in range(12)), x=320)
    in_columns = [line for _, _, line in left + right]
    rng = random.Random(3)
    drawn = {
        "by column": left + right,
        "upwards": left[::-1] + right[::-1],
        "shuffled": rng.sample(right, 12) + rng.sample(left, 12),
    }
    for order, page in drawn.items():
        assert parse_pdf(pdf_bytes([page]))[0].split("\n") == in_columns, order


def test_header_drawn_last_does_not_change_the_order() -> None:
    page = [*lines(ENGLISH), (72.0, 800.0, "Header"), (72.0, 40.0, "17")]
    text, _, _ = parse_pdf(pdf_bytes([page]))
    assert text.startswith("The committee") and text.endswith("Header\n\n17")


def test_rows_of_a_table_stay_separate() -> None:
    page = [
        (x, 700 - 15 * r, f"{word} {r}")
        for r in range(4)
        for x, word in ((72, "name"), (250, "value"), (420, "remark of some length"))
    ]
    text, _, _ = parse_pdf(pdf_bytes([page]))
    assert text.split("\n") == [f"name {r} value {r} remark of some length {r}" for r in range(4)]


@pytest.mark.parametrize(
    ("first", "second", "joined"),
    [
        ("an exam\u2010", "ple of it", "an example of it"),
        ("a state-of-the\u2010", "art thing", "a state-of-the-art thing"),
        ("so well\u2010", "known a thing", "so well-known a thing"),
        ("Jean\u2010", "Paul Sartre", "Jean-Paul Sartre"),
        ("from 10\u2010", "20 to 30", "from 10-20 to 30"),
        ("项目管理", "系统", "项目管理系统"),
        ("用户的", "file", "用户的 file"),
    ],
)
def test_two_lines_are_joined(first: str, second: str, joined: str) -> None:
    wide = dict(left=72.0, right=272.0)
    page = [Line(first, bottom=700, top=712, **wide), Line(second, bottom=685, top=697, **wide)]
    assert join_lines(page, {"well-known"}) == joined


def test_lines_of_unknown_position_are_unchanged() -> None:
    page = [Line("一", placed=False), Line("b exam\u2010", placed=False), Line("ple", placed=False)]
    assert in_reading_order(page) == page
    assert join_lines(page, set()) == "一\nb example"


def test_indent_starts_a_paragraph() -> None:
    page = [
        Line("一个写满了的行", 72.0, 700, 272.0, 712),
        Line("另起一段的行", 96.0, 685, 272.0, 697),
        Line("接着写的行", 72.0, 670, 272.0, 682),
    ]
    assert join_lines(page, set()) == "一个写满了的行\n另起一段的行接着写的行"


@pytest.mark.parametrize(
    "item", ["• second", "2. second", "(二) second", "第二条 第二", "- second"]
)
def test_list_items_start_lines(item: str) -> None:
    wide = dict(left=72.0, right=272.0)
    page = [Line("first", bottom=700, top=712, **wide), Line(item, bottom=685, top=697, **wide)]
    assert join_lines(page, set()) == f"first\n{item}"


def test_real_pages_of_matplotlib(tmp_path: Path) -> None:
    """With fonts embedded as subsets, as PDF writers do."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(6, 4))
    for n, line in enumerate(("Ångström naïve", "Γειά σου", "Привет, мир")):
        figure.text(0.1, 0.8 - 0.1 * n, line)
    path = tmp_path / "a.pdf"
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(path)
    pyplot.close(figure)
    assert load_one(path).text.split() == [
        *("Ångström", "naïve", "Γειά", "σου", "Привет,", "мир"),
    ]


# Other files and files without text


def test_scan_has_no_text(tmp_path: Path) -> None:
    path = tmp_path / "scan.pdf"
    path.write_bytes(pdf_bytes([[]]))
    problem = problem_of(path)
    assert problem.message == "has no text in it" and "OCR" in problem.hint
    assert problem.code == "no_text"


def test_encrypted_pdf_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    encrypt = (
        b"<< /Filter /Standard /V 1 /R 2 /P -44 /Length 40 /O <" + b"11" * 32 + b">"
        b" /U <" + b"22" * 32 + b"> >>"
    )
    objects = {1: b"<< /Type /Catalog /Pages 2 0 R >>", 2: b"<< /Type /Pages /Count 0 /Kids [] >>"}
    trailer = b"/Encrypt 3 0 R /ID [<00112233445566778899aabbccddeeff> <00>]"
    path.write_bytes(pdf_file({**objects, 3: encrypt}, trailer))
    problem = problem_of(path)
    assert (problem.message, problem.code) == ("is protected by a password", "encrypted")


def test_damaged_files_are_problems(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    for data in (b"", b"not a PDF", b"%PDF-1.7\n", pdf_bytes([lines("x")])[:200]):
        path.write_bytes(data)
        problem = problem_of(path)
        assert "damaged PDF" in problem.message and problem.code == "damaged"


def test_pages_that_refer_to_themselves(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    objects = {1: b"<< /Type /Catalog /Pages 2 0 R >>"}
    objects[2] = b"<< /Type /Pages /Count 9 /Kids [2 0 R 2 0 R] /Parent 2 0 R >>"
    path.write_bytes(pdf_file(objects))
    assert problem_of(path).hint


def test_flipped_bytes_do_not_raise(tmp_path: Path) -> None:
    raw = pdf_bytes([lines(ENGLISH), lines(CHINESE)])
    rng = random.Random(7)
    for n in range(60):
        damaged = bytearray(raw)
        for _ in range(20):
            damaged[rng.randrange(len(raw))] = rng.randrange(256)
        (tmp_path / f"{n}.pdf").write_bytes(damaged)
    loaded, problems = load(tmp_path)
    assert len(loaded) + len(problems) == len(list(tmp_path.iterdir()))
    for _, documents in loaded.values():
        for document in documents:
            document.text.encode("utf-8")
            assert "\0" not in document.text


def sized(*parts: tuple[float, str]) -> bytes:
    """One page of (letter size, lines)."""
    y, drawn = 780.0, []
    for size, text in parts:
        for line in text.split("\n"):
            drawn.append((72.0, y, line, size))
            y -= 1.3 * size
        y -= 0.7 * size
    return pdf_bytes([drawn])


def test_larger_lines_are_headings() -> None:
    text, _, _ = parse_pdf(
        sized(
            (24, "第三章 合同的履行"),
            (12, CHINESE.replace("　", "")),
            (16, "Costs and a title\nof two lines"),
            (12, ENGLISH + "\n" + ENGLISH),
            (16, "Large, but it continues,"),
            (16, "3 Utilities . . . . . . . . 5"),
            (12, "in the next line."),
            (12, "# a line of a program"),
        )
    )
    lines = text.split("\n\n")
    assert lines[0] == "# 第三章 合同的履行"
    assert "## Costs and a title of two lines" in lines
    assert [line for line in lines if line.startswith("#")] == [lines[0], lines[2]]
    assert "Large, but it continues," in text
    assert "\n\\# a line of a program" in text


def test_poster_has_no_headings() -> None:
    text, _, _ = parse_pdf(sized((30, "Come to the fair"), (12, "on Friday"), (20, "Free beer")))
    assert "#" not in text
    text, _, _ = parse_pdf(pdf_bytes([lines(ENGLISH)]))
    assert "#" not in text
