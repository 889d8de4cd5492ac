"""Metrics of `evaluate` that need no network: `evaluate.load("accuracy")` would ask the Hub for its code.

    from hf_minigpt.metrics import load_metric

    load_metric("calibration_error").compute(prediction_scores=probabilities, references=labels)

`evaluate.load` takes the path of each module in this folder, too.
"""

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import evaluate

METRICS = ("accuracy", "f1", "roc_auc", "calibration_error")


def load_metric(name: str) -> "evaluate.EvaluationModule":
    """A metric of this folder, by the name of its module.

    Raises:
        ValueError: there is none by that name.
    """
    if name not in METRICS:
        raise ValueError(f"metric {name!r} is unknown: choose one of {', '.join(METRICS)}.")
    import evaluate

    return evaluate.load(str(Path(__file__).with_name(f"{name}.py")), keep_in_memory=True)
