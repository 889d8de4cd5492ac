"""The metrics of metrics.py as metrics of `evaluate`, for its evaluators and `evaluate.combine`."""

import datasets
import evaluate

from .metrics import PREDICTION_METRICS, SCORE_METRICS


class ClassificationMetric(evaluate.Metric):
    """The metric of metrics.py that `config_name` names."""

    def _info(self):
        integer, scores = datasets.Value("int64"), datasets.Sequence(datasets.Value("float32"))
        inputs = {"predictions": integer} if self.config_name in PREDICTION_METRICS else {"prediction_scores": scores}
        return evaluate.MetricInfo(
            description=self._function.__doc__,
            citation="",
            inputs_description="references: (N,) class numbers; see the description.",
            features=datasets.Features(inputs | {"references": integer}),
        )

    @property
    def _function(self):
        return (PREDICTION_METRICS | SCORE_METRICS)[self.config_name]

    def _compute(self, **inputs):
        return {self.config_name: self._function(**inputs)}
