"""What training needs: the formulas beside what autograd keeps, and refusals before work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from khaosz.config import LoRAConfig, ModelConfig, TrainConfig, overridden, preset
from khaosz.errors import NotEnoughMemoryError
from khaosz.interop.huggingface import save_model
from khaosz.memory.machine import Limit
from khaosz.memory.parts import BASE
from khaosz.memory.training import Packed, TrainingPlan, layer_activations
from khaosz.model import Transformer
from khaosz.model.lora import add_lora
from khaosz.trainer.checks import check_stages
from tests.tiny_models import random_model, tokenizer

ROOT = Path(__file__).parents[2]
MB = 1 << 20
SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
}


def kept(config: ModelConfig, dtype: torch.dtype, lora: LoRAConfig | None) -> int:
    """Bytes that autograd keeps of a forward pass over two packed rows of 64, each tensor counted
    once, without the weights and their copies."""
    torch.manual_seed(0)  # of a mixture: two experts as good as equal would share the tokens
    model = Transformer(config).train()
    if lora is not None:
        add_lora(model, lora)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, tuple[int, Tensor]] = {}  # tensors too, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        is_copy = tensor.dim() == 2 and tensor.shape[0] != 128 and tensor.dtype != torch.int64
        if storage.data_ptr() not in weights and not is_copy:
            seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    ids = torch.zeros(2, 64, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        model(ids, None, ids)
    return sum(count for count, _ in seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True},
        {"qk_norm": True, "num_key_value_heads": 2},
        {"qkv_bias": True},
        {"qk_norm": True, "output_norms": True},
        {"value_norm": True, "layer_scalar": True},
    ],
)
def test_activations_of_a_layer(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    two, three = (ModelConfig(**SHAPE, num_hidden_layers=n).updated(**changes) for n in (2, 3))
    each = kept(three, dtype, None) - kept(two, dtype, None)
    # The weights of QK-norm, side by side in fp32, are not counted: (Q + K) H numbers.
    assert each - layer_activations(two, 128, 64, dtype) in (0, 256, 192)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_a_mixture(dtype: torch.dtype) -> None:
    # All tokens are the same one, so that each expert has all or none of them: `kept` takes
    # matrices of other numbers of rows for copies of weights.
    experts = {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
    shape = {**SHAPE, **experts, "norm_topk_prob": True, "router_aux_loss_coef": 0.0}
    two, three = (ModelConfig(**shape, num_hidden_layers=n) for n in (2, 3))
    each = kept(three, dtype, None) - kept(two, dtype, None)
    assert each == layer_activations(two, 128, 64, dtype)


DELTA_NET: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("linear_attention", DELTA_NET),
        ("linear_attention", {**DELTA_NET, "linear_value_head_dim": 16}),
        ("conv", {"conv_L_cache": 3}),
        ("full_attention", {"attn_output_gate": True, "qk_norm": True}),
    ],
)
def test_activations_of_other_layers(
    dtype: torch.dtype, kind: str, changes: dict[str, Any]
) -> None:
    two, three = (
        ModelConfig.parse({**SHAPE, **changes, "num_hidden_layers": n, "layer_types": (kind,) * n})
        for n in (2, 3)
    )
    each = kept(three, dtype, None) - kept(two, dtype, None)
    planned = layer_activations(two, 128, 64, dtype)
    # A fit to shapes of one size and another: enough, and not much more than that.
    assert 0.95 * each <= planned <= 1.35 * each, (each, planned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4)])
def test_activations_of_a_layer_that_shares_keys(
    dtype: torch.dtype, lora: LoRAConfig | None
) -> None:
    one, two = (
        ModelConfig(**SHAPE, num_hidden_layers=3, qk_norm=True, num_kv_shared_layers=n)
        for n in (1, 2)
    )
    sizes = [layer_activations(two, 128, 64, dtype, lora, layer) for layer in (0, 2)]
    assert kept(two, dtype, lora) - kept(one, dtype, lora) == sizes[1] - sizes[0]


def test_activations_of_embeddings_of_a_layer() -> None:
    two, three = (
        ModelConfig(**SHAPE, num_hidden_layers=n, hidden_size_per_layer_input=16) for n in (2, 3)
    )
    each = kept(three, torch.float32, None) - kept(two, torch.float32, None)
    # Beside the layer's own: 12 bytes of a number of all layers' inputs, and a scale.
    assert each == layer_activations(two, 128, 64, torch.float32) + 128 * (12 * 16 + 4)


def test_activations_of_a_frozen_layer_with_adapters() -> None:
    lora = LoRAConfig(rank=4)
    two, three = (ModelConfig(**SHAPE, num_hidden_layers=n, qk_norm=True) for n in (2, 3))
    each = kept(three, torch.float32, lora) - kept(two, torch.float32, lora)
    assert each == layer_activations(two, 128, 64, torch.float32, lora)


def test_weights_gradients_and_optimizer() -> None:
    config = preset("nano", vocab_size=8_192).model
    matrices, total = 6 * (4 * 256 * 256 + 3 * 256 * 704), config.parameters()
    parts = TrainingPlan(config, rows=4, window=256).memory(0).parts
    assert parts["weights"] == parts["gradients"] == 4 * total
    assert parts["optimizer"] == 4 * matrices + 8 * (total - matrices)  # Muon, and AdamW
    plan = TrainingPlan(config, rows=4, window=256, optimizer="adamw")
    assert plan.memory(0).parts["optimizer"] == 8 * total
    adapters = 6 * 16 * (4 * (256 + 256) + 3 * (256 + 704))
    lora = TrainingPlan(config, rows=4, window=256, lora=LoRAConfig(rank=16)).memory(0).parts
    assert lora["gradients"] == 4 * adapters and lora["optimizer"] == 8 * adapters
    assert lora["weights"] == 4 * (total + adapters)
    packed = LoRAConfig(rank=16, base="int8")
    small = TrainingPlan(config, rows=4, window=256, lora=packed).memory(0).parts
    assert small["weights"] == lora["weights"] - 3 * matrices + 4 * 6 * (4 * 256 + 2 * 704 + 256)


def test_logits_of_a_chunk_are_bounded_by_the_vocabulary() -> None:
    config = preset("nano", vocab_size=65_536).model
    plan = TrainingPlan(config, rows=16, window=256)
    # 128 tokens a chunk: 25 bytes a logit; the head's gradient; the input and its gradient.
    expected = 25 * 128 * 65_536 + 4 * 65_536 * 256 + 8 * 4_096 * 256
    assert plan.memory(0).parts["logits"] == expected
    assert "logits" not in TrainingPlan(config, rows=16, window=256, head=False).memory(0).parts


def test_kernels_of_each_shape_are_counted_in_bf16() -> None:
    config, packed = preset("nano").model, Packed(512, 64, 128, True, shapes=(5, 3))
    plan = TrainingPlan(config, rows=4, window=128, packed=packed)
    assert "kernels" not in plan.memory(0).parts
    half = replace(plan, dtypes=(torch.bfloat16,))
    # Three products of each of a layer's four shapes of matrices, and of the logits.
    assert half.memory(0).parts["kernels"] == 3 * (5 * 4 + 3) * 700 * 1024
    assert replace(half, head=False).memory(0).parts["kernels"] == 3 * 5 * 4 * 700 * 1024


def test_compiled_layers_keep_less() -> None:
    plan = TrainingPlan(preset("nano").model, rows=16, window=256)
    eager, compiled = plan.memory(0).parts, replace(plan, compiled=True).memory(0).parts
    for name in ("activations", "allocator"):
        assert compiled[name] == int(0.45 * eager[name])
    assert compiled["compiler"] == 80 * MB and compiled["logits"] == eager["logits"]


def test_the_base_is_counted_once() -> None:
    plan = TrainingPlan(preset("base").model, rows=4, window=1_024)
    assert plan.memory(7).parts[BASE] - plan.memory(0).parts[BASE] == 7


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("a few words\n" * 50, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory as large as `base`, whose weights are never read."""
    path, by = tmp_path_factory.mktemp("initial") / "model", tokenizer()
    save_model(random_model(by.vocab_size), path, bos_id=by.bos_id, eos_ids=[by.eos_id])
    by.save(path)
    stored = json.loads((path / "config.json").read_text(encoding="utf-8"))
    shape = preset("base", vocab_size=by.vocab_size).model
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim"
    for name in (*names.split(), "num_key_value_heads", "max_position_embeddings"):
        stored[name] = getattr(shape, name)
    (path / "config.json").write_text(json.dumps(stored), encoding="utf-8")
    return path


_LEAST = "micro_batch=1 gradient_checkpointing=true"


@pytest.mark.parametrize(
    ("start", "gigabytes", "expected"),
    [
        ("new", 3.3, ["gradient_checkpointing=true", f"size=small {_LEAST}"]),
        ("new", 2.6, [_LEAST, f"size=small {_LEAST}"]),
        ("new", 1.2, [f"size=small {_LEAST}"]),
        ("new", 0.6, [f"size=mini {_LEAST}"]),
        ("new", 0.01, [f"not even size=nano window=128 {_LEAST}"]),
        ("huge", 1.9, ["size=small"]),
        ("loaded", 3.4, ["micro_batch=1", f"lora.rank=16 {_LEAST}"]),
        ("loaded", 2.8, ["gradient_checkpointing=true", f"lora.rank=16 {_LEAST}"]),
        ("loaded", 1.4, [f"lora.rank=16 {_LEAST}"]),
        ("loaded", 0.6, [f"lora.rank=16 window=512 {_LEAST}"]),
        ("loaded", 0.35, [f"lora.rank=16 lora.base=int8 window=512 {_LEAST}"]),
        ("adapters", 0.6, [f"window=512 {_LEAST}"]),
        ("adapters", 0.3, [f"a model of 14.4M parameters as with size=mini and {_LEAST}"]),
    ],
)
def test_a_refused_recipe_names_what_fits(
    texts: Path,
    initial: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: str,
    gigabytes: float,
    expected: list[str],
) -> None:
    """Each proposal passes when the recipe is run with it, and is the mildest of its kind."""
    most = (Limit("a test", int(gigabytes * 1_024 * MB)),)
    monkeypatch.setattr("khaosz.trainer.memory.memory_limits", lambda device: most)
    recipe: dict[str, Any] = {"stage": "pt", "data": texts, "out": texts.parent / "out"}
    recipe |= {"max_steps": 1, "dtype": "fp32"}
    if start == "huge":
        recipe["size"] = "13b"
    else:
        recipe |= {"batch_tokens": 8_192, "micro_batch": 4, "window": 1_024}
        recipe |= {"size": "base"} if start == "new" else {"init_from": initial}
    if start == "adapters":
        recipe["lora"] = {"rank": 8}
    with pytest.raises(NotEnoughMemoryError) as caught:
        check_stages([TrainConfig(**recipe)])
    hint, _, override = str(caught.value.hint).rpartition("; ")
    assert override == "memory_check=false skips this check"
    proposals = [text.rpartition(" (")[0] for text in hint.removeprefix("would fit: ").split("), ")]
    assert proposals == expected
    for words in proposals:
        if not words.startswith(("a model", "not even")):
            check_stages([overridden(TrainConfig(**recipe), words.split())])


_REFUSED = """
import re
import resource
from pathlib import Path

import torch

from khaosz.config import TrainConfig
from khaosz.errors import NotEnoughMemoryError
from khaosz.trainer.checks import check_stages

status = Path("/proc/self/status").read_text()
used = int(re.search(r"VmSize:\\s+(\\d+)", status)[1]) << 10
most = used + (torch.get_num_threads() - 1) * (72 << 20) + (2 << 30)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
config = {"stage": "pt", "data": "text.txt", "out": "out", "max_steps": 1, "dtype": "fp32"}
for extra in ({"size": "base", "memory_check": False}, {"size": "nano"}, {"size": "base"}):
    try:
        print(check_stages([TrainConfig(**config, **extra)])[0].memory)
    except NotEnoughMemoryError as error:
        print("refused:", error, "|", error.hint)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited on Linux only")
def test_training_that_cannot_fit_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a few words\n" * 50, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", _REFUSED],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    allowed, small, refused = done.stdout.strip().splitlines()
    assert allowed.startswith("memory: about ") and small.startswith("memory: about ")
    assert refused.startswith("refused: training 125.9M parameters needs about"), refused
    assert "RLIMIT_AS" in refused and "optimizer" in refused and "weights 480 MB" in refused
    assert "memory_check=false skips this check" in refused
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited on Linux only")
@pytest.mark.parametrize(
    ("command", "more"),
    [
        # Reading fails, and with memory_check=false the first step of the calibration.
        (["generate", "{model}", "--prompt", "a"], 130),
        (["train", "pt", "data=text.txt", "out=out", "size=base", "max_steps=1"], 500),
    ],
)
def test_memory_that_runs_out_is_one_line(tmp_path: Path, command: list[str], more: int) -> None:
    (tmp_path / "text.txt").write_text("a few words\n" * 2_000, encoding="utf-8")
    script = (
        "import re, resource, torch, khaosz.cli; from pathlib import Path\n"
        "status = Path('/proc/self/status').read_text()\n"
        f"most = (int(re.search(r'VmSize:\\s+(\\d+)', status)[1]) << 10) + ({more} << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most)); khaosz.cli.main()\n"
    )
    if command[0] == "generate":
        shape = preset("small", vocab_size=320).model
        save_model(Transformer(shape), tmp_path / "model")
        tokenizer().save(tmp_path / "model")
    else:
        command = [*command, "memory_check=false", "vocab_size=512", "dtype=auto"]
    done = subprocess.run(
        [sys.executable, "-c", script, *(part.format(model="model") for part in command)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 1, done.stderr
    *_, error, hint = done.stderr.strip().splitlines()
    assert error.startswith("error: out of memory ("), done.stderr
    assert hint.startswith("hint: use a smaller model")
