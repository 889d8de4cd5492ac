"""F1: the harmonic mean of precision and recall, averaged over the classes."""

import datasets
import evaluate
import numpy as np


DESCRIPTION = "F1 of each class, 2 TP / (2 TP + FP + FN), averaged over the classes that occur (macro)."
INPUTS = """
Args:
    predictions: (N,) classes.
    references: (N,) classes.
Returns:
    f1: in [0, 1].
"""


class F1(evaluate.Metric):
    def _info(self):
        integers = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": integers, "references": integers}),
        )

    def _compute(self, predictions, references):
        predictions, references = np.asarray(predictions), np.asarray(references)
        scores = []
        for number in np.union1d(predictions, references):
            hits = np.sum((predictions == number) & (references == number))
            scores.append(2 * hits / (np.sum(predictions == number) + np.sum(references == number)))
        return {"f1": float(np.mean(scores))}
