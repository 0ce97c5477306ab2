"""How a model embeds, written and read in sentence-transformers' layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import nn

from khaosz.data.tokenizer import load_tokenizer
from khaosz.errors import ModelError
from khaosz.interop.retrieval import dense_layers
from khaosz.interop.sentence_transformers import (
    EmbedderSettings,
    is_embedder,
    load_embedder_settings,
    save_embedder,
)


@pytest.mark.parametrize(
    "settings",
    [EmbedderSettings(), EmbedderSettings("last", "query: ", "passage: ", 128)],
    ids=["plain", "all"],
)
def test_written_file_is_read_back(
    tmp_path: Path, tokenizer_dir: Path, settings: EmbedderSettings
) -> None:
    assert not is_embedder(tmp_path)
    save_embedder(tmp_path, settings, 32, load_tokenizer(tokenizer_dir))
    assert is_embedder(tmp_path) and load_embedder_settings(tmp_path) == settings


def test_begin_token_matches_transformers(tmp_path: Path, tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    save_embedder(tmp_path, EmbedderSettings(), 32, tokenizer)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("春天 a").ids == [tokenizer.bos_id, *tokenizer.encode("春天 a")]
    again = load_tokenizer(tmp_path)  # as a resumed run does
    assert again.encode("春天 a") == tokenizer.encode("春天 a")
    save_embedder(tmp_path / "again", EmbedderSettings(), 32, again)
    name = "tokenizer.json"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_plain_model_has_defaults(tmp_path: Path) -> None:
    assert load_embedder_settings(tmp_path) == EmbedderSettings()
    assert load_embedder_settings(tmp_path / "model.gguf") == EmbedderSettings()


def test_directory_of_another_library(tmp_path: Path) -> None:
    """Qwen3-Embedding's files: no word about lengths, and a prompt for queries."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{kind}"}
        for i, (p, kind) in enumerate(kinds)
    ]
    pooling = {"word_embedding_dimension": 1024, "pooling_mode_lasttoken": True}
    prompts = {"query": "Instruct: find\nQuery:", "document": ""}
    (tmp_path / "1_Pooling").mkdir()
    for name, values in {
        "modules.json": modules,
        "1_Pooling/config.json": {**pooling, "pooling_mode_mean_tokens": False},
        "config_sentence_transformers.json": {"prompts": prompts, "similarity_fn_name": "cosine"},
    }.items():
        (tmp_path / name).write_text(json.dumps(values))
    result = load_embedder_settings(tmp_path)
    assert result == EmbedderSettings("last", "Instruct: find\nQuery:", "", None)


def test_directory_of_sentence_transformers_6(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    kinds = ["base.modules.transformer.Transformer", "modules.pooling.Pooling"]
    for name, values in {
        "modules.json": [
            {"idx": i, "path": path, "type": f"sentence_transformers.{kind}"}
            for i, (path, kind) in enumerate(zip(["", "1_Pooling"], kinds, strict=True))
        ],
        "1_Pooling/config.json": {"pooling_mode": "mean", "include_prompt": True},
        "tokenizer_config.json": {"model_max_length": 128},
    }.items():
        (tmp_path / name).write_text(json.dumps(values))
    assert load_embedder_settings(tmp_path) == EmbedderSettings(max_length=128)
    change(tmp_path / "tokenizer_config.json", model_max_length=10**30)
    assert load_embedder_settings(tmp_path) == EmbedderSettings()


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_unsupported_features_are_rejected(tmp_path: Path, tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)

    def fresh() -> Path:
        save_embedder(tmp_path, EmbedderSettings(), 32, tokenizer)
        return tmp_path

    change(fresh() / "1_Pooling/config.json", pooling_mode_cls_token=True)
    with pytest.raises(ModelError, match="cls_token"):
        load_embedder_settings(tmp_path)
    change(fresh() / "1_Pooling/config.json", include_prompt=False)
    with pytest.raises(ModelError, match="not supported"):
        load_embedder_settings(tmp_path)
    change(fresh() / "sentence_bert_config.json", max_seq_length="many")
    with pytest.raises(ModelError, match="max_seq_length"):
        load_embedder_settings(tmp_path)
    change(fresh() / "config_sentence_transformers.json", prompts={"query": 3})
    with pytest.raises(ModelError, match="prompts are not strings"):
        load_embedder_settings(tmp_path)
    (fresh() / "1_Pooling/config.json").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        load_embedder_settings(tmp_path)
    modules = json.loads((fresh() / "modules.json").read_text())
    dense = {"idx": 3, "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    (tmp_path / "modules.json").write_text(json.dumps([*modules, dense]))
    with pytest.raises(ModelError, match="order Transformer, Pooling, Normalize, Dense"):
        load_embedder_settings(tmp_path)
    lstm = {"idx": 3, "path": "3_LSTM", "type": "sentence_transformers.models.LSTM"}
    (tmp_path / "modules.json").write_text(json.dumps([*modules, lstm]))
    with pytest.raises(ModelError, match="LSTM"):
        load_embedder_settings(tmp_path)
    modules[1]["path"] = "../elsewhere"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="is not a subdirectory"):
        load_embedder_settings(tmp_path)
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_embedder_settings(tmp_path)


def test_default_prompt_and_projections(tmp_path: Path, tokenizer_dir: Path) -> None:
    from safetensors.torch import save_file

    save_embedder(tmp_path, EmbedderSettings(), 32, load_tokenizer(tokenizer_dir))
    prompts = {"prompts": {"all": "x: ", "query": "q: "}, "default_prompt_name": "all"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    modules = json.loads((tmp_path / "modules.json").read_text())
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (tmp_path / "modules.json").write_text(json.dumps([*modules[:2], dense]))
    layer = nn.Linear(32, 5)
    config = {"in_features": 32, "out_features": 5, "bias": True}
    config["activation_function"] = "torch.nn.modules.activation.Tanh"
    (tmp_path / "2_Dense").mkdir()
    path = tmp_path / "2_Dense/config.json"
    path.write_text(json.dumps(config))
    weights = {"linear.weight": layer.weight.data, "linear.bias": layer.bias.data}
    save_file(weights, tmp_path / "2_Dense/model.safetensors")
    settings = load_embedder_settings(tmp_path)
    assert (settings.query_prefix, settings.passage_prefix) == ("q: ", "x: ")
    x = torch.randn(3, 32)
    torch.testing.assert_close(dense_layers(tmp_path)(x), torch.tanh(layer(x)))
    for changes, message in (
        ({"activation_function": "torch.nn.modules.activation.ReLU"}, "not supported"),
        ({"use_residual": True}, "not supported"),
        ({"out_features": 6}, "not those of config.json"),
        ({"bias": False}, "not those of config.json"),
    ):
        path.write_text(json.dumps({**config, **changes}))
        with pytest.raises(ModelError, match=message):
            dense_layers(tmp_path)
    (tmp_path / "2_Dense/model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        dense_layers(tmp_path)
