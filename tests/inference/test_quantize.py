"""`quantize`, `init`, `convert`, `bench infer` and `eval` on .gguf files, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_model, tokenizer
from typer.testing import CliRunner

from khaosz.cli import app
from khaosz.errors import ConfigError, KhaoszError, ModelError
from khaosz.interop.gguf.model import GgufModel
from khaosz.interop.huggingface import save_model

torch.set_num_threads(1)
RUNNER = CliRunner()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    model = random_model(320, hidden_size=64, intermediate_size=128, head_dim=16)
    save_model(model, tmp_path / "model")
    tokenizer().save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    records = [
        {"text": "the quick brown fox " * 4, "lang": "en"},
        {"text": "春眠不觉晓", "lang": "zh"},
    ]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def run(*words: str) -> Any:
    done = RUNNER.invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_quantising_reports_quality(directory: Path, texts: Path, tmp_path: Path) -> None:
    losses = {}
    for to, kind in (("int8", "Q8_0"), ("int4", "Q4_1")):
        out = tmp_path / f"{to}.gguf"
        result = run(
            "quantize",
            str(directory),
            "--to",
            to,
            "--out",
            str(out),
            "--data",
            str(texts),
            "--json",
        )
        assert result["type"] == kind and result["bytes"] == out.stat().st_size
        assert GgufModel.open(out).kind("layers.0.mlp.up_proj.weight") == kind
        quality = result["quality"]
        assert quality["by_lang"].keys() == {"zh", "en"} and quality["tokens"] > 30
        losses[to] = abs(quality["loss_percent"])
        again = run("generate", str(out), "--prompt", "the", "--max-tokens", "4", "--json")
        assert again["tokens"] >= 1
        scored = run("eval", "bpb", str(out), str(texts), "--json")
        assert scored["bits_per_byte"] > 0
    assert losses["int8"] < losses["int4"]
    shown = RUNNER.invoke(app, ["quantize", str(directory), "--to", "Q4_0", "--data", str(texts)])
    assert "same token" in shown.stdout and "Q4_0" in shown.stdout
    assert (directory.parent / "model-Q4_0.gguf").exists()


def test_importance_changes_weights(directory: Path, texts: Path, tmp_path: Path) -> None:
    plain, weighted = tmp_path / "plain.gguf", tmp_path / "weighted.gguf"
    words = ["quantize", str(directory), "--to", "q4_k_m", "--no-report", "--json", "--out"]
    assert run(*words, str(plain))["type"] == "Q4_K_M"
    run(*words, str(weighted), "--imatrix", str(texts))
    name = "layers.0.self_attn.q_proj.weight"
    files = GgufModel.open(plain), GgufModel.open(weighted)
    assert [file.kind(name) for file in files] == ["Q5_0", "Q5_0"]  # rows of 64
    assert (files[0].raw(name) != files[1].raw(name)).any()
    words = ["quantize", str(directory), "--imatrix", str(texts), "--out", str(tmp_path / "x.gguf")]
    with pytest.raises(ModelError, match="--imatrix has no effect on Q8_0"):
        run(*words, "--to", "int8")
    (tmp_path / "empty.txt").write_text("")
    words[3] = str(tmp_path / "empty.txt")
    with pytest.raises(KhaoszError):
        run(*words, "--to", "q6_k")
    assert not (tmp_path / "x.gguf").exists()


def test_quantize_errors_are_reported(directory: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.gguf"
    taken.touch()
    with pytest.raises(ModelError, match="exists"):
        run("quantize", str(directory), "--out", str(taken))
    with pytest.raises(ModelError, match=r"does not end in \.gguf"):
        run("quantize", str(directory), "--out", str(tmp_path / "x.bin"))
    with pytest.raises(ModelError, match="type 'int3'"):
        run("quantize", str(directory), "--to", "int3")
    with pytest.raises(ModelError, match="model directory not found"):
        run("quantize", str(tmp_path / "none"))
    assert not list(tmp_path.glob("*partial*"))


def test_init_writes_random_model_of_a_size(tmp_path: Path) -> None:
    for out in (tmp_path / "nano.gguf", tmp_path / "nano"):
        done = RUNNER.invoke(app, ["init", "--size", "nano", "--out", str(out)])
        assert done.exit_code == 0, done.output
        result = run("bench", "infer", str(out), "--rounds", "1", "--json")
        assert result["prefill_tokens_per_s"] > 0 and result["decode_tokens_per_s"] > 0
        assert result["ttft_s"] >= result["load_s"] and 0 < result["bandwidth_share"] < 2
    with pytest.raises(ModelError, match="exists"):
        run("init", "--size", "nano", "--out", str(tmp_path / "nano"))
    with pytest.raises(ConfigError, match="'namo'"):
        run("init", "--size", "namo", "--out", str(tmp_path / "x"))


def test_tokenizer_with_more_tokens_than_the_model_is_named(
    directory: Path, texts: Path, tmp_path: Path
) -> None:
    """Their ids have no row: each command would end with an IndexError."""
    save_model(random_model(100), tmp_path / "small")
    tokenizer().save(tmp_path / "small")
    message = "the tokenizer has 320 tokens, the model only 100"
    for words in (
        ["eval", "bpb", str(tmp_path / "small"), str(texts)],
        ["convert", str(tmp_path / "small"), str(tmp_path / "out.gguf")],
        ["generate", str(tmp_path / "small"), "--prompt", "x"],
    ):
        with pytest.raises(ModelError, match=message):
            RUNNER.invoke(app, words, catch_exceptions=False)


@pytest.mark.parametrize("seed", ["-1", str(2**64), "9" * 30])
def test_seed_of_random_weights_out_of_range(tmp_path: Path, seed: str) -> None:
    words = ["init", "--size", "nano", "--out", str(tmp_path / "m"), "--seed", seed]
    with pytest.raises(ConfigError, match="--seed is"):
        RUNNER.invoke(app, words, catch_exceptions=False)
