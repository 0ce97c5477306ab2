"""Learning-rate schedules: pure functions of the step, so a resumed run needs no state."""

from __future__ import annotations

import math

from khaosz.config import ScheduleConfig


def warmup_steps(config: ScheduleConfig, total: int) -> int:
    if config.warmup_steps is not None:
        return min(config.warmup_steps, total)
    return round(config.warmup_fraction * total)


def lr_factor(config: ScheduleConfig, step: int, total: int, start: int = 0) -> float:
    """The factor on the base learning rate for optimizer step `step` (0-based) of `total`. A run
    that was finished at step `start` and extended begins a new cycle there, unless it is constant.

    Warm-up is linear and its first step is not zero; the formulas are listed at `ScheduleConfig`.
    The last step of a decaying schedule is the last one above `min_ratio`.
    """
    if start and config.name == "constant":
        return 1.0
    step, total = step - start, total - start
    warmup = warmup_steps(config, total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done, span = step - warmup, max(1, total - warmup)
    low = config.min_ratio
    match config.name:
        case "constant":
            return 1.0
        case "cosine":
            return low + (1 - low) * _half_cosine(done / span)
        case "wsd":
            decay = max(1, round(config.decay_fraction * total))
            left = total - step
            return low + (1 - low) * min(1.0, left / (decay + 1))
        case "sgdr":
            return low + (1 - low) * _half_cosine(_cycle_position(config, done / span))


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _cycle_position(config: ScheduleConfig, progress: float) -> float:
    """The position (0 to 1) in the current warm restart, where cycle i is `cycle_growth`^i long."""
    lengths = [config.cycle_growth**i for i in range(config.cycles)]
    left = progress * sum(lengths)
    for length in lengths:
        if left < length:
            return left / length
        left -= length
    return 1.0
