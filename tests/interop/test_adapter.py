"""Adapter directories: ours and PEFT's, both ways, and what a broken one says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from khaosz.config import LoRAConfig
from khaosz.errors import ModelError
from khaosz.interop.adapter import CONFIG, WEIGHTS, load_adapter, save_adapter
from khaosz.interop.huggingface import load_model, save_model
from khaosz.model import Transformer
from khaosz.model.lora import (
    Int8Linear,
    LoRALinear,
    adapter_state,
    add_lora,
    named_adapters,
)

torch.set_num_threads(1)

FAMILIES = {**tiny_models.FAMILIES, "qwen2": {"qkv_bias": True, "tie_word_embeddings": False}}
# The same network in fp32, its operations in another order: rounding of 6e-8 through two layers,
# on logits of size 1 to 10.
FP32 = 1e-5
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
PICKLED = "adapter_model.bin"


def build(**changes: Any) -> Transformer:
    return tiny_models.tiny_model(0.2, **{"max_position_embeddings": 64, **changes})


def adapted(lora: dict[str, Any] | None = None, **changes: Any) -> Transformer:
    """`build` with adapters that have been trained: B is not zero."""
    model = build(**changes)
    generator = torch.Generator().manual_seed(1)
    add_lora(model, LoRAConfig.parse({"rank": 4, "alpha": 8.0, **(lora or {})}), generator)
    with torch.no_grad():
        for layer in named_adapters(model).values():
            layer.lora_B.normal_(0.0, 0.1, generator=generator)
    return model


def ids() -> Tensor:
    return torch.randint(0, 61, (2, 50), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def our_logits(model: Transformer) -> Tensor:
    return model.logits(model(ids()))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter of `build()`, on q_proj and down_proj."""
    directory = tmp_path / "adapter"
    save_adapter(adapted({"target_modules": ["q_proj", "down_proj"]}), directory, "base")
    return directory


def edit(directory: Path, **changes: Any) -> None:
    """Change keys of the configuration; `...` removes one."""
    values = json.loads((directory / CONFIG).read_text(encoding="utf-8")) | changes
    remaining = {key: value for key, value in values.items() if value is not ...}
    (directory / CONFIG).write_text(json.dumps(remaining), encoding="utf-8")


def edit_tensors(directory: Path, **changes: Tensor | None) -> None:
    tensors = load_file(directory / WEIGHTS) | changes
    remaining = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(remaining, directory / WEIGHTS)


def refused(directory: Path) -> ModelError:
    """The error of loading `directory`, after which the model is as it was, to the bit."""
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_adapter(model, directory)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return caught.value


# Ours


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapter_loads_bitwise(tmp_path: Path, family: str, rslora: bool) -> None:
    model = adapted({"dropout": 0.25, "rslora": rslora, "alpha": 6.5}, **FAMILIES[family])
    save_adapter(model, tmp_path / "new" / "adapter", tmp_path)
    again = build(**FAMILIES[family])
    before = torch.get_rng_state()
    config = load_adapter(again, tmp_path / "new" / "adapter")
    assert torch.equal(torch.get_rng_state(), before)
    assert config == next(iter(named_adapters(model).values())).config
    mine, theirs = adapter_state(model), adapter_state(again)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert all(tensor.dtype == torch.float32 for tensor in theirs.values())
    assert torch.equal(our_logits(again), our_logits(model))  # hence without dropout
    learning = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert learning == set(mine)


def test_adapter_on_int8_base(tmp_path: Path) -> None:
    model = adapted({"base": "int8"})
    save_adapter(model, tmp_path, "base")
    again = build()
    assert load_adapter(again, tmp_path, base="int8").base == "int8"
    assert all(isinstance(layer.base, Int8Linear) for layer in named_adapters(again).values())
    assert torch.equal(our_logits(again), our_logits(model))


def test_adapter_layout_matches_peft(tmp_path: Path) -> None:
    save_adapter(adapted({"target_modules": ["up_proj", "q_proj"]}), tmp_path, Path("models/a"))
    assert json.loads((tmp_path / CONFIG).read_text(encoding="utf-8")) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path("models/a")),
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 8.0,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": ["up_proj", "q_proj"],
        "bias": "none",
    }
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == {
        f"base_model.model.model.layers.{layer}.{name}.weight": shape
        for layer in range(2)
        for name, shape in {
            "self_attn.q_proj.lora_A": (4, 32),
            "self_attn.q_proj.lora_B": (48, 4),
            "mlp.up_proj.lora_A": (4, 32),
            "mlp.up_proj.lora_B": (48, 4),
        }.items()
    }
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize("blocked", [WEIGHTS, CONFIG])
def test_failed_save_leaves_old_adapter(saved: Path, blocked: str) -> None:
    old = contents(saved)
    (
        saved / f".{blocked}.{os.getpid()}.partial"
    ).mkdir()  # what can't be written fails for root, too
    with pytest.raises(ModelError, match="cannot write the adapter") as caught:
        save_adapter(adapted({"rank": 2}), saved, "base")
    assert caught.value.hint is not None
    now = contents(saved)
    assert {name: now[name] for name in old} == old
    load_adapter(build(), saved)


def test_crash_between_files_leaves_an_adapter_that_is_rejected(saved: Path) -> None:
    (saved / WEIGHTS).unlink()
    (saved / WEIGHTS).mkdir()  # stops the save after the old configuration is gone
    with pytest.raises(ModelError, match="cannot write"):
        save_adapter(adapted(), saved, "base")
    assert str(refused(saved)) == f"{saved}: {CONFIG} not found"


def test_save_replaces_another_adapter(saved: Path) -> None:
    model = adapted({"rank": 2, "alpha": 3.0})
    save_adapter(model, saved, "base")
    again = build()
    assert load_adapter(again, saved).rank == 2
    assert torch.equal(our_logits(again), our_logits(model))


# Theirs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_adapters_become_fp32(saved: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(saved / WEIGHTS).items()}
    save_file(tensors, saved / WEIGHTS)
    model = build()
    load_adapter(model, saved)
    for name, tensor in adapter_state(model).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensors[f"base_model.model.model.{name}.weight"].float())


# adapter_config.json of PEFT 0.21.2 for LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM").
PEFTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "down_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"task_type": None, "init_lora_weights": "gaussian", "revision": "main"},
        {"target_modules": ["self_attn.q_proj", "model.layers.0.mlp.down_proj", "down_proj"]},
        {"use_rslora": ..., "lora_dropout": ..., "use_dora": ..., "init_lora_weights": ...},
    ],
)
def test_pefts_own_configuration_is_read(saved: Path, changes: dict[str, Any]) -> None:
    (saved / CONFIG).write_text(json.dumps(PEFTS), encoding="utf-8")
    edit(saved, **changes)
    config = load_adapter(build(), saved)
    assert (config.rank, config.alpha, config.dropout, config.rslora) == (4, 8.0, 0.0, False)
    assert config.target_modules == ("q_proj", "down_proj")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"peft_type": ...}, "peft_type None is not supported"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS' is not supported"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head'] is not supported"),
        ({"layers_to_transform": [0]}, "layers_to_transform=[0] is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern={'q_proj': 2} is not supported"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern={'q_proj': 2} is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' is not"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices=[5] is not supported"),
        ({"of_next_year": {"a": 1}}, "of_next_year={'a': 1} is not supported"),
        ({"line\nbreak": 1}, "line\\nbreak=1 is not supported"),
        ({"target_modules": ".*_proj"}, "target_modules='.*_proj' is not a list of names"),
        ({"target_modules": ...}, "target_modules=None is not a list of names"),
        ({"target_modules": ["c_attn"]}, "target_modules: unknown module 'c_attn', known: q_proj"),
        ({"target_modules": ["q_porj"]}, "unknown module 'q_porj', did you mean 'q_proj'?"),
        ({"target_modules": [None]}, "target_modules: unknown module 'None'"),
        ({"target_modules": []}, "target_modules: "),
        ({"r": 0}, "rank: Input should be greater than or equal to 1 (got 0)"),
        ({"r": ...}, "rank: Input should be greater than or equal to 1 (got 0)"),
        ({"r": "four"}, "rank: Input should be a valid integer"),
        ({"r": 8}, f"tensor '{Q_PROJ}.lora_A.weight' is (4, 32), expected (8, 32)"),
        ({"lora_alpha": ...}, "alpha: Input should be greater than 0"),
        ({"lora_alpha": 10**400}, "alpha: "),
        ({"lora_dropout": 1.0}, "dropout: Input should be less than 1"),
        ({"target_modules": ["q_proj"]}, "unexpected tensor 'base_model.model.model.layers.0.mlp"),
        (
            {"target_modules": ["q_proj", "down_proj", "k_proj"]},
            f"tensor '{Q_PROJ.replace('q_proj', 'k_proj')}.lora_A.weight' is missing",
        ),
    ],
)
def test_unsupported_option_is_rejected(saved: Path, changes: dict[str, Any], message: str) -> None:
    edit(saved, **changes)
    error = refused(saved)
    assert str(saved) in str(error) and message in str(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{Q_PROJ}.lora_A.weight": None}, f"tensor '{Q_PROJ}.lora_A.weight' is missing"),
        ({f"{Q_PROJ}.lora_B.weight": torch.zeros(32, 4)}, "is (32, 4), expected (48, 4)"),
        ({f"{Q_PROJ}.lora_B.weight": torch.zeros(48, 4, dtype=torch.int8)}, "is torch.int8"),
        ({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}, "unexpected tensor"),
        ({f"{Q_PROJ}.lora_magnitude_vector": torch.zeros(48)}, "unexpected tensor"),
        ({f"a\nb{'c' * 5000}": torch.zeros(1)}, "unexpected tensor 'a\\nbccc"),
        (
            {"base_model.model.model.layers.2.mlp.down_proj.lora_A.weight": torch.zeros(4, 48)},
            "unexpected tensor 'base_model.model.model.layers.2.mlp.down_proj.lora_A.weight'",
        ),
    ],
)
def test_misshapen_tensor_is_named(
    saved: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    edit_tensors(saved, **changes)
    assert message in str(refused(saved))


def test_adapter_of_wider_model_is_rejected(tmp_path: Path) -> None:
    save_adapter(adapted(hidden_size=40), tmp_path, "base")
    assert "is (4, 40), expected (4, 32)" in str(refused(tmp_path))


def test_pickle_is_never_read(saved: Path) -> None:
    (saved / WEIGHTS).rename(saved / PICKLED)
    error = refused(saved)
    assert str(error) == f"{saved}: {WEIGHTS} not found"
    assert error.hint is not None and "pickle" in error.hint and "PEFT" in error.hint
    (saved / PICKLED).unlink()
    assert refused(saved).hint is None


def test_directory_without_adapter_is_reported(tmp_path: Path, saved: Path) -> None:
    error = refused(tmp_path / "nowhere")
    assert str(error) == f"{tmp_path / 'nowhere'}: {CONFIG} not found"
    assert error.hint is not None and WEIGHTS in error.hint
    save_model(build(), tmp_path / "model")
    assert str(refused(tmp_path / "model")) == f"{tmp_path / 'model'}: {CONFIG} not found"
    for text in ("{", "[]", '"LORA"', "null", "\xff", "[" * 100_000, '{"r": 1' + "0" * 5000 + "}"):
        (saved / CONFIG).write_text(text, encoding="latin-1")
        assert str(saved / CONFIG) in str(refused(saved))
    (saved / CONFIG).unlink()
    (saved / CONFIG).mkdir()
    assert f"{saved / CONFIG}: cannot be read" in str(refused(saved))


@pytest.mark.parametrize("length", [0, 7, 100, 3000, -1])
def test_truncated_file_is_rejected(saved: Path, length: int) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:length])
    assert f"{saved / WEIGHTS}: broken or cut short" in str(refused(saved))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def one_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    save_adapter(adapted({"target_modules": ["q_proj", "down_proj"]}), directory, "base")
    return directory


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(PEFTS)) | st.text(), JSON, min_size=1, max_size=3))
def test_no_configuration_crashes(one_adapter: Path, changes: dict[str, Any]) -> None:
    (one_adapter / CONFIG).write_text(json.dumps(PEFTS | changes), encoding="utf-8")
    model = build()
    try:
        load_adapter(model, one_adapter)
    except ModelError as error:
        assert "\n" not in str(error)
        assert not any(isinstance(module, LoRALinear) for module in model.modules())


# PEFT itself


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_ours(tmp_path: Path, family: str, rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = build(**FAMILIES[family])
    save_model(model, tmp_path / "base")
    plain = our_logits(model)
    model = adapted({"rslora": rslora, "alpha": 6.0, "dropout": 0.1}, **FAMILIES[family])
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    ours = our_logits(model)
    assert not torch.allclose(ours, plain, atol=0.1)  # the adapters are seen at all
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids()).logits, ours, rtol=FP32, atol=FP32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_we_load_pefts(tmp_path: Path, family: str, targets: str | list[str]) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    save_model(build(**FAMILIES[family]), tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32
    )
    lora = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(theirs, lora).eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "base")
    plain = our_logits(ours)
    load_adapter(ours, tmp_path / "adapter")
    result = our_logits(ours)
    assert not torch.allclose(result, plain, atol=0.1)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids()).logits, result, rtol=FP32, atol=FP32)
    save_adapter(ours, tmp_path / "again", tmp_path / "base")
    again, original = (load_file(tmp_path / name / WEIGHTS) for name in ("again", "adapter"))
    assert again.keys() == original.keys()
    assert all(torch.equal(again[name], original[name]) for name in original)
