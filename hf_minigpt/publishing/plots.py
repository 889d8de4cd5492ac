"""Figures for model cards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_losses(
    log_history: Sequence[dict[str, Any]], path: str | Path, floor: float | None = None, title: str = ""
) -> None:
    """Draw training and held-out loss against tokens seen, or against steps where the tokens were not logged.

    Args:
        log_history: the Trainer's; entries with `loss` or `eval_loss` (nats per token), and with
            `num_input_tokens_seen` or `step`.
        path: of the image, whose suffix tells the format.
        floor: a loss that no model can beat (nats per token), drawn as a line.
    """
    # imported here: nobody should wait for matplotlib who does not draw
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
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
    """Draw the loss of each rung of a ladder, a bar for held-out text and a dot for the text trained on.

    Args:
        held_out, training: nats per token by rung, in the order of the climb.
        path: of the image, whose suffix tells the format.
        floor: a loss that no model can beat (nats per token), drawn as a line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
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


def plot_attention_mask(mask: Any, tokens: Sequence[str], path: str | Path) -> None:
    """Draw which tokens each token may attend to, as a heatmap.

    Args:
        mask: (T, T) booleans, a row for each token that attends.
        tokens: the T tokens as they shall be written.
        path: of the image, whose suffix tells the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    size = 2.5 + 0.3 * len(tokens)
    figure = Figure(figsize=(size, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = ("lightgrey", "tab:blue")
    axes.pcolormesh(mask, cmap=ListedColormap(colors), vmin=0, vmax=1, edgecolors="white", linewidth=1)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.set_xticks([i + 0.5 for i in range(len(tokens))], tokens, rotation=90, parse_math=False)
    axes.set_yticks([i + 0.5 for i in range(len(tokens))], tokens, parse_math=False)
    axes.xaxis.tick_top()
    axes.set_ylabel("this token")
    axes.set_xlabel("attends to")
    axes.xaxis.set_label_position("top")
    figure.legend(
        handles=[Patch(color=colors[1], label="seen"), Patch(color=colors[0], label="masked")],
        loc="outside lower center",
        ncols=2,
    )
    figure.savefig(path, dpi=120)


def plot_next_tokens(probabilities: Sequence[float], tokens: Sequence[str], path: str | Path, title: str = "") -> None:
    """Draw the likeliest next tokens as bars.

    Args:
        probabilities: in the order in which they shall stand, from the top.
        tokens: the tokens as they shall be written.
        path: of the image, whose suffix tells the format.
        title: for instance the prompt.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.2 + 0.28 * len(tokens)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(tokens))
    bars = axes.barh(places, probabilities, color="tab:blue", alpha=0.8)
    axes.bar_label(bars, fmt="%.2g", padding=3)
    axes.set_yticks(places, tokens, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("probability of being the next token")
    axes.margins(x=0.15)
    axes.set_title(title, parse_math=False, wrap=True)
    figure.savefig(path, dpi=120)
