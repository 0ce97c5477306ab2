"""What training needs: the formulas beside what autograd keeps, and refusals before work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from khaosz.config import LoRAConfig, ModelConfig, preset
from khaosz.memory.parts import BASE
from khaosz.memory.training import TrainingPlan, layer_activations
from khaosz.model import Transformer
from khaosz.model.lora import add_lora

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
    [{}, {"qk_norm": True}, {"qk_norm": True, "num_key_value_heads": 2}, {"qkv_bias": True}],
)
def test_activations_of_a_layer(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    two, three = (ModelConfig(**SHAPE, num_hidden_layers=n).updated(**changes) for n in (2, 3))
    each = kept(three, dtype, None) - kept(two, dtype, None)
    # The weights of QK-norm, side by side in fp32, are not counted: (Q + K) H numbers.
    assert each - layer_activations(two, 128, 64, dtype) in (0, 256, 192)


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


def test_smaller_settings_need_less() -> None:
    plan = TrainingPlan(preset("base").model, rows=4, window=1_024)
    needed = {words: other.memory(0).total for words, other in plan.smaller()}
    assert {"micro_batch=1", "gradient_checkpointing=true"} < needed.keys()
    assert all(total < plan.memory(0).total for total in needed.values())
    assert plan.memory(7).parts[BASE] - plan.memory(0).parts[BASE] == 7


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
