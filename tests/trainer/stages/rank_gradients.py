"""Run by torchrun, or imported: an alignment run with all that its ranks have computed.

python rank_gradients.py record RECIPE OUT     every step's gradients and rollouts, to OUT-RANK
python rank_gradients.py run RECIPE [STEP]     a plain run, begun or resumed; stopped after STEP
python rank_gradients.py stages RECIPE N       N stages, one after the other in these processes

`record` leaves the gradients as they are only where `grad_clip` is out of reach.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from khaosz.config import load_recipe
from khaosz.parallel import setup_parallel
from khaosz.trainer import run as running
from khaosz.trainer.callback import Callback
from khaosz.trainer.loggers import JsonLines
from khaosz.trainer.plots import LossCurve
from khaosz.trainer.stages.rlhf import RLHFStrategy
from khaosz.trainer.stages.validation import PairValidation
from khaosz.trainer.train_context import TrainContext
from khaosz.trainer.trainer import Trainer

QUIET = Console(quiet=True)


def record(recipe: Path, out: Path) -> None:
    """Train, keeping "gradient.STEP.NAME" of all trained parameters and, of this rank's rollouts,
    "rollout.NUMBER.FIELD". Losses and metrics are in the run's metrics.jsonl."""
    config = load_recipe(recipe)
    parallel = setup_parallel(config.parallel)
    trainer = running.assemble(running.RunOrigin(config), parallel, QUIET)
    context = trainer.context
    trainer.callbacks = [c for c in trainer.callbacks if isinstance(c, PairValidation | JsonLines)]
    kept: dict[str, Tensor] = {}
    update, strategy = trainer._update, trainer.strategy

    def recording(factor: float, *, finite: bool, step: int) -> None:
        for name, parameter in context.trained().items():
            assert parameter.grad is not None, name
            kept[f"gradient.{step}.{name}"] = parameter.grad.clone()
        if isinstance(strategy, RLHFStrategy) and strategy.rollout is not None:
            for name, tensor in strategy.rollout.tensors().items():
                kept[f"rollout.{strategy.rollout.number}.{name}"] = tensor.clone()
        update(factor, finite=finite, step=step)

    trainer._update = recording  # type: ignore[method-assign]
    trainer.run()
    save_file(kept, f"{out}-{parallel.rank}")
    parallel.barrier()
    parallel.close()


class StopLastRank(Callback):
    """One rank is asked to stop, as by a signal; the others are to hear of it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, context: TrainContext, metrics: dict[str, Any]) -> None:
        parallel = context.parallel
        if metrics["step"] == self.step and parallel.rank == parallel.world - 1:
            context.stopping = "the test said so"


def run(recipe: Path, stop_after: int | None) -> None:
    """`khaosz.trainer.run` as it is, but for the picture; it goes on from a checkpoint if any."""
    built = Trainer.__init__

    def stopping(self: Trainer, *args: Any, **kwargs: Any) -> None:
        built(self, *args, **kwargs)
        self.callbacks = [c for c in self.callbacks if not isinstance(c, LossCurve)]
        if stop_after is not None:
            self.callbacks.append(StopLastRank(stop_after))

    Trainer.__init__ = stopping  # type: ignore[method-assign]
    config = load_recipe(recipe)
    running.run(config, resume=(config.out / "last").exists(), console=QUIET)


def stages(recipe: Path, n: int) -> None:
    """A recipe of several stages. Under torchrun the store outlives a process group: a second one
    in it may read the first one's addresses and wait, about one time in three, for ever. So that
    nobody has to wait for that, it is refused here."""
    begin, groups = dist.init_process_group, []

    def once(*args: Any, **kwargs: Any) -> None:
        groups.append(kwargs.get("store"))
        assert len(groups) == 1 or groups[-1] is not None, "a second process group in one store"
        begin(*args, **kwargs)

    dist.init_process_group = once
    config = load_recipe(recipe)
    configs = [config.updated(out=config.out / str(i)) for i in range(n)]
    assert sum(1 for _ in running.run_stages(configs, console=QUIET)) == n


def main() -> None:
    """A function, so that the model and its process group are gone before the interpreter ends."""
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["record", recipe, out]:
            record(Path(recipe), Path(out))
        case ["run", recipe, *step]:
            run(Path(recipe), int(step[0]) if step else None)
        case ["stages", recipe, n]:
            stages(Path(recipe), int(n))
        case other:
            raise SystemExit(f"error: not understood: {other}")


if __name__ == "__main__":
    main()
