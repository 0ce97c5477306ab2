"""`/docs` and `/model` of a chat with a model in this process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from scripted_model import model, model_directory, run_khaosz

from khaosz.rag import KnowledgeBase

ANSWER = "南极[1]。"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two trained models, the newer of which cites, and a base."""
    folder = tmp_path_factory.mktemp("place")
    model_directory(folder / "runs/plain/last", model("Yes"))
    citing = model_directory(folder / "runs/citing/last", model(ANSWER, 4096))
    later = (folder / "runs/plain/last/model.safetensors").stat().st_mtime + 10
    os.utime(citing / "model.safetensors", (later, later))
    with KnowledgeBase(folder / "khaosz.kb") as base:
        base.add_text("企鹅住在南极。它们不会飞。", name="企鹅.md")
        base.add_text("合同自双方签字之日起生效，有效期三年。", name="合同.md")
        base.add_text("The blue whale is the largest animal.", name="whales.md")
    return folder


def told(place: Path, *lines: str, options: tuple[str, ...] = ()) -> str:
    done = run_khaosz(
        *("chat", "--device", "cpu", "--temperature", "0.5", *options),
        lines="\n".join(lines).encode(),
        cwd=place,
        KHAOSZ_CACHE=str(place / "cache"),
    )
    assert done.returncode == 0 and done.stderr == b"", done.stderr.decode()
    return done.stdout.decode()


def test_answers_come_from_documents_with_their_sources(place: Path) -> None:
    question = "企鹅住在哪里？"
    warm, cold = "/set temperature 50", "/set temperature 0"  # it quotes all the same
    base = "/docs", "/docs khaosz.kb"
    out = told(place, *base, warm, question, "/retry", "/docs off", cold, question)
    assert "answers come from no documents\n/docs BASE takes:\n  khaosz.kb" in out
    assert "answers come from khaosz.kb" in out
    assert out.count(f"{ANSWER}\n[1] 企鹅.md  0-13\n") == 2
    assert out.count(ANSWER) == 3


def test_what_documents_do_not_hold_no_model_is_asked(place: Path) -> None:
    out = told(place, "木星有多少颗卫星？", options=("--docs", "khaosz.kb"))
    assert "answers come from khaosz.kb" in out
    assert "资料中没有找到答案。\n" in out
    assert "南极" not in out and "[1]" not in out


def test_a_model_that_cites_nothing_is_told_of(place: Path) -> None:
    model_directory(place / "silent", model("南极。", 4096))
    out = told(place, "/model silent", "企鹅住在哪里？", options=("--docs", "khaosz.kb"))
    assert "names no source. Passages it was given:\n[1] 企鹅.md  0-13\n" in out


def test_a_long_conversation_leaves_the_passages_their_room(place: Path) -> None:
    long = "企鹅住在哪里？" + "吗" * 400  # 1,200 tokens
    out = told(place, long, long, long, options=("--docs", "khaosz.kb"))
    assert "exchanges are forgotten)" in out
    assert out.count("[1] 企鹅.md") == 3


def test_a_base_that_is_not_there(place: Path) -> None:
    out = told(place, "/docs no.kb", "/docs silent", "企鹅住在哪里？")
    assert "no.kb" in out and not (place / "no.kb").exists()
    assert ANSWER in out
    done = run_khaosz("chat", "--docs", "no.kb", cwd=place, KHAOSZ_CACHE=str(place / "cache"))
    assert done.returncode == 1 and b"no.kb" in done.stderr


def test_another_model_goes_on_with_the_conversation(place: Path) -> None:
    out = told(place, "/model", "hi", "/model plain", "/model", "/retry", "/model plian", "hi")
    first, second = Path("runs/citing/last"), Path("runs/plain/last")
    assert f"* {first}\n  {second}\n" in out
    assert f"{second}  context 96 tokens" in out
    assert f"  {first}\n* {second}\n" in out
    assert "no model 'plian' is here (did you mean plain?)" in out
    assert out.count("Yes") == 2


def test_a_model_by_its_name(place: Path) -> None:
    assert told(place, "hi", options=("--model", "plain")).count("Yes") == 1
    assert "no model 'x' is here" in told(place, "/model x")
    model_directory(place / "runs/more/plain/last", model("Yes"))
    assert "name the whole path" in told(place, "/model plain")
