"""`/docs` and `/model` of a chat with a model in this process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from scripted_model import model, model_directory, run_khaosz

from khaosz.cli.rag import _default_reader
from khaosz.interop.fetch.catalogue import entry_of
from khaosz.rag import KnowledgeBase

ANSWER = "南极[1]。"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a knowledge base and two trained models, the newer of which cites."""
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


def chat(place: Path, *lines: str, options: tuple[str, ...] = ()) -> str:
    done = run_khaosz(
        *("chat", "--device", "cpu", "--temperature", "0.5", *options),
        lines="\n".join(lines).encode(),
        cwd=place,
        KHAOSZ_CACHE=str(place / "cache"),
    )
    errors = [line for line in done.stderr.decode().splitlines() if line[:7] != "model: "]
    assert done.returncode == 0 and not errors, done.stderr.decode()
    return done.stdout.decode()


def test_answers_from_documents_with_sources(place: Path) -> None:
    question = "企鹅住在哪里？"
    warm, cold = "/set temperature 50", "/set temperature 0"  # has no effect with documents
    base = "/docs", "/docs khaosz.kb"
    out = chat(place, *base, warm, question, "/retry", "/docs off", cold, question)
    assert "answering without documents\nknowledge bases:\n  khaosz.kb" in out
    assert "answering from khaosz.kb" in out
    assert out.count(f"{ANSWER}\n[1] 企鹅.md, line 1\n") == 2
    assert out.count(ANSWER) == 3


def test_refusal_without_a_matching_passage(place: Path) -> None:
    out = chat(place, "木星有多少颗卫星？", options=("--docs", "khaosz.kb"))
    assert "answering from khaosz.kb" in out
    assert "资料中没有找到答案。\n" in out
    assert "南极" not in out
    # The passages are shown all the same, and the model can be asked.
    assert "the model was not asked. /anyway asks it.\n[1] 合同.md, line 1\n" in out
    out = chat(place, "木星有多少颗卫星？", "/anyway", options=("--docs", "khaosz.kb"))
    assert f"{ANSWER}\n[1] 合同.md, line 1\n" in out


def test_answer_without_citation_lists_the_passages(place: Path) -> None:
    model_directory(place / "silent", model("南极。", 4096))
    out = chat(place, "/model silent", "企鹅住在哪里？", options=("--docs", "khaosz.kb"))
    assert "cites no source. Passages in the prompt:\n[1] 企鹅.md, line 1\n" in out


def test_long_conversation_is_truncated_for_the_passages(place: Path) -> None:
    long = "企鹅住在哪里？" + "吗" * 400  # 1,200 tokens
    out = chat(place, long, long, long, options=("--docs", "khaosz.kb"))
    assert "the oldest exchange is dropped)" in out
    assert out.count("[1] 企鹅.md") == 3


def test_missing_knowledge_base(place: Path) -> None:
    out = chat(place, "/docs no.kb", "/docs silent", "企鹅住在哪里？")
    assert "no.kb" in out and not (place / "no.kb").exists()
    assert ANSWER in out
    done = run_khaosz("chat", "--docs", "no.kb", cwd=place, KHAOSZ_CACHE=str(place / "cache"))
    assert done.returncode == 1 and b"no.kb" in done.stderr


def test_model_command_continues_the_conversation(place: Path) -> None:
    out = chat(place, "/model", "hi", "/model plain", "/model", "/retry", "/model plian", "hi")
    first, second = Path("runs/citing/last"), Path("runs/plain/last")
    assert f"* {first}\n  {second}\n" in out
    assert f"{second}  context 96 tokens" in out
    assert f"  {first}\n* {second}\n" in out
    assert "model 'plian' not found (did you mean 'plain'?)" in out
    assert out.count("Yes") == 2


def test_model_by_name(place: Path) -> None:
    assert chat(place, "hi", options=("--model", "plain")).count("Yes") == 1
    assert "model 'x' not found" in chat(place, "/model x")
    model_directory(place / "runs/more/plain/last", model("Yes"))
    assert "give the whole path" in chat(place, "/model plain")


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("citing", f"{ANSWER}\n[1] 企鹅.md, line 1\n"),
        ("plain", "cites no source. Passages in the prompt:\n[1] 企鹅.md, line 1\n"),
    ],
)
def test_rag_ask_prints_the_sources(place: Path, tmp_path: Path, name: str, printed: str) -> None:
    directory = model_directory(tmp_path / name, model(ANSWER if name == "citing" else "Yes", 4096))
    command = ["rag", "ask", "企鹅住在哪里？", "--model", str(directory), "--device", "cpu"]
    done = run_khaosz(*command, cwd=place)
    assert done.returncode == 0, done.stderr.decode()
    assert printed in done.stdout.decode().replace("\r\n", "\n")


def test_rag_ask_quotes_without_a_model_that_reads(place: Path, tmp_path: Path) -> None:
    """None is on the machine, then only one of 96 tokens of context."""
    kb, question = str(place / "khaosz.kb"), "企鹅住在哪里？"
    command = ["rag", "ask", question, "--kb", kb]
    for why in ("no model is on this machine", "reads only 96 tokens"):
        done = run_khaosz(*command, cwd=tmp_path, KHAOSZ_CACHE=str(tmp_path))
        assert done.returncode == 0, done.stderr.decode()
        assert (
            done.stdout.decode().replace("\r\n", "\n") == "企鹅住在南极。[1]\n[1] 企鹅.md, line 1\n"
        )
        assert why in done.stderr.decode() and "`khaosz pull`" in done.stderr.decode()
        model_directory(tmp_path / "runs/short/last", model("Yes"))
    done = run_khaosz(*command, "--quote", "--json", cwd=place)
    reply = json.loads(done.stdout)
    assert (reply["text"], reply["quoted"], reply["asked"]) == ("企鹅住在南极。[1]", True, False)
    assert [citation["line"] for citation in reply["citations"]] == [1]


def test_default_model_without_the_language_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of SmolLM2, an English model, is the newest on many machines."""
    model_directory(tmp_path / "runs/citing/last", model(ANSWER, 4096))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KHAOSZ_CACHE", str(tmp_path))
    expected = str(Path("runs/citing/last"))
    assert _default_reader("企鹅住在哪里？") == (expected, "")
    entry = entry_of("smollm2-135m")
    monkeypatch.setattr("khaosz.interop.languages.known_entry", lambda model: entry)
    name, why = _default_reader("企鹅住在哪里？")
    assert name is None and "khaosz pull" in why and "中文" in why
    assert _default_reader("Where do penguins live?") == (expected, "")
