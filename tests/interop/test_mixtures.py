"""Qwen3 MoE and Granite MoE: a router and experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from family_tests import COMMON, FamilyTests, close, ids, logits_of, their_logits, transformers
from tiny_models import bytewise, randomised, tiny_model
from torch import Tensor

from khaosz.config import LoRAConfig
from khaosz.config.model_config import EXPERTS
from khaosz.errors import ModelError
from khaosz.inference.adapter import Adapter
from khaosz.inference.importance import measure_importance
from khaosz.inference.runner import Chunk, Runner, storage_of
from khaosz.interop.adapter import load_adapter, save_adapter
from khaosz.interop.gguf.file import GgufFile, TensorToWrite, write_gguf
from khaosz.interop.gguf.model import GgufModel, load_gguf, save_gguf, write_model
from khaosz.interop.huggingface import load_model, save_model
from khaosz.interop.huggingface_config import config_from_hf
from khaosz.model import Transformer
from khaosz.model.lora import add_lora, named_adapters
from khaosz.model.part import Part

MIXTURE: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "qk_norm": True,
    "hidden_size": 64,
    "head_dim": 16,
    "vocab_size": 276,
}


class TestQwen3Moe(FamilyTests):
    theirs = "qwen3_moe"
    architecture = "qwen3moe"
    config: ClassVar[dict[str, Any]] = {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
    }
    wide: ClassVar[dict[str, Any]] = {"moe_intermediate_size": 32}
    structural = frozenset({*EXPERTS, "router_aux_loss_coef"})
    refused: ClassVar[list[tuple[dict[str, Any], str]]] = [
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0 is not supported"),
        ({"mlp_only_layers": [-1.5]}, "mlp_only_layers=.* is not a list of layers"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts_per_tok": 7}, "above num_experts"),
    ]


class TestGraniteMoe(FamilyTests):
    theirs = "granitemoe"
    architecture = "granitemoe"
    config: ClassVar[dict[str, Any]] = {
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    }
    wide: ClassVar[dict[str, Any]] = {"moe_intermediate_size": 96}
    structural = frozenset(EXPERTS)


def test_layers_without_experts(tmp_path: Path) -> None:
    """Of four, the second has experts: every second layer, and not the last."""
    sparse = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", **COMMON, **TestQwen3Moe.config, **sparse, pad_token_id=0
    )
    torch.manual_seed(0)
    theirs = randomised(transformers.AutoModelForCausalLM.from_config(config), 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    assert model.config.mlp_only_layers == (0, 2, 3)
    assert model.config.parameters() == sum(p.numel() for p in model.parameters())
    expected = their_logits(tmp_path / "theirs")
    close(logits_of(model, ids()), expected)
    save_model(model, tmp_path / "ours")
    close(their_logits(tmp_path / "ours"), expected)
    with pytest.raises(ModelError, match="no keys for layers without experts"):
        save_gguf(model, bytewise(), tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoeshared"])
def test_other_mixtures_are_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match=f"model_type '{name}' is not supported"):
        config_from_hf({"model_type": name, "num_local_experts": 8})


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    path = tmp_path_factory.mktemp("mixture") / "model.gguf"
    save_gguf(tiny_model(**MIXTURE), bytewise(), path, "Q8_0")
    return GgufFile.open(path)


def changed(file: GgufFile, path: Path, **changes: Any) -> Path:
    """The file with other keys; None removes one."""
    keys = {**file.metadata, **{f"qwen3moe.{key}": value for key, value in changes.items()}}
    entries = [
        TensorToWrite(n, t.type, t.shape, lambda n=n: [file.raw(n)])
        for n, t in file.tensors.items()
    ]
    write_gguf(path, {key: value for key, value in keys.items() if value is not None}, entries)
    return path


def test_granite_without_rotation_is_refused(tmp_path: Path) -> None:
    model = tiny_model(**{**MIXTURE, "qk_norm": False, "logits_scaling": 8.0})
    save_gguf(model, bytewise(), tmp_path / "model.gguf")
    file = GgufFile.open(tmp_path / "model.gguf")
    assert GgufModel(file).config.logits_scaling == 8.0
    file.metadata["granitemoe.rope.scaling.finetuned"] = False
    with pytest.raises(ModelError, match=r"rope\.scaling\.finetuned = False is not supported"):
        GgufModel(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_shared_count", 1),
        ("expert_shared_feed_forward_length", 32),
        ("expert_gating_func", 2),
        ("expert_weights_scale", 2.5),
        ("expert_weights_norm", False),
    ],
)
def test_other_routing_in_gguf_is_refused(
    key: str, value: object, file: GgufFile, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=f"qwen3moe.{key} = {value} is not supported"):
        GgufModel.open(changed(file, tmp_path / "model.gguf", **{key: value}))


def test_width_of_experts_in_older_files(file: GgufFile, tmp_path: Path) -> None:
    older = {"expert_feed_forward_length": None, "feed_forward_length": 64}
    model = GgufModel.open(changed(file, tmp_path / "model.gguf", **older))
    assert model.config.moe_intermediate_size == 32


def test_experts_are_read_where_they_lie(file: GgufFile) -> None:
    """Each matrix is a view of the mapped file; routers are fp32, and counted so."""
    model, places = GgufModel(file), []
    for expert in range(6):
        name = f"layers.1.mlp.experts.{expert}.down_proj.weight"
        raw, whole = model.raw(name), file.raw("blk.1.ffn_down_exps.weight")
        assert np.shares_memory(raw, whole) and model.nbytes(name) == raw.nbytes
        places.append(raw.ctypes.data - whole.ctypes.data)
    assert places == [raw.nbytes * expert for expert in range(6)]
    assert model.kind("layers.1.mlp.gate.weight") == "F32" and model.matrix_kinds == {"Q8_0"}
    storage = storage_of(model, "cpu", None)
    vectors = sum(np.prod(s) for n, s in model.shapes.items() if len(s) == 1 or "mlp.gate." in n)
    own, mapped = storage.weights(model.config)
    if storage.native:
        matrices = sum(model.nbytes(n) for n, s in model.shapes.items() if len(s) == 2)
        assert (own, mapped) == (
            4 * vectors,
            matrices - 2 * model.nbytes("layers.0.mlp.gate.weight"),
        )


def test_experts_compute_only_what_is_routed_to_them() -> None:
    runner = Runner.from_module(tiny_model(**MIXTURE))
    weights, computed = runner.weights(), []

    def linear(part: Part, names: tuple[str, ...], x: Tensor, rows: Tensor | None = None) -> Any:
        if rows is not None:
            computed.append((part.layer, names[0], len(x)))
        return weights.linear(part, names, x, rows)

    runner.weights = lambda: replace(weights, linear=linear)
    runner.run([Chunk([5], runner.new_cache())])
    assert len(computed) == 8 and {rows for *_, rows in computed} == {1}  # two experts, twice
    computed.clear()
    runner.run([Chunk(list(range(5, 25)), runner.new_cache())])
    ups = [rows for layer, name, rows in computed if layer == 0 and "gate_proj" in name]
    assert sum(ups) == 40 and 0 not in ups


TARGETS = ("q_proj", "experts.gate_proj", "experts.up_proj", "experts.down_proj")


def with_adapters(directory: Path, seed: int) -> Transformer:
    model = load_model(directory)
    add_lora(model, LoRAConfig(rank=2, target_modules=TARGETS), torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for layer in named_adapters(model).values():
            layer.lora_B.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("deterministic", [False, True])
def test_adapters_of_experts_beside_each_other(tmp_path: Path, deterministic: bool) -> None:
    """Three sequences in one pass, two with adapters of their own."""
    save_model(tiny_model(**MIXTURE), tmp_path / "base")
    runner = Runner.open(tmp_path / "base", deterministic=deterministic)
    chunks, expected = [], []
    for seed, length in ((1, 9), (0, 14), (2, 20)):
        model, adapter = load_model(tmp_path / "base"), None
        if seed:
            model = with_adapters(tmp_path / "base", seed)
            save_adapter(model, tmp_path / f"{seed}", tmp_path / "base")
            adapter = Adapter(model.config, tmp_path / f"{seed}")
            again = load_model(tmp_path / "base")
            assert load_adapter(again, tmp_path / f"{seed}").target_modules == TARGETS
            close(logits_of(again, ids()), logits_of(model, ids()))
        tokens = ids(1, seed)[:, :length]
        expected.append(logits_of(model, tokens)[0])
        chunks.append(Chunk(tokens[0].tolist(), runner.new_cache(), length, adapter))
    for logits, reference in zip(runner.run(chunks), expected, strict=True):
        close(logits, reference)


def test_peft_adapters_of_expert_layers_are_read(tmp_path: Path) -> None:
    """PEFT says "up_proj" where it means those of experts."""
    save_model(tiny_model(**MIXTURE), tmp_path / "base")
    model = with_adapters(tmp_path / "base", 1)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace("experts.", ""))
    again = load_model(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    close(logits_of(again, ids()), logits_of(model, ids()))


def test_importance_of_experts(tmp_path: Path) -> None:
    """Over the tokens that an expert saw; one that saw none is quantised without."""
    model = tiny_model(**{**MIXTURE, "num_experts": 40})
    runner = Runner.from_module(model)
    importance = measure_importance(runner, bytewise(), ["qq"])
    seen = {name.split(".")[4] for name in importance if ".1.mlp.experts." in name}
    assert 2 <= len(seen) < 40
    path = tmp_path / "model.gguf"
    parameters = dict(model.named_parameters())
    write_model(model.config, parameters.__getitem__, bytewise(), path, "Q4_K_M", True, importance)
    kinds = {name: tensor.type for name, tensor in GgufFile.open(path).tensors.items()}
    # Rows of 64 and 32 are not whole blocks of 256.
    assert (
        kinds["blk.0.ffn_up_exps.weight"] == "Q5_0" and kinds["blk.0.ffn_gate_inp.weight"] == "F32"
    )
    reference, scale = logits_of(model, ids()), float(logits_of(model, ids()).abs().max())
    assert (logits_of(load_gguf(path), ids()) - reference).abs().mean() < 0.1 * scale


def test_deterministic_bits_depend_on_the_past_alone() -> None:
    """How many positions of a tile an expert has depends on others too."""
    runner = Runner.from_module(tiny_model(**MIXTURE), deterministic=True)
    tokens, whole = ids()[0].tolist(), runner.new_cache()
    [expected] = runner.run([Chunk(tokens, whole, len(tokens))])
    cache, parts = runner.new_cache(), []
    for start, end in ((0, 5), (5, 6), (6, 23), (23, len(tokens))):
        parts += runner.run([Chunk(tokens[start:end], cache, end - start)])
    assert torch.equal(torch.cat(parts), expected)
