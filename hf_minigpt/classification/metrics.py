"""Metrics of a classifier, and statistics to compare two classifiers."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F


if TYPE_CHECKING:
    import evaluate


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the fraction of correct predictions.

    Args:
        predictions, references: (N,) class numbers.
    """
    return float(np.mean(np.asarray(predictions) == np.asarray(references)))


def f1(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the macro F1: 2 TP / (2 TP + FP + FN), averaged over the classes that occur.

    Args:
        predictions, references: (N,) class numbers.
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    scores = []
    for number in np.union1d(predictions, references):
        hits = np.sum((predictions == number) & (references == number))
        scores.append(2 * hits / (np.sum(predictions == number) + np.sum(references == number)))
    return float(np.mean(scores))


def roc_auc(prediction_scores: np.ndarray, references: np.ndarray) -> float:
    """Return the area under the ROC curve. With more than two classes, average one-vs-rest over those that occur.

    Args:
        prediction_scores: (N, C) probabilities, or scores on any scale if C = 2.
        references: (N,) class numbers. If all are equal, the area is 0.5.
    """
    scores, references = np.asarray(prediction_scores, dtype=np.float64), np.asarray(references)
    if scores.shape[1] == 2:
        return _area(scores[:, 1] - scores[:, 0], references == 1)
    return float(np.mean([_area(scores[:, number], references == number) for number in np.unique(references)]))


def _area(scores: np.ndarray, is_member: np.ndarray) -> float:
    """Area under the ROC curve of one class, by the rank sum of Mann and Whitney (1947)."""
    num_members = is_member.sum()
    num_others = len(is_member) - num_members
    if num_members == 0 or num_others == 0:
        return 0.5
    _, positions, counts = np.unique(scores, return_inverse=True, return_counts=True)
    # Ties share the mean of their ranks.
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[positions]
    return float((ranks[is_member].sum() - num_members * (num_members + 1) / 2) / (num_members * num_others))


def calibration_error(prediction_scores: np.ndarray, references: np.ndarray, num_bins: int = 15) -> float:
    """Return the expected calibration error (Naeini et al., 2015; Guo et al., 2017).

    Predictions are binned by confidence, the probability of the predicted class. The error is the mean over all
    predictions of the distance between the accuracy and the mean confidence in their bin.

    Args:
        prediction_scores: (N, C) probabilities.
        references: (N,) class numbers.
        num_bins: number of bins of equal width between confidence 0 and 1.
    """
    probabilities = np.asarray(prediction_scores, dtype=np.float64)
    confidences = probabilities.max(1)
    is_correct = probabilities.argmax(1) == np.asarray(references)
    bins = np.minimum((confidences * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, weights=is_correct - confidences, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(is_correct))


PREDICTION_METRICS = {"accuracy": accuracy, "f1": f1}
SCORE_METRICS = {"roc_auc": roc_auc, "calibration_error": calibration_error}


def load_metric(name: str) -> "evaluate.Metric":
    """Return a metric of this file as a metric of `evaluate`, without the download of `evaluate.load`.

    Args:
        name: "accuracy" or "f1", computed from `predictions` and `references`, or "roc_auc" or "calibration_error",
            computed from `prediction_scores` and `references`.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in PREDICTION_METRICS | SCORE_METRICS:
        known = ", ".join(PREDICTION_METRICS | SCORE_METRICS)
        raise ValueError(f"metric {name!r} is unknown. Choose one of {known}.")
    # imported here, because it takes seconds and few runs need it
    from .evaluate_metric import ClassificationMetric

    return ClassificationMetric(config_name=name, keep_in_memory=True)


def classification_metrics(logits: torch.Tensor, labels: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Return the loss (nats), accuracy, macro F1, area under the ROC curve and expected calibration error.

    Args:
        logits: (N, C).
        labels: (N,) class numbers.
    """
    references = np.asarray(labels)
    predictions = logits.argmax(-1).numpy()
    probabilities = logits.double().softmax(-1).float().numpy()
    loss = F.cross_entropy(logits.double(), torch.as_tensor(references, dtype=torch.int64)).item()
    return (
        {"loss": loss}
        | {name: metric(predictions, references) for name, metric in PREDICTION_METRICS.items()}
        | {name: metric(probabilities, references) for name, metric in SCORE_METRICS.items()}
    )


def confusion_matrix(predictions: np.ndarray, labels: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    """Return (C, C) counts, with a row per true class and a column per predicted class."""
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(matrix, (np.asarray(labels), predictions), 1)
    return matrix


def bootstrap_interval(
    is_correct: np.ndarray, confidence_level: float = 0.95, num_resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap confidence interval of an accuracy.

    Args:
        is_correct: (N,) booleans.
    """
    # The number of correct predictions in a resample is binomial, so that no resample has to be drawn item by item.
    share = float(np.mean(is_correct))
    draws = np.random.Generator(np.random.PCG64(seed)).binomial(len(is_correct), share, size=num_resamples)
    low, high = np.quantile(draws / len(is_correct), [(1 - confidence_level) / 2, (1 + confidence_level) / 2])
    return float(low), float(high)


def accuracy_interval(logits: torch.Tensor, labels: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Return the 95% confidence interval of the accuracy, as `accuracy_low` and `accuracy_high`.

    Args:
        logits: (N, C).
        labels: (N,) class numbers.
    """
    low, high = bootstrap_interval(logits.argmax(-1).numpy() == np.asarray(labels))
    return {"accuracy_low": low, "accuracy_high": high}


def mcnemar_test(is_correct: np.ndarray, other_is_correct: np.ndarray) -> tuple[int, int, float]:
    """Compare two classifiers on the same texts by the exact McNemar test (1947).

    Args:
        is_correct, other_is_correct: (N,) booleans.

    Returns:
        The number of texts that only the first classifier gets right, the number that only the other gets right, and
        the two-sided p-value.
    """
    only_first = int(np.sum(is_correct & ~other_is_correct))
    only_other = int(np.sum(~is_correct & other_is_correct))
    num = only_first + only_other
    # Python's integers are exact, where floats would underflow.
    tail = sum(math.comb(num, k) for k in range(min(only_first, only_other) + 1))
    return only_first, only_other, min(2 * tail / 2**num, 1.0)
