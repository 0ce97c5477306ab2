"""Run by torchrun, or imported: gradients and loss of one accumulated step, which rank 0 writes.

python step_gradients.py RECIPE OUT.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file

from khaosz.config import load_recipe
from khaosz.parallel import setup_parallel, sum_over_ranks
from khaosz.trainer import run as running


def step_gradients(recipe: Path, out: Path) -> None:
    """A function, so that the model and its process group are gone before the interpreter ends."""
    config = load_recipe(recipe)
    parallel = setup_parallel(config.parallel)
    console = Console(quiet=True)
    trainer = running.assemble(running.RunOrigin(config), parallel, console)
    context = trainer.context
    batches = trainer.strategy.micro_batches(0)
    count = sum_over_ranks([float(sum(batch.tokens for batch in batches))], parallel)[0]
    loss = trainer._accumulate(batches, count)
    assert loss is not None
    total = sum_over_ranks([float(loss)], parallel)[0] / count
    if parallel.is_main:
        gradients = {n: p.grad for n, p in context.model.named_parameters() if p.grad is not None}
        save_file({**gradients, "loss": torch.tensor(total)}, out)
    parallel.barrier()
    # Else DDP's reducer would own the last process group and join gloo's threads under the GIL.
    del trainer, context, loss
    parallel.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    step_gradients(Path(sys.argv[1]), Path(sys.argv[2]))
