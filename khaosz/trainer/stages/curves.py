"""Pictures of an alignment run, drawn at its end into its directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from khaosz.trainer.callback import Callback
from khaosz.trainer.loggers import read_metrics
from khaosz.trainer.plots import Panel, can_draw, draw_panels, save_figure
from khaosz.trainer.stages.pairs import PairStrategy
from khaosz.trainer.stages.validation import calibration_table, pair_gaps
from khaosz.trainer.strategy import Compute
from khaosz.trainer.train_context import TrainContext

_PAIR_PANELS: Sequence[Panel] = (
    ("loss", [("loss", "training"), ("val_loss", "held out")]),
    ("accuracy", [("accuracy", "training"), ("val_accuracy", "held out")]),
    ("margin of rewards", [("margin", "training"), ("val_margin", "held out")]),
    (
        "log-probability per token",
        [("val_logprob_chosen", "chosen, held out"), ("val_logprob_rejected", "rejected")],
    ),
)
REWARD_PANELS: Sequence[Panel] = (
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
    save_figure(figure, path)
