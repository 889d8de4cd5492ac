"""The metrics and statistics equal those of scikit-learn and scipy, also as metrics of `evaluate`."""

import math

import evaluate
import numpy as np
import pytest
import sklearn.metrics
import torch
from scipy.stats import binomtest

from hf_minigpt.classification import metrics
from hf_minigpt.classification.report import spread


def scores_and_references(num_classes, n=200, seed=0):
    generator = np.random.default_rng(seed)
    references = generator.integers(num_classes, size=n)
    scores = generator.dirichlet(np.ones(num_classes), size=n) + 0.5 * np.eye(num_classes)[references]
    # Rounding produces ties.
    scores = np.round(scores / scores.sum(1, keepdims=True), 1).astype(np.float32)
    return scores, references


@pytest.mark.parametrize("num_classes", [2, 4])
def test_metrics_equal_those_of_scikit_learn(num_classes):
    scores, references = scores_and_references(num_classes)
    predictions = scores.argmax(1)
    if num_classes == 2:
        roc_auc = sklearn.metrics.roc_auc_score(references, scores[:, 1] - scores[:, 0])
    else:
        roc_auc = sklearn.metrics.roc_auc_score(np.eye(num_classes)[references], scores, average="macro")
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(references, predictions),
        "f1": sklearn.metrics.f1_score(references, predictions, average="macro"),
        "roc_auc": roc_auc,
    }
    for name, value in expected.items():
        inputs = {"prediction_scores": scores} if name == "roc_auc" else {"predictions": predictions}
        assert getattr(metrics, name)(*inputs.values(), references) == pytest.approx(value), name
        assert metrics.load_metric(name).compute(**inputs, references=references) == {name: pytest.approx(value)}


def test_calibration_error_equals_a_computation_by_hand():
    scores = np.array([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8]])
    # With 2 bins, all confidences share one: accuracy 2/3, mean confidence 0.8.
    assert metrics.calibration_error(scores, [0, 1, 0], num_bins=2) == pytest.approx(0.8 - 2 / 3)
    # With 5 bins, 0.9 and 0.8 share one, and 0.7 has another.
    by_hand = (2 * abs(1 / 2 - 0.85) + abs(1 - 0.7)) / 3
    assert metrics.calibration_error(scores, [0, 1, 0], num_bins=5) == pytest.approx(by_hand)
    metric = metrics.load_metric("calibration_error")
    assert metric.compute(prediction_scores=scores, references=[0, 1, 0], num_bins=5) == {
        "calibration_error": pytest.approx(by_hand)
    }
    assert metrics.calibration_error([[1.0, 0.0], [0.0, 1.0]], [0, 0]) == 0.5


def test_area_is_one_half_for_a_single_class():
    assert metrics.roc_auc([[0.2, 0.8]], [1]) == 0.5


def test_metrics_can_be_combined_by_evaluate():
    combined = evaluate.combine([metrics.load_metric("accuracy"), metrics.load_metric("f1")])
    assert combined.compute(predictions=[0, 1, 1], references=[0, 1, 0]) == pytest.approx(
        {"accuracy": 2 / 3, "f1": 2 / 3}
    )


def test_unknown_metric_is_named():
    with pytest.raises(ValueError, match=r"'precision'.*calibration_error"):
        metrics.load_metric("precision")


def test_classification_metrics_and_confusion_matrix_equal_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    logits, labels = torch.from_numpy(generator.normal(size=(50, 3))).float(), generator.integers(3, size=50)
    found = metrics.classification_metrics(logits, labels)
    assert list(found) == ["loss", "accuracy", "f1", "roc_auc", "calibration_error"]
    probabilities = logits.double().softmax(-1).numpy()
    predictions = logits.argmax(-1).numpy()
    assert found["loss"] == pytest.approx(sklearn.metrics.log_loss(labels, probabilities))
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predictions))
    matrix = metrics.confusion_matrix(predictions, labels, 3)
    assert (matrix == sklearn.metrics.confusion_matrix(labels, predictions)).all()


def test_mcnemar_test_equals_the_binomial_test():
    ours = np.array([True] * 30 + [False] * 12 + [True] * 100)
    other = np.array([False] * 30 + [True] * 12 + [True] * 100)
    expected = binomtest(12, 42, 0.5).pvalue
    assert metrics.mcnemar_test(ours, other) == (30, 12, pytest.approx(expected))
    assert metrics.mcnemar_test(other, ours) == (12, 30, pytest.approx(expected))
    assert metrics.mcnemar_test(ours, ours) == (0, 0, 1.0)
    # 2**4000 exceeds the range of floats.
    many = np.arange(4000) % 5 < 2
    assert metrics.mcnemar_test(many, ~many)[2] == pytest.approx(binomtest(1600, 4000, 0.5).pvalue)


def test_bootstrap_interval_equals_that_of_explicit_resamples():
    is_correct = np.arange(500) % 10 > 0
    generator = np.random.default_rng(1)
    means = [is_correct[generator.integers(500, size=500)].mean() for _ in range(4000)]
    expected = [np.quantile(means, 0.025), np.quantile(means, 0.975)]
    assert list(metrics.bootstrap_interval(is_correct)) == pytest.approx(expected, abs=0.004)


def test_spread_is_mean_and_sample_deviation():
    assert spread([0.9, 0.92]) == (pytest.approx(0.91), pytest.approx(0.02 / math.sqrt(2)))
    assert spread([0.9]) == (0.9, 0.0)
