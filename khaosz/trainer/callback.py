"""Callbacks: what happens around the loop. Each is one small object; they run in list order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console

from khaosz.errors import TrainingError
from khaosz.files import write_json
from khaosz.parallel import sum_over_ranks
from khaosz.trainer.calibration import replanned_steps
from khaosz.trainer.checkpoint import point, resolve, rotate, save_checkpoint, write_rollout
from khaosz.trainer.outcome import collapse_signs, run_warnings
from khaosz.trainer.random_state import random_state
from khaosz.trainer.train_context import TrainContext

_WORTH_REPLANNING = 0.05  # of the steps of a run: times differ by a few percent anyway

Evaluate = Callable[[TrainContext], dict[str, float]]
"""Scores of held-out data, among them the `loss`; empty where there is nothing to score."""


class Callback:
    """Does nothing; a callback overrides the methods that it needs."""

    def on_start(self, context: TrainContext) -> None: ...

    def on_step(self, context: TrainContext, metrics: dict[str, Any]) -> None: ...

    def on_end(self, context: TrainContext) -> None: ...


def is_last(context: TrainContext) -> bool:
    return context.progress.step >= context.plan.total_steps


class Validation(Callback):
    """Evaluates every `every` steps and at the end; adds the scores as `val_*` to the metrics."""

    def __init__(self, evaluate: Evaluate, every: int) -> None:
        self.evaluate, self.every = evaluate, every

    def on_step(self, context: TrainContext, metrics: dict[str, Any]) -> None:
        if metrics["step"] % self.every and not is_last(context):
            return
        if scores := self.evaluate(context):
            metrics |= {f"val_{name}": value for name, value in scores.items()}
            context.progress.evaluated(scores["loss"])


class EarlyStop(Callback):
    """Ends the run after `patience` evaluations without a lower validation loss."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_step(self, context: TrainContext, metrics: dict[str, Any]) -> None:
        if "val_loss" in metrics and context.early_stopped:
            context.stopping = f"no gain in {self.patience} evaluations"


class Budget(Callback):
    """Corrects the number of steps of a run with `max_minutes`, whose steps may take longer or
    shorter than calibration measured: at an evaluation, or without held-out data every `every`
    steps. The new plan is part of the checkpoint that is written then, so that a resumed run
    follows it."""

    def __init__(self, console: Console, every: int | None = None) -> None:
        self.console, self.every = console, every
        self._step, self._seconds = 0, 0.0

    def on_start(self, context: TrainContext) -> None:
        self._step, self._seconds = context.progress.step, context.progress.seconds

    def on_step(self, context: TrainContext, metrics: dict[str, Any]) -> None:
        plan, progress = context.plan, context.progress
        due = "val_loss" in metrics
        if self.every is not None:
            due = progress.step % self.every == 0 or is_last(context)
        if not due or context.stopping or progress.step == self._step:
            return
        rate = (progress.seconds - self._seconds) / (progress.step - self._step)
        self.on_start(context)
        mine = replanned_steps(context.config, plan, progress, rate)
        # The clock of rank 0, for all of them.
        total = int(sum_over_ranks([float(mine * context.parallel.is_main)], context.parallel)[0])
        if abs(total - plan.total_steps) < max(1, _WORTH_REPLANNING * total):
            return
        reason = (
            f"{total:,} steps instead of {plan.total_steps:,}, planned again at step"
            f" {progress.step:,}: {rate:.2f} s per step"
        )
        context.plan = replace(plan, total_steps=total, reasons=[*plan.reasons, reason])
        context.save_now = True
        if context.parallel.is_main:
            write_json(context.config.out / "plan.json", asdict(context.plan))
        self.console.print(f"  {reason}", highlight=False)


class Checkpointing(Callback):
    """Saves every `every` steps or `seconds`, at a new best, at the end and when the run is
    stopped. A checkpoint changes nothing in the run, so that the clock may decide."""

    def __init__(self, every: int, seconds: float = math.inf) -> None:
        self.every, self.seconds = every, seconds
        self._saved = -1
        self._saved_at = math.inf

    def on_start(self, context: TrainContext) -> None:
        self._saved = context.progress.step  # what was resumed is saved
        self._saved_at = time.monotonic()

    def on_step(self, context: TrainContext, metrics: dict[str, Any]) -> None:
        progress = context.progress
        gained = "val_loss" in metrics and progress.best_step == progress.step
        due = progress.step % self.every == 0
        late = time.monotonic() - self._saved_at >= self.seconds
        # The clock of rank 0, for all of them.
        late = sum_over_ranks([float(late and context.parallel.is_main)], context.parallel)[0] > 0
        if due or late or gained or context.save_now or is_last(context):
            self._save(context, gained)

    def on_end(self, context: TrainContext) -> None:
        if context.progress.step and context.progress.step != self._saved:
            self._save(context, gained=False)

    def _save(self, context: TrainContext, gained: bool) -> None:
        for name, parameter in context.trained().items():
            if not bool(parameter.isfinite().all()):
                raise TrainingError(
                    f"step {context.progress.step}: {name} is not finite, so nothing is saved",
                    hint="lower lr, or try dtype=fp32; earlier checkpoints are intact",
                )
        self._saved, context.save_now = context.progress.step, False
        write_rollout(context)
        context.random_state = random_state(context.parallel)
        context.parallel.barrier()
        if context.parallel.is_main:
            directory = save_checkpoint(context)
            if gained:
                point(context.config.out / "best", directory)
            rotate(context.config.out, context.config.keep)
        context.parallel.barrier()
        self._saved_at = time.monotonic()


class ProgressLine(Callback):
    """Prints loss, bits per byte, rate, FLOP utilisation and remaining time every few steps."""

    def __init__(
        self,
        console: Console,
        every: int,
        flops: float,
        peak: float | None,
        progress_metrics: Sequence[str] = (),
        unit: str | None = None,
    ) -> None:
        self.console, self.every, self.flops, self.peak = console, every, flops, peak
        self.progress_metrics, self.unit = progress_metrics, unit
        self._last_print = 0.0

    def on_start(self, context: TrainContext) -> None:
        plan, config = context.plan, context.config
        for reason in plan.reasons:
            self.console.print(f"  {reason}")
        verb = "resuming at" if context.progress.step else "training for"
        self.console.print(
            f"[bold]{config.stage}[/bold] {verb} "
            f"{context.progress.step or plan.total_steps:,} steps"
            f" of {self.unit or f'{plan.rows * (config.window or 0):,} tokens'}"
        )

    def on_step(self, context: TrainContext, metrics: dict[str, Any]) -> None:
        plan, progress = context.plan, context.progress
        for name in ("loss", "logprob_chosen", "val_logprob_chosen"):
            if math.isfinite(value := metrics.get(name, math.nan)):
                progress.start.setdefault(name, value)
        per_step = progress.seconds / max(1, progress.step)
        left = (plan.total_steps - progress.step) * per_step
        metrics["elapsed_s"] = round(progress.seconds, 3)
        if self.peak:
            metrics["mfu"] = metrics["tokens_per_s"] * self.flops / self.peak
        always = "val_loss" in metrics or is_last(context) or progress.step == 1
        # At most one line per second, so that a fast run does not flood the terminal.
        due = progress.step % self.every == 0 and time.monotonic() - self._last_print >= 1
        if not always and not due:
            return
        self._last_print = time.monotonic()
        parts = [
            f"step {progress.step:>6,}/{plan.total_steps:,}",
            f"loss {metrics['loss']:.3f}",
            f"lr {metrics['lr']:.2e}",
            f"{metrics['tokens_per_s']:,.0f} tok/s",
        ]
        if "mfu" in metrics:
            parts.append(f"mfu {metrics['mfu']:.0%}")
        parts += [f"{plain(n)} {metrics[n]:.3g}" for n in self.progress_metrics if n in metrics]
        if "val_bits_per_byte" in metrics:
            parts.append(
                f"[cyan]val {metrics['val_loss']:.3f}, "
                f"{metrics['val_bits_per_byte']:.3f} bits/byte[/cyan]"
            )
        elif "val_loss" in metrics:
            scores = [f"val {metrics['val_loss']:.3f}"]
            names = [n for n in self.progress_metrics if f"val_{n}" in metrics]
            scores += [f"{n} {metrics[f'val_{n}']:.3g}" for n in names]
            parts.append(f"[cyan]{', '.join(scores)}[/cyan]")
        if context.progress.skipped:
            parts.append(f"[red]{context.progress.skipped} steps skipped[/red]")
        parts += [f"[red]{sign}[/red]" for sign in collapse_signs(progress.start, metrics)]
        parts.append(f"{duration(left)} left")
        self.console.print("  ".join(parts), highlight=False, soft_wrap=True)


class Summary(Callback):
    """The last lines of a run: how it ended, and warnings."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_end(self, context: TrainContext) -> None:
        progress = context.progress
        saved = resolve(context.config.out / "last") is not None
        if not context.signal or is_last(context):
            parts = [f"{progress.step:,} steps in {duration(progress.seconds)}"]
            if "loss" in context.last:
                parts.append(f"loss {context.last['loss']:.3f}")
            if progress.last_val is not None and progress.best is not None:
                best = f" (lowest {progress.best:.3f} at step {progress.best_step:,})"
                parts.append(f"validation {progress.last_val:.3f}{best}")
            if saved:
                parts.append(str(context.config.out / "last"))
            self.console.print(f"  {plain(', '.join(parts))}", highlight=False, soft_wrap=True)
        for line in run_warnings(context):
            self.console.print(f"  [yellow]warning: {plain(line)}[/yellow]", soft_wrap=True)
        if context.stopping and not is_last(context):
            end = "; continue with --resume" if context.signal else ""
            if not saved:
                end = "; nothing was saved"
            self.console.print(
                f"[yellow]{context.stopping} at step {progress.step:,}[/yellow]{end}"
            )


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Sustained FLOP/s of this device's matrix products, measured on 1024 x 1024 for 0.2 s.

    Model FLOP utilisation is relative to this: a data sheet does not know the number of threads.
    """
    generator = torch.Generator(device).manual_seed(0)  # the global one is the run's
    a = torch.randn(1024, 1024, device=device, dtype=dtype, generator=generator)
    a @ a
    best, end = 0.0, time.perf_counter() + 0.2
    while time.perf_counter() < end:
        started = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the device
        best = max(best, 2 * 1024**3 / (time.perf_counter() - started))
    return best


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def plain(text: str) -> str:
    return text.replace("[", "\\[")
