"""Chunks tile the text, fit in the budget, and are cut where a reader would cut."""

from __future__ import annotations

import itertools
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khaosz.errors import ConfigError
from khaosz.rag.split.layout import find_layout
from khaosz.rag.split.sentence import CLOSING, sentence_spans
from khaosz.rag.split.structure import Chunk, StructureSplitter

# Everything that the splitter treats specially, so that random texts contain much of it.
_PIECES = st.sampled_from(
    [
        *"ab7 \n\t\r#|`~=-.,!?;:\"'()”“。！？；…，、」「）（\u3000第章",
        *"\u0301\u200d🚀👩🏽🇨🇳\ud83d\ude00",
        "\n\n", "\r\n", "\n# ", "\n## ab\n", "\n```\n", "\n| a | b |", "\n- ", "\n1. ", "ab ab. ",
        "中文。", "\n第三章 总则\n", "Dr. ", "e.g. ", "U.S. ", "3.14", "\n---\n", "\n===\n", "……",
    ]
)  # fmt: skip
_TEXTS = st.lists(_PIECES, max_size=80).map("".join)


def chars(text: str, size: int, overlap: int = 0) -> list[Chunk]:
    return StructureSplitter(max_chars=size, overlap=overlap).split(text)


def texts(text: str, size: int) -> list[str]:
    return [chunk.text for chunk in chars(text, size)]


def tokens(text: str) -> int:
    """Words of up to three letters, and bytes: like real tokens, they do not add up over a cut."""
    runs = "".join(c if c.isascii() and c.isalpha() else f" {c} " for c in text).split(" ")
    return sum((len(run) + 2) // 3 if run.isalpha() else len(run) * 2 for run in runs)


def assert_tiles(text: str, chunks: list[Chunk]) -> None:
    at = 0
    for chunk in chunks:
        assert chunk.start == at < chunk.end
        assert chunk.text == text[chunk.start : chunk.end]
        at = chunk.end
    assert at == len(text)


# -- every text -----------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(_TEXTS, st.integers(1, 40))
def test_chunks_tile_the_text_within_the_budget(text: str, size: int) -> None:
    chunks = chars(text, size)
    assert_tiles(text, chunks)
    assert all(len(chunk.text) <= size for chunk in chunks)


@settings(max_examples=300, deadline=None)
@given(_TEXTS, st.integers(6, 40))
def test_chunks_tile_the_text_within_a_token_budget(text: str, size: int) -> None:
    chunks = StructureSplitter(max_tokens=size, count_tokens=tokens).split(text)
    assert_tiles(text, chunks)
    assert all(tokens(chunk.text) <= size for chunk in chunks)


@settings(max_examples=300, deadline=None)
@given(_TEXTS, st.integers(2, 40), st.data())
def test_overlap_is_limited_and_leaves_no_gap(text: str, size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size // 2))
    at = 0
    for chunk in chars(text, size, overlap):
        assert at - overlap <= chunk.start <= at < chunk.end
        assert chunk.text == text[chunk.start : chunk.end] and len(chunk.text) <= size
        at = chunk.end
    assert at == len(text)


@settings(max_examples=300, deadline=None)
@given(_TEXTS, st.integers(1, 40))
def test_chunk_opens_with_closing_punctuation_only_without_another_cut(
    text: str, size: int
) -> None:
    layout = find_layout(text)
    starts = set(layout.starts if layout else ())
    for before, chunk in itertools.pairwise(chars(text, size)):
        opening = chunk.text.lstrip()
        if opening and opening[0] in CLOSING and not opening.startswith("!["):
            assert not _has_other_cut(text, before.start, size, starts), (before, chunk)


def _has_other_cut(text: str, start: int, size: int, starts: set[int]) -> bool:
    """Whether a cut within the budget leaves text on both sides, on the right before the next
    section, and no closing mark after it."""
    places = range(start + 1, min(start + size, len(text) - 1) + 1)
    return any(
        text[start:at].strip()
        and text[at : min((s for s in starts if s > at), default=len(text))].strip()
        and text[at:].lstrip()[0] not in CLOSING
        and _whole(text, at)
        for at in places
    )


def _whole(text: str, at: int) -> bool:
    before, after = text[at - 1], text[at]
    if unicodedata.category(after)[0] == "M" or "\u200d" in (before, after):
        return False
    if (before, after) == ("\r", "\n") or (before == "…" and after == "…"):
        return False
    return not (
        "\U0001f3fb" <= after <= "\U0001f3ff"
        or "\U0001f1e6" <= after <= "\U0001f1ff"
        or "\udc00" <= after <= "\udfff"
    )


@settings(max_examples=200, deadline=None)
@given(_TEXTS)
def test_sentences_tile_the_text(text: str) -> None:
    assert "".join(text[start:end] for start, end in sentence_spans(text)) == text


@settings(max_examples=200, deadline=None)
@given(_TEXTS, st.integers(8, 40))
def test_chunk_is_blank_only_for_a_blank_run_as_long_as_the_budget(text: str, size: int) -> None:
    runs = [run for run in _blank_runs(text) if run >= size - 1]
    if not runs and text.strip():
        assert all(chunk.text.strip() for chunk in chars(text, size))


def _blank_runs(text: str) -> list[int]:
    return [len(run) for run in "".join(" " if c.isspace() else "x" for c in text).split("x")]


# -- sentences -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "marked",  # a bar stands where a sentence ends
    [
        "他来了。¦她走了！¦真的吗？¦是的；¦好……¦嗯",
        "他说：“走吧。”¦然后走了。",
        "（见下。）¦再看『此处！』」¦完。",
        '他说"好。"¦又说"不。"¦"行！"',
        "Dr. Smith met Mr. J. Doe. ¦They left.",
        "Use it, e.g. Here. ¦In the U.S. Senate too.",
        "It is 3.14. ¦Version 2.0.1 is out! ¦Yes.",
        '"Who?" he said. ¦"Me."  ¦Then (so.) ¦We',
        "用 Python 3.11 写。¦See Fig. 3 for it. ¦好的",
        "访问 example.com。¦谢谢 Acme Inc.的人。¦It works well.¦好的",
        "See No. 5 and vol. 3 of it. ¦He said no. ¦Then etc. ¦Done.",
        "1. Open it.\n¦2. Close it.",
        "A line of text that has been wrapped by hand at\nseventy columns. ¦Next.",
        "标题\n¦正文一。\n\n¦正文二",
        r"He wrote it.\n\n¦2. Then he left.\n¦See \nabla.",
        "",
        "  \n ",
    ],
)
def test_sentence_ends(marked: str) -> None:
    text = marked.replace("¦", "")
    expected = marked.split("¦") if text else []
    assert [text[start:end] for start, end in sentence_spans(text)] == expected


# -- where chunks are cut ------------------------------------------------------------------------


def test_chinese_is_cut_at_the_last_sentence_that_fits() -> None:
    assert texts("春天来了。花都开了！你看见了吗？我看见了。", 14) == [
        "春天来了。花都开了！",
        "你看见了吗？我看见了。",
    ]


def test_english_is_cut_after_sentences_not_abbreviations() -> None:
    assert texts("We met Dr. Who. He left at 5 p.m. on Monday. It rained.", 30) == [
        "We met Dr. Who. ",
        "He left at 5 p.m. on Monday. ",
        "It rained.",
    ]


def test_late_paragraph_is_preferred_to_a_later_sentence() -> None:
    text = "One is short. Two is short.\n\nThree. Four runs on for quite a while."
    assert texts(text, 40) == [
        "One is short. Two is short.\n\n",
        "Three. Four runs on for quite a while.",
    ]


def test_falls_back_to_clauses_words_and_characters() -> None:
    assert texts("一二三四，五六七八九十", 8) == ["一二三四，", "五六七八九十"]
    assert texts("alpha beta gamma delta", 12) == ["alpha beta ", "gamma delta"]
    assert texts("abcdefghij", 4) == ["abcd", "efgh", "ij"]


def test_lists_are_cut_between_items() -> None:
    text = "Bring\n- a rope of ten metres\n- a lamp, with oil\n- bread"
    assert texts(text, 36) == ["Bring\n- a rope of ten metres\n", "- a lamp, with oil\n- bread"]


def test_title_and_line_with_a_colon_go_with_the_next_text() -> None:
    assert texts("One is short. Two.\n\nA Title\n\nThree. Four runs on.", 34) == [
        "One is short. Two.\n\n",
        "A Title\n\nThree. Four runs on.",
    ]
    assert texts("春天来了。\n步骤如下：\n先洗手。再吃饭。", 16) == [
        "春天来了。\n",
        "步骤如下：\n先洗手。再吃饭。",
    ]


def test_rest_of_a_long_paragraph_is_a_chunk() -> None:
    long = "Aaa bbb ccc ddd. Eee fff ggg hhh. Iii jjj kkk.\n"
    assert texts(long + "Lll.\nMmm.\n" * 3, 40) == [
        "Aaa bbb ccc ddd. Eee fff ggg hhh. ",
        "Iii jjj kkk.\n",
        "Lll.\nMmm.\n" * 3,
    ]


def test_long_sentence_is_cut_at_a_clause_if_much_would_be_unused() -> None:
    text = "It is so. " * 5 + "word " * 40 + "end, " + "word " * 40
    assert texts(text, 300)[0].endswith("end, ")
    assert texts("It is so. " * 15 + "word, " * 40, 250)[0].endswith("so. ")


def test_dumped_records_are_cut_between_objects_and_at_escaped_blank_lines() -> None:
    text = "[{'role': 'user', 'text': 'Hi. Now'}, {'role': 'x', 'text': 'Yes. One'}, {'role': 'y'}]"
    assert texts(text, 50)[0] == "[{'role': 'user', 'text': 'Hi. Now'}, "
    assert texts(r"{'text': 'One thing\n\nTwo. Three things and four'", 40)[0] == (
        r"{'text': 'One thing\n\n"
    )


def test_code_is_kept_whole_or_cut_between_lines() -> None:
    code = "```python\nx = 1. \ny = 2\n```\n"
    assert texts("Some words come first.\n" + code + "After.", 30)[1] == code
    long = "```\n" + "".join(f"line{i} = f(a). B\n" for i in range(6)) + "```\n"
    pieces = texts(long, 40)
    assert len(pieces) > 2 and all(piece.endswith("\n") for piece in pieces)


def test_tables_are_cut_between_rows() -> None:
    table = "| a. B | b |\n|---|---|\n" + "".join(f"| {i}. X | yes. No |\n" for i in range(8))
    pieces = texts(table, 50)
    assert len(pieces) > 2
    assert all(piece.startswith("|") and piece.endswith("|\n") for piece in pieces)
    pieces = texts("Words. " * 30 + "\n\n" + table + "\nMore. " * 30, 220)
    assert any(table in piece for piece in pieces)


def test_headings_in_code_are_ignored() -> None:
    assert find_layout("```\n# a comment\n```\n# Real\n").paths == [(), ("Real",)]  # type: ignore


def test_markdown_headings() -> None:
    text = "Intro.\n\nTitle\n=====\n\nText.\n\n## Part ##\n\nText.\n\n### Deep\n\nText.\n\n"
    text += "## Other\nEnd."
    layout = find_layout(text)
    assert layout is not None
    assert layout.paths == [
        (), ("Title",), ("Title", "Part"), ("Title", "Part", "Deep"), ("Title", "Other"),
    ]  # fmt: skip
    assert [text[start:].split("\n")[0] for start in layout.starts[1:]] == [
        "Title", "## Part ##", "### Deep", "## Other",
    ]  # fmt: skip


def test_chinese_headings() -> None:
    text = (
        "某法\n第一章 总则\n第一条 为了。\n第一节 范围\n内容。\n第二章　附则\n第三章，本法所称。\n"
    )
    layout = find_layout(text)
    assert layout is not None
    assert layout.paths == [(), ("第一章 总则",), ("第一章 总则", "第一节 范围"), ("第二章 附则",)]


def test_chunks_have_the_headings_above_all_of_them() -> None:
    body = "Words go by here. " * 5
    text = f"# A\n\n## B\n\n{body}\n\n## C\n\n{body}\n\n# D\n\nshort.\n\n## E\n\nshort.\n"
    assert [chunk.headings for chunk in chars(text, 120)] == [("A", "B"), ("A", "C"), ("D",)]


def test_chunk_crosses_a_heading_only_of_a_short_section() -> None:
    text = "# A\n" + "Words go by. " * 4 + "\n# B\n" + "Words go by. " * 4
    assert [chunk.headings for chunk in chars(text, 100)] == [("A",), ("B",)]


def test_characters_are_not_divided() -> None:
    family = "👩\u200d👩\u200d👧"
    assert texts(family * 3, 6) == [family] * 3
    assert texts("e\u0301" * 4, 3) == ["e\u0301"] * 4
    assert texts("🇨🇳🇺🇸🇩🇪", 3) == ["🇨🇳", "🇺🇸", "🇩🇪"]
    assert texts("ab\r\ncd", 3) == ["ab", "\r\nc", "d"]
    assert texts("\ud83d\ude00" * 2, 3) == ["\ud83d\ude00"] * 2


def test_trailing_blank_lines_stay_with_the_text_before() -> None:
    assert texts("Aaaa. Bbbb.\n\n\n", 11) == ["Aaaa. ", "Bbbb.\n\n\n"]
    assert texts("   \n", 10) == ["   \n"]
    assert texts("", 10) == []


# -- linear time ----------------------------------------------------------------------------------


_HOSTILE = [*'a .\n"#。”-`|~=第\u0301…', "\r\n", "“”", "Dr. ", "a,", "\n#", "a\n", "\n|a", "}, {"]


@pytest.mark.parametrize("unit", _HOSTILE)
def test_hostile_texts_of_a_million_characters(unit: str) -> None:
    # Quadratic time would be hours here.
    text = unit * (1_000_000 // len(unit))
    chunks = chars(text, 800)
    assert_tiles(text, chunks)
    assert max(len(chunk.text) for chunk in chunks) <= 800
    assert len(chunks) <= 4 * len(text) // 800 + 2


def test_tokens_are_counted_a_few_times_per_chunk() -> None:
    counted = 0

    def count(text: str) -> int:
        nonlocal counted
        counted += len(text)
        return len(text.encode()) // 3 + 1

    text = "今天天气很好，我们出去走走。It was fine. " * 2000
    chunks = StructureSplitter(max_tokens=128, count_tokens=count).split(text)
    assert_tiles(text, chunks)
    assert counted < 8 * len(text)  # 3 to 4 passes; a count per sentence would be 10


# -- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_chars": 0},
        {"max_chars": 10, "overlap": 6},
        {"max_chars": 10, "overlap": -1},
        {"max_chars": 10, "max_tokens": 10, "count_tokens": len},
        {"max_tokens": 10},
        {"max_chars": 10, "count_tokens": len},
        {"max_tokens": -1, "count_tokens": len},
    ],
)
def test_refuses_invalid_budgets(arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as refused:
        StructureSplitter(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value) and refused.value.hint


def test_refuses_a_character_over_the_budget() -> None:
    splitter = StructureSplitter(max_tokens=2, count_tokens=lambda text: len(text.encode()))
    with pytest.raises(ConfigError, match="alone takes 3 tokens"):
        splitter.split("ab好")


def test_shorter_text_may_have_more_tokens() -> None:
    """As if a token crossed the cut: text that ends in "b" has four more tokens."""

    def count(text: str) -> int:
        return len(text) + 4 * text.rstrip().endswith("b")

    text = "aaab " * 30
    chunks = StructureSplitter(max_tokens=13, count_tokens=count).split(text)
    assert_tiles(text, chunks)
    assert all(count(chunk.text) <= 13 for chunk in chunks)


def test_overlap_is_counted_in_tokens() -> None:
    def count(text: str) -> int:
        return 2 * len(text)

    text = "Aa bb. " * 40
    before = 0
    for chunk in StructureSplitter(max_tokens=60, overlap=20, count_tokens=count).split(text):
        assert count(text[chunk.start : before]) <= 20
        before = chunk.end


def test_empty_section_goes_with_the_next() -> None:
    text = "# Whole\n\n## Part\n\n" + "Words stand here. " * 4
    first = chars(text, 90)[0]
    assert first.text.startswith("# Whole\n\n## Part\n\nWords") and first.headings == (
        "Whole",
        "Part",
    )


def test_underline_needs_a_blank_line_above_its_text() -> None:
    assert find_layout("first line\nsecond line\n---\nmore\n") is not None
    assert find_layout("first line\nsecond line\n---\nmore\n").paths == [()]  # type: ignore[union-attr]
    assert find_layout("\nTitle\n---\nmore\n").paths[-1] == ("Title",)  # type: ignore[union-attr]


@pytest.mark.parametrize("pair", ["e\u0301", "\r\n"])
def test_visible_character_is_not_divided(pair: str) -> None:
    for size in (2, 3, 4, 5, 7):
        for chunk in chars("ab" + pair * 40, size)[1:]:
            assert chunk.text[0] not in ("\u0301", "\n")


def test_sentence_longer_than_the_overlap_is_not_repeated() -> None:
    text = "Aa bb. Cc dd. " * 9  # a sentence with its space takes seven
    starts = {overlap: chars(text, 28, overlap)[1].start for overlap in (6, 7)}
    assert starts == {6: 24, 7: 21}  # 24: at least at a word


@pytest.mark.parametrize(
    "unit",
    [
        "关于其他代码的说明。\n\n:Original: index.rst\n==\n",  # a field, and no title
        ".open = probes_open,\n.read = seq_read,\n",
        '{ .type = "int",                .name = "cpu" },\n',
        "of the object.\n.**\nRecursive wildcard.\n",
    ],
)
def test_lines_with_closing_marks_stay_with_the_line_before(unit: str) -> None:
    for size in range(30, 60):
        for chunk in chars(unit * 20, size)[1:]:
            assert chunk.text.lstrip()[0] not in CLOSING, chunk.text


def test_clause_is_preferred_to_a_word() -> None:
    text = "字" * 120 + "，" + "字" * 60 + " " + "字" * 400
    assert chars(text, 300)[0].end == 121


def test_combining_mark_stays_with_its_sentence() -> None:
    text = "字" * 20 + "。" + "字" * 20 + "。\u0301" + "字" * 40
    assert [chunk.start for chunk in chars(text, 50)][1] == 21
