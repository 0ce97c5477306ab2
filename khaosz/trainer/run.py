"""A recipe from start to finish: resolve what it starts from, assemble its stage, train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError

from khaosz.config import TrainConfig
from khaosz.errors import CheckpointError, ConfigError, TrainingError
from khaosz.files import FolderInUse, disk_error, exclusive
from khaosz.parallel import ParallelContext, setup_parallel
from khaosz.trainer.checkpoint import (
    check_same_run,
    has_checkpoints,
    load_state,
    resolve,
    step_of,
    steps,
    verify,
)
from khaosz.trainer.checks import check_stages
from khaosz.trainer.extension import greater_lengths, require_optimizer
from khaosz.trainer.open_run import RunOrigin, open_run
from khaosz.trainer.outcome import check_outcome
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
# What a run writes before its first checkpoint.
_BEFORE_CHECKPOINTS = {
    "data", "val", "tokenizer", "tensorboard", "train_config.json", "plan.json", "metrics.jsonl",
    "samples.jsonl", "reference.safetensors", "reference-val.safetensors", "wandb", "swanlog",
}  # fmt: skip


def run(
    config: TrainConfig,
    *,
    resume: bool = False,
    extend: bool = False,
    console: Console | None = None,
) -> TrainContext:
    """Train as `config` says and return the finished context; progress goes to `console`. With
    `extend` a finished run continues to the greater length that `config` has now.

    Raises a `KhaoszError` for everything that can't work; earlier output stays intact.
    """
    (context,) = run_stages([config], resume=resume, extend=extend, console=console)
    return context


def run_stages(
    configs: list[TrainConfig],
    *,
    resume: bool = False,
    extend: bool = False,
    console: Console | None = None,
) -> Iterator[TrainContext]:
    """Run stages one after the other and yield the context of each when it is done.

    With `resume`, finished stages are skipped, an interrupted stage continues, and one whose
    output directory is absent or empty starts.
    A stop requested during one stage ends all of them; an early stop ends its stage only.
    """
    console = console or Console(stderr=True)
    if extend and len(configs) != 1:
        raise ConfigError(
            f"--extend continues one run, the recipe has {len(configs)} stages",
            hint="write the stage to extend as a recipe of its own",
        )
    checked = check_stages(configs, resume=resume or extend)
    sums = {stage.config.out: stage.memory for stage in checked}
    parallel: ParallelContext | None = None
    try:
        for config in configs:
            # All stages share one process group: it can be left once, but not joined again.
            parallel = setup_parallel(config.parallel)
            console.quiet = console.quiet or not parallel.is_main
            if line := sums.get(config.out):
                console.print(f"  {line}", highlight=False, markup=False)
            with _output(config.out, parallel, console):
                context = _run(config, resume, extend, parallel, console)
            yield context
            if context.stopping and not context.complete:
                return
    finally:
        if parallel is not None:
            parallel.close()


def _run(
    config: TrainConfig, resume: bool, extend: bool, parallel: ParallelContext, console: Console
) -> TrainContext:
    origin = _origin(config, resume, extend, parallel, console)
    if origin.saved is not None:
        torch.set_num_threads(origin.saved.plan.threads)
    trainer = assemble(origin, parallel, console)
    context = trainer.context
    if context.complete:
        check_outcome(context)
        console.print(f"nothing left to do: {config.out} is trained to its last step")
        return context
    return trainer.run()


@contextmanager
def _output(out: Path, parallel: ParallelContext, console: Console) -> Iterator[None]:
    """Keep other processes out of the run's directory. A disk that refuses to be read or written
    is a `TrainingError`."""
    try:
        if not parallel.is_main:
            yield
            return
        with exclusive(out) as is_held:
            if not is_held:
                console.print(f"  {out}: this file system has no locks; start no second run there")
            yield
    except FolderInUse as error:
        raise TrainingError(
            f"{out} is in use: {error} trains there", hint="wait for it, or choose another out="
        ) from None
    except BrokenPipeError:
        raise
    except (OSError, SafetensorError) as error:
        hint = "choose another out="
        if out.is_dir() and has_checkpoints(out):
            hint = "checkpoints that were written are intact: continue with --resume"
        raise TrainingError(disk_error(error, out), hint=hint) from error


def _origin(
    config: TrainConfig, resume: bool, extend: bool, parallel: ParallelContext, console: Console
) -> RunOrigin:
    out = config.out
    last = resolve(out / "last")
    if not has_checkpoints(out):
        if extend:
            raise CheckpointError(f"{out}: no run to extend", hint="train without --extend first")
        if resume:
            _require_fresh(out)
            console.print(
                f"nothing to resume in {out}: starting from the beginning", soft_wrap=True
            )
        return RunOrigin(config)
    if not resume and not extend:
        raise CheckpointError(
            f"{out} already contains a run",
            hint="continue it with --resume, or choose another out=",
        )
    if last is None or last.parent != out.resolve() or step_of(last) is None:
        what = "is missing or leads nowhere" if last is None else f"is not a link to one: {last}"
        hint = "choose another out="
        if names := [path.name for path in steps(out).values()]:
            hint = f"say where to continue: ln -sfn {names[-1]} {out / 'last'}"
        raise CheckpointError(f"{out / 'last'}, the newest checkpoint, {what}", hint=hint)
    if extend:
        require_optimizer(last)
    if parallel.local_rank == 0:
        verify(last)
    saved = load_state(last)
    extended = saved.plan.extended_at > 0
    stored = check_same_run(config, last, extend=extend, extended=extended)
    lengths = greater_lengths(config, stored, saved.plan, saved.progress) if extend else {}
    return RunOrigin(stored, last, saved, lengths)


def _require_fresh(out: Path) -> None:
    """Raises `CheckpointError` unless a directory has at most what a run writes before its first
    checkpoint."""
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    for name in names:
        if name not in _BEFORE_CHECKPOINTS and not name.startswith("."):
            raise CheckpointError(
                f"{out}: nothing to resume, yet it is not empty: it holds {name}",
                hint="start without --resume, or choose another out=",
            )


def assemble(origin: RunOrigin, parallel: ParallelContext, console: Console) -> Trainer:
    """A run of any stage, ready to train."""
    return _ASSEMBLE[origin.config.stage](open_run(origin, parallel, console))
