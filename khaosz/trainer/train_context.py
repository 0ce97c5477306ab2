"""`TrainContext`: the state of a run, and the part of it that a checkpoint stores."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from khaosz.config import TrainConfig
from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import quoted
from khaosz.model import RewardModel, Transformer
from khaosz.parallel import ParallelContext


@dataclass
class Progress:
    """The position of a run. The data position follows from `step`: the sampler has no state."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens trained on (labels), all ranks
    seconds: float = 0.0  # time spent in optimizer steps
    skipped: int = 0  # steps without an update, because the gradient was not finite
    idle: int = 0  # steps whose gradient was zero
    finite: bool = True  # whether the loss of the last step is finite
    best: float | None = None  # lowest validation loss so far
    best_step: int = 0
    evaluations: int = 0
    evaluations_without_gain: int = 0
    first_val: float | None = None  # validation losses; None if they were not finite
    last_val: float | None = None
    start: dict[str, float] = field(default_factory=dict)  # first values that a collapse shows in

    def evaluated(self, loss: float) -> None:
        """Record the validation loss of this step. One that is not finite is never the best."""
        known = loss if math.isfinite(loss) else None
        if not self.evaluations:
            self.first_val = known
        self.last_val = known
        self.evaluations += 1
        if known is not None and (self.best is None or known < self.best):
            self.best, self.best_step = known, self.step
            self.evaluations_without_gain = 0
        else:
            self.evaluations_without_gain += 1


@dataclass(frozen=True)
class Plan:
    """The result of calibration. It is stored and reused by `--resume`, so that both parts of a run
    compute the same numbers. A run with `max_minutes` may be given another `total_steps` on the
    way (`callback.Budget`); `planned_steps` stays: intervals are derived from it."""

    total_steps: int
    dtype: str  # "fp32" | "bf16"
    compiled: bool
    threads: int
    rows: int  # windows per optimizer step
    micro_rows: int
    seconds_per_step: float
    reasons: list[str] = field(default_factory=list)
    planned_steps: int | None = None  # at the start; None in checkpoints of earlier versions
    most_steps: int | None = None  # those of `epochs`
    extended_at: int = 0  # the step where the run was finished before, and the schedule starts
    former: dict[str, list[float]] = field(default_factory=dict)  # lengths before it was extended

    @property
    def tenth(self) -> int:
        """A tenth of the run as it was planned at first, at least 5 steps: how often it is
        evaluated and saved by default."""
        return max(5, (self.planned_steps or self.total_steps) // 10)

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


class Rollouts(Protocol):
    """The state of a reinforcement-learning run beside its weights, as tensors."""

    def state_tensors(self) -> dict[str, torch.Tensor]: ...

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None: ...


@dataclass
class TrainContext:
    """The models, their optimizers, the plan and the position of one run.

    `model` is trained and saved: in alignment the policy. A reinforcement-learning run also has a
    frozen `reference`, a frozen `reward` model and a trained `critic`, each where it is needed.
    """

    config: TrainConfig
    model: Transformer
    tokenizer: Tokenizer
    parallel: ParallelContext
    plan: Plan
    optimizers: list[Optimizer]
    windows: int = 0  # examples of the training data, which a resumed run checks
    progress: Progress = field(default_factory=Progress)
    stopping: str | None = None  # why the run ends early
    signal: int = 0  # the signal that stopped it
    save_now: bool = False  # the plan has changed: a checkpoint is due
    last: dict[str, Any] = field(default_factory=dict)  # metrics of the last step
    # Of what a resumed run reads again: name -> {"hash": ..., and where it was}
    fingerprints: dict[str, dict[str, str]] = field(default_factory=dict)
    critic: RewardModel | None = None
    rollouts: Rollouts | None = None
    random_state: dict[str, torch.Tensor] | None = None  # of all ranks, gathered for a checkpoint

    @property
    def early_stopped(self) -> bool:
        """Whether `early_stop` evaluations in a row were without gain: the run is complete."""
        patience = self.config.early_stop
        return patience is not None and self.progress.evaluations_without_gain >= patience

    @property
    def complete(self) -> bool:
        return self.progress.step >= self.plan.total_steps or self.early_stopped

    def state(self) -> dict[str, Any]:
        """The part of a checkpoint that is stored as JSON."""
        return {
            "format": 1,
            "progress": asdict(self.progress),
            "plan": asdict(self.plan),
            "world": self.parallel.world,
            "windows": self.windows,
            "fingerprints": self.fingerprints,
        }

    def trained(self) -> dict[str, nn.Parameter]:
        """Every parameter that a step may change: the model's, and a critic's as "value.<name>"."""
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if self.critic is not None:
            named |= {f"value.{n}": p for n, p in self.critic.named_parameters()}
        return named

    def named_optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """Every optimizer tensor under "<parameter name>/<state name>"."""
        names = {id(p): name for name, p in self.trained().items()}
        return {
            f"{names[id(parameter)]}/{key}": value
            for optimizer in self.optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_optimizer_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `named_optimizer_tensors`, on the parameters' devices. Raises `ValueError`
        for a tensor of another shape or of an unknown name, and for one that is missing."""
        parameters = self.trained()
        owner = {
            id(p): optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        keys: dict[str, set[str]] = {name: set() for name in parameters}
        for full, value in tensors.items():
            name, _, key = full.rpartition("/")
            if name not in parameters:
                raise ValueError(f"{quoted(full)} belongs to no parameter of this model")
            parameter = parameters[name]
            # AdamW keeps its step count as a CPU tensor unless it is fused on an accelerator.
            device = parameter.device if value.ndim else value.device
            if value.ndim and value.shape != parameter.shape:
                shapes = f"{tuple(value.shape)}, expected {tuple(parameter.shape)}"
                raise ValueError(f"{quoted(full)} is {shapes}")
            owner[id(parameter)].state[parameter][key] = value.to(device)
            keys[name].add(key)
        for optimizer in self.optimizers:
            names = [name for name, p in parameters.items() if owner[id(p)] is optimizer]
            expected = set().union(*(keys[name] for name in names))
            for name in names:
                for key in sorted(expected - keys[name]):
                    raise ValueError(f"{quoted(f'{name}/{key}')} is missing")
