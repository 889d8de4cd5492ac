"""Share of the predictions that are right."""

import datasets
import evaluate
import numpy as np


DESCRIPTION = "Share of the predictions that equal their reference."
INPUTS = """
Args:
    predictions: (N,) classes.
    references: (N,) classes.
Returns:
    accuracy: in [0, 1].
"""


class Accuracy(evaluate.Metric):
    def _info(self):
        integers = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": integers, "references": integers}),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
