"""Qwen3.5: gated DeltaNet layers, attention with an output gate, norms stored as weight - 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from family_tests import COMMON, FP32, FamilyTests, close, ids, logits_of, transformers
from safetensors.torch import load_file, save_file
from tiny_models import bytewise, randomised

from khaosz.config import ModelConfig
from khaosz.config.model_config import DELTA_NET
from khaosz.errors import ModelError
from khaosz.inference.runner import Chunk, Runner
from khaosz.interop.gguf.blocks import dequantize
from khaosz.interop.gguf.file import GgufFile, TensorToWrite, write_gguf
from khaosz.interop.gguf.model import GgufModel, load_gguf, save_gguf
from khaosz.interop.huggingface import WEIGHTS, load_model
from khaosz.interop.huggingface_config import config_from_hf, model_type
from khaosz.model import Transformer

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 5,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
# States carry the rounding of all positions before them.
ROUNDING = 2.5 * FP32


class TestQwen35(FamilyTests):
    """Three value heads for each key head, as no published small model has: 1 and 2 are the same
    in any order of two axes."""

    theirs = "qwen3_5_text"
    architecture = "qwen35"
    lora_rounding = ROUNDING
    config: ClassVar[dict[str, Any]] = SHAPE
    structural = frozenset({"attn_output_gate", "layer_types", *DELTA_NET})
    refused: ClassVar[list[tuple[dict[str, Any], str]]] = [
        ({"attn_output_gate": False}, "attn_output_gate=False is not supported"),
        ({"layer_types": ["full_attention"] * 5}, "layer_types without linear_attention"),
        ({"layer_types": ["linear_attention", "conv"]}, "layer_types"),
        ({"linear_num_value_heads": 3}, "must be a multiple of linear_num_key_heads"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not supported"),
    ]

    def test_long_sequences(self, model: Transformer, directory: Path) -> None:
        """More than one chunk of the recurrence: whole, and from states that are kept."""
        tokens = torch.randint(0, 270, (1, 150), generator=torch.Generator().manual_seed(3))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            expected = theirs.eval()(tokens).logits
        close(logits_of(model, tokens), expected, ROUNDING)
        runner, row = Runner.from_module(model), tokens[0].tolist()
        cache = runner.new_cache()
        close(runner.run([Chunk(row[:140], cache, 140)])[0], expected[0, :140], ROUNDING)
        fork = cache.fork(139)
        assert fork.length == 124  # 16 before the end
        for each in (cache, fork):
            last = runner.run([Chunk(row[each.length :], each)])[0]
            close(last, expected[0, -1:], ROUNDING)

    def test_drafts_in_tiles(self, model: Transformer) -> None:
        """A deterministic runner computes a draft in two passes where it crosses a tile."""
        prompt = [20, 21, 22, 20, 21, 22, 20, 21]
        plain, drafted = (
            self._answers(model, prompt, prompt_lookup=lookup, deterministic=True)
            for lookup in (False, True)
        )
        assert plain == drafted

    def test_text_model_is_read_alone(self, tmp_path: Path) -> None:
        """Of a model that sees images and predicts tokens beyond the next, as published."""
        text = {**COMMON, **SHAPE, "model_type": "qwen3_5_text", "tie_word_embeddings": True}
        text["rope_parameters"] = {
            "rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.25,
            "mrope_section": [1, 1, 0], "mrope_interleaved": True,
        }  # fmt: skip
        vision = {
            "hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2,
            "out_hidden_size": COMMON["hidden_size"], "num_position_embeddings": 16,
        }  # fmt: skip
        config = transformers.AutoConfig.for_model(
            "qwen3_5", text_config=text, vision_config=vision, tie_word_embeddings=True
        )
        torch.manual_seed(0)
        theirs = transformers.AutoModelForImageTextToText.from_config(config)
        randomised(theirs, 0.2)
        theirs.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / WEIGHTS)
        tensors["mtp.fc.weight"] = torch.zeros(2, 2)
        save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
        ours = load_model(tmp_path)
        assert model_type(ours.config) == "qwen3_5_text" and ours.config.rope_theta == 5e5
        assert ours.config.rotary_dim == 4
        with torch.no_grad():
            close(logits_of(ours, ids()), theirs.eval()(ids()).logits)

    def test_published_configuration(self, directory: Path) -> None:
        """Keys that say what is usual, and keys that are missing."""
        values = json.loads((directory / "config.json").read_text())
        values |= {"full_attention_interval": 3, "mtp_num_hidden_layers": 1, "mlp_only_layers": []}
        del values["layer_types"], values["rope_parameters"]
        config = config_from_hf(values)
        assert config.partial_rotary_factor == 0.25
        assert [config.layer_type(i) for i in (1, 2, 4)] == [
            "linear_attention", "full_attention", "linear_attention"
        ]  # fmt: skip

    def test_gguf_stores_what_llama_cpp_reads(self, model: Transformer, tmp_path: Path) -> None:
        """Its folds, written out by hand: value head v of key head k is at v * 2 + k."""
        save_gguf(model, bytewise(), tmp_path / "model.gguf", "F32")
        file = GgufFile.open(tmp_path / "model.gguf")

        def stored(name: str) -> np.ndarray:
            tensor = file.tensors[name]
            return dequantize(file.raw(name), tensor.type).reshape(tensor.shape)

        part = model.layers[0].get_submodule("linear_attn")
        ours = {name: p.detach().numpy() for name, p in part.named_parameters()}
        decay = -np.exp(ours["A_log"])
        qkv, conv = ours["in_proj_qkv.weight"], ours["conv1d.weight"][:, 0]
        np.testing.assert_array_equal(stored("blk.0.attn_qkv.weight")[:64], qkv[:64])
        for key in range(2):
            for value in range(3):
                mine, place = key * 3 + value, value * 2 + key
                rows, places = (slice(16 * i, 16 * i + 16) for i in (mine, place))
                assert np.isclose(stored("blk.0.ssm_a")[place], decay[mine])
                assert stored("blk.0.ssm_dt.bias")[place] == ours["dt_bias"][mine]
                pairs = [
                    (stored("blk.0.ssm_alpha.weight")[place], ours["in_proj_a.weight"][mine]),
                    (stored("blk.0.ssm_beta.weight")[place], ours["in_proj_b.weight"][mine]),
                    (stored("blk.0.attn_gate.weight")[places], ours["in_proj_z.weight"][rows]),
                    (stored("blk.0.attn_qkv.weight")[64:][places], qkv[64:][rows]),
                    (stored("blk.0.ssm_conv1d.weight")[64:][places], conv[64:][rows]),
                    (stored("blk.0.ssm_out.weight")[:, places], ours["out_proj.weight"][:, rows]),
                ]
                for theirs, own in pairs:
                    np.testing.assert_array_equal(theirs, own)
        # Norms are ours, which are 1 more than in Hugging Face directories.
        norm = model.layers[0].get_parameter("post_attention_layernorm.weight").detach()
        np.testing.assert_array_equal(stored("blk.0.post_attention_norm.weight"), norm)
        values = {key[7:]: value for key, value in file.metadata.items() if key[:7] == "qwen35."}
        assert values["ssm.inner_size"] == 96 and values["ssm.state_size"] == 16
        assert (values["ssm.group_count"], values["ssm.time_step_rank"]) == (2, 6)
        assert values["ssm.conv_kernel"] == values["full_attention_interval"] == 4
        assert values["rope.dimension_count"] == 2 * sum(values["rope.dimension_sections"]) == 4

    def test_blocks_for_tokens_beyond_the_next_are_left_out(
        self, model: Transformer, tmp_path: Path
    ) -> None:
        path, more = tmp_path / "model.gguf", tmp_path / "more.gguf"
        save_gguf(model, bytewise(), path, "F32")
        file = GgufFile.open(path)

        def write(**changes: int) -> None:
            metadata = {**file.metadata, **{f"qwen35.{k}": v for k, v in changes.items()}}
            entries = [
                TensorToWrite(name, t.type, t.shape, lambda name=name: [file.raw(name)])
                for name, t in file.tensors.items()
            ]
            extra = np.zeros((1, 128), np.uint8)
            entries.append(TensorToWrite("blk.5.nextn.enorm.weight", "F32", (32,), lambda: [extra]))
            write_gguf(more, metadata, entries)

        write(block_count=6, nextn_predict_layers=1)
        close(logits_of(load_gguf(more), ids()), logits_of(model, ids()))
        write()
        with pytest.raises(ModelError, match=r"unexpected tensor 'blk\.5"):
            GgufModel.open(more)
        write(nextn_predict_layers=6)
        with pytest.raises(ModelError, match="6 of 5 blocks predict tokens beyond the next"):
            GgufModel.open(more)


def test_what_llama_cpp_cannot_say(tmp_path: Path) -> None:
    shape = dict(zip(DELTA_NET, (2, 4, 8, 16, 4), strict=True))
    fields = {k: v for k, v in COMMON.items() if k != "num_hidden_layers"}
    config = {**fields, "num_hidden_layers": 3, "qk_norm": True, "attn_output_gate": True}

    def model(**changes: Any) -> Transformer:
        return Transformer(ModelConfig.parse({**config, **shape, **changes}))

    types = ("linear_attention", "full_attention", "linear_attention")
    with pytest.raises(ModelError, match="one width for keys and values"):
        save_gguf(model(layer_types=types), bytewise(), tmp_path / "a.gguf", "F32")
    with pytest.raises(ModelError, match="these layer_types cannot be written"):
        changed = model(layer_types=types[1:] + types[1:2], linear_value_head_dim=8)
        save_gguf(changed, bytewise(), tmp_path / "a.gguf", "F32")
    assert not (tmp_path / "a.gguf").exists()
