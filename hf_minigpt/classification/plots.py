"""Figures of the model cards of classifiers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..publishing.plots import new_figure


# A confusion matrix of more classes has a fixed size and no numbers, and at most MAX_TICKS class names.
MAX_NUMBERED_CLASSES = 30
MAX_TICKS = 40
MAX_NAME_LENGTH = 24


def plot_confusion_matrix(matrix: np.ndarray, names: Sequence[str], path: str | Path) -> None:
    """Draw a confusion matrix.

    Args:
        matrix: (C, C) counts, with a row per true class and a column per predicted class.
        names: names of the C classes.
        path: image to write. The suffix determines the format.
    """
    is_numbered = len(names) <= MAX_NUMBERED_CLASSES
    size = 2.5 + 0.8 * len(names) if is_numbered else 12
    figure, axes = new_figure(size, size)
    # Colours show shares of the row, so that rare classes are as visible as frequent ones.
    image = axes.imshow(matrix / np.maximum(matrix.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    ticks = range(0, len(names), -(-len(names) // MAX_TICKS))
    # Long names would leave no room for the matrix.
    shown = [names[i] for i in ticks]
    labels = [name if len(name) <= MAX_NAME_LENGTH else f"{name[: MAX_NAME_LENGTH - 1]}…" for name in shown]
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
    """Draw a reliability diagram: accuracy against confidence, which are equal for a calibrated classifier.

    Args:
        probabilities: (N, C).
        labels: (N,) class numbers.
        path: image to write. The suffix determines the format.
        num_bins: number of bins of equal width between confidence 0 and 1.
    """
    confidences = probabilities.max(1)
    is_correct = probabilities.argmax(1) == labels
    bins = np.minimum((confidences * num_bins).astype(int), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    used = counts > 0
    accuracies = np.bincount(bins, weights=is_correct, minlength=num_bins)[used] / counts[used]
    means = np.bincount(bins, weights=confidences, minlength=num_bins)[used] / counts[used]
    figure, axes = new_figure(5, 4.5)
    axes.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1, label="calibrated")
    axes.plot(means, accuracies, color="tab:blue", alpha=0.6)
    # The size of a point shows the number of predictions in the bin.
    axes.scatter(means, accuracies, s=10 + 300 * counts[used] / counts.sum(), color="tab:blue", label="predictions")
    axes.set_xlim(1 / probabilities.shape[1] - 0.02, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
