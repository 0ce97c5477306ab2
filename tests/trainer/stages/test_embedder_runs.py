"""Whole runs of the stage: what is written, resumed to the bit, learned and refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import stopping_after, write_recipe
from translation import translation_pairs, written

from khaosz.cli.local_models import newest_model
from khaosz.config import TrainConfig
from khaosz.errors import CheckpointError, ConfigError, DataError
from khaosz.interop.sentence_transformers import EmbedderSettings, load_embedder_settings
from khaosz.rag.models.embedders import EngineEmbedder
from khaosz.trainer.checkpoint import resolve
from khaosz.trainer.run import run
from khaosz.trainer.train_context import TrainContext

QUIET = Console(file=io.StringIO())
LORA = {"rank": 4, "alpha": 8.0}


def go(config: Any, **more: Any) -> TrainContext:
    return run(config, **{"console": QUIET, **more})


def rows(config: Any) -> list[dict[str, Any]]:
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_what_it_learns_holds_for_texts_it_has_not_seen(embedder: Any, tmp_path: Path) -> None:
    """Letters and the characters that stand for them: 16 symbols, any order."""
    config = embedder(
        data=written(tmp_path / "train.jsonl", translation_pairs(400, 1)),
        val=written(tmp_path / "val.jsonl", translation_pairs(60, 2)),
        max_steps=120,
        batch_pairs=32,
        micro_batch=16,
        lr=4e-3,
        embedding_lr=4e-3,
        eval_every=60,
        save_every=1000,
        embed={"temperature": 0.05, "pooling": "mean"},
    )
    go(config)
    log = rows(config)
    assert log[0]["accuracy"] < 0.4
    assert log[-1]["val_accuracy"] > 0.9 and log[-1]["val_mrr"] > 0.9
    model = resolve(config.out / "last")
    assert model is not None
    opened = EngineEmbedder(model)  # and so it is found by what it is for
    pairs = translation_pairs(60, 2)
    passages = [
        *{p["positive"]: None for p in pairs},
        *(n for p in pairs for n in p.get("negatives", [])),
    ]
    cosines = opened.queries([p["query"] for p in pairs]) @ opened.passages(passages).T
    hit = [passages[n] == p["positive"] for n, p in zip(cosines.argmax(1), pairs, strict=True)]
    assert np.mean(hit) == pytest.approx(log[-1]["val_accuracy"], abs=0.02)


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_a_resumed_run_is_the_same_run(
    embedder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Any
) -> None:
    embed = {"pooling": "last", "query_prefix": "q: ", "passage_prefix": "p: ", "max_length": 40}
    more: dict[str, Any] = {} if lora is None else {"lora": lora, "embed": embed}
    whole, parts = (embedder(out=tmp_path / name, **more) for name in ("whole", "parts"))
    go(whole)
    with stopping_after(3, monkeypatch):
        assert go(parts).progress.step == 3
    torch.manual_seed(99)  # nothing may hang on what the process did before
    assert go(parts, resume=True).progress.step == 6
    one, two = resolve(whole.out / "last"), resolve(parts.out / "last")
    assert one is not None and two is not None
    files = ["model.safetensors", "state/optimizer.safetensors"]
    for file in files if lora is None else [*files, "adapter/adapter_model.safetensors"]:
        a, b = load_file(one / file), load_file(two / file)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), file
    clocks = {"tokens_per_s", "elapsed_s", "mfu"}
    logs = [[{k: v for k, v in row.items() if k not in clocks} for row in rows(c)]
            for c in (whole, parts)]  # fmt: skip
    assert logs[0] == logs[1]
    assert {"accuracy", "val_accuracy", "val_mrr", "val_loss"} <= logs[0][-1].keys()
    wanted = EmbedderSettings("mean", "q: ", "p: ", 48)
    if lora is not None:
        wanted = EmbedderSettings("last", "q: ", "p: ", 40)
    assert load_embedder_settings(one) == load_embedder_settings(two) == wanted


def test_a_run_that_was_killed_goes_on_as_if_nothing_had_been(
    embedder: Any, tmp_path: Path
) -> None:
    """Killed amid a step, as a machine that loses its power: nothing is told or saved before."""
    changes = {"max_steps": 30, "eval_every": 100, "save_every": 5}
    whole, killed = (embedder(out=tmp_path / name, **changes) for name in ("whole", "killed"))
    recipe = write_recipe(killed, tmp_path / "recipe.toml")
    command = [sys.executable, "-m", "khaosz", "train", str(recipe)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while resolve(killed.out / "last") is None:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait(timeout=60)
    last = resolve(killed.out / "last")
    assert last is not None and last.name != "step-000030"
    go(killed, resume=True)
    go(whole)
    one, two = resolve(whole.out / "last"), resolve(killed.out / "last")
    assert one is not None and two is not None and one.name == two.name == "step-000030"
    for file in ("model.safetensors", "state/optimizer.safetensors"):
        a, b = load_file(one / file), load_file(two / file)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), file


def test_a_resumed_run_wants_its_own_pairs(embedder: Any, tmp_path: Path) -> None:
    go(embedder(max_steps=2))
    fewer = written(tmp_path / "fewer.jsonl", translation_pairs(20, 0))
    with pytest.raises(CheckpointError, match="the run began with"):
        go(embedder(max_steps=2, data=fewer), resume=True)
    with pytest.raises(CheckpointError, match="embed"):
        go(embedder(max_steps=2, embed={"pooling": "last"}), resume=True)


def test_the_head_of_the_vocabulary_is_left_alone(embedder: Any) -> None:
    config = embedder(max_steps=2, model={**embedder().model, "tie_word_embeddings": False})
    context = go(config)
    assert context.model.training and context.model.lm_head is not None
    assert "lm_head.weight" not in context.trained()
    assert {"embed_tokens.weight", "norm.weight"} <= context.trained().keys()


def test_what_is_cut_is_said(embedder: Any, tmp_path: Path) -> None:
    records = [*translation_pairs(20, 0), {"query": "a " * 60, "positive": "天" * 60}]
    said = io.StringIO()
    config = embedder(data=written(tmp_path / "long.jsonl", records), max_steps=1)
    go(config, console=Console(file=said, width=200))
    assert "cut to 48 tokens: 1 queries, 1 passages" in said.getvalue()


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"embed": {"max_length": 65}}, ConfigError, "longer than the window of 64"),
        ({"batch_pairs": 1}, ConfigError, "batch_pairs=1"),
        ({"lora": {"rank": 2, "dropout": 0.1}}, ConfigError, "dropout"),
    ],
)
def test_what_cannot_work_is_refused(embedder: Any, changes: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        go(embedder(**changes))


def test_one_passage_has_no_negative(embedder: Any, tmp_path: Path) -> None:
    records = [{"query": f"q{i}", "positive": "p"} for i in range(9)]
    data = written(tmp_path / "one.jsonl", records)
    with pytest.raises(DataError, match="9 pairs, and all have one passage"):
        go(embedder(data=data, val_fraction=0.0))


def test_from_nothing_the_tokenizer_hears_queries_and_passages(embedder: Any) -> None:
    values = {**embedder(max_steps=1, vocab_size=300).model_dump(exclude_unset=True)}
    del values["tokenizer"]
    tokenizer = go(TrainConfig.parse(values)).tokenizer
    assert len(tokenizer.encode("天地玄黄")) < 12  # three bytes each, were they new to it


def test_closed_keys(embedder: Any) -> None:
    with pytest.raises(ConfigError, match="poolng") as refused:
        embedder(embed={"poolng": "last"})
    assert refused.value.hint == "did you mean 'embed.pooling'?"
    with pytest.raises(ConfigError, match="embed needs init_from"):
        embedder(size=None)


def test_bad_data_is_one_line(
    embedder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from khaosz.cli import main

    config = embedder(data=written(tmp_path / "bad.jsonl", [{"query": "a", "answer": "b"}]))
    recipe = write_recipe(config, tmp_path / "recipe.toml")
    monkeypatch.setattr("sys.argv", ["khaosz", "train", str(recipe)])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 1
    *_, error, hint = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: nothing to train on in 1 records: 1 records skipped as no pos")
    assert error.endswith("bad.jsonl line 1") and hint.startswith('hint: a record is {"query"')
    with pytest.raises(DataError):
        go(config)


def test_nobody_is_sent_to_talk_to_it(embedder: Any, tmp_path: Path) -> None:
    go(embedder(max_steps=1, out=tmp_path / "runs/embed"))
    with pytest.raises(Exception, match="no trained model found"):
        newest_model(tmp_path / "runs")
