"""The demo's last part, on models that answer one thing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny_models import chain_model, tokenizer

from khaosz.data.tokenizer.chat import encode_chat
from khaosz.demo.corpus import DemoCorpus
from khaosz.demo.facts import Fact
from khaosz.demo.training import _finished_stages, _show_result
from khaosz.errors import TrainingError
from khaosz.interop.huggingface import save_model


def demo_of(folder: Path, *, answers: bool) -> DemoCorpus:
    """The outputs of a demo whose model ends at once, or says one letter first."""
    by = tokenizer()
    prompt = encode_chat(by, [{"role": "user", "content": "x"}], add_generation_prompt=True)[0]
    chain = [prompt[-1], *(by.encode("y") if answers else ()), by.end_id]
    for stage in ("pt", "sft", "dpo"):
        last = folder / stage / "last"
        save_model(chain_model(by, chain), last, bos_id=by.bos_id, eos_ids=[*by.end_ids])
        by.save(last)
        (folder / stage / "metrics.jsonl").write_text('{"step": 7, "loss": 2.0}\n')
    text = "the quick brown fox jumps over the lazy dog " * 4
    (folder / "val.jsonl").write_text(json.dumps({"text": text, "lang": "en"}) + "\n")
    questions = [{"prompt": question} for question in ("你是谁？", "Who are you?")]
    (folder / "prompts.json").write_text(json.dumps(questions))
    paths = [folder / "val.jsonl"] * 8
    return DemoCorpus(*paths, prompts=folder / "prompts.json", stats={})


CASE = Fact("u", "idioms", "zh", "x", "y", "y", "d")


def test_empty_answers_are_an_error(tmp_path: Path) -> None:
    corpus = demo_of(tmp_path, answers=False)
    with pytest.raises(TrainingError, match="answers are empty: fine-tuning had 7") as error:
        _show_result(tmp_path, corpus, [CASE, CASE], Console(file=io.StringIO()))
    assert "--minutes" in (error.value.hint or "")


def test_results_are_shown_scored_and_saved(tmp_path: Path) -> None:
    text = io.StringIO()
    wrong = Fact("u", "laws", "zh", "x", "z", "z", "d")
    corpus = demo_of(tmp_path, answers=True)
    reached = _show_result(tmp_path, corpus, [CASE, wrong], Console(file=text))
    assert (reached["cases"], reached["right"], reached["steps"]["sft"]) == (2, 1, 7)
    assert reached["copied"] == 0.5  # of "y" all of "y", and nothing of "z"
    assert "word for word: 1 of 2" in text.getvalue() and "bits per byte" in text.getvalue()
    assert "the quick brown fox" in text.getvalue()
    saved = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))
    assert [turn["answer"] for turn in saved][1:] == ["y", "y"]


def test_the_second_act_alone_creates_its_folder(tmp_path: Path) -> None:
    assert _finished_stages(tmp_path / "a" / "b", {"minutes": 9}, Console(file=io.StringIO())) == []
    assert _finished_stages(tmp_path / "a" / "b", {"minutes": 9}, Console(file=io.StringIO())) == []
