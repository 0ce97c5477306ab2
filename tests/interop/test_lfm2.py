"""LFM2: gated short convolutions beside attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from family_tests import FamilyTests, close, ids, logits_of, transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import bytewise, randomised

from khaosz.config import LORA_TARGETS, LoRAConfig
from khaosz.errors import ModelError
from khaosz.interop.adapter import load_adapter, save_adapter
from khaosz.interop.gguf.file import GgufFile, TensorToWrite, write_gguf
from khaosz.interop.gguf.model import GgufModel, save_gguf
from khaosz.interop.huggingface import load_model
from khaosz.interop.huggingface_config import config_from_hf
from khaosz.model import Transformer
from khaosz.model.lora import adapter_state, add_lora, named_adapters, target_of

TYPES = ["conv", "conv", "full_attention", "conv", "full_attention"]


class TestLfm2(FamilyTests):
    theirs = "lfm2"
    architecture = "lfm2"
    config: ClassVar[dict[str, Any]] = {
        "num_hidden_layers": 5,
        "layer_types": TYPES,
        "head_dim": 16,
        "block_auto_adjust_ff_dim": False,
        "norm_eps": 1e-3,
        "tie_word_embeddings": False,
    }
    structural = frozenset({"layer_types", "conv_L_cache"})
    refused: ClassVar[list[tuple[dict[str, Any], str]]] = [
        ({"conv_bias": True}, "conv_bias=True is not supported"),
        ({"layer_types": ["full_attention"] * 5}, "without conv are not supported"),
        ({"layer_types": ["conv", "mamba"]}, "layer_types"),
        ({"conv_L_cache": 1}, "conv_L_cache"),
    ]

    def test_older_keys(self, directory: Path, tmp_path: Path) -> None:
        """As LFM2 was published: which layers attend, and two thirds of the feed-forward."""
        values = json.loads((directory / "config.json").read_text())
        for key in ("layer_types", "tie_word_embeddings", "intermediate_size"):
            del values[key]
        values |= {"full_attn_idxs": [2, 4], "tie_embedding": True, "block_ff_dim": 100}
        values |= {"block_auto_adjust_ff_dim": True, "block_multiple_of": 32}
        config = config_from_hf(values)
        theirs = transformers.AutoConfig.for_model(**values)
        assert list(config.layer_types or ()) == theirs.layer_types == TYPES
        assert config.tie_word_embeddings
        torch.manual_seed(0)
        model = randomised(transformers.AutoModelForCausalLM.from_config(theirs), 0.2)
        assert model.model.layers[0].feed_forward.w1.out_features == config.intermediate_size == 96
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            close(logits_of(load_model(tmp_path), ids()), model(ids()).logits)

    def test_gguf_keys(self, model: Transformer, tmp_path: Path) -> None:
        path, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
        save_gguf(model, bytewise(), path, "F32")
        file = GgufFile.open(path)
        assert file.metadata["lfm2.attention.head_count_kv"].tolist() == [0, 0, 2, 0, 2]
        assert file.metadata["lfm2.shortconv.l_cache"] == 3
        assert file.tensors["blk.0.shortconv.conv.weight"].shape == (32, 3)
        assert "token_embd_norm.weight" in file.tensors

        def changed(**changes: Any) -> Path:
            metadata = {**file.metadata, **{f"lfm2.attention.{k}": v for k, v in changes.items()}}
            entries = [
                TensorToWrite(name, t.type, t.shape, lambda name=name: [file.raw(name)])
                for name, t in file.tensors.items()
            ]
            write_gguf(other, metadata, entries)
            return other

        for changes, message in [
            ({"causal": False}, "attention in both directions is not supported"),
            ({"head_count_kv": np.array([0, 0, 2, 0, 4], np.int32)}, "is not 0 and another number"),
            ({"head_count_kv": np.array([0, 2], np.int32)}, "one whole number for each of 5"),
            ({"head_count_kv": "x"}, "is not a whole number"),
        ]:
            with pytest.raises(ModelError, match=message):
                GgufModel.open(changed(**changes))


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        (LORA_TARGETS, ["in_proj", "out_proj", "w1", "w2", "w3", "k_proj", "q_proj", "v_proj"]),
        (("o_proj", "up_proj"), ["w3", "self_attn.out_proj"]),
        (("out_proj", "q_proj"), ["conv.out_proj", "q_proj"]),
    ],
)
def test_adapters_have_the_names_of_transformers(
    tmp_path: Path, targets: tuple[str, ...], written: list[str]
) -> None:
    """PEFT adapts the layers whose name ends with a target, and stores them by their names."""
    config = TestLfm2.config | {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "model_type": "lfm2"}
    theirs = transformers.AutoConfig.for_model(**config)
    layers = {
        name
        for name, part in transformers.AutoModelForCausalLM.from_config(theirs).named_modules()
        if isinstance(part, torch.nn.Linear)
    }
    model = Transformer(config_from_hf(theirs.to_dict()))
    add_lora(model, LoRAConfig(rank=2, target_modules=targets), torch.Generator().manual_seed(0))
    save_adapter(model, tmp_path, "base")
    ends = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    chosen = {name for name in layers if any(f".{name}".endswith(f".{end}") for end in ends)}
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert ends == written
    assert {f"base_model.model.{name}.lora_A.weight" for name in chosen} == {
        name for name in stored if name.endswith("lora_A.weight")
    }
    again = Transformer(model.config)
    assert set(load_adapter(again, tmp_path).target_modules) == {
        target_of(name) for name in named_adapters(model)
    }
    # An earlier version wrote our names.
    state = {f"base_model.model.model.{k}.weight": v for k, v in adapter_state(model).items()}
    save_file(state, str(tmp_path / "adapter_model.safetensors"))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["target_modules"] = sorted({target_of(name) for name in named_adapters(model)})
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    again = Transformer(model.config)
    load_adapter(again, tmp_path)
    for name, matrix in adapter_state(again).items():
        assert torch.equal(matrix, adapter_state(model)[name])
