"""Figures of model cards: losses, and what a model attends to and predicts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a matplotlib figure (width and height in inches) and its axes, independent of pyplot and displays."""
    # imported here, because importing matplotlib takes long
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def plot_losses(
    log_history: Sequence[dict[str, Any]], path: str | Path, floor: float | None = None, title: str = ""
) -> None:
    """Draw the training and held-out loss against tokens seen, or against steps if tokens were not logged.

    Args:
        log_history: log history of the Trainer: entries with `loss` or `eval_loss` (nats per token), and
            `num_input_tokens_seen` or `step`.
        path: image to write. The suffix determines the format.
        floor: lower bound of the loss (nats per token), drawn as a line.
    """
    from matplotlib.ticker import EngFormatter

    figure, axes = new_figure(7, 4)
    entries = [entry for entry in log_history if "loss" in entry or "eval_loss" in entry]
    x = "num_input_tokens_seen" if all("num_input_tokens_seen" in entry for entry in entries) else "step"
    for key, label, style in (("loss", "training", {"alpha": 0.6}), ("eval_loss", "held out", {"marker": "."})):
        points = [(entry[x], entry[key]) for entry in entries if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    if floor is not None:
        axes.axhline(floor, color="black", linestyle=":", linewidth=1, label="entropy of the source")
    axes.set_xlabel("steps" if x == "step" else "tokens seen")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_rungs(
    held_out: dict[str, float], training: dict[str, float], path: str | Path, floor: float | None = None
) -> None:
    """Draw the losses of a ladder of models: a bar for the held-out loss and a dot for the training loss of each rung.

    Args:
        held_out, training: loss of each rung (nats per token), from the lowest rung to the highest.
        path: image to write. The suffix determines the format.
        floor: lower bound of the loss (nats per token), drawn as a line.
    """
    figure, axes = new_figure(8, 4.5)
    names = list(held_out)
    bars = axes.bar(names, list(held_out.values()), color="tab:blue", alpha=0.8, label="held out")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.scatter(names, [training[name] for name in names], color="black", marker=".", zorder=3, label="training")
    if floor is not None:
        axes.axhline(floor, color="black", linestyle=":", linewidth=1, label="entropy of the source")
    axes.set_ylabel("loss (nats per token)")
    axes.tick_params("x", rotation=30)
    axes.margins(y=0.1)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
