"""`khaosz eval grounded --kb`: answers graded by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from khaosz.cli import app
from khaosz.errors import DataError
from khaosz.evaluation.answers import contains_answer, graded_answers, read_questions, report
from khaosz.rag import KnowledgeBase
from khaosz.rag.answer import ask
from khaosz.rag.models.protocols import Messages

QUESTIONS = [
    {"question": "企鹅住在哪里？", "answer": ["南极", "南方"], "doc": "鸟.md"},
    {"question": "How heavy is a blue whale?", "answer": "1,500"},
    {"question": "企鹅吃什么？", "answer": "鱼"},
    {"question": "How do I bake bread?", "answer": "oven"},
    {"question": "What do whales sing?", "answer": None},
    {"question": "Which spices belong in garam masala?", "answer": None},
]


class Replies:
    """Answers by the question in the prompt."""

    context = 2000

    def __init__(self, replies: dict[str, str]) -> None:
        self._replies = replies

    def count(self, messages: Messages) -> int:
        return len(messages)

    def stream(self, messages: Messages, max_tokens: int, temperature: float) -> Iterator[str]:
        prompt = messages[-1]["content"]
        yield next(text for question, text in self._replies.items() if question in prompt)


@pytest.fixture
def base(tmp_path: Path) -> KnowledgeBase:
    base = KnowledgeBase(tmp_path / "a.kb")
    base.add_text("企鹅是鸟，住在南极。企鹅吃小鱼。", name="鸟.md")
    base.add_text("A blue whale weighs 1500 tonnes. Whales sing.", name="whales.md")
    return base


def questions_file(tmp_path: Path, records: list[dict]) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path


def test_answers_are_graded(base: KnowledgeBase, tmp_path: Path) -> None:
    model = Replies(
        {
            "企鹅住在哪里？": "企鵝住在南極[1]。",
            "How heavy is a blue whale?": "It weighs 1500 tonnes.",
            "企鹅吃什么？": "資料中沒有找到答案。",
            "What do whales sing?": "The documents do not contain the answer.",
        }
    )
    questions = read_questions(questions_file(tmp_path, QUESTIONS))
    graded = list(graded_answers(base, model, questions))
    assert [(each.asked, each.refused, each.right, each.cited) for each in graded] == [
        (True, False, True, True),
        (True, False, True, False),  # without a number
        (True, True, False, False),
        (False, True, False, False),
        (True, True, False, False),
        (False, True, False, False),
    ]
    result = report(graded)
    assert (result.answerable, result.unanswerable) == (4, 2)
    assert (result.refused_before, result.refused_after) == (0.25, 0.25)
    assert (result.right, result.cited, result.unasked, result.refused) == (0.5, 0.25, 0.5, 0.5)
    assert "25.0% refused before the model, 25.0% by it, 50.0% right" in result.format()


def test_refused_question_can_be_asked_anyway(base: KnowledgeBase) -> None:
    model = Replies({"How do I bake bread?": "In an oven."})
    refused = ask(base, "How do I bake bread?", model)
    assert "".join(refused) and not refused.asked and not refused.found
    anyway = ask(base, "How do I bake bread?", model, anyway=True)
    assert "".join(anyway) == "In an oven." and anyway.asked and not anyway.found
    refusing = Replies({"企鹅住在哪里？": "资料中没有找到答案。"})
    reply = ask(base, "企鹅住在哪里？", refusing)
    assert reply.found and "".join(reply) and reply.asked and not reply.found


def test_numbers_stand_alone() -> None:
    assert contains_answer("It costs 1,180 dollars.", ["1180"])
    assert contains_answer("in ７ days", ["7"]) and contains_answer("7.", ["7"])
    for text in ("17 days", "70 days", "7.5 days", "1.7 days"):
        assert not contains_answer(text, ["7"]), text


@pytest.mark.parametrize(
    "record", [{"question": "x"}, {"question": " ", "answer": "x"}, {"question": "x", "answer": 3}]
)
def test_invalid_question_is_refused(tmp_path: Path, record: dict) -> None:
    with pytest.raises(DataError, match="line 1: not a question"):
        read_questions(questions_file(tmp_path, [record]))


def test_command(base: KnowledgeBase, tiny_model: Path, tmp_path: Path) -> None:
    base.close()
    file, out = questions_file(tmp_path, QUESTIONS), tmp_path / "answers.jsonl"
    arguments = ["eval", "grounded", str(tiny_model), str(file), "--device", "cpu"]
    options = ["--kb", str(tmp_path / "a.kb"), "--out", str(out), "--json"]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    values = json.loads(result.output[result.output.index("{") :])
    assert values["answerable"] == 4 and values["refused_before"] == 0.25
    assert len(out.read_text(encoding="utf-8").splitlines()) == len(QUESTIONS)
    assert CliRunner().invoke(app, [*arguments, "--out", str(out)]).exit_code != 0
