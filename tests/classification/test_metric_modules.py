"""The metrics against scikit-learn, and loaded as `evaluate` loads them."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
import sklearn.metrics

import hf_minigpt.metrics
from hf_minigpt.metrics import METRICS, load_metric


def predictions(num_classes, n=200, seed=0):
    generator = np.random.default_rng(seed)
    references = generator.integers(num_classes, size=n)
    scores = generator.dirichlet(np.ones(num_classes), size=n) + 0.5 * np.eye(num_classes)[references]
    # rounded: ties
    scores = np.round(scores / scores.sum(1, keepdims=True), 1).astype(np.float32)
    return scores, references


@pytest.mark.parametrize("num_classes", [2, 4])
def test_equal_scikit_learn(num_classes):
    scores, references = predictions(num_classes)
    chosen = scores.argmax(1)
    accuracy = load_metric("accuracy").compute(predictions=chosen, references=references)
    assert accuracy == {"accuracy": pytest.approx(sklearn.metrics.accuracy_score(references, chosen))}
    f1 = load_metric("f1").compute(predictions=chosen, references=references)
    assert f1 == {"f1": pytest.approx(sklearn.metrics.f1_score(references, chosen, average="macro"))}
    roc_auc = load_metric("roc_auc").compute(prediction_scores=scores, references=references)
    if num_classes == 2:
        expected = sklearn.metrics.roc_auc_score(references, scores[:, 1] - scores[:, 0])
    else:
        one_hot = np.eye(num_classes)[references]
        expected = sklearn.metrics.roc_auc_score(one_hot, scores, average="macro")
    assert roc_auc == {"roc_auc": pytest.approx(expected)}


def test_calibration_error_by_hand():
    # bins of a half: (0.5, 1] holds confidences 0.9, 0.7, 0.8, accuracy 2/3, mean confidence 0.8
    scores = [[0.9, 0.1], [0.3, 0.7], [0.2, 0.8]]
    metric = load_metric("calibration_error")
    result = metric.compute(prediction_scores=scores, references=[0, 1, 0], num_bins=2)
    assert result == {"calibration_error": pytest.approx(0.8 - 2 / 3)}
    # bins of a fifth: 0.9 and 0.8 share one, 0.7 has another
    result = metric.compute(prediction_scores=scores, references=[0, 1, 0], num_bins=5)
    assert result == {"calibration_error": pytest.approx((2 * abs(1 / 2 - 0.85) + abs(1 - 0.7)) / 3)}
    certain = metric.compute(prediction_scores=[[1.0, 0.0], [0.0, 1.0]], references=[0, 0])
    assert certain == {"calibration_error": pytest.approx(0.5)}


def test_one_class_ranks_by_chance():
    assert load_metric("roc_auc").compute(prediction_scores=[[0.2, 0.8]], references=[1]) == {"roc_auc": 0.5}


@pytest.mark.parametrize("name", METRICS)
def test_each_is_loaded_by_path(name):
    path = Path(hf_minigpt.metrics.__file__).with_name(f"{name}.py")
    assert isinstance(evaluate.load(str(path)), evaluate.Metric)


def test_an_unknown_name():
    with pytest.raises(ValueError, match="calibration_error"):
        load_metric("precision")
