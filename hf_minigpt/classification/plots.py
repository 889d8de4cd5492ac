"""Figures for the cards of classifiers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


# With more classes a confusion matrix has no numbers, names for so many of them, and one size
MAX_NUMBERED_CLASSES = 30
MAX_TICKS = 40
MAX_NAME = 24


def plot_confusion_matrix(matrix: np.ndarray, names: Sequence[str], path: str | Path) -> None:
    """Draw how many texts of each class were taken for which.

    More than `MAX_NUMBERED_CLASSES` classes are drawn in colours only, at a fixed size, with the names of at most
    `MAX_TICKS` of them, evenly spaced.

    Args:
        matrix: (C, C) counts, a row for each true class, a column for each predicted one.
        names: of the C classes.
        path: of the image, whose suffix tells the format.
    """
    is_numbered = len(names) <= MAX_NUMBERED_CLASSES
    size = 2.5 + 0.8 * len(names) if is_numbered else 12
    figure, axes = _figure(size, size)
    # colour by the share of the row: a rare class counts as much as a frequent one
    image = axes.imshow(matrix / np.maximum(matrix.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    ticks = range(0, len(names), -(-len(names) // MAX_TICKS))
    # a long name would leave no room for the matrix
    labels = [name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…" for name in map(names.__getitem__, ticks)]
    if is_numbered:
        rotation = 30 if len(names) > 3 else 0
        for row, column in np.ndindex(*matrix.shape):
            is_dark = matrix[row, column] > matrix[row].sum() / 2
            color = "white" if is_dark else "black"
            axes.text(column, row, f"{matrix[row, column]:,}", ha="center", va="center", color=color)
    else:
        rotation = 90
        figure.colorbar(image, label="share of the true class", shrink=0.6)
    axes.set_xticks(ticks, labels, rotation=rotation, parse_math=False)
    axes.set_yticks(ticks, labels, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.savefig(path, dpi=120)


def plot_reliability(probabilities: np.ndarray, labels: np.ndarray, path: str | Path, num_bins: int = 15) -> None:
    """Draw the accuracy of the predictions of each confidence: on the diagonal it is what the classifier claims.

    Args:
        probabilities: (N, C).
        labels: (N,) classes.
        path: of the image, whose suffix tells the format.
        num_bins: of confidence, between 0 and 1.
    """
    confidences = probabilities.max(1)
    is_right = probabilities.argmax(1) == labels
    bins = np.minimum((confidences * num_bins).astype(int), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    used = counts > 0
    accuracies = np.bincount(bins, weights=is_right, minlength=num_bins)[used] / counts[used]
    means = np.bincount(bins, weights=confidences, minlength=num_bins)[used] / counts[used]
    figure, axes = _figure(5, 4.5)
    axes.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1, label="calibrated")
    axes.plot(means, accuracies, color="tab:blue", alpha=0.6)
    # as large as the bin is full
    axes.scatter(means, accuracies, s=10 + 300 * counts[used] / counts.sum(), color="tab:blue", label="predictions")
    axes.set_xlim(1 / probabilities.shape[1] - 0.02, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("confidence")
    axes.set_ylabel("share that is right")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # imported here: nobody should wait for matplotlib who does not draw
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
