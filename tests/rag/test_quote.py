"""The sentence that answers a question, without a model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from khaosz.rag import KnowledgeBase
from khaosz.rag.answer import Answer, ask
from khaosz.rag.prompt import REFUSAL
from khaosz.rag.scripts import to_traditional

sys.path += [str(Path(__file__).parents[2]), str(Path(__file__).parent / "load")]
from make_documents import pdf_bytes

from bench.answers import base_of, own, quoted, read_questions

LEASE = """# Lease

The landlord is Dana Whitfield. The lease begins on 1 April 2025 and ends on 31 March 2027. The
rent is 1,180 dollars a month. Is a pet allowed? Cats are; dogs are not allowed [2].
"""
PRICES = "品名,单价（元）,保修（月）\n复印纸,25,无\n打印机,1299,24\n"
ROW = "品名: 打印机; 单价（元）: 1299; 保修（月）: 24 [1]"
MENU = "# 菜单\n\n| 菜名 | 价格 |\n| --- | --- |\n| 红烧肉 | 48 元 |\n| 清蒸鱼 | 66 元 |\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> KnowledgeBase:
    folder = tmp_path_factory.mktemp("documents")
    for name, text in (("lease.md", LEASE), ("价目.csv", PRICES), ("菜单.md", MENU)):
        (folder / name).write_text(text, encoding="utf-8")
    pages = [[(72, 700, "General terms of the warehouse.")], [(72, 700, "The gate opens at 6:45.")]]
    (folder / "warehouse.pdf").write_bytes(pdf_bytes(pages))
    base = KnowledgeBase(":memory:")
    report = base.add([folder])
    assert not report.problems
    return base


def answered(base: KnowledgeBase, question: str) -> tuple[str, Answer]:
    reply = ask(base, question, None)
    return "".join(reply), reply


@pytest.mark.parametrize(
    ("question", "answer", "place"),
    [
        (
            "When does the lease end?",
            "The lease begins on 1 April 2025 and ends on 31 March 2027. [1]",
            "lease.md > Lease, line 3",
        ),
        (
            "How much is the rent?",
            "The rent is 1,180 dollars a month. [1]",
            "lease.md > Lease, lines 3-4",
        ),
        ("Who is the landlord?", "The landlord is Dana Whitfield. [1]", "lease.md > Lease, line 3"),
        # A question answers none, and the brackets of the document stay.
        (
            "Are dogs allowed?",
            "Cats are; dogs are not allowed [2]. [1]",
            "lease.md > Lease, line 4",
        ),
        ("打印机多少钱？", ROW, "价目.csv, line 3"),
        ("打印機保修幾個月？", ROW, "价目.csv, line 3"),
        ("清蒸鱼什么价格？", "菜名: 清蒸鱼; 价格: 66 元[1]", "菜单.md > 菜单, line 6"),
        ("When does the gate open?", "The gate opens at 6:45. [1]", "warehouse.pdf, p. 2"),
    ],
)
def test_sentence_or_row_with_its_place(
    base: KnowledgeBase, question: str, answer: str, place: str
) -> None:
    text, reply = answered(base, question)
    assert text == answer
    assert reply.found and not reply.asked and reply.quote is not None
    assert reply.quote.hit.place == place
    (citation,) = reply.citations
    document = base.store.document_by_hash(citation.hash)
    assert document is not None
    exact = base.store.text(document.id)[citation.start : citation.end]
    assert exact == reply.quote.hit.text and "\n\n" not in exact
    assert citation.page == (2 if "pdf" in place else None)


@pytest.mark.parametrize(
    ("question", "language"),
    [
        ("Who painted the Mona Lisa?", "en"),
        ("珠穆朗玛峰有多高？", "zh"),
        ("What is the phone number of the landlord?", "en"),  # the kind of answer is absent
        ("菜单的邮箱是什么？", "zh"),
    ],
)
def test_no_answer_is_said(base: KnowledgeBase, question: str, language: str) -> None:
    text, reply = answered(base, question)
    assert text == REFUSAL[language]
    assert not reply.found and reply.quote is None and not reply.citations


def test_follow_up_is_searched_with_the_question_before(base: KnowledgeBase) -> None:
    history = [{"role": "user", "content": "打印机多少钱？"}, {"role": "assistant", "content": "…"}]
    assert "1299" in "".join(ask(base, "它保修几个月？", None, history=history))


@pytest.mark.parametrize(
    ("name", "heads", "row"),
    [
        ("价目.csv", "品名,单价\n", "商品{},{} 元\n"),
        ("价目.csv", "品名;单价\n", "商品{};{} 元\n"),
        ("价目.tsv", "品名\t单价\n", "商品{}\t{} 元\n"),
        ("价目.md", "价目如下。\n\n| 品名 | 单价 |\n|---|:--|\n", "| 商品{} | {} 元 |\n"),
        ("价目.md", "|品名|单价|\n|-|-|\n", "|商品{}|{} 元|\n"),
    ],
)
def test_row_in_a_later_chunk_has_its_heads(name: str, heads: str, row: str) -> None:
    rows = "".join(row.format(i, i * 7) for i in range(400))
    with KnowledgeBase(":memory:") as base:
        base.add_text(heads + rows, name=name)
        text, reply = answered(base, "商品371多少钱？")
        assert text == "品名: 商品371; 单价: 2597 元[1]"
        assert base.store.chunk_count > 1 and reply.quote and reply.quote.hit.start > 1000


def test_bar_in_a_sentence_is_not_a_table() -> None:
    with KnowledgeBase(":memory:") as base:
        base.add_text("Usage of the tool.\nRun `cat log | sort` within 5 days.", name="a.md")
        assert answered(base, "How many days for cat log?")[0].startswith("Run `cat log | sort`")


@pytest.mark.parametrize(("language", "least"), [("zh", 55), ("en", 99)])
def test_questions_of_the_bench(language: str, least: int) -> None:
    """Of 60 and 100; and half a hundred on other subjects."""
    documents, kinds = own(language)
    with base_of(documents, None) as base:
        assert quoted(base, kinds["answerable"])[0] >= least
        assert quoted(base, kinds["far"])[1] >= 48
        variant = [to_traditional(each.question) for each in kinds["answerable"]]
        replies = [ask(base, each, None) for each in variant[:10]]
        assert sum(reply.quote is not None for reply in replies) >= 9


def test_questions_that_nothing_was_chosen_by() -> None:
    documents, kinds = read_questions(Path(__file__).with_name("quotes.toml"))
    with base_of(documents, None) as base:
        assert quoted(base, kinds["answerable"]) == (23, 3)  # of 28
        assert quoted(base, kinds["far"]) == (0, 4)
