"""A recipe from start to finish: resolve what it starts from, assemble its stage, train."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich.console import Console

from khaosz.config import TrainConfig
from khaosz.errors import CheckpointError
from khaosz.parallel import ParallelContext, setup_parallel
from khaosz.trainer.checkpoint import check_same_run, load_state, resolve
from khaosz.trainer.open_run import RunOrigin, open_run
from khaosz.trainer.stages.assembly import (
    assemble_embedder,
    assemble_pairs,
    assemble_rollouts,
    assemble_text,
)
from khaosz.trainer.train_context import TrainContext
from khaosz.trainer.trainer import Trainer

_ASSEMBLE = {
    "pt": assemble_text,
    "sft": assemble_text,
    "rm": assemble_pairs,
    "dpo": assemble_pairs,
    "ppo": assemble_rollouts,
    "grpo": assemble_rollouts,
    "embed": assemble_embedder,
}


def run(
    config: TrainConfig, *, resume: bool = False, console: Console | None = None
) -> TrainContext:
    """Train as `config` says and return the finished context; progress goes to `console`.

    Raises a `KhaoszError` for everything that can't work; earlier output stays intact.
    """
    (context,) = run_stages([config], resume=resume, console=console)
    return context


def run_stages(
    configs: list[TrainConfig], *, resume: bool = False, console: Console | None = None
) -> Iterator[TrainContext]:
    """Run stages one after the other and yield the context of each when it is done.

    With `resume`, finished stages are skipped, an interrupted stage continues and the others start.
    A stop requested during one stage ends all of them.
    """
    console = console or Console(stderr=True)
    parallel: ParallelContext | None = None
    try:
        for config in configs:
            # All stages share one process group: it can be left once, but not joined again.
            parallel = setup_parallel(config.parallel)
            interrupted = resolve(config.out / "last") is not None
            context = _run(config, resume and (interrupted or len(configs) == 1), parallel, console)
            yield context
            if context.stopping:
                return
    finally:
        if parallel is not None:
            parallel.close()


def _run(
    config: TrainConfig, resume: bool, parallel: ParallelContext, console: Console
) -> TrainContext:
    console.quiet = console.quiet or not parallel.is_main
    origin = _origin(config, resume)
    if origin.saved is not None:
        torch.set_num_threads(origin.saved.plan.threads)
    trainer = assemble(origin, parallel, console)
    context = trainer.context
    if context.progress.step >= context.plan.total_steps:
        console.print(f"nothing left to do: {config.out} is trained to its last step")
        return context
    return trainer.run()


def _origin(config: TrainConfig, resume: bool) -> RunOrigin:
    last = resolve(config.out / "last")
    if not resume:
        if last is not None:
            raise CheckpointError(
                f"{config.out} already contains a run",
                hint="continue it with --resume, or choose another out=",
            )
        return RunOrigin(config)
    if last is None:
        raise CheckpointError(f"{config.out}: nothing to resume", hint="start without --resume")
    return RunOrigin(check_same_run(config, last), last, load_state(last))


def assemble(origin: RunOrigin, parallel: ParallelContext, console: Console) -> Trainer:
    """A run of any stage, ready to train."""
    return _ASSEMBLE[origin.config.stage](open_run(origin, parallel, console))
