"""How a run ended: whether it learned anything, what looks wrong, and what to do next."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from khaosz.config import ROLLOUT_STAGES
from khaosz.errors import TrainingError
from khaosz.trainer.checkpoint import resolve
from khaosz.trainer.train_context import TrainContext

# In nats per token. Preference training lowers the probability of chosen answers a little; below
# half of what it was, the model unlearns to write them (arXiv:2402.13228, section 3).
_FALL = math.log(2)
_FAR = 1.0  # of the log-ratio to the reference; a healthy run stays below a few tenths
_RISE = 1.5  # of the loss of the first step; batches of other records differ by less


def check_outcome(context: TrainContext) -> None:
    """Raises `TrainingError` for a run that ends without an update, or with a loss or a validation
    loss that is not finite."""
    progress, out = context.progress, context.config.out
    hint = "lower lr, or try dtype=fp32, and look for broken records in the data"
    if 0 < progress.step <= progress.skipped:
        raise TrainingError(
            f"{out}: nothing was learned: the gradient was not finite in any of"
            f" {progress.step:,} steps",
            hint=hint,
        )
    for name, broken in (
        ("loss", not progress.finite),
        ("validation loss", progress.evaluations > 0 and progress.last_val is None),
    ):
        if broken:
            raise TrainingError(
                f"{out}: the {name} is not finite at the last step, {progress.step:,}", hint=hint
            )


def run_warnings(context: TrainContext) -> list[str]:
    """What looks wrong about a run that ends, a line each."""
    progress, warnings = context.progress, []
    if progress.skipped:
        warnings.append(
            f"{progress.skipped:,} of {progress.step:,} steps changed nothing: their gradient was"
            " not finite"
        )
    if progress.idle == progress.step - progress.skipped > 0:
        why = ""
        if context.config.stage == "grpo":
            why = " (GRPO learns from answers to one prompt whose rewards differ)"
        warnings.append(f"the gradient was zero in every step: the weights are unchanged{why}")
    first, last, best = progress.first_val, progress.last_val, progress.best
    if first is not None and last is not None and best is not None and last > first:
        lowest = f"; the lowest, {best:.3f}, is in {context.config.out / 'best'}"
        warnings.append(
            f"the validation loss ended at {last:.3f}, above its first value {first:.3f}"
            f"{lowest if progress.best_step != progress.step else ''}: lower lr or train for less"
        )
    began, ended = progress.start.get("loss", 0.0), context.last.get("loss", 0.0)
    if context.config.stage not in ROLLOUT_STAGES and ended > _RISE * began > 0:
        warnings.append(
            f"the loss ended at {ended:.3f}, above its first value {began:.3f}: lower lr"
        )
    return warnings + [
        f"{sign}: lower lr, raise beta or sft_weight"
        if context.config.stage == "dpo"
        else f"{sign}: lower lr or raise rollout.kl"
        for sign in collapse_signs(progress.start, context.last)
    ]


def collapse_signs(start: dict[str, float], metrics: dict[str, Any]) -> list[str]:
    """What shows in the metrics of a step that preference training is destroying the model.
    `start`: the first values of the run, for losses without a reference."""
    signs = []
    for prefix, where in (("val_", "held-out "), ("", "")):
        name = f"{prefix}logprob_chosen"
        shift, limit = metrics.get(f"{prefix}chosen_shift"), _FALL
        if shift is None and name in start and name in metrics:
            # Batches of other pairs differ, held-out pairs are always the same.
            shift, limit = metrics[name] - start[name], _FALL if prefix else 2 * _FALL
        if shift is not None and shift < -limit:
            signs.append(f"collapse: {where}chosen answers lost {-shift:.2g} nats per token")
            break
    for prefix in ("val_", ""):
        name, tokens = f"{prefix}kl", metrics.get(f"{prefix}answer_tokens")
        if name in metrics and tokens:
            # On given answers a positive log-ratio is learning, on sampled ones it is divergence.
            given = f"{prefix}logprob_chosen" in metrics
            far = -metrics[name] if given else abs(metrics[name])
            if far > _FAR * tokens:
                each = far / tokens
                signs.append(f"collapse: {name} {metrics[name]:.3g}, {each:.2g} nats per token")
                break
    return signs


def best_model(context: TrainContext) -> Path:
    """OUT/best where its validation loss is lower than that of OUT/last."""
    progress, out = context.progress, context.config.out
    better = progress.best_step != progress.step and resolve(out / "best") is not None
    return out / ("best" if better else "last")


def next_commands(context: TrainContext) -> list[str]:
    """What to do with the model of a run: commands that work as they are."""
    config, model = context.config, str(best_model(context))
    data = str(config.val or config.data)
    raw = Path(data).is_file()
    match config.stage:
        case "pt":
            prompt = next(iter(config.prompts), "The")
            lines = [["generate", model, "--prompt", prompt]]
            lines += [["eval", "bpb", model, data]] if raw else []
        case "rm":
            lines = [["eval", "preference", model, data]] if raw else []
        case "embed":
            lines = [["eval", "retrieval", data, "--embedder", model]] if raw else []
        case _:
            lines = [["chat", model], ["serve", model]]
    return [command(*line) for line in lines]


def command(*arguments: str) -> str:
    """A `khaosz` command to paste into a shell."""
    start = ["khaosz"] if shutil.which("khaosz") else [sys.executable, "-m", "khaosz"]
    return shlex.join([*start, *arguments])
