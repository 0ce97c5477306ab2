"""Pictures of a run, drawn when it ends: loss curves, panels of metrics, calibration."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from khaosz.files import atomic_path, disk_error
from khaosz.trainer.callback import Callback
from khaosz.trainer.loggers import read_metrics, smoothed
from khaosz.trainer.train_context import TrainContext

Row = dict[str, Any]
Panel = tuple[str, Sequence[tuple[str, str]]]  # title, and (metric, label) of each line


class LossCurve(Callback):
    """OUT/loss.png: losses, learning rate and speed, or the stage's panels of metrics."""

    def __init__(self, out: Path, console: Console, panels: Sequence[Panel] | None = None) -> None:
        self.out, self.console, self.panels = out, console, panels

    def title(self, context: TrainContext) -> str:
        return f"{self.out.name} ({context.config.stage})"

    def on_end(self, context: TrainContext) -> None:
        rows = read_metrics(self.out / "metrics.jsonl")
        if len(rows) < 2:
            return
        if not can_draw():
            self.console.print("  no loss curve: pip install 'khaosz\\[train]' adds matplotlib")
            return
        path = self.out / "loss.png"
        try:
            if self.panels is None:
                draw_curve(rows, path, self.title(context))
            else:
                draw_panels(rows, self.panels, path, self.title(context))
        except OSError as error:  # the run is complete without its picture
            self.console.print(f"  no loss curve: {disk_error(error, path)}")
        else:
            self.console.print(f"  loss curve: {path}")


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure that is drawn to files only."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_curve(rows: list[Row], path: Path, title: str) -> None:
    """A picture of metrics rows: losses over tokens above, learning rate and speed below."""
    figure = new_figure(9, 6)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    tokens = [row["tokens"] / 1e6 for row in rows]
    top.plot(
        tokens, [row["loss"] for row in rows], color="#9db4c0", linewidth=0.8, label="training"
    )
    top.plot(
        tokens,
        smoothed([row["loss"] for row in rows], 0.9 if len(rows) > 200 else 0.6),
        color="#1f4e79",
        label="smoothed",
    )
    scored = [row for row in rows if "val_loss" in row]
    if scored:
        last = scored[-1]
        end = f"{last['val_loss']:.3f} nats/token, {last['val_bits_per_byte']:.3f} bits/byte"
        top.plot(
            [row["tokens"] / 1e6 for row in scored],
            [row["val_loss"] for row in scored],
            "o-", color="#d1495b", markersize=4, label=f"validation, at the end {end}",
        )  # fmt: skip
    top.set_ylabel("loss (nats per token)")
    top.set_title(title)
    top.legend(frameon=False)
    top.grid(alpha=0.25)
    below.plot(tokens, [row["lr"] for row in rows], color="#2e7d32")
    below.set_ylabel("learning rate", color="#2e7d32")
    below.set_xlabel("tokens (millions)")
    speed = below.twinx()
    speed.plot(tokens, [row["tokens_per_s"] for row in rows], color="#bbbbbb", linewidth=0.8)
    speed.set_ylabel("tokens/s", color="#888888")
    speed.set_ylim(bottom=0)
    save_figure(figure, path)


def draw_panels(rows: list[Row], panels: Sequence[Panel], path: Path, title: str) -> None:
    """One small plot over the steps for every panel with a metric in the rows."""
    drawn = [(t, [(m, n) for m, n in lines if _points(rows, m)[0]]) for t, lines in panels]
    drawn = [(t, lines) for t, lines in drawn if lines]
    figure = new_figure(9, 2.2 * len(drawn) + 0.6)
    axes = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    axes[0].set_title(title)
    for axis, (name, lines) in zip(axes, drawn, strict=True):
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
    save_figure(figure, path)


def draw_calibration(table: list[tuple[float, float, int]], path: Path, title: str) -> None:
    """Accuracy over confidence; a calibrated reward model is on the diagonal."""
    figure = new_figure(5, 5)
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
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _points(rows: list[Row], metric: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    return [float(step) for step, _ in points], [float(value) for _, value in points]
