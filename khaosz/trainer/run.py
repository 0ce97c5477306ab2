"""A recipe from start to finish."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich.console import Console

from khaosz.config import PAIR_STAGES, ROLLOUT_STAGES, TrainConfig
from khaosz.errors import CheckpointError
from khaosz.parallel import ParallelContext, setup_parallel
from khaosz.trainer import build
from khaosz.trainer.build import Start
from khaosz.trainer.checkpoint import check_same_run, load_state, resolve
from khaosz.trainer.stages import build as alignment
from khaosz.trainer.stages.build import build_embedder
from khaosz.trainer.train_context import TrainContext
from khaosz.trainer.trainer import Trainer


def run(
    config: TrainConfig,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> TrainContext:
    """Train as `config` says and return the finished context; progress goes to `console`.

    Raises a `KhaoszError` for everything that can't work; earlier output stays intact.
    """
    parallel = setup_parallel(config.parallel)
    try:
        return _run(config, resume, parallel, console or Console(stderr=True))
    finally:
        parallel.close()


def _run(
    config: TrainConfig, resume: bool, parallel: ParallelContext, console: Console
) -> TrainContext:
    console.quiet = console.quiet or not parallel.is_main
    start = _find_start(config, resume)
    if start.saved is not None:
        torch.set_num_threads(start.saved.plan.threads)
    context, trainer = build_run(start, parallel, console)
    if context.progress.step >= context.plan.total_steps:
        console.print(f"nothing left to do: {config.out} is trained to its last step")
        return context
    return trainer.run()


def run_stages(
    configs: list[TrainConfig], *, resume: bool = False, console: Console | None = None
) -> Iterator[TrainContext]:
    """Run stages one after the other, each context handed out when its stage is done.

    With `resume`, finished stages are passed over, a begun one goes on and the rest start; a stop
    asked for during one stage ends them all.
    """
    console = console or Console(stderr=True)
    parallel: ParallelContext | None = None
    try:
        for config in configs:
            # All stages are of one process group: it can be left once, not joined again.
            parallel = setup_parallel(config.parallel)
            begun = resolve(config.out / "last") is not None
            context = _run(config, resume and (begun or len(configs) == 1), parallel, console)
            yield context
            if context.stopping:
                return
    finally:
        if parallel is not None:
            parallel.close()


def _find_start(config: TrainConfig, resume: bool) -> Start:
    last = resolve(config.out / "last")
    if not resume:
        if last is not None:
            raise CheckpointError(
                f"{config.out} already holds a run",
                hint="go on with --resume, or choose another out=",
            )
        return Start(config)
    if last is None:
        raise CheckpointError(f"{config.out}: nothing to resume", hint="start without --resume")
    return Start(check_same_run(config, last), last, load_state(last))


def build_run(
    start: Start, parallel: ParallelContext, console: Console
) -> tuple[TrainContext, Trainer]:
    """Everything of a run, ready to go."""
    if start.config.stage in PAIR_STAGES:
        return alignment.build_pairs(start, parallel, console)
    if start.config.stage in ROLLOUT_STAGES:
        return alignment.build_rollouts(start, parallel, console)
    if start.config.stage == "embed":
        return build_embedder(start, parallel, console)
    return build.build(start, parallel, console)
