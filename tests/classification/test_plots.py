"""The figures show the numbers that they are given."""

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from hf_minigpt.classification.plots import plot_confusion_matrix, plot_reliability


def axes_of(monkeypatch, draw):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    draw()
    return figures[0].axes[0]


def test_confusion_matrix_shows_counts_and_names(tmp_path, monkeypatch):
    path = tmp_path / "matrix.png"
    matrix = np.array([[1200, 3], [40, 5]])
    axes = axes_of(monkeypatch, lambda: plot_confusion_matrix(matrix, ["no", "$yes"], path))
    assert [text.get_text() for text in axes.texts] == ["1,200", "3", "40", "5"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["no", "$yes"]
    assert path.stat().st_size > 1000


def test_reliability_diagram_shows_accuracy_by_confidence(tmp_path, monkeypatch):
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.45, 0.55]])
    axes = axes_of(
        monkeypatch, lambda: plot_reliability(probabilities, np.array([0, 1, 1]), tmp_path / "a.png", num_bins=4)
    )
    means, accuracies = axes.lines[1].get_data()
    assert np.allclose(means, [0.55, 0.85]) and np.allclose(accuracies, [1, 0.5])


@pytest.mark.parametrize("num", [31, 400])
def test_confusion_matrix_of_many_classes_has_a_fixed_size(num, tmp_path, monkeypatch):
    path = tmp_path / "matrix.png"
    names = [f"intent {i} " + "x" * 200 * (i == 0) for i in range(num)]
    axes = axes_of(monkeypatch, lambda: plot_confusion_matrix(np.eye(num, dtype=int), names, path))
    assert not axes.texts and len(axes.get_xticks()) == len(axes.get_yticks()) <= 40
    assert [label.get_text().split()[1] for label in axes.get_yticklabels()] == [
        str(int(i)) for i in axes.get_yticks()
    ]
    height, width, _ = matplotlib.image.imread(path).shape
    assert max(height, width) <= 1500
    # The names leave most of the figure to the matrix.
    assert axes.get_position().width > 0.5
