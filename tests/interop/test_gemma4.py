"""Gemma 4: embeddings of each layer, shared keys and values, wider heads in full layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from family_tests import FamilyTests, close, ids, logits_of
from safetensors.torch import load_file, save_file
from tiny_models import bytewise

from khaosz.data.batches.batch import Batch
from khaosz.data.batches.dataset import TokenDataset
from khaosz.interop.gguf.file import GgufFile
from khaosz.interop.gguf.model import save_gguf
from khaosz.interop.huggingface import WEIGHTS, load_model
from khaosz.model import Transformer
from khaosz.parallel import ParallelContext
from khaosz.trainer.stages.logprobs import batch_logprobs
from khaosz.trainer.strategy import Compute, PTStrategy

LAYERS = ["sliding_attention", "full_attention"] * 3


class TestGemma4(FamilyTests):
    theirs = "gemma4_text"
    architecture = "gemma4"
    config: ClassVar[dict[str, Any]] = {
        "num_hidden_layers": 6,
        "layer_types": LAYERS,
        "sliding_window": 9,
        "global_head_dim": 16,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 276,
        "final_logit_softcapping": 8.0,
    }
    structural: ClassVar[frozenset[str]] = frozenset(
        {
            "layer_types",
            "global_head_dim",
            "num_kv_shared_layers",
            "use_double_wide_mlp",
            "hidden_size_per_layer_input",
        }
    )
    wide: ClassVar[dict[str, Any]] = {
        "embedding_multiplier": 8.0,
        "hidden_size_per_layer_input": 32,
    }
    refused: ClassVar[list[tuple[dict[str, Any], str]]] = [
        ({"hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all' is not"),
        ({"enable_moe_block": True}, "enable_moe_block=True is not supported"),
        ({"attention_k_eq_v": True}, "attention_k_eq_v=True is not supported"),
        ({"vocab_size_per_layer_input": 99}, "vocab_size_per_layer_input=99 is not vocab_size"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config=.* is not supported"),
        ({"num_kv_shared_layers": 5}, "num_kv_shared_layers is 5 of 6"),
        ({"layer_types": ["chunked_attention"] * 6}, "layer_types"),
    ]

    @classmethod
    def prepare(cls, model: torch.nn.Module) -> None:
        """Scales of layers, and queries as small as trained ones: scores are not divided by
        H ** 0.5, and rounding would grow with them."""
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if "layer_scalar" in name:
                    tensor.uniform_(0.6, 1.4, generator=generator)
                if name.endswith("q_norm.weight"):
                    tensor.mul_(0.3)

    def test_unread_tensors_of_shared_layers_are_left_out(
        self, directory: Path, expected: torch.Tensor, tmp_path: Path
    ) -> None:
        """Published files have keys and values of layers that read others'."""
        tensors = load_file(directory / WEIGHTS)
        for part in ("k_proj", "v_proj", "k_norm"):
            tensors[f"model.layers.5.self_attn.{part}.weight"] = torch.ones(3)
        save_file(tensors, tmp_path / WEIGHTS)
        (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
        close(logits_of(load_model(tmp_path), ids()), expected)

    def test_gguf_stores_what_llama_cpp_reads(self, model: Transformer, tmp_path: Path) -> None:
        save_gguf(model, bytewise(), tmp_path / "model.gguf", "F32")
        file = GgufFile.open(tmp_path / "model.gguf")
        values = {key.removeprefix("gemma4."): value for key, value in file.metadata.items()}
        pattern = values["attention.sliding_window_pattern"]
        assert pattern.dtype == bool and pattern.tolist() == [True, False] * 3
        assert values["feed_forward_length"].tolist() == [48] * 4 + [96] * 2
        assert (values["attention.key_length"], values["attention.key_length_swa"]) == (16, 12)
        factors = file.raw("rope_freqs.weight").view("<f4").ravel()
        assert (factors == [1.0] * 2 + [np.float32(1e30)] * 6).all()

    def test_losses_read_capped_logits(self, model: Transformer) -> None:
        tokens, labels = ids()[:, :-1], ids()[:, 1:]
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        batch = Batch(tokens, labels, positions, torch.zeros_like(tokens))
        with torch.no_grad():
            logits = model.logits(model(tokens)).flatten(0, 1)
            expected = F.cross_entropy(logits, labels.flatten(), reduction="none")
            close(batch_logprobs(model, batch, Compute())[0], -expected)
            strategy = PTStrategy(
                cast(TokenDataset, None), 2, 2, ParallelContext(torch.device("cpu"))
            )
            close(strategy.loss(model, batch, Compute()), expected.sum())

    def test_checkpointed_gradients_are_the_same(self, directory: Path) -> None:
        """Those of keys and values that other layers read too."""
        gradients = []
        for checkpointing in (False, True):
            model = load_model(directory).train()
            model.gradient_checkpointing = checkpointing
            model.logits(model(ids())).square().mean().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        for plain, again in zip(*gradients, strict=True):
            assert plain is not None and plain.any() and torch.equal(plain, again)
