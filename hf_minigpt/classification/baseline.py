"""The yardstick: logistic regression on words and pairs of words. scikit-learn is needed only here."""

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from .data import LabelledTexts, ReviewSplits
from .metrics import mcnemar_test


# inverse strengths of the regularisation, of which the validation texts choose one
STRENGTHS = (1.0, 4.0, 16.0)


def check_baseline_possible() -> None:
    """Raise ValueError where scikit-learn is missing, before anything takes long."""
    if find_spec("sklearn") is None:
        raise ValueError("baseline=True needs scikit-learn: pip install 'hf_minigpt[baseline]', or leave it out.")


def linear_baseline(train: LabelledTexts, validation: LabelledTexts, texts: Sequence[str]) -> np.ndarray:
    """Predictions (N,) of TF-IDF of words and pairs of words with logistic regression.

    The strength of its regularisation is chosen on `validation`, and the final fit is on both: it has no other use
    for held-out texts, and a yardstick shall be as good as it can be.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    def fit(data: LabelledTexts, strength: float):
        # one-letter words too: "I" and "a" tell as much as others
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
    """Train the baseline on the same split and test which is better (`mcnemar_test`).

    Args:
        predictions: (N,) classes of the test texts, by the network.
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
