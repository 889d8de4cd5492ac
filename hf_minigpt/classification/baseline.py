"""A linear baseline: logistic regression on the TF-IDF of words and word pairs, by scikit-learn."""

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from .data import LabelledTexts, ReviewSplits
from .metrics import mcnemar_test


# Inverse regularisation strengths to choose from.
STRENGTHS = (1.0, 4.0, 16.0)


def check_baseline_possible() -> None:
    """Raise ValueError if scikit-learn is not installed."""
    if find_spec("sklearn") is None:
        raise ValueError("baseline=True requires scikit-learn. Install 'hf_minigpt[baseline]', or leave baseline out.")


def linear_baseline(train: LabelledTexts, validation: LabelledTexts, texts: Sequence[str]) -> np.ndarray:
    """Train the baseline and return its predicted class numbers (N,) for `texts`.

    The regularisation strength is chosen by the accuracy on `validation`. The final fit uses `train` and `validation`,
    which makes the baseline stronger.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    def fit(data: LabelledTexts, strength: float):
        # scikit-learn's default pattern drops words of one letter, such as "I".
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"\b\w+\b")
        model = LogisticRegression(C=strength, max_iter=1000)
        model.fit(vectorizer.fit_transform(data.texts), data.labels)
        return lambda texts: model.predict(vectorizer.transform(texts))

    def validation_accuracy(strength: float) -> float:
        return float(np.mean(fit(train, strength)(validation.texts) == np.asarray(validation.labels)))

    best = max(STRENGTHS, key=validation_accuracy)
    both = LabelledTexts(train.texts + validation.texts, train.labels + validation.labels)
    return fit(both, best)(texts)


def compare_with_baseline(predictions: np.ndarray, splits: ReviewSplits) -> dict[str, float]:
    """Train the baseline on the same split and compare the network with it on the test texts (`mcnemar_test`).

    Args:
        predictions: (N,) class numbers that the network predicts for the test texts.
    """
    labels = np.asarray(splits.test.labels)
    baseline = linear_baseline(splits.train, splits.validation, splits.test.texts)
    only_network, only_baseline, p = mcnemar_test(predictions == labels, baseline == labels)
    return {
        "baseline_accuracy": float(np.mean(baseline == labels)),
        "only_network_right": only_network,
        "only_baseline_right": only_baseline,
        "mcnemar_p": p,
    }
