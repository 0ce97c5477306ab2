"""Pictures of an alignment run, drawn at its end into its directory."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from khaosz.trainer.alignment.pairs import PairStrategy
from khaosz.trainer.alignment.validation import calibration_table, pair_gaps
from khaosz.trainer.callback import Callback
from khaosz.trainer.loggers import read_metrics, smoothed
from khaosz.trainer.strategy import Compute
from khaosz.trainer.train_context import TrainContext

Row = dict[str, Any]
Panel = tuple[str, Sequence[tuple[str, str]]]  # title, and (metric, label) of each line

_PAIR_PANELS: Sequence[Panel] = (
    ("loss", [("loss", "training"), ("val_loss", "held out")]),
    ("accuracy", [("accuracy", "training"), ("val_accuracy", "held out")]),
    ("margin of rewards", [("margin", "training"), ("val_margin", "held out")]),
    (
        "log-probability per token",
        [("val_logprob_chosen", "chosen, held out"), ("val_logprob_rejected", "rejected")],
    ),
)
_REWARD_PANELS: Sequence[Panel] = (
    ("reward", [("reward", "mean of a rollout")]),
    ("KL against the reference", [("kl", "nats per answer")]),
    ("answers", [("finished", "ended by themselves"), ("clip_fraction", "ratios clipped")]),
    ("critic", [("explained_variance", "explained variance")]),
)


class PreferenceCurve(Callback):
    """OUT/loss.png, and for a reward model with held-out pairs OUT/calibration.png."""

    def __init__(
        self, out: Path, console: Console, strategy: PairStrategy, compute: Compute
    ) -> None:
        self.out, self.console, self.strategy, self.compute = out, console, strategy, compute

    def on_end(self, context: TrainContext) -> None:
        if not can_draw(self.console):
            return
        rows = read_metrics(self.out / "metrics.jsonl")
        title = f"{self.out.name} ({context.config.stage})"
        if len(rows) > 1:
            draw_panels(rows, _PAIR_PANELS, self.out / "loss.png", title)
            self.console.print(f"  loss curve: {self.out / 'loss.png'}")
        alone = context.parallel.world == 1
        if context.config.stage == "rm" and len(self.strategy.held_out.pairs) >= 5 and alone:
            gaps = pair_gaps(self.strategy, context.model, self.compute)
            path = self.out / "calibration.png"
            draw_calibration(calibration_table(gaps), path, title)
            self.console.print(f"  calibration: {path}")


class RewardCurve(Callback):
    """OUT/loss.png of a PPO or GRPO run: reward, KL, answers, critic."""

    def __init__(self, out: Path, console: Console) -> None:
        self.out, self.console = out, console

    def on_end(self, context: TrainContext) -> None:
        rows = read_metrics(self.out / "metrics.jsonl")
        if len(rows) < 2 or not can_draw(self.console):
            return
        path = self.out / "loss.png"
        draw_panels(rows, _REWARD_PANELS, path, f"{self.out.name} ({context.config.stage})")
        self.console.print(f"  curves: {path}")


def draw_panels(rows: list[Row], panels: Sequence[Panel], path: Path, title: str) -> None:
    """One small plot over the steps for every panel of which the rows know a metric."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = [(t, [(m, n) for m, n in lines if _points(rows, m)[0]]) for t, lines in panels]
    known = [(t, lines) for t, lines in known if lines]
    figure = Figure(figsize=(9, 2.2 * len(known) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(known), 1, sharex=True, squeeze=False)[:, 0]
    axes[0].set_title(title)
    for axis, (name, lines) in zip(axes, known, strict=True):
        for (metric, label), colour in zip(lines, ("#1f4e79", "#d1495b"), strict=False):
            steps, values = _points(rows, metric)
            many = len(values) > 40
            if many:
                axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
                values = smoothed(values, 0.8)
            axis.plot(steps, values, color=colour, label=label, marker="" if many else ".")
        axis.set_ylabel(name)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    axes[-1].set_xlabel("optimizer step")
    _save(figure, path)


def draw_calibration(table: list[tuple[float, float, int]], path: Path, title: str) -> None:
    """Accuracy over confidence; on the diagonal a reward model is as right as it thinks it is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.plot([0.5, 1], [0.5, 1], color="#bbbbbb", linestyle="--", label="calibrated")
    axis.plot([c for c, _, _ in table], [a for _, a, _ in table], "o-", color="#1f4e79")
    for confidence, accuracy, pairs in table:
        axis.annotate(f"{pairs}", (confidence, accuracy), xytext=(4, -12),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axis.set_xlabel("confidence of the model in the answer it prefers")
    axis.set_ylabel("how often people preferred it too")
    axis.set_title(f"{title}: held-out pairs")
    axis.set_ylim(0, 1.02)
    axis.legend(frameon=False)
    axis.grid(alpha=0.25)
    _save(figure, path)


def _points(rows: list[Row], metric: str) -> tuple[list[float], list[float]]:
    held = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    return [float(step) for step, _ in held], [float(value) for _, value in held]


def can_draw(console: Console) -> bool:
    if importlib.util.find_spec("matplotlib") is None:
        console.print("  no picture: pip install 'khaosz\\[train]' brings matplotlib")
        return False
    return True


def _save(figure: Any, path: Path) -> None:
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)
