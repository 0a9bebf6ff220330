"""The picture of a training: loss over steps."""

from __future__ import annotations

from pathlib import Path

from fewbits.finetuning.loop import Outcome
from fewbits.measure.report.palette import LIGHT

WINDOW = 0.05  # share of the steps that the smooth line averages over


def draw(outcome: Outcome, file: Path) -> bool:
    """Draw `outcome` into a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    steps, losses = zip(*outcome.losses, strict=True) if outcome.losses else ((), ())
    axes.plot(steps, losses, color=LIGHT["rule"], linewidth=0.8, label="of each step")
    axes.plot(steps, smooth(losses), color=LIGHT["accent"], linewidth=1.6, label="its mean")
    if outcome.held_out:
        axes.plot(*zip(*outcome.held_out, strict=True), color=LIGHT["note"], marker="o", markersize=4,
                  label="on held-out text")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)
    return True


def smooth(losses: tuple[float, ...] | list[float]) -> list[float]:
    """Mean of each value and those shortly before it."""
    window = max(1, round(WINDOW * len(losses)))
    return [sum(losses[max(0, i + 1 - window):i + 1]) / min(window, i + 1) for i in range(len(losses))]
