"""Records for answers from passages: the prompt of `rag ask`, right citations, nothing held out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model
from typer.testing import CliRunner

from khaosz.cli import app
from khaosz.data.records.chat import to_messages
from khaosz.demo.facts import Fact, unit_facts
from khaosz.demo.grounded import grounded_records
from khaosz.demo.texts import Unit
from khaosz.errors import ConfigError, DataError
from khaosz.evaluation import groundedness
from khaosz.rag import KnowledgeBase
from khaosz.rag.answer import CitationStream, ask, strip_markers
from khaosz.rag.prompt import REFUSAL

WORDS = [
    "画蛇添足",
    "守株待兔",
    "掩耳盗铃",
    "刻舟求剑",
    "亡羊补牢",
    "叶公好龙",
    "杯弓蛇影",
    "井底之蛙",
]


def idiom(word: str) -> Unit:
    text = f"成语：{word}。释义：{word[::-1]}的道理很深。并不好懂。出处：《{word}传》。"
    return Unit("idioms", word, "zh", (text,))


FACTS = [fact for word in WORDS * 5 for fact in unit_facts(idiom(word), 0)]


def letters(messages: list[dict[str, str]]) -> int:
    return sum(len(message["content"]) for message in messages)


def words(text: str) -> str:
    return "".join(text.split())


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return [r for seed in range(4) for r in grounded_records(FACTS, letters, 2000, seed)]


def test_an_answer_is_in_the_passage_that_it_cites(records: list[dict[str, Any]]) -> None:
    answered = [r for r in records if r["answer"] is not None]
    refused = [r for r in records if r["answer"] is None]
    assert 0.1 < len(refused) / len(records) < 0.4
    assert {r["citation"] for r in answered if r["passages"] == 3} == {1, 2, 3}
    for record in answered:
        prompt, said = (message["content"] for message in record["messages"])
        _, passage = prompt.split(f'<passage id="{record["citation"]}"', 1)
        passage = passage.partition("</passage>")[0]
        assert words(record["answer"]) in words(strip_markers(passage))
        assert said.rpartition("[")[0].rstrip() in passage
        stream = CitationStream(record["passages"])
        text = stream.feed(said) + stream.finish()
        assert (stream.used, stream.invalid) == ([record["citation"]], 0)
        assert words(strip_markers(text)) == words(record["answer"])
        to_messages(record)  # what `stage = "sft"` reads
    for record in refused:
        asked = record["messages"][0]["content"].rpartition("问题：")[2]
        (word,) = (word for word in WORDS if word in asked)
        assert f"成语：{word}" not in record["messages"][0]["content"]
        assert record["messages"][1]["content"] == REFUSAL["zh"] and record["citation"] is None


class Parrot:
    """Returns canned answers and records what it was sent."""

    context = 2256  # what leaves 2,000 for the prompt

    def __init__(self, says: dict[str, str] | str) -> None:
        self.says, self.sent = says, ""

    def count(self, messages: Any) -> int:
        return letters(messages)

    def stream(self, messages: Any, max_tokens: int, temperature: float) -> Iterator[str]:
        self.sent = messages[-1]["content"]
        yield self.says if isinstance(self.says, str) else self.says[self.sent]


def test_the_prompt_is_what_rag_ask_sends(tmp_path: Path) -> None:
    """The same document and question, through a base, and through the records."""
    fact = Fact("u", "s", "zh", "成语画蛇添足，释义？", "比喻多余。",
                "成语：画蛇添足。释义：比喻多余。", "成语词典")  # fmt: skip
    (record,) = grounded_records([fact], letters, 2000, 0)
    parrot = Parrot("比喻多余。[1]")
    with KnowledgeBase(tmp_path / "a.kb") as base:
        base.add_text(fact.passage, name=fact.doc)
        answer = ask(base, fact.question, parrot)
        assert "".join(answer) == record["messages"][1]["content"]
    assert parrot.sent == record["messages"][0]["content"]
    assert [c.number for c in answer.citations] == [record["citation"]]


def test_a_passage_without_room_is_not_cited() -> None:
    """Where `build_prompt` drops the passage, or narrows it beyond the answer, the answer is no."""
    long = [
        Fact("u", "s", "zh", f"“{word}”是什么意思？", f"{word}的意思。",
             f"{word}。" + "无关的话说了很多。" * 60 + f"{word}的意思。", "d")
        for word in WORDS
    ]  # fmt: skip
    for record in grounded_records(long, letters, 500, 0):
        prompt = record["messages"][0]["content"]
        assert letters(record["messages"][:1]) <= 500
        assert (record["answer"] is None) == (record["citation"] is None)
        assert record["answer"] is None or words(record["answer"]) in words(strip_markers(prompt))


def test_facts_of_statutes_and_of_python() -> None:
    law = Unit("laws", "某法", "zh", ("《某法》\n第一章 总则\n第一条　为了某事，制定本法。",))
    (fact,) = unit_facts(law, 0)
    assert fact.question.startswith("《某法》第一条") and fact.answer == "为了某事，制定本法。"
    assert (fact.passage, fact.doc) == ("第一条　为了某事，制定本法。", "某法")
    assert fact.headings == ("第一章 总则",)
    text = (
        "email\n\nA package.\n\nbody_length: Return a body quoted-printable encoding length.\n\nx"
    )
    (fact,) = unit_facts(Unit("python", "email", "en", (text,)), 0)
    assert "body_length" in fact.question
    assert fact.answer == "Return a body quoted-printable encoding length."
    assert fact.answer in fact.passage


def test_groundedness_counts(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    path = tmp_path / "grounded.jsonl"
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n")
    right = {r["messages"][0]["content"]: r["messages"][1]["content"] for r in records}
    perfect = groundedness(Parrot(right), path)
    assert (perfect.exact, perfect.said, perfect.cited, perfect.both) == (1, 0, 1, 1)
    assert (perfect.refused, perfect.refusals) == (0, 1)
    assert perfect.answerable + perfect.unanswerable == len(records)
    silent = groundedness(Parrot(REFUSAL["zh"]), path, limit=40)
    assert (silent.exact, silent.cited, silent.refused, silent.refusals) == (0, 0, 1, 1)
    assert silent.answerable + silent.unanswerable == 40
    # The right words with a marker too many, and other words with the right one.
    more = groundedness(Parrot({k: v + "[99]" for k, v in right.items()}), path)
    assert (more.exact, more.cited) == (1, 0)
    wordy = groundedness(Parrot({k: "是这样：" + v for k, v in right.items()}), path)
    assert (wordy.exact, wordy.said, wordy.cited, wordy.both) == (0, 1, 1, 0)
    other = {k: v.replace("道理", "意思") for k, v in right.items()}
    wrong = groundedness(Parrot(other), path)
    assert wrong.cited == 1 and wrong.exact is not None and wrong.exact < 1
    with pytest.raises(DataError, match=r"bad\.jsonl line 1: not a grounded record"):
        (tmp_path / "bad.jsonl").write_text('{"messages": []}\n')
        groundedness(Parrot(""), tmp_path / "bad.jsonl")


def test_data_grounded_keeps_units_apart(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from khaosz.data.tokenizer import load_tokenizer
    from khaosz.demo.corpus import held_out
    from khaosz.demo.fetch import DemoSources
    from khaosz.interop.huggingface import save_model

    units = [idiom(f"{a}{word[1:]}") for word in WORDS for a in "天地玄黄宇宙洪荒日月盈昃"]
    monkeypatch.setattr("khaosz.demo.corpus.read_units", lambda sources, seed: units)
    nothing = DemoSources({}, tmp_path, None, ())
    monkeypatch.setattr("khaosz.demo.fetch.fetch_demo", lambda **_: nothing)
    tokenizer = load_tokenizer(tokenizer_dir)
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=1024)
    save_model(model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    out = tmp_path / "out"
    command = ["data", "grounded", str(tmp_path / "model"), "--out", str(out), "--limit", "60"]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    kept, apart = (
        (out / name).read_text(encoding="utf-8")
        for name in ("grounded.jsonl", "grounded_val.jsonl")
    )
    assert len(kept.splitlines()) == 60 and apart
    held = held_out(units, 0)
    assert held and not any(f"成语：{key}" in kept for key in held)
    assert all(f"成语：{unit.key}" not in apart for unit in units if unit.key not in held)
    too_small = CliRunner().invoke(app, [*command, "--max-tokens", "1000", "--out", f"{out}2"])
    assert isinstance(too_small.exception, ConfigError)
    assert "none of 60 prompts fits into the 24 tokens" in str(too_small.exception)
    assert not Path(f"{out}2").exists()
