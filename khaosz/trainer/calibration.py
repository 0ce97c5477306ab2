"""The short calibration at the start of a run: compute type, compilation, threads, step count.

Its result is a `Plan`, stored in every checkpoint: a resumed run computes the same numbers.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from khaosz.config import TrainConfig
from khaosz.data.batches.batch import Batch
from khaosz.errors import ConfigError, DeviceError
from khaosz.model import Transformer
from khaosz.parallel import ParallelContext, sum_over_ranks
from khaosz.trainer.loss import chunk_loss
from khaosz.trainer.optimizer import build_optimizers
from khaosz.trainer.strategy import Compute, LossModule, Strategy
from khaosz.trainer.train_context import Plan, Progress

_TOKENS_PER_FORWARD = 16_384  # on an accelerator
# On a CPU, in multiplications with one square matrix of the model's width: enough to make the fixed
# cost of an operation small. A larger forward pass only takes more memory (mini, 17M: one window is
# as fast as two, with a quarter less memory).
_WORK_PER_FORWARD = 2**28
_MOST_CALIBRATION_S = 10.0  # of a measurement that is repeated
_WORTH_COMPILING_S = 120.0  # a shorter run ends before compilation pays off


def rows_per_step(
    config: TrainConfig, parallel: ParallelContext, hidden_size: int
) -> tuple[int, int]:
    """Windows per optimizer step (all ranks) and per forward pass (one rank).

    Raises `ConfigError` when a step holds less than one window per rank.
    """
    assert config.batch_tokens is not None and config.window is not None
    rows = max(1, config.batch_tokens // config.window)
    if rows < parallel.world:
        raise ConfigError(
            f"batch_tokens={config.batch_tokens} is {rows} windows of {config.window} tokens,"
            f" fewer than the {parallel.world} processes",
            hint=f"batch_tokens={parallel.world * config.window} or more",
        )
    mine = -(-rows // parallel.world)
    limit = _TOKENS_PER_FORWARD
    if parallel.device.type == "cpu":
        limit = min(limit, _WORK_PER_FORWARD // hidden_size**2)
    if config.micro_batch is not None:
        return rows, min(config.micro_batch, mine)
    passes = -(-mine // max(1, limit // config.window))
    return rows, -(
        -mine // passes
    )  # of equal size as far as possible: every other size is compiled again


def compiler_problem(device: torch.device) -> str | None:
    """Why `torch.compile` can't work here, or None."""
    if device.type == "cpu":
        named = os.environ.get("CXX")
        candidates = [named] if named else ["g++", "clang++", "cl"]
        if not any(shutil.which(name) for name in candidates):
            return f"no C++ compiler ({' or '.join(candidates)})"
    elif device.type in ("npu", "mps"):
        return f"not used on {device.type}"
    return None


def apply_plan(plan: Plan, model: Transformer, config: TrainConfig) -> Compute:
    """Set a model up to compute as planned."""
    return _compute(model, config, plan.torch_dtype, plan.compiled)


def calibrate(
    model: Transformer,
    config: TrainConfig,
    parallel: ParallelContext,
    strategy: Strategy,
    rows: int,
    micro: int,
    console: Console,
) -> Plan:
    """Time real micro-batches under the candidates, then whole steps with a learning rate of 0.

    Weights are unchanged when it returns; gradients and optimizer state are discarded. All ranks
    use the times of rank 0. Raises `DeviceError` when the recipe requires a compiler that this
    machine lacks.
    """
    batches = [batch.to(parallel.device) for batch in strategy.micro_batches(0)]
    timing = _Timing(model, config, parallel, strategy, batches)
    problem = compiler_problem(parallel.device)
    if config.keeps_file:
        problem = "lora.base=file dequantises outside of the compiler"
    if config.compile == "on" and problem:
        raise DeviceError(f"compile=on, but {problem}", hint="install one, or compile=auto")
    reasons: list[str] = []

    dtype = torch.float32 if config.dtype != "bf16" else torch.bfloat16
    eager: dict[torch.dtype, float] = {}
    if config.dtype == "auto":
        supported, first = list[Compute](), list[float]()
        for candidate in (torch.float32, torch.bfloat16):
            try:
                compute = _compute(model, config, candidate, False)
                first += timing.least_seconds([(None, compute)], rounds=1)
                supported.append(compute)
            except RuntimeError:  # raised by a device without bf16 kernels
                if candidate == torch.bfloat16 and not supported:
                    raise  # possibly out of memory
        seconds_of = first  # a first pass takes a little longer, which counts in short ones
        if sum(first) < _MOST_CALIBRATION_S:
            seconds_of = timing.least_seconds([(None, compute) for compute in supported])
        eager = {c.dtype: s for c, s in zip(supported, seconds_of, strict=True)}
        dtype = min(eager, key=lambda name: eager[name])
        times = ", ".join(f"{_name(d)} {s * 1e3:,.0f} ms" for d, s in eager.items())
        reasons.append(f"dtype {_name(dtype)}: forward and backward take {times}")
    else:
        reasons.append(f"dtype {config.dtype}: set by the recipe")

    compiled = config.compile == "on"
    if config.compile == "auto":
        if not problem and dtype not in eager:
            (eager[dtype],) = timing.least_seconds([(None, _compute(model, config, dtype, False))])
        expected = _expected_seconds(config, strategy, rows, len(batches) * eager.get(dtype, 0.0))
        if problem:
            reasons.append(f"not compiled: {problem}")
        elif expected < _WORTH_COMPILING_S:
            reasons.append(
                f"not compiled: the run takes {expected:,.0f} s at most, too short for compilation"
                " to pay off"
            )
        else:
            console.print("  [dim]compiling (once; cached for the next run)[/dim]")
            compiled, reason = timing.try_compiled(dtype)
            reasons.append(reason)

    seconds = timing.step_seconds(_compute(model, config, dtype, compiled))
    total = _total_steps(config, strategy, rows, seconds)
    strategy.metric_sums.clear()
    chosen = sum_over_ranks(
        [float(x) if parallel.is_main else 0.0
         for x in (dtype == torch.bfloat16, compiled, total, seconds)],
        parallel,
    )  # fmt: skip
    reasons.append(f"{chosen[3]:.2f} s per step, so {int(chosen[2]):,} steps")
    return Plan(
        total_steps=int(chosen[2]),
        dtype="bf16" if chosen[0] else "fp32",
        compiled=bool(chosen[1]),
        threads=torch.get_num_threads(),
        rows=rows,
        micro_rows=micro,
        seconds_per_step=chosen[3],
        planned_steps=int(chosen[2]),
        most_steps=min(_step_limits(config, strategy, rows), default=None),
        reasons=reasons,
    )


def _compute(
    model: Transformer, config: TrainConfig, dtype: torch.dtype, compiled: bool
) -> Compute:
    model.compiled_blocks = None
    inner = chunk_loss
    if compiled:
        if model.config.num_experts is None:  # an expert has another number of rows each time
            model.compiled_blocks = torch.compile(model.blocks, dynamic=False)
        inner = torch.compile(chunk_loss, dynamic=False)
    return Compute(dtype, config.loss_chunk, inner)


@dataclass(frozen=True)
class _Timing:
    """Times the forward and backward passes of a model over real micro-batches."""

    model: Transformer
    config: TrainConfig
    parallel: ParallelContext
    strategy: Strategy
    batches: list[Batch]

    def try_compiled(self, dtype: torch.dtype) -> tuple[bool, str]:
        """Whether the compiled model is worth it, and why."""
        eager = _compute(self.model, self.config, dtype, False)
        compute = _compute(self.model, self.config, dtype, True)
        candidates = [(None, eager), (self.model.compiled_blocks, compute)]
        started = time.perf_counter()
        try:
            self.least_seconds(candidates[1:], rounds=1)
            took = time.perf_counter() - started
            plain, fast = self.least_seconds(candidates)
        except (RuntimeError, OSError) as error:  # dynamo's and inductor's errors too
            first = str(error).strip().splitlines()[0][:100]
            return False, f"not compiled: the compiler failed ({first})"
        gain = plain / fast
        if gain < 1.03:
            return False, f"not compiled: the gain is {gain - 1:+.0%}"
        return True, f"compiled: {gain:.2f}x as fast as eager, ready after {took:.0f} s"

    def least_seconds(
        self, candidates: Sequence[tuple[Any, Compute]], rounds: int = 4
    ) -> list[float]:
        """The least seconds of a forward and backward with each candidate (compiled blocks,
        compute). Rounds are interleaved, so that other work on the machine does not slow one
        candidate alone."""
        model = self.model
        modules = [LossModule(model.train(), self.strategy, compute) for _, compute in candidates]
        seconds: list[list[float]] = [[] for _ in candidates]
        for _ in range(rounds):
            if sum(map(sum, seconds)) > _MOST_CALIBRATION_S:
                break
            for (blocks, _), module, times in zip(candidates, modules, seconds, strict=True):
                model.compiled_blocks = blocks
                with _timed(self.parallel, times):
                    module(self.batches[0]).backward()
                model.zero_grad(set_to_none=True)
        return [min(times) for times in seconds]

    def step_seconds(self, compute: Compute) -> float:
        """Seconds of a whole optimizer step, updates with a learning rate of zero included."""
        module = LossModule(self.model.train(), self.strategy, compute)
        optimizers = build_optimizers(self.model, self.config, dtype=compute.dtype)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0

        def once() -> None:
            for batch in self.batches:
                (module(batch) / 1e3).backward()
            parameters = self.model.parameters()
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
            if math.isfinite(float(norm)):  # 0 times NaN would be added to the weights
                for optimizer in optimizers:
                    optimizer.step()
            self.model.zero_grad(set_to_none=True)

        runs = 5 if self.config.max_minutes is not None else 1
        first: list[float] = []
        with _timed(self.parallel, first):
            once()
        if first[0] > _MOST_CALIBRATION_S:
            return first[0]
        seconds: list[float] = []
        while len(seconds) < runs and sum(seconds) < _MOST_CALIBRATION_S:
            with _timed(self.parallel, seconds):
                once()
        return statistics.median(seconds)


@contextlib.contextmanager
def _timed(parallel: ParallelContext, into: list[float]) -> Iterator[None]:
    _synchronise(parallel)
    started = time.perf_counter()
    yield
    _synchronise(parallel)
    into.append(time.perf_counter() - started)


def _synchronise(parallel: ParallelContext) -> None:
    if parallel.device.type != "cpu":
        getattr(torch, parallel.device.type).synchronize()


def replanned_steps(config: TrainConfig, plan: Plan, progress: Progress, rate: float) -> int:
    """The steps of a run with `max_minutes` whose steps now take `rate` seconds."""
    assert config.max_minutes is not None
    left = config.max_minutes * 60 - progress.seconds
    total = progress.step + max(0, int(left / rate))
    total = max(total, config.min_steps or 1)
    return min(total, plan.most_steps or total)


def _total_steps(
    config: TrainConfig, strategy: Strategy, rows: int, seconds_per_step: float
) -> int:
    limits = _step_limits(config, strategy, rows)
    if config.max_minutes is not None:
        steps = int(config.max_minutes * 60 / seconds_per_step)
        limits.append(max(steps, config.min_steps or 1))
    return max(1, min(limits))


def _step_limits(config: TrainConfig, strategy: Strategy, rows: int) -> list[int]:
    limits = [] if config.max_steps is None else [config.max_steps]
    if config.epochs is not None:
        limits.append(-(-round(strategy.examples * config.epochs) // rows))
    return limits


def _expected_seconds(
    config: TrainConfig, strategy: Strategy, rows: int, seconds_per_step: float
) -> float:
    """The longest that the run can take, if not compiled."""
    limits = [steps * seconds_per_step for steps in _step_limits(config, strategy, rows)]
    if config.max_minutes is not None:
        limits.append(max(config.max_minutes * 60, (config.min_steps or 0) * seconds_per_step))
    return min(limits)


def _name(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp32"
