"""Area under the ROC curve: how well the scores rank, whatever threshold is chosen."""

import datasets
import evaluate
import numpy as np


DESCRIPTION = """Chance that a random example of a class gets a higher score for it than a random one of the other
classes, ties counting half (the statistic of Mann and Whitney); averaged over the classes that occur, if more than
two."""
INPUTS = """
Args:
    prediction_scores: (N, C) a score for each class, of any scale where there are two, else probabilities.
    references: (N,) classes.
Returns:
    roc_auc: in [0, 1]; 0.5 is chance, and what a single class gives.
"""


class RocAuc(evaluate.Metric):
    def _info(self):
        features = {"prediction_scores": datasets.Sequence(datasets.Value("float32"))}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(features | {"references": datasets.Value("int64")}),
        )

    def _compute(self, prediction_scores, references):
        scores, references = np.asarray(prediction_scores, dtype=np.float64), np.asarray(references)
        if scores.shape[1] == 2:
            areas = [area(scores[:, 1] - scores[:, 0], references == 1)]
        else:
            areas = [area(scores[:, number], references == number) for number in np.unique(references)]
        return {"roc_auc": float(np.mean(areas))}


def area(scores, is_member):
    """Area of one class's curve, from the ranks of its members' scores."""
    num_members = is_member.sum()
    num_others = len(is_member) - num_members
    if num_members == 0 or num_others == 0:
        return 0.5
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    # equal scores share the mean of their ranks
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return (ranks[is_member].sum() - num_members * (num_members + 1) / 2) / (num_members * num_others)
