"""HTML as Markdown."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_documents import load_one, problem_of

pytest.importorskip("selectolax")
from khaosz.rag.load import Limits
from khaosz.rag.load.html import html_to_markdown, parse


def markdown(html: str) -> str:
    return html_to_markdown(html).text


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<h1>A <em>b</em></h1><p>c<br>d</p><h3>e\nf</h3>g", "# A b\n\nc\nd\n\n### e f\n\ng"),
        ("a<p>b<p>c<div>d</div>e", "a\n\nb\n\nc\n\nd\n\ne"),
        ("  a \n\t b&nbsp;<b> c</b> ", "a b c"),
        ("<p>春眠\n  不觉晓，<b>处处</b>\nspring</p>", "春眠不觉晓，处处 spring"),
        ("soft&shy;hyphen zero\u200bwidth", "softhyphen zerowidth"),
        ("a<br><br>b", "a\n\nb"),
        ("<ul><li>a<li>b<ul><li>c</ul><li>d</ul>e", "- a\n- b\n  - c\n- d\n\ne"),
        ("<ol start=3><li>a</li><li><p>b</p><p>c</p></li></ol>", "3. a\n4. b\n\n   c"),
        ("<blockquote>a<p>b</blockquote>", "> a\n\n> b"),
        ("<p>use <code>x = 1</code> or <code></code>.</p>", "use `x = 1` or ."),
        (
            '<pre><code class="language-python">if a:\n    b\n\n\tc</code></pre>',
            "```python\nif a:\n    b\n\n\tc\n```",
        ),
        ("<pre>a\n````\nb<br>c</pre>d", "`````\na\n````\nb\nc\n`````\n\nd"),
        (
            "<table><caption>T</caption><tr><th>a<th>b|c<tr><td>1<td>2<p>3</table>",
            "T\n\n| a | b\\|c |\n| --- | --- |\n| 1 | 2 3 |",
        ),
        (
            "<table><tr><td rowspan=2>x<td colspan=2>y<tr><td>1<td>2<tr><td>3</table>",
            "| x | y |  |\n| --- | --- | --- |\n| x | 1 | 2 |\n| 3 |  |  |",
        ),
        ("<table><tr><td>a<tr><td>b</table>", "a\n\nb"),
        (
            "<table><tr><td><h1>t</h1><table><tr><td>1<td>2</table></table>",
            "# t\n\n| 1 | 2 |\n| --- | --- |",
        ),
        ("<p># no heading</p><p>#tag</p><p>| a</p>", "\\# no heading\n\n#tag\n\n\\| a"),
        ("<a href='http://x.y/z'>text</a> <img src='http://x.y/a.png' alt='alt'>", "text"),
        ("<details><summary>s</summary>d</details>", "s\n\nd"),
        ("<ruby>漢<rp>(</rp><rt>hàn</rt><rp>)</rp></ruby>", "漢"),
        ("<p>1 &lt; 2 &amp;&#x4e2d;&#0;</p>", "1 < 2 &中\ufffd"),
        ("", ""),
        ("<frameset><frame src=x></frameset>", ""),
    ],
)
def test_elements_become_markdown(html: str, expected: str) -> None:
    assert markdown(html) == expected


@pytest.mark.parametrize(
    "hidden",
    [
        "<script>alert('x')</script>",
        "<style>p{}</style>",
        "<nav><a>x</a></nav>",
        "<div role=navigation>x</div>",
        "<noscript>x</noscript>",
        "<template><p>x</template>",
        "<p hidden>x</p>",
        "<p style='color:red; DISPLAY : none'>x</p>",
        "<p style=visibility:hidden>x<b>x</b></p>",
        "<span aria-hidden=true>x</span>",
        "<iframe src=http://x.y>x</iframe>",
        "<svg><text>x</text></svg>",
        "<textarea>x</textarea><select><option>x</select>",
        "<dialog>x</dialog>",
        "<!-- x -->",
        "<math><semantics><annotation>x</annotation></semantics></math>",
    ],
)
def test_hidden_elements_are_dropped(hidden: str) -> None:
    assert markdown(f"<p>before</p>{hidden}<p>after</p>") == "before\n\nafter"


def test_body_hidden_until_its_script_runs_is_read() -> None:
    assert markdown("<body style='visibility:hidden'><p>a") == "a"


PAGE = (
    "<title> 唐诗 &amp;\n more </title><h1>春晓</h1>"
    "<p>春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"
)


@pytest.mark.parametrize(
    ("encoding", "declared"),
    [
        ("utf-8", ""),
        ("utf-8", "<meta charset=gbk>"),  # an outdated declaration
        ("gb18030", "<meta charset='gb2312'>"),
        ("gbk", '<meta http-equiv="Content-Type" content="text/html; charset=gbk">'),
        ("gb18030", ""),
        ("gb18030", "<meta charset='no-such-thing'>"),
        ("gb18030", "<meta charset='hex'>"),
        ("utf-16", "<meta charset=utf-8>"),
    ],
)
def test_pages_in_other_encodings(tmp_path: Path, encoding: str, declared: str) -> None:
    path = tmp_path / "页.html"
    path.write_bytes(f"<html><head>{declared}{PAGE}".encode(encoding))
    document = load_one(path)
    assert document.text.startswith("# 春晓\n\n春眠不觉晓，")
    assert document.metadata == {"format": "html", "title": "唐诗 & more"}
    assert document.name == document.doc_id == "页.html"


def test_declared_encodings_that_are_not_detected() -> None:
    japanese = "<meta charset=shift_jis><p>吾輩は猫である".encode("shift_jis")
    assert parse(japanese, Limits()).text == "吾輩は猫である"
    latin = b"<meta charset=iso-8859-1><p>\x93caf\xe9\x94"
    assert parse(latin, Limits()).text == "“café”"


def test_elements_nest_deeper_than_the_recursion_limit() -> None:
    deep = 10_000
    assert markdown("<div>" * deep + "x" + "</div>" * deep) == "x"
    lists = markdown("<ul><li>" * 5000 + "x")
    assert lists.strip("- ") == "x" and len(lists) < 100
    assert markdown("<table><tr><td>" * 3000 + "x") == "x"
    assert markdown("<pre><ul>" * 2000 + "x" + "</pre></ul>" * 2000 + "<li>y").startswith("```\nx")


def test_spans_do_not_multiply() -> None:
    wide = markdown("<table>" + "<tr><td colspan=1000 rowspan=65534>x<td>y" * 50 + "</table>")
    assert len(wide) < 50 * 1000
    wider = markdown("<table><tr>" + "<td colspan=90>x" * 50 + "<tr><td>y</table>")
    assert max(line.count("|") for line in wider.split("\n")) == 101


TAGS = ["p", "div", "h2", "ul", "ol", "li", "pre", "code", "table", "tr", "td", "th", "br", "b"]
TAGS += ["blockquote", "a", "caption", "nav", "dl", "dt"]


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([f"<{tag}>" for tag in TAGS] + [f"</{tag}>" for tag in TAGS]),
            st.text(max_size=5),
            st.sampled_from(["<td rowspan=3>", "<td colspan=2>", "\n", "字", "`", "|"]),
        ),
        max_size=40,
    )
)
def test_tag_soup_is_converted(parts: list[str]) -> None:
    text = markdown("".join(parts).encode("utf-8", "replace").decode())
    text.encode("utf-8")
    assert "\0" not in text and text == text.strip("\n")


@given(st.lists(st.text("abc 字句", min_size=1, max_size=8), min_size=1, max_size=30))
def test_no_words_are_lost(words: list[str]) -> None:
    """In lists, tables, quotes and headings."""
    wrappers = ["<p>{}</p>", "<li>{}", "<td>{}", "<h2>{}</h2>", "<blockquote>{}</blockquote>"]
    html = "".join(wrappers[i % len(wrappers)].format(word) for i, word in enumerate(words))
    expected = sorted(c for word in words for c in word if c != " ")
    assert sorted(c for c in markdown(html) if c in "abc字句") == expected


def test_page_without_text_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.htm"
    path.write_text("<script>render()</script><div id=root></div>")
    assert problem_of(path).message == "has no text in it"
    path.write_bytes(bytes(range(256)) * 4)
    assert "binary" in problem_of(path).message
