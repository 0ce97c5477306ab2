"""Two gloo ranks give what one process gives: every query meets the passages of both."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from embedder_ranks import record
from safetensors.torch import load_file
from tiny import write_recipe

from khaosz.config import TrainConfig
from khaosz.data.tokenizer import Tokenizer
from khaosz.interop import save_model
from khaosz.model import Transformer

SCRIPT = str(Path(__file__).parent / "embedder_ranks.py")
CLOCKS = {"tokens_per_s", "elapsed_s", "mfu"}


def recorded(config: TrainConfig, folder: Path, ranks: int) -> tuple[list[Any], list[Any]]:
    """Metrics by step, and each rank's gradients."""
    values = {**config.model_dump(exclude_unset=True), "out": folder / f"run{ranks}"}
    given = {key: value for key, value in values.items() if value is not None}
    recipe = write_recipe(TrainConfig.parse(given), folder / f"run{ranks}.toml")
    out = folder / f"kept{ranks}"
    if ranks == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a sum over threads has another order
        record(recipe, out)
        torch.set_num_threads(threads)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", SCRIPT]
        done = subprocess.run(
            [*command, str(recipe), str(out)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-3000:]
    lines = (folder / f"run{ranks}" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], [load_file(f"{out}-{r}") for r in range(ranks)]


@pytest.mark.parametrize("symmetric", [False, True])
def test_two_ranks_are_one_batch(
    embedder: Any, model: Transformer, tokenizer: Tokenizer, tmp_path: Path, symmetric: bool
) -> None:
    """Seven pairs a step, four and three, in passes of different numbers, negatives among them."""
    save_model(model, tmp_path / "start", pad_id=tokenizer.pad_id)
    tokenizer.save(tmp_path / "start")
    config = embedder(
        init_from=tmp_path / "start", size=None, model={}, tokenizer=None, batch_pairs=7,
        max_steps=4, grad_clip=1e9, lr=1e-4, embedding_lr=1e-4, weight_decay=0.0, eval_every=2,
        embed={"max_length": 48, "symmetric": symmetric},
    )  # fmt: skip
    alone, (kept,) = recorded(config, tmp_path, 1)
    both, (first, second) = recorded(config, tmp_path, 2)
    assert [row["step"] for row in alone] == [row["step"] for row in both] == [1, 2, 3, 4]
    assert {"accuracy", "val_loss", "val_accuracy", "val_mrr"} <= alone[-1].keys()
    for a, b in zip(alone, both, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - CLOCKS:  # fp32 sums in another order
            assert math.isclose(a[name], b[name], rel_tol=1e-5, abs_tol=1e-5), (name, a, b)
    assert kept.keys() == first.keys()
    for name, gradient in kept.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        # Relative to the tensor's largest entry: single entries are sums that cancel.
        torch.testing.assert_close(first[name], gradient, rtol=0, atol=1e-5 * max(scale, 1e-3))
        assert torch.equal(first[name], second[name]), f"{name}: the ranks go apart"
