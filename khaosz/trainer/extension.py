"""`--extend`: a finished run continues to a greater length, with its optimizer and its data order.

The lengths of the recipe are those of the whole run. A schedule that decays starts a new cycle
(warm-up, plateau, decay) over the added steps; `constant` stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from khaosz.config import TrainConfig
from khaosz.errors import CheckpointError, ConfigError
from khaosz.trainer.train_context import Plan, Progress

LENGTHS = ("max_steps", "epochs", "max_minutes")


def require_optimizer(checkpoint: Path) -> None:
    """Raises `CheckpointError` for a checkpoint without the state of its optimizer."""
    path = checkpoint / "state" / "optimizer.safetensors"
    if not path.exists():
        raise CheckpointError(
            f"{path} not found: the run can't be extended without it",
            hint=f"start a new run from its model with init_from={checkpoint.parent / 'last'}",
        )


def greater_lengths(
    config: TrainConfig, stored: TrainConfig, plan: Plan, progress: Progress
) -> dict[str, float]:
    """The lengths of a recipe that differ from those of the run: what it is extended to. Empty if
    it was extended so before. Raises `CheckpointError` for a run that is not finished and
    `ConfigError` for a recipe of the same length."""
    wanted = {name: getattr(config, name) for name in LENGTHS}
    lengths = {
        name: value
        for name, value in wanted.items()
        # The recipe may still have lengths of the run before it was extended.
        if value is not None and value not in (getattr(stored, name), *plan.former.get(name, ()))
    }
    if plan.extended_at and not lengths:
        return {}
    patience = stored.early_stop
    early = patience is not None and progress.evaluations_without_gain >= patience
    if progress.step < plan.total_steps and not early:
        raise CheckpointError(
            f"{config.out} is at step {progress.step:,} of {plan.total_steps:,}: only a finished"
            " run can be extended",
            hint="finish it with --resume and its recipe first",
        )
    if not lengths:
        raise ConfigError(
            f"{config.out} is finished, and the recipe is as long as it was",
            hint="say how long the whole run is to be, such as --extend"
            f" max_steps={2 * progress.step}",
        )
    return lengths


def with_lengths(config: TrainConfig, lengths: dict[str, float]) -> TrainConfig:
    """A recipe whose length is given by these keys alone."""
    return config.updated(**{name: lengths.get(name) for name in LENGTHS})


def extended_plan(
    plan: Plan,
    step: int,
    stored: TrainConfig,
    config: TrainConfig,
    total_steps: Callable[[TrainConfig], int],
) -> Plan:
    """The plan of a run of the recipe `stored` that is finished at `step` and extended to the
    length of `config`. Raises `ConfigError` if that is not further."""
    total = total_steps(config)
    if total <= step:
        asked = (f"{name}={getattr(config, name):g}" for name in LENGTHS if getattr(config, name))
        raise ConfigError(
            f"{', '.join(asked)} ends at step {total:,}, and {config.out} has done {step:,}",
            hint="say how long the whole run is to be, with the part that is done",
        )
    former = {name: list(plan.former.get(name, [])) for name in LENGTHS}
    for name in LENGTHS:
        if (length := getattr(stored, name)) is not None:
            former[name].append(length)
    most = None
    if config.max_minutes is not None and config.epochs is not None:
        most = total_steps(config.updated(max_minutes=None))
    rate = "stays" if config.schedule.name == "constant" else "starts a new cycle"
    return replace(
        plan,
        total_steps=total,
        extended_at=step,
        planned_steps=total - step,
        most_steps=most,
        former=former,
        reasons=[f"extended from step {step:,} to {total:,}: the learning rate {rate}"],
    )
