"""Two gloo ranks under torchrun give the losses and gradients of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from step_gradients import step_gradients

from khaosz.config import ParallelConfig, load_recipe
from khaosz.errors import DeviceError
from khaosz.parallel import available_devices, setup_parallel
from khaosz.trainer.run import run

RECIPE = """
stage = "pt"
data = {data}
out = {out}
size = "nano"
window = 32
batch_tokens = 320      # 10 windows: 5 for each of two ranks, in 3 micro-batches
micro_batch = 2
max_steps = 6
dtype = "fp32"
compile = "off"
optimizer = "adamw"
eval_every = 3
eval_tokens = 400
save_every = 3
log_every = 1
[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 2
head_dim = 16
intermediate_size = 64
"""


def write_recipe(path: Path, data: Path, out: Path) -> Path:
    path.write_text(RECIPE.format(data=json.dumps(str(data)), out=json.dumps(str(out))))
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A sum over several threads has another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def launch_two(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.usefixtures("one_thread")
def test_gradients_of_a_step(tmp_path: Path, prepared_dir: Path) -> None:
    script = str(Path(__file__).parent / "step_gradients.py")
    results = []
    for ranks in (1, 2):
        out = tmp_path / f"run{ranks}"
        recipe = write_recipe(tmp_path / f"{ranks}.toml", prepared_dir, out)
        gradients = tmp_path / f"{ranks}.safetensors"
        if ranks == 1:
            step_gradients(recipe, gradients)
        else:
            launch_two(script, str(recipe), str(gradients))
        results.append(load_file(gradients))
    alone, together = results
    assert alone.keys() == together.keys()
    for name, gradient in alone.items():
        # fp32 sums in another order. An average where
        # a sum belongs would be off by a factor of two.
        torch.testing.assert_close(together[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("one_thread")
def test_run_under_torchrun(tmp_path: Path, prepared_dir: Path) -> None:
    rows = []
    for ranks in (1, 2):
        out = tmp_path / f"run{ranks}"
        recipe = write_recipe(tmp_path / f"{ranks}.toml", prepared_dir, out)
        if ranks == 1:
            run(load_recipe(recipe), console=Console(quiet=True))
        else:
            launch_two("-m", "khaosz", "train", str(recipe))
        lines = (out / "metrics.jsonl").read_text().splitlines()
        rows.append([json.loads(line) for line in lines])
        assert sorted(p.name for p in out.glob("step-*")) == ["step-000003", "step-000006"]
    for one, two in zip(*rows, strict=True):
        assert one["step"] == two["step"] and one["tokens"] == two["tokens"]
        # Six AdamW steps accumulate the rounding of the gradients; 1e-4 of a loss of about six.
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        if "val_loss" in one:
            assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)
    assert rows[1][0]["loss"] == pytest.approx(rows[0][0]["loss"], rel=1e-5)


def test_choosing_a_device() -> None:
    devices = available_devices()
    assert devices[-1] == "cpu"
    assert setup_parallel(ParallelConfig(device="cpu")).device.type == "cpu"
    if "npu" not in devices:
        with pytest.raises(DeviceError, match="not available here"):
            setup_parallel(ParallelConfig(device="npu"))


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from khaosz.config import load_recipe
from khaosz.trainer.run import run
from khaosz.trainer.trainer import Trainer

step = Trainer.step
def killed(self, number):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and number == int(sys.argv[2]) and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number)

torch.set_num_threads(1)
Trainer.step = killed
run(load_recipe(Path(sys.argv[1])), resume=True)
"""


@pytest.mark.parametrize(
    ("killed_at", "said"),
    [(1, "starting from the"), pytest.param(4, "resuming at 3", marks=pytest.mark.slow)],
)
def test_torchrun_restarts_a_killed_run(
    tmp_path: Path, prepared_dir: Path, killed_at: int, said: str
) -> None:
    """Before its first checkpoint and after it, by the same command with --resume."""
    (tmp_path / "killed.py").write_text(KILLED)
    recipe = write_recipe(tmp_path / "recipe.toml", prepared_dir, tmp_path / "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += [str(tmp_path / "killed.py"), str(recipe), str(killed_at)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
