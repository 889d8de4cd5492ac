"""Expected calibration error: how far a classifier's confidence is from its accuracy."""

import datasets
import evaluate
import numpy as np


DESCRIPTION = """Expected calibration error (Naeini et al., 2015; Guo et al., 2017): the predictions go into bins of
equal width by their confidence, the probability of the class chosen; the error is the mean over predictions of the
distance between their bin's accuracy and its mean confidence."""
INPUTS = """
Args:
    prediction_scores: (N, C) probabilities.
    references: (N,) classes.
    num_bins: between confidence 0 and 1; 15 by default.
Returns:
    calibration_error: in [0, 1]; 0 is perfect.
"""


class CalibrationError(evaluate.Metric):
    def _info(self):
        features = {"prediction_scores": datasets.Sequence(datasets.Value("float32"))}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(features | {"references": datasets.Value("int64")}),
        )

    def _compute(self, prediction_scores, references, num_bins=15):
        probabilities = np.asarray(prediction_scores, dtype=np.float64)
        confidences = probabilities.max(1)
        is_right = probabilities.argmax(1) == np.asarray(references)
        bins = np.minimum((confidences * num_bins).astype(int), num_bins - 1)
        gaps = np.bincount(bins, weights=is_right - confidences, minlength=num_bins)
        return {"calibration_error": float(np.abs(gaps).sum() / len(is_right))}
