"""The floor below which no model is asked: per retriever, language and script."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from khaosz.rag import KnowledgeBase
from khaosz.rag.models.protocols import GoodCosine
from khaosz.rag.prompt import REFUSAL, is_refusal
from khaosz.rag.relevance import has_relevant, overlap
from khaosz.rag.scripts import to_simplified, to_traditional

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench.answers import base_of, contracts, own, refused

LEASE = "Lease. The contract with Miller ends on 3 May 2027. The notice period is 30 days."
CONTRACT = "本协议由甲方与乙方签订，有效期至 2027 年 5 月 3 日。解约须提前三十天书面通知。"


def found(text: str | Sequence[str], question: str, embedder: object = None) -> bool:
    texts = [text] if isinstance(text, str) else text
    with KnowledgeBase(":memory:", embedder=embedder) as base:  # type: ignore[arg-type]
        for number, each in enumerate(texts):
            base.add_text(each, name=f"{number}.md")
        if embedder is not None:
            base.reindex()
        return has_relevant(base, question, base.search(question, 3))


class Directions:
    """An embedder for which the passages lie at a given cosine to every query."""

    name, dimension = "directions", 2

    def __init__(self, cosine: float, good_cosine: GoodCosine) -> None:
        self._cosine, self.good_cosine = cosine, good_cosine

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        row = [self._cosine, (1 - self._cosine**2) ** 0.5]
        return np.array([row] * len(texts), np.float32)

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([[1.0, 0.0]] * len(texts), np.float32)

    def tokens(self, texts: Sequence[str]) -> int:
        return 0


@pytest.mark.parametrize(
    ("text", "question"),
    [
        (LEASE, "When does the contract with Miller end?"),
        (LEASE, "How long is the notice period?"),
        ("租金每月 4800 元，押金为两个月的租金。", "每个月房租多少钱？"),
        (LEASE, "When is the agreement over?"),
        (LEASE, "what is the deadline for cancelling?"),
        (LEASE, "合同什么时候到期？"),  # another language, and all that is stored
        (LEASE, "Miller 的合同什么时候到期？"),
        (CONTRACT, "合同什么时候到期？"),
        (CONTRACT, "When does the contract end?"),
        (to_traditional(CONTRACT), "合同什么时候到期？"),
        ("我公司员工每年享有十五天带薪年休假。报销须在三十日内提交发票。", "年假有几天？"),
        (
            "我公司员工每年享有十五天带薪年休假。报销须在三十日内提交发票。",
            "報銷要在多久之內提交？",
        ),
        ("甲公司員工請病假須提供醫院證明。", "请病假需要什么证明？"),
        ("The employees of Halden number 3,940.", "How many people does Halden employ?"),
    ],
)
def test_question_that_the_document_answers_is_found(text: str, question: str) -> None:
    assert found(text, question)


@pytest.mark.parametrize(
    ("text", "question"),
    [
        (LEASE, "Who won the match?"),
        (LEASE, "How do I bake bread?"),
        (CONTRACT, "红烧肉怎么做？"),
        (CONTRACT, "蒙娜麗莎是誰畫的？"),
        ([LEASE, CONTRACT], "Who painted the Mona Lisa?"),
    ],
)
def test_question_on_another_subject_is_not_found(text: str, question: str) -> None:
    assert not found(text, question)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_refusals_of_word_search(language: str) -> None:
    """The questions of the bench, and forty documents that differ in their numbers only."""
    documents, kinds = own(language)
    with base_of(documents, None) as base:
        assert refused(base, kinds["far"]) >= 48
        assert refused(base, kinds["answerable"]) <= 1
    documents, questions = contracts(language)
    with base_of(documents, None) as base:
        assert refused(base, questions) == 0
        variants = [to_traditional(each.question) for each in questions]
        assert all(has_relevant(base, each, base.search(each, 3)) for each in variants)


def test_embedder_without_a_measured_cosine_has_no_floor() -> None:
    many = [f"Text number {i} about nothing." for i in range(8)]
    assert found(many, "合同什么时候到期？", Directions(0.1, None))
    assert not found(many, "合同什么时候到期？", Directions(0.1, 0.5))
    assert found(many, "合同什么时候到期？", Directions(0.6, 0.5))


def test_measured_cosine_depends_on_both_languages() -> None:
    cosines = {"zh-zh": 0.85, "en-en": 0.8, "zh-en": 0.7, "en-zh": 0.75}
    english = [f"Text number {i} about nothing." for i in range(8)]
    chinese = [f"第{i}段，没有内容。" for i in range(8)]
    for cosine, passages, question, expected in (
        (0.72, english, "租约何时终止", True),
        (0.72, english, "lease termination", False),
        (0.72, chinese, "lease termination", False),
        (0.77, chinese, "lease termination", True),
        (0.82, chinese, "租约终止", False),
        (0.86, chinese, "租约终止", True),
        (0.82, english, "lease termination", True),
    ):
        assert found(passages, question, Directions(cosine, cosines)) is expected, (
            cosine,
            question,
        )


def test_overlap_ignores_question_words_and_other_scripts() -> None:
    assert overlap("what is the fee of contract 7", "contract 7 has a fee") == 1.0
    assert overlap("miller 的合同什么时候到期", "the contract with miller") == 1.0
    assert overlap("what is it", "anything") == 1.0  # nothing to compare
    assert overlap("quasar", "the contract") == 0.0
    assert overlap("employees", "we employ ten people") == 1.0


def test_search_finds_either_script() -> None:
    with KnowledgeBase(":memory:") as base:
        base.add_text("租賃合約於五月到期。", name="traditional")
        base.add_text("采购合同在六月到期。", name="simplified")
        assert base.search("租赁合约")[0].doc == "traditional"
        assert base.search("採購合約六月")[0].doc == "simplified"
    assert to_simplified("頭髮發現") == "头发发现" and to_traditional("发现") == "發現"
    assert to_simplified("abc") == "abc"


@pytest.mark.parametrize(
    "text",
    [
        *REFUSAL.values(),
        to_traditional(REFUSAL["zh"]),
        "根据资料，文档中没有提到相关信息。[1]",
        "资料中没有找到答案",
        "The documents do not contain the answer [1].",
        "The passages don't provide an answer to this question.",
        "the document does not explicitly state that information.\nIt only lists prices.",
    ],
)
def test_refusal_is_recognised(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "合同于 2027 年 5 月 3 日到期。[1]",
        "合同没有规定押金。[1]",
        "The contract does not contain a penalty clause [1].",
        "The lease ends in May [1]. The documents do not contain the answer to the rest.",
        "",
    ],
)
def test_answer_is_not_taken_for_a_refusal(text: str) -> None:
    assert not is_refusal(text)
