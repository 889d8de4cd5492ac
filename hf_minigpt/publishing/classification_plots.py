"""Figures for the cards of classifiers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plot_confusion_matrix(matrix: np.ndarray, names: Sequence[str], path: str | Path) -> None:
    """Draw how many texts of each class were taken for which.

    Args:
        matrix: (C, C) counts, a row for each true class, a column for each predicted one.
        names: of the C classes.
        path: of the image, whose suffix tells the format.
    """
    size = 2.5 + 0.8 * len(names)
    figure, axes = _figure(size, size)
    # colour by the share of the row: a rare class counts as much as a frequent one
    axes.imshow(matrix / np.maximum(matrix.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*matrix.shape):
        is_dark = matrix[row, column] > matrix[row].sum() / 2
        axes.text(
            column, row, f"{matrix[row, column]:,}", ha="center", va="center", color="white" if is_dark else "black"
        )
    axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 3 else 0, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
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
