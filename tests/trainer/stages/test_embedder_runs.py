"""Whole runs of the embedder's stage: output, exact resumption, learning, refused settings."""

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

from khaosz.config import TrainConfig
from khaosz.errors import CheckpointError, ConfigError, DataError
from khaosz.interop.local_models import newest_model
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


def test_embedder_generalises_to_unseen_texts(embedder: Any, tmp_path: Path) -> None:
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
    opened = EngineEmbedder(model)  # the settings make it an embedder
    pairs = translation_pairs(60, 2)
    passages = [
        *{p["positive"]: None for p in pairs},
        *(n for p in pairs for n in p.get("negatives", [])),
    ]
    cosines = opened.queries([p["query"] for p in pairs]) @ opened.passages(passages).T
    hit = [passages[n] == p["positive"] for n, p in zip(cosines.argmax(1), pairs, strict=True)]
    assert np.mean(hit) == pytest.approx(log[-1]["val_accuracy"], abs=0.02)


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_resumed_run_equals_uninterrupted_run(
    embedder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Any
) -> None:
    embed = {"pooling": "last", "query_prefix": "q: ", "passage_prefix": "p: ", "max_length": 40}
    more: dict[str, Any] = {} if lora is None else {"lora": lora, "embed": embed}
    whole, parts = (embedder(out=tmp_path / name, **more) for name in ("whole", "parts"))
    go(whole)
    with stopping_after(3, monkeypatch):
        assert go(parts).progress.step == 3
    torch.manual_seed(99)  # a run must not depend on what the process did before
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
    expected = EmbedderSettings("mean", "q: ", "p: ", 48)
    if lora is not None:
        expected = EmbedderSettings("last", "q: ", "p: ", 40)
    assert load_embedder_settings(one) == load_embedder_settings(two) == expected


def test_killed_run_resumes_exactly(embedder: Any, tmp_path: Path) -> None:
    """Killed within a step, as after a power cut: nothing is saved at the end."""
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


def test_resume_refuses_other_pairs_and_settings(embedder: Any, tmp_path: Path) -> None:
    go(embedder(max_steps=2))
    fewer = written(tmp_path / "fewer.jsonl", translation_pairs(20, 0))
    with pytest.raises(CheckpointError, match="the run began with"):
        go(embedder(max_steps=2, data=fewer), resume=True)
    with pytest.raises(CheckpointError, match="embed"):
        go(embedder(max_steps=2, embed={"pooling": "last"}), resume=True)


def test_lm_head_is_not_trained(embedder: Any) -> None:
    config = embedder(max_steps=2, model={**embedder().model, "tie_word_embeddings": False})
    context = go(config)
    assert context.model.training and context.model.lm_head is not None
    assert "lm_head.weight" not in context.trained()
    assert {"embed_tokens.weight", "norm.weight"} <= context.trained().keys()


def test_cut_texts_are_reported(embedder: Any, tmp_path: Path) -> None:
    records = [*translation_pairs(20, 0), {"query": "a " * 60, "positive": "天" * 60}]
    output = io.StringIO()
    config = embedder(data=written(tmp_path / "long.jsonl", records), max_steps=1)
    go(config, console=Console(file=output, width=200))
    assert "cut to 48 tokens: 1 queries, 1 passages" in output.getvalue()


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"embed": {"max_length": 65}}, ConfigError, "longer than the window of 64"),
        ({"batch_pairs": 1}, ConfigError, "batch_pairs=1"),
        ({"lora": {"rank": 2, "dropout": 0.1}}, ConfigError, "dropout"),
    ],
)
def test_refuses_impossible_settings(embedder: Any, changes: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        go(embedder(**changes))


def test_refuses_data_with_one_passage(embedder: Any, tmp_path: Path) -> None:
    records = [{"query": f"q{i}", "positive": "p"} for i in range(9)]
    data = written(tmp_path / "one.jsonl", records)
    with pytest.raises(DataError, match="9 pairs, and all have one passage"):
        go(embedder(data=data, val_fraction=0.0))


def test_new_tokenizer_is_trained_on_queries_and_passages(embedder: Any) -> None:
    values = {**embedder(max_steps=1, vocab_size=300).model_dump(exclude_unset=True)}
    del values["tokenizer"]
    tokenizer = go(TrainConfig.parse(values)).tokenizer
    assert len(tokenizer.encode("天地玄黄")) < 12  # untrained, they would be three bytes each


def test_refuses_unknown_keys(embedder: Any) -> None:
    with pytest.raises(ConfigError, match="poolng") as refused:
        embedder(embed={"poolng": "last"})
    assert refused.value.hint == "did you mean 'embed.pooling'?"
    with pytest.raises(ConfigError, match="embed needs init_from"):
        embedder(size=None)


def test_bad_data_is_one_line_and_a_hint(
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
    assert "none of the first records can be read" in error and error.endswith("bad.jsonl line 1")
    assert hint.startswith("hint: ")
    with pytest.raises(DataError):
        go(config)


def test_embedder_is_not_a_chat_model(embedder: Any, tmp_path: Path) -> None:
    go(embedder(max_steps=1, out=tmp_path / "runs/embed"))
    with pytest.raises(Exception, match="no trained model found"):
        newest_model(tmp_path / "runs")
