"""`Trainer`: the one loop. Only this file steps an optimizer."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from khaosz.data.batches.batch import Batch
from khaosz.errors import TrainingError
from khaosz.parallel import data_parallel, sum_over_ranks
from khaosz.parallel.module import loss_divisor, no_sync
from khaosz.trainer.callback import Callback
from khaosz.trainer.outcome import check_outcome
from khaosz.trainer.schedule import lr_factor
from khaosz.trainer.strategy import Compute, LossModule, Strategy
from khaosz.trainer.train_context import TrainContext

_MOST_SKIPPED = 10  # non-finite gradients in a row before the run gives up
_STOPS = (signal.SIGINT, signal.SIGTERM)


class Trainer:
    """Runs a strategy on a context and calls the callbacks."""

    def __init__(
        self,
        context: TrainContext,
        strategy: Strategy,
        compute: Compute,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.context, self.strategy, self.callbacks = context, strategy, callbacks
        self.module = data_parallel(LossModule(context.model, strategy, compute), context.parallel)
        self._trained = list(context.trained().values())
        self._skipped_in_a_row = 0

    def run(self) -> TrainContext:
        """Train to the planned number of steps, or until something asks to stop.

        A signal or an early stop ends the run when the current step is either finished or dropped
        as a whole, so a checkpoint is always between two steps. Raises `TrainingError`, also for a
        run that ends without having learned anything.
        """
        context, progress = self.context, self.context.progress
        context.model.train()
        for callback in self.callbacks:
            callback.on_start(context)
        with self._signals():
            while progress.step < context.plan.total_steps:
                started = time.perf_counter()
                metrics = self.step(progress.step)
                if metrics is None:
                    break
                progress.seconds += time.perf_counter() - started
                context.last = metrics
                for callback in self.callbacks:
                    callback.on_step(context, metrics)
            for callback in self.callbacks:
                callback.on_end(context)
        if not context.signal:
            check_outcome(context)
        return context

    def step(self, step: int) -> dict[str, Any] | None:
        """One optimizer step; None, with nothing changed, if a stop is requested on any rank."""
        context, parallel = self.context, self.context.parallel
        started = time.perf_counter()
        batches = self.strategy.micro_batches(step)
        mine = float(sum(map(self.strategy.count, batches)))
        labels = float(sum(batch.tokens for batch in batches))
        stopping = [float(context.stopping is not None)]
        stopping += [float(context.signal == number) for number in _STOPS]
        count, tokens, stop, *signals = sum_over_ranks([mine, labels, *stopping], parallel)
        if stop:
            context.stopping = context.stopping or "stopped by another rank"
            received = [number for number, ranks in zip(_STOPS, signals, strict=True) if ranks]
            context.signal = context.signal or next(iter(received), 0)
            return None
        if count == 0:
            raise TrainingError(f"step {step}: nothing to train on")
        loss = self._accumulate(batches, count)
        if loss is None:
            return None
        norm = torch.nn.utils.clip_grad_norm_(self._trained, context.config.grad_clip)
        plan = context.plan
        factor = lr_factor(context.config.schedule, step, plan.total_steps, plan.extended_at)
        # One transfer per step: the norm, which is the same on all ranks, and this rank's sums.
        names = list(self.strategy.metric_sums)
        sums = [norm.to(loss.device), loss, *self.strategy.metric_sums.values()]
        grad_norm, *mine_summed = torch.stack(sums).tolist()
        self.strategy.metric_sums.clear()
        self._update(factor, finite=math.isfinite(grad_norm), step=step)
        progress = context.progress
        progress.step += 1
        progress.tokens += int(tokens)
        progress.idle += grad_norm == 0
        loss_sum, *totals = sum_over_ranks(mine_summed, parallel)
        loss_mean = loss_sum / count
        progress.finite = math.isfinite(loss_mean)
        seconds = time.perf_counter() - started
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": loss_mean,
            "lr": (context.config.lr or 0.0) * factor,
            "grad_norm": grad_norm,
            "tokens_per_s": tokens / seconds,
            **{name: value / count for name, value in zip(names, totals, strict=True)},
            **self.strategy.step_metrics,
        }

    def _accumulate(self, batches: list[Batch], count: float) -> torch.Tensor | None:
        """Gradients of loss sum / count over all micro-batches; returns this rank's loss sum."""
        total = torch.zeros((), device=self.context.parallel.device)
        divisor = loss_divisor(count, self.context.parallel)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with no_sync(self.module, last):
                loss = self.module(batch.to(self.context.parallel.device))
                (loss / divisor).backward()
            total += loss.detach()
            if not last and self.context.stopping and self.context.parallel.world == 1:
                self._clear_gradients()
                return None
        return total

    def _update(self, factor: float, *, finite: bool, step: int) -> None:
        """Step the optimizers, unless the gradient is not finite: then nothing changes."""
        context = self.context
        if finite:
            self._skipped_in_a_row = 0
            for optimizer in context.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * factor
                optimizer.step()
        else:
            context.progress.skipped += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= _MOST_SKIPPED:
                raise TrainingError(
                    f"step {step}: the gradient was not finite {_MOST_SKIPPED} times in a row",
                    hint="lower lr, or try dtype=fp32; earlier checkpoints are intact",
                )
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        for parameter in self._trained:
            parameter.grad = None

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM request a clean stop; a second SIGINT interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {}

        def request_stop(number: int, frame: FrameType | None) -> None:
            self.context.stopping = f"stopped by {signal.Signals(number).name}"
            self.context.signal = number
            signal.signal(number, before[number])

        for number in _STOPS:
            before[number] = signal.getsignal(number)
            signal.signal(number, request_stop)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
