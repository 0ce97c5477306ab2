"""Run by torchrun, or imported: an embedder's run with every step's gradients.

python embedder_ranks.py RECIPE OUT     "STEP.NAME" of all trained parameters, to OUT-RANK
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from khaosz.config import load_recipe
from khaosz.parallel import setup_parallel
from khaosz.trainer import run as running
from khaosz.trainer.loggers import JsonLines
from khaosz.trainer.stages.embed_validation import RetrievalValidation


def record(recipe: Path, out: Path) -> None:
    """Losses and metrics are in the run's metrics.jsonl."""
    config = load_recipe(recipe)
    parallel = setup_parallel(config.parallel)
    trainer = running.assemble(running.RunOrigin(config), parallel, Console(quiet=True))
    context = trainer.context
    kinds = RetrievalValidation | JsonLines
    trainer.callbacks = [c for c in trainer.callbacks if isinstance(c, kinds)]
    kept: dict[str, Tensor] = {}
    update = trainer._update

    def recording(factor: float, *, finite: bool, step: int) -> None:
        for name, parameter in context.trained().items():
            assert parameter.grad is not None, name
            kept[f"{step}.{name}"] = parameter.grad.clone()
        update(factor, finite=finite, step=step)

    trainer._update = recording  # type: ignore[method-assign]
    trainer.run()
    save_file(kept, f"{out}-{parallel.rank}")
    parallel.barrier()
    parallel.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    record(Path(sys.argv[1]), Path(sys.argv[2]))
