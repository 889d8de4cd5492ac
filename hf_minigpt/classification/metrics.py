"""How good a classifier is, how sure one can be of it, and whether it is better than another."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from ..metrics import load_metric


def classification_metrics(logits: torch.Tensor, labels: Sequence[int] | np.ndarray) -> dict[str, float]:
    """
    Args:
        logits: (N, C).
        labels: (N,) classes.

    Returns:
        loss: nats.
        accuracy, f1 (macro), roc_auc, calibration_error: of `hf_minigpt.metrics`.
    """
    references = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    probabilities = logits.double().softmax(-1).numpy()
    predictions = logits.argmax(-1).numpy()
    metrics = {"loss": F.cross_entropy(logits.double(), references).item()}
    for name in ("accuracy", "f1"):
        metrics |= load_metric(name).compute(predictions=predictions, references=references.numpy())
    for name in ("roc_auc", "calibration_error"):
        metrics |= load_metric(name).compute(prediction_scores=probabilities, references=references.numpy())
    return metrics


def confusion_matrix(predictions: np.ndarray, labels: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) counts: a row for each true class, a column for each predicted one."""
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(matrix, (np.asarray(labels), predictions), 1)
    return matrix


def bootstrap_interval(
    is_right: np.ndarray, confidence_level: float = 0.95, num_resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of an accuracy.

    Args:
        is_right: (N,) booleans.
    """
    # how many of N draws with replacement are right is binomial: no draw needs to be made one by one
    share = float(np.mean(is_right))
    draws = np.random.Generator(np.random.PCG64(seed)).binomial(len(is_right), share, size=num_resamples)
    low, high = np.quantile(draws / len(is_right), [(1 - confidence_level) / 2, (1 + confidence_level) / 2])
    return float(low), float(high)


def accuracy_interval(logits: torch.Tensor, labels: Sequence[int] | np.ndarray) -> dict[str, float]:
    """The 95 % interval of an accuracy, as `accuracy_low` and `accuracy_high`; arguments as above."""
    low, high = bootstrap_interval(logits.argmax(-1).numpy() == np.asarray(labels))
    return {"accuracy_low": low, "accuracy_high": high}


def mcnemar_test(is_right: np.ndarray, other_is_right: np.ndarray) -> tuple[int, int, float]:
    """Exact McNemar test (1947) of two classifiers on the same texts.

    Args:
        is_right, other_is_right: (N,) booleans.

    Returns:
        How many texts only the first has right, how many only the other; and the chance of so uneven a share, or a
        more uneven one, if both were equally good (two-sided).
    """
    only_first = int(np.sum(is_right & ~other_is_right))
    only_other = int(np.sum(~is_right & other_is_right))
    num = only_first + only_other
    # Python's integers are exact: no sum of tiny floats
    tail = sum(math.comb(num, k) for k in range(min(only_first, only_other) + 1))
    return only_first, only_other, min(2 * tail / 2**num, 1.0)
