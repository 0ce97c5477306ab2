"""Ranking the answers of several models by several annotators: real models, a real server."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from scripted_model import SCRIPT, khaosz_serve, model_directory
from tiny_models import random_model, tokenizer

from khaosz.cli.collect import Collected, collect, progress_line
from khaosz.config import LoRAConfig
from khaosz.data.rankings.ranking_file import read_rankings
from khaosz.errors import ConfigError, DataError, GenerationError, ModelError
from khaosz.files import holding
from khaosz.inference.sampling import SamplingParams
from khaosz.interop.adapter import save_adapter
from khaosz.interop.huggingface import save_model
from khaosz.model.lora import add_lora

torch.set_num_threads(1)
PARAMS = SamplingParams(max_tokens=8, temperature=1.0)
LONG = SamplingParams(max_tokens=64, temperature=1.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models, and an adapter of the first."""
    root = tmp_path_factory.mktemp("models")
    paths = [root / "one", root / "two", root / "adapter"]
    for seed, path in enumerate(paths[:2]):
        model = random_model(tokenizer().vocab_size, seed=seed)
        save_model(model, path)
        tokenizer().save(path)
    model = random_model(tokenizer().vocab_size, seed=0)
    config = LoRAConfig(rank=2, alpha=64.0)
    add_lora(model, config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    save_adapter(model, paths[2], base=paths[0])
    return paths


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    records = [{"prompt": text, "id": f"q{i}"} for i, text in enumerate(["春眠不觉晓", "the dog"])]
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path


def session(
    monkeypatch: pytest.MonkeyPatch, typed: str, *arguments: Any, **options: Any
) -> tuple[Collected, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    console = Console(file=io.StringIO(), width=200, highlight=False, emoji=False)
    result = collect(*arguments, **{"params": PARAMS, "console": console, **options})
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_two_annotators_rank_the_same_answers(
    monkeypatch: pytest.MonkeyPatch, models: list[Path], prompts: Path, tmp_path: Path
) -> None:
    names = [str(models[0]), str(models[1]), f"{models[0]}+{models[2]}"]
    out, answers = tmp_path / "r.jsonl", tmp_path / "answers.jsonl"
    result, shown = session(
        monkeypatch, "", names[:2], prompts, None, answers=answers, answers_only=True
    )
    assert result == Collected() and "4 sets of answers sampled" in shown and not out.exists()
    before = answers.read_bytes()
    # A model that is added later is sampled alone; what is there stays.
    answers.write_bytes(before + before[:40])  # left by a crash
    _, shown = session(
        monkeypatch, "b>a=c\nc>a>b\n", names, prompts, out, annotator="李", answers=answers
    )
    assert answers.read_bytes().startswith(before) and len(lines(answers)) == 6
    assert not any(name in shown.split("sampled")[1] for name in names)
    # Without models and prompts: those of the file.
    session(monkeypatch, "a>b>c\na>b>c\n", [], None, out, annotator="ann", answers=answers)
    records = lines(out)
    assert [each["annotator"] for each in records] == ["李", "李", "ann", "ann"]
    assert records[0]["id"] == "q0" and records[0]["created"] > 1.7e9
    assert records[0]["ranking"] == [1, [0, 2]]
    stored = {(each["model"], text) for each in lines(answers) for text in each["answers"]}
    for record in records:
        assert len(record["answers"]) == 3
        for text, (source,) in zip(record["answers"], record["sources"], strict=True):
            assert (source["model"], text) in stored
            assert source["sampling"]["max_tokens"] == 8
    assert {s["model"] for each in records for [s] in each["sources"]} == {*names}
    rankings = read_rankings([out])
    assert [each.item for each in rankings[:2]] == [each.item for each in rankings[2:]]
    # The order differs between annotators.
    assert [r["answers"] for r in records[:2]] != [r["answers"] for r in records[2:]]


def test_undo_is_durable_and_shows_the_prompt_again(
    monkeypatch: pytest.MonkeyPatch, models: list[Path], prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r.jsonl"

    def ranked(typed: str, annotator: str) -> tuple[list[tuple[str, Any]], Collected, str]:
        result, shown = session(
            monkeypatch, typed, models[0], prompts, out, n=2, annotator=annotator
        )
        mine = [each for each in lines(out) if each["annotator"] == annotator]
        return [(each["id"], each["ranking"]) for each in mine], result, shown

    ranked("a>b\na>b\n", "bo")
    before = out.read_bytes()
    rows, result, shown = ranked("u\na>b\nu\nb>a\nb>a\n", "ann")
    assert rows == [("q0", [1, 0]), ("q1", [1, 0])]
    assert result == Collected(ranked=2)
    assert "no ranking to take back" in shown and "the last ranking is taken back" in shown
    assert shown.count("1 of 2") == 2
    # Of an earlier session, too.
    ranked("", "ann")
    out.write_bytes(out.read_bytes().rpartition(b'{"prompt": [')[0])  # only q0 is left
    rows, result, _ = ranked("u\nq\n", "ann")
    assert rows == [] and result == Collected(remaining=2)
    assert out.read_bytes() == before


def test_equal_answers_are_shown_once_with_both_models(
    monkeypatch: pytest.MonkeyPatch, models: list[Path], prompts: Path, tmp_path: Path
) -> None:
    out, answers = tmp_path / "r.jsonl", tmp_path / "a.jsonl"
    prompt = [{"role": "user", "content": "x"}]
    answers.write_text(
        "".join(
            json.dumps(
                {
                    "prompt": prompt, "model": name, "sampling": {"seed": 1}, "answers": [text],
                    "finish_reasons": ["stop"],
                }
            )
            + "\n"
            for name, text in (("m", "same"), ("n", "same"), ("o", "other"))
        )
    )  # fmt: skip
    session(monkeypatch, "a>b\n", [], None, out, answers=answers)
    (record,) = lines(out)
    models_of = {
        text: [source["model"] for source in sources]
        for text, sources in zip(record["answers"], record["sources"], strict=True)
    }
    assert models_of == {"same": ["m", "n"], "other": ["o"]}


@pytest.mark.slow  # a server in a process of its own
def test_server_and_model_are_ranked_together(
    monkeypatch: pytest.MonkeyPatch, models: list[Path], tmp_path: Path
) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "r.jsonl"
    prompts.write_text(json.dumps({"prompt": "x"}) + "\n", encoding="utf-8")
    with khaosz_serve(model_directory(tmp_path / "saying")) as url:
        server = f"{url}#saying"
        session(monkeypatch, "a>b\n", [models[0], server], prompts, out, params=LONG)
    (record,) = lines(out)
    by = {each["model"]: (text, each["sampling"]) for text, [each] in zip(
        record["answers"], record["sources"], strict=True
    )}  # fmt: skip
    assert by.keys() == {str(models[0]), server}
    assert by[server] == (SCRIPT, by[server][1]) and by[server][1]["max_tokens"] == 64
    with pytest.raises(ModelError, match=r"127\.0\.0\.1"):  # the server has ended
        session(monkeypatch, "", [models[0], server], prompts, tmp_path / "s.jsonl")


def test_errors_of_several_models(
    monkeypatch: pytest.MonkeyPatch, models: list[Path], prompts: Path, tmp_path: Path
) -> None:
    out, broken = tmp_path / "r.jsonl", tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "x"}\n')
    one = str(models[0])
    cases: list[tuple[type[Exception], str, list[Any], dict[str, Any]]] = [
        (ConfigError, "given twice", [[one, one], prompts, out], {}),
        (GenerationError, "between 2 and 26 answers", [[one, str(models[1])], prompts, out],
         {"n": 14}),
        (ModelError, "nowhere", [[one, str(tmp_path / "nowhere")], prompts, out], {}),
        (DataError, "broken.jsonl, line 1 has no answers", [[], None, out], {"answers": broken}),
        (DataError, "no prompts", [[], None, out], {"answers": tmp_path / "new.jsonl"}),
        (DataError, "no file for the rankings", [[one], prompts, None], {}),
        (DataError, "name has 1 to 64", [[one], prompts, out], {"annotator": " ann"}),
        (DataError, "cannot be shown", [[one], prompts, out], {"annotator": "a\x1bb"}),
    ]  # fmt: skip
    for kind, message, arguments, options in cases:
        with pytest.raises(kind, match=message):
            session(monkeypatch, "", *arguments, **options)
    assert not out.exists()
    # The same annotator ranks in another terminal.
    session(monkeypatch, "q\n", one, prompts, out, annotator="ann", n=2)
    monkeypatch.setattr("khaosz.cli.collect.holding", lambda path: holding(tmp_path / "held"))
    with holding(tmp_path / "held"), pytest.raises(DataError, match="ann is ranking into"):
        session(monkeypatch, "", one, prompts, out, annotator="ann", n=2)


def test_progress_line() -> None:
    assert progress_line(1, 40, 0, [], 40) == "1 of 40"
    assert progress_line(12, 40, 3, [10.0, 16.0], 28) == "12 of 40, 3 skipped, about 6 min left"
    assert progress_line(39, 40, 0, [10.0], 2) == "39 of 40, under 1 min left"
