"""Models are converted, merged and loaded tensor by tensor: no copy of the whole in between."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from khaosz.config import LoRAConfig, ModelConfig
from khaosz.interop.adapter import save_adapter
from khaosz.interop.huggingface import write_directory
from khaosz.model import Transformer, parameter_shapes
from khaosz.model.lora import add_lora
from tests.tiny_models import tokenizer

ROOT = Path(__file__).parents[2]
# Many layers, so that one tensor (0.5 MB) is small beside the whole.
CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=32,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    qk_norm=True,
)
# Buffers of numpy and of the allocator, and what is imported late; a copy of the model in bf16
# would be 64 MB.
ROOM = 24.0


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process can be reset on Linux only")
    folder = tmp_path_factory.mktemp("peaks")
    model, by = folder / "model", tokenizer()
    shapes = parameter_shapes(CONFIG)
    write_directory(
        model,
        CONFIG,
        lambda name: torch.full(shapes[name], 0.01),
        dtype=torch.bfloat16,
        token_ids={"bos_token_id": by.bos_id, "eos_token_id": [by.eos_id]},
    )
    by.save(model)
    trained = Transformer(CONFIG)
    add_lora(trained, LoRAConfig(target_modules=("down_proj",)))
    save_adapter(trained, folder / "adapter", model)
    done = subprocess.run(
        [sys.executable, "-m", "tests.interop.peaks", str(model), str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peaks: dict[str, float] = json.loads(done.stdout)
    return peaks


@pytest.mark.parametrize("action", ["convert", "convert back", "quantize", "merge"])
def test_models_are_written_tensor_by_tensor(peaks: dict[str, float], action: str) -> None:
    assert peaks[action] < ROOM, peaks


def test_a_bf16_directory_is_loaded_without_a_copy(peaks: dict[str, float]) -> None:
    size = CONFIG.parameters() / (1 << 20)  # in millions of bytes per byte of a weight
    # Less from below, or nothing: memory that the allocator kept from before may be used again.
    assert size < peaks["engine in bf16"] < 2 * size + ROOM, peaks
    assert peaks["engine in fp32"] < 4 * size + ROOM, peaks
    assert peaks["module"] < 4 * size + ROOM, peaks
