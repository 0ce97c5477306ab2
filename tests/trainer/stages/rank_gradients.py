"""Runs of two ranks with all gradients and rollouts that they compute.

torchrun rank_gradients.py serve FOLDER         run the jobs in FOLDER until it has a file "stop"
torchrun rank_gradients.py stages RECIPE N      N stages, one after the other in these processes

Jobs are argument lists, `N.json` in the folder; each rank answers with `N-RANK.txt`:

record RECIPE OUT     every step's gradients and rollouts, to OUT-RANK
run RECIPE [STEP]     a plain run, new or resumed; stopped after STEP

`record` leaves the gradients as they are only where `grad_clip` is out of reach.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from khaosz.config import ParallelConfig, load_recipe
from khaosz.parallel import ParallelContext, setup_parallel
from khaosz.trainer import run as running
from khaosz.trainer.callback import Callback, Validation
from khaosz.trainer.loggers import JsonLines
from khaosz.trainer.plots import LossCurve
from khaosz.trainer.stages.rlhf import RLHFStrategy
from khaosz.trainer.train_context import TrainContext
from khaosz.trainer.trainer import Trainer

QUIET = Console(quiet=True)


def record(recipe: Path, out: Path) -> None:
    """Train, and store "gradient.STEP.NAME" of all trained parameters and "rollout.NUMBER.FIELD" of
    this rank's rollouts. Losses and metrics are in the run's metrics.jsonl."""
    config = load_recipe(recipe)
    parallel = setup_parallel(config.parallel)
    trainer = running.assemble(running.RunOrigin(config), parallel, QUIET)
    context = trainer.context
    kinds = Validation | JsonLines
    trainer.callbacks = [c for c in trainer.callbacks if isinstance(c, kinds)]
    tensors: dict[str, Tensor] = {}
    update, strategy = trainer._update, trainer.strategy

    def recording(factor: float, *, finite: bool, step: int) -> None:
        for name, parameter in context.trained().items():
            assert parameter.grad is not None, name
            tensors[f"gradient.{step}.{name}"] = parameter.grad.clone()
        if isinstance(strategy, RLHFStrategy) and strategy.rollout is not None:
            for name, tensor in strategy.rollout.tensors().items():
                tensors[f"rollout.{strategy.rollout.number}.{name}"] = tensor.clone()
        update(factor, finite=finite, step=step)

    trainer._update = recording  # type: ignore[method-assign]
    trainer.run()
    save_file(tensors, f"{out}-{parallel.rank}")
    parallel.barrier()
    parallel.close()


class StopLastRank(Callback):
    """Requests a stop on one rank, as a signal does; the other ranks must follow."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, context: TrainContext, metrics: dict[str, Any]) -> None:
        parallel = context.parallel
        if metrics["step"] == self.step and parallel.rank == parallel.world - 1:
            context.stopping = "the test requests it"


def run(recipe: Path, stop_after: int | None) -> None:
    """`khaosz.trainer.run` without its picture; resumes if there is a checkpoint."""
    init = Trainer.__init__

    def stopping(self: Trainer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.callbacks = [c for c in self.callbacks if not isinstance(c, LossCurve)]
        if stop_after is not None:
            self.callbacks.append(StopLastRank(stop_after))

    Trainer.__init__ = stopping  # type: ignore[method-assign]
    try:
        config = load_recipe(recipe)
        torch.manual_seed(99)  # a run must not depend on what the process did before
        running.run(config, resume=(config.out / "last").exists(), console=QUIET)
    finally:
        Trainer.__init__ = init  # type: ignore[method-assign]


def stages(recipe: Path, n: int) -> None:
    """A recipe of several stages. Under torchrun the store outlives a process group: a second one
    may read the addresses of the first and wait for ever, about one time in three. So a second one
    is refused here."""
    init, groups = dist.init_process_group, []

    def once(*args: Any, **kwargs: Any) -> None:
        groups.append(kwargs.get("store"))
        assert len(groups) == 1 or groups[-1] is not None, "a second process group in one store"
        init(*args, **kwargs)

    dist.init_process_group = once
    config = load_recipe(recipe)
    configs = [config.updated(out=config.out / str(i)) for i in range(n)]
    assert sum(1 for _ in running.run_stages(configs, console=QUIET)) == n


def serve(folder: Path) -> None:
    """Run jobs in one process group, so that the start of the processes is paid once."""
    rank, parent = setup_parallel(ParallelConfig()).rank, os.getppid()
    ParallelContext.close = lambda self: None  # type: ignore[method-assign]
    for number in count():
        job = folder / f"{number}.json"
        while not job.exists():
            if (folder / "stop").exists() or os.getppid() != parent:
                dist.destroy_process_group()
                return
            time.sleep(0.01)
        error = ""
        try:
            main(json.loads(job.read_text(encoding="utf-8")))
        except Exception:
            error = traceback.format_exc()
        partial = folder / f"{number}-{rank}.partial"
        partial.write_text(error, encoding="utf-8")
        partial.rename(partial.with_suffix(".txt"))
        assert not error, error  # torchrun ends the other rank, which may wait for this one


def main(arguments: list[str]) -> None:
    """A function, so that the model and its process group are gone before the interpreter ends."""
    torch.set_num_threads(1)
    match arguments:
        case ["record", recipe, out]:
            record(Path(recipe), Path(out))
        case ["run", recipe, *step]:
            run(Path(recipe), int(step[0]) if step else None)
        case ["stages", recipe, n]:
            stages(Path(recipe), int(n))
        case ["serve", folder]:
            serve(Path(folder))
        case other:
            raise SystemExit(f"error: unknown arguments: {other}")


if __name__ == "__main__":
    main(sys.argv[1:])
