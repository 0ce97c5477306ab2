"""The acts of the demo that need no training: documents, and an assistant."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny_models import chain_model, tokenizer

from khaosz.demo import assistant
from khaosz.demo.assistant import PROPOSED, can_ask, proposal, run_assistant
from khaosz.demo.make_documents import FOLDER, files
from khaosz.demo.reading import QUESTIONS
from khaosz.demo.run import run_demo
from khaosz.demo.training import LEAST_STEPS, _check_steps, _finished_stages
from khaosz.errors import ConfigError, TrainingError
from khaosz.interop.fetch.catalogue import catalogue
from khaosz.interop.huggingface import save_model
from khaosz.rag import KnowledgeBase
from khaosz.rag.answer import ask
from khaosz.rag.quote import find_quote


def console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=120), text


def test_documents_answer_eight_questions(tmp_path: Path) -> None:
    shown, text = console()
    for files_line in ("6 files read, 0 read before", "0 files read, 6 read before"):
        reached = run_demo(minutes=9, out=tmp_path, acts=["documents"], console=shown)
        assert reached["documents"] | {"seconds": 0} == {
            "reached": True, "documents": 6, "questions": 8, "right": 8, "seconds": 0,
        }  # fmt: skip
        assert reached["model"]["reached"] is reached["assistant"]["reached"] is False
        assert files_line in text.getvalue()
    for line in ("价目表.csv, line 6", "air-purifier-manual.pdf, p. 2", "leave-rules.md > Leave",
                 "khaosz train lora init_from=MODEL data=chats.jsonl"):  # fmt: skip
        assert line in text.getvalue()


def test_quotes_are_from_the_expected_files() -> None:
    with KnowledgeBase(":memory:") as base:
        base.add([FOLDER])
        for each in QUESTIONS:
            quote = find_quote(base, each.question, base.search(each.question))
            assert quote is not None and quote.hit.doc == each.doc
        assert "".join(ask(base, "Who painted the Mona Lisa?", None)).endswith("the answer.")


def test_binary_documents_are_what_their_script_writes() -> None:
    for name, content in files().items():
        assert (FOLDER / name).read_bytes() == content, "python -m khaosz.demo.make_documents"
    (FOLDER / "电梯检修通知.txt").read_bytes().decode("gb18030")
    with pytest.raises(UnicodeDecodeError):
        (FOLDER / "电梯检修通知.txt").read_text(encoding="utf-8")


def test_nothing_is_fetched_without_a_yes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KHAOSZ_CACHE", str(tmp_path / "cache"))
    pulled: list[str] = []
    monkeypatch.setattr(assistant, "pull", lambda name, *more, **options: pulled.append(name))
    asked: list[str] = []

    def refuse(question: str) -> bool:
        asked.append(question)
        return False

    shown, text = console()
    common = {"out": tmp_path, "console": shown, "name": None}
    assert "no terminal" in run_assistant(**common, offline=False, confirm=None)["skipped"]
    assert "offline" in run_assistant(**common, offline=True, confirm=refuse)["skipped"]
    assert not asked
    assert "not fetched" in run_assistant(**common, offline=False, confirm=refuse)["skipped"]
    assert asked == ["fetch qwen2.5-coder-0.5b, 491 MB, duration not known?"] and not pulled
    assert text.getvalue().count(f"khaosz pull {PROPOSED}; khaosz demo --only assistant") == 3
    assert not can_ask()


def test_minutes_of_the_download_are_those_of_the_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KHAOSZ_CACHE", str(tmp_path))
    (tmp_path / "demo").mkdir()
    rate = tmp_path / "demo/download_rate.json"
    rate.write_text('{"bytes": 10000000, "seconds": 5}')
    assert proposal(catalogue()[PROPOSED]).endswith("491 MB, about 4 min?")
    rate.write_text("[]")
    assert "not known" in proposal(catalogue()[PROPOSED])


def test_failing_assistant_is_one_line(tmp_path: Path) -> None:
    shown, text = console()
    reached = run_demo(
        minutes=9, out=tmp_path, acts=["assistant"], model=str(tmp_path / "no.gguf"), console=shown
    )
    assert "no.gguf" in reached["assistant"]["error"] and not reached["assistant"]["reached"]
    assert "file or directory. Later: khaosz pull qwen2.5-coder-0.5b;" in text.getvalue().replace(
        "\n", " "
    )


def test_assistant_answers_all_questions(tmp_path: Path) -> None:
    by = tokenizer()
    words = by.encode("899[1]")
    chain = [by.special_ids["<|assistant|>"], *dict.fromkeys(words), by.end_id]
    save_model(
        chain_model(by, chain, 4096), tmp_path / "m", bos_id=by.bos_id, eos_ids=[*by.end_ids]
    )
    by.save(tmp_path / "m")
    shown, text = console()
    reached = run_demo(
        minutes=9, out=tmp_path, acts=["assistant"], model=str(tmp_path / "m"), console=shown
    )["assistant"]
    assert reached["reached"] and reached["questions"] == 8
    assert text.getvalue().count("> ") >= 10
    assert "“Every employee has 22 days of paid annual leave.” leave-rules.md" in text.getvalue()
    assert f"chat:                 khaosz chat {tmp_path / 'm'}" in text.getvalue()


def test_too_few_steps_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "pt").mkdir()
    metrics = tmp_path / "pt/metrics.jsonl"
    metrics.write_text('{"step": 20, "loss": 2.0}\n')
    with pytest.raises(TrainingError, match="least numbers: pt 60, sft 60, dpo 5") as error:
        _check_steps(tmp_path, "pt", 3)
    assert "--minutes 9" in (error.value.hint or "")
    metrics.write_text(f'{{"step": {LEAST_STEPS["pt"]}, "loss": 2.0}}\n')
    _check_steps(tmp_path, "pt", 3)


def test_only_an_equal_demo_is_continued(tmp_path: Path) -> None:
    shown, _ = console()
    plan = {"minutes": 9.0, "offline": False}
    assert _finished_stages(tmp_path, plan, shown) == []
    (tmp_path / "pt").mkdir()
    (tmp_path / "documents.kb").touch()
    (tmp_path / "demo.json").write_text(json.dumps({**plan, "stages": ["pt"]}))
    assert _finished_stages(tmp_path, plan, shown) == ["pt"]
    assert _finished_stages(tmp_path, {**plan, "minutes": 3.0}, shown) == []
    assert (tmp_path / "pt.1").exists() and not (tmp_path / "pt").exists()
    assert (tmp_path / "documents.kb").exists()


def test_minutes_are_checked_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--minutes must be"):
        run_demo(minutes=0, out=tmp_path, acts=["documents"])
    assert not list(tmp_path.iterdir())
