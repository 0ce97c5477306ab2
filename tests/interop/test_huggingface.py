"""Model directories against transformers, both ways, and what a broken one says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, SHAPE, tiny_model
from torch import Tensor

from khaosz.errors import ModelError
from khaosz.interop.huggingface import WEIGHTS, WEIGHTS_INDEX, load_model, save_model
from khaosz.interop.huggingface_config import config_from_hf, config_to_hf, load_config, model_type
from khaosz.model import Transformer

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

SCALINGS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn of its own context": {"rope_type": "yarn", "factor": 2.0},
    "yarn in full": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "attention_factor": 0.8,
        "truncate": False,
    },
}
# The same network in fp32, its operations in another order: rounding of 6e-8 through two layers,
# on logits of size 1 to 10.
FP32 = 1e-5


def build(**changes: Any) -> Transformer:
    return tiny_model(0.2, **{"max_position_embeddings": 64, **changes})


def ids() -> Tensor:
    return torch.randint(0, 61, (2, 50), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def our_logits(model: Transformer) -> Tensor:
    return model.logits(model(ids()))


@torch.no_grad()
def their_logits(directory: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    logits = model.eval()(ids()).logits
    assert isinstance(logits, Tensor)
    return logits


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_we_save(
    tmp_path: Path, family: str, tied: bool, scaling: str
) -> None:
    changes = {**FAMILIES[family], "tie_word_embeddings": tied, "rope_theta": 5_000.0}
    model = build(**changes, rope_scaling=SCALINGS[scaling], rms_norm_eps=1e-3)
    save_model(model, tmp_path, bos_id=1, eos_ids=[2, 7], pad_id=0)
    ours = our_logits(model)
    torch.testing.assert_close(ours, their_logits(tmp_path), rtol=FP32, atol=FP32)
    again = load_model(tmp_path)
    # Defaults that were left out of a scaling are written, so compare what they come to.
    assert again.config.model_dump() == model.config.model_dump()
    assert torch.equal(our_logits(again), ours)


def their_config(family: str, tied: bool, scaling: str) -> Any:
    rope = {"rope_theta": 5_000.0, **(SCALINGS[scaling] or {"rope_type": "default"})}
    if scaling == "llama3":  # transformers has no defaults for these
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    shape = dict(SHAPE)
    return transformers.AutoConfig.for_model(
        family,
        **shape,
        tie_word_embeddings=tied,
        rope_parameters=rope,
        rms_norm_eps=1e-3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def their_model(directory: Path, config: Any, **save: Any) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(directory, **save)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_we_load_what_transformers_saves(
    tmp_path: Path, family: str, tied: bool, scaling: str
) -> None:
    their_model(tmp_path, their_config(family, tied, scaling))
    model = load_model(tmp_path)
    assert model_type(model.config) == family and model.config.tie_word_embeddings == tied
    torch.testing.assert_close(our_logits(model), their_logits(tmp_path), rtol=FP32, atol=FP32)


def test_sharded_model_is_loaded(tmp_path: Path) -> None:
    their_model(tmp_path, their_config("qwen3", False, "default"), max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 and (tmp_path / WEIGHTS_INDEX).exists()
    model = load_model(tmp_path)
    torch.testing.assert_close(our_logits(model), their_logits(tmp_path), rtol=FP32, atol=FP32)
    # Saved over a sharded one, the new weights are the ones that count, for both readers.
    other = build(qk_norm=True, tie_word_embeddings=False)
    save_model(other, tmp_path)
    assert torch.equal(our_logits(load_model(tmp_path)), our_logits(other))
    torch.testing.assert_close(our_logits(other), their_logits(tmp_path), rtol=FP32, atol=FP32)


def test_older_files_name_the_scaling_differently() -> None:
    values = {**config_to_hf(build().config), "rope_scaling": {"type": "linear", "factor": 2.0}}
    scaling = config_from_hf(values).rope_scaling
    assert scaling is not None and (scaling.rope_type, scaling.factor) == ("linear", 2.0)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": PLAIN, "rope_scaling": YARN},  # as model cards say
        {"rope_parameters": PLAIN, "rope_scaling": {**YARN, "type": "yarn"}},
        {"rope_parameters": YARN, "rope_scaling": YARN, "rope_theta": 500.0},
        {"rope_parameters": YARN, "rope_scaling": {}},
        {"rope_parameters": {**PLAIN, "rope_theta": 500.0}, "rope_theta": 500.0},
        {"rope_scaling": {**YARN, "rope_theta": 500.0}, "rope_parameters": {"rope_theta": 500.0}},
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            "original_max_position_embeddings": 16,
        },
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": None}},
        {"rope_scaling": LLAMA3, "rope_parameters": None},
        {"dtype": "float32", "torch_dtype": "float32", "hidden_act": "swish"},
    ],
    ids=str,
)
def test_settings_in_two_places(tmp_path: Path, changes: dict[str, Any]) -> None:
    their_model(tmp_path, their_config("qwen3", False, "default"))
    values = json.loads((tmp_path / "config.json").read_text())
    del values["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
    torch.testing.assert_close(
        our_logits(load_model(tmp_path)), their_logits(tmp_path), rtol=FP32, atol=FP32
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {**YARN, "factor": 2.0}, "rope_scaling": YARN},
            r"rope_scaling.factor=4.0 contradicts rope_parameters.factor=2.0",
        ),
        (
            {"rope_parameters": YARN, "rope_scaling": {"rope_type": "default"}},
            "rope_scaling.rope_type='default' contradicts rope_parameters.rope_type='yarn'",
        ),
        # transformers computes these with a base of 10,000, and beta_fast of 32.
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": YARN},
            "rope_parameters.rope_theta=1000000.0 is absent from rope_scaling",
        ),
        (
            {"rope_parameters": {**YARN, "beta_fast": 16.0}, "rope_scaling": YARN},
            "rope_parameters.beta_fast=16.0 is absent from rope_scaling",
        ),
        (
            {"rope_theta": 1e6, "rope_parameters": PLAIN},
            "rope_parameters.rope_theta=10000.0 contradicts rope_theta=1000000.0",
        ),
        (
            {"rope_scaling": {**YARN, "type": "linear"}},
            "rope_scaling.rope_type='yarn' contradicts rope_scaling.type='linear'",
        ),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 32},
            "rope_scaling.original_max_position_embeddings=16 contradicts original",
        ),
        ({"rope_scaling": {"factor": 4.0}}, "factor=4.0 without a rope_type"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor: Field required"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "requires low_freq_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "got 'dynamic'"),
        ({"rope_scaling": {**YARN, "mscale": 1.0}}, "unknown key 'mscale'"),
        ({"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' is not a table"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "contradicts torch_dtype='bfloat16'"),
        ({"hidden_activation": "gelu"}, "hidden_act='silu' contradicts hidden_activation='gelu'"),
        ({"text_config": {"rope_theta": 1e6}}, "text_config="),
        ({"sliding_window": 64, "use_sliding_window": True}, "use_sliding_window=True is not"),
    ],
    ids=str,
)
def test_contradictions_and_halves_are_rejected(changes: dict[str, Any], message: str) -> None:
    values = {**config_to_hf(build(qk_norm=True).config), "max_position_embeddings": 8192}
    del values["rope_theta"]
    with pytest.raises(ModelError, match=message):
        config_from_hf({**values, **changes})


def test_missing_config_keys_have_family_defaults() -> None:
    for family in [*FAMILIES, "mistral"]:
        left = ("head_dim", "max_position_embeddings", "num_key_value_heads")
        values = {k: SHAPE[k] for k in SHAPE if k not in left} | {
            "num_attention_heads": 32,
            "hidden_size": 64,
        }
        window = {"sliding_window": None} if family == "mistral" else {}
        config = config_from_hf({**values, **window, "model_type": family})
        theirs = transformers.AutoConfig.for_model(family, **values)
        assert config.max_position_embeddings == theirs.max_position_embeddings
        assert config.num_key_value_heads == theirs.num_key_value_heads
        assert config.head_dim == (128 if family == "qwen3" else 64 // 32)
        assert getattr(theirs, "head_dim", None) in (None, config.head_dim)
        assert config.rms_norm_eps == theirs.rms_norm_eps
        assert config.rope_theta == theirs.rope_parameters["rope_theta"]
        assert config.tie_word_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_dtype_on_disk_and_load_in_requested_dtype(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = build()
    save_model(model.to(dtype), tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert "lm_head.weight" not in stored
    loaded = load_model(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in loaded.parameters()) and not loaded.training
    assert torch.equal(loaded.norm.weight, model.norm.weight.float())
    assert loaded.rotary.inverse_frequency.dtype == torch.float32


def test_no_partial_file_is_left(tmp_path: Path) -> None:
    save_model(build(), tmp_path, bos_id=1)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "generation_config.json", WEIGHTS]
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["bos_token_id"] == 1 and "eos_token_id" not in config


# ------------------------------------------------------------------------------------- user errors


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**values, **changes}), encoding="utf-8")

    return edit


def edit_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return edit


def cut(directory: Path, keep: float) -> None:
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def with_index(weight_map: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        os.rename(directory / WEIGHTS, directory / "elsewhere.safetensors")
        index = directory / WEIGHTS_INDEX
        index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")

    return edit


def weights_as_directory(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).mkdir()


NORM = "model.norm.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda d: (d / WEIGHTS).unlink(), r"no model\.safetensors"),
    "cut weights": (lambda d: cut(d, 0.6), "broken or cut short"),
    "cut header": (lambda d: cut(d, 0.001), "broken or cut short"),
    "empty weights": (lambda d: cut(d, 0), "broken or cut short"),
    "a directory for weights": (
        weights_as_directory,
        "broken or cut short",
    ),
    "missing tensor": (edit_weights(lambda t: t.pop(NORM)), f"'{NORM}' is missing"),
    "misshapen tensor": (
        edit_weights(lambda t: t.update({NORM: torch.ones(31)})),
        rf"'{NORM}' is \(31,\), expected \(32,\)",
    ),
    "unexpected tensor": (
        edit_weights(lambda t: t.update({"model.layers.2.x": torch.ones(1)})),
        r"unexpected tensor 'model\.layers\.2\.x'",
    ),
    "integer tensor": (
        edit_weights(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)})),
        f"'{NORM}' is torch.int8",
    ),
    "another head": (
        edit_weights(lambda t: t.update({"lm_head.weight": torch.ones(61, 32)})),
        "lm_head.weight is not the embedding",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), r"no config\.json"),
    "config not JSON": (
        lambda d: (d / "config.json").write_text("{", encoding="utf-8"),
        "not valid JSON",
    ),
    "config a list": (
        lambda d: (d / "config.json").write_text("[]", encoding="utf-8"),
        "holds a list",
    ),
    "other family": (edit_config(model_type="gpt2"), "model_type 'gpt2' is not supported"),
    "attention bias": (edit_config(attention_bias=True), "attention_bias=True is not supported"),
    "mlp bias": (edit_config(mlp_bias=True), "mlp_bias=True is not supported"),
    "activation": (edit_config(hidden_act="gelu"), "hidden_act='gelu' is not supported"),
    "sliding window": (
        edit_config(use_sliding_window=True, sliding_window=16),
        "use_sliding_window=True is not supported",
    ),
    "sliding layers": (
        edit_config(layer_types=["full_attention", "sliding_attention"]),
        "layer_types other than full_attention",
    ),
    "quantised": (
        edit_config(quantization_config={"quant_method": "awq"}),
        "quantization_config=.* is not supported",
    ),
    "partial rotary": (edit_config(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "partial rotary inside": (
        edit_config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        "partial_rotary_factor",
    ),
    "multimodal rotary": (
        edit_config(rope_scaling={"type": "default", "mrope_section": [1, 2, 3]}),
        "mrope_section",
    ),
    "dynamic scaling": (
        edit_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        "rope_type",
    ),
    "unknown scaling key": (
        edit_config(rope_scaling={"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}),
        "unknown key 'mscale'",
    ),
    "scaling not a table": (edit_config(rope_scaling="yarn"), "is not a table"),
    "no width": (edit_config(hidden_size=None), "hidden_size"),
    "width a word": (edit_config(hidden_size="wide", head_dim=None), "hidden_size"),
    "heads zero": (edit_config(num_attention_heads=0), "num_attention_heads"),
    "shard above": (with_index({NORM: "../x.safetensors"}), "leaves the directory"),
    "shard is the parent": (with_index({NORM: ".."}), "leaves the directory"),
    "shard absolute": (with_index({NORM: "/etc/passwd"}), "leaves the directory"),
    "shard missing": (with_index({NORM: "a.safetensors"}), r"no a\.safetensors"),
    "index not a map": (with_index([1]), "not an index of shards"),
    "index of numbers": (with_index({NORM: 3}), "not an index of shards"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directories_are_rejected_with_a_reason(tmp_path: Path, case: str) -> None:
    directory = tmp_path / "model"
    save_model(build(), directory)
    (tmp_path / "x.safetensors").write_bytes((directory / WEIGHTS).read_bytes())
    load_model(directory)
    breaks, message = BROKEN[case]
    breaks(directory)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(directory)
    assert "\n" not in str(caught.value)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model directory not found") as caught:
        load_model(tmp_path / "none")
    assert caught.value.hint is not None
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ModelError):
        load_config(tmp_path / "file")


def test_stored_tied_head_is_accepted(tmp_path: Path) -> None:
    model = build()
    save_model(model, tmp_path)

    def write_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)  # as in 2023

    edit_weights(write_head)(tmp_path)
    assert torch.equal(our_logits(load_model(tmp_path)), our_logits(model))
