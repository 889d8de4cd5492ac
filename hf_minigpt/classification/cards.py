"""Model cards of classifiers, whose numbers come from the run that made them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard

from ..training.report import TrainingReport, fill_card, format_metrics


CLASSIFIER_USE = (
    "To sort texts like those it was trained on, in their language, and to study how a small model learns to.",
    "Not for texts of another kind without a test on some of them first, nor for decisions about people.",
)

# name -> (what the card calls it, digits)
CLASSIFICATION_METRICS = {
    "accuracy": ("Accuracy", ".2%"),
    "accuracy_low": ("Accuracy, 95 % interval from", ".2%"),
    "accuracy_high": ("Accuracy, 95 % interval to", ".2%"),
    "accuracy_mean": ("Accuracy, mean over the seeds", ".2%"),
    "accuracy_spread": ("Accuracy, standard deviation over the seeds", ".2%"),
    "f1": ("F1 (macro)", ".4f"),
    "roc_auc": ("Area under the ROC curve", ".4f"),
    "calibration_error": ("Expected calibration error (15 bins)", ".4f"),
    "loss": ("Loss (nats)", ".4f"),
    "pipeline_accuracy": ("Accuracy through the stock pipeline, on the first test texts", ".2%"),
    "same_texts_accuracy": ("Accuracy in the recipe, on the same texts", ".2%"),
    "baseline_accuracy": ("TF-IDF of words and pairs with logistic regression", ".2%"),
    "only_network_right": ("Texts that only the network has right", ",.0f"),
    "only_baseline_right": ("Texts that only the baseline has right", ",.0f"),
    "mcnemar_p": ("Chance of so uneven a share (exact McNemar test)", ".2g"),
    "share_truncated": ("Test texts longer than the context", ".1%"),
    "examples_per_second": ("Texts per second in training", ",.0f"),
}

TEMPLATE = """\
---
{metadata}
---

# {name}

{description}

## Results

On the test texts, which no step of the training has seen:

{metrics}
{figures}
## How to use

```python
from transformers import pipeline

classify = pipeline("text-classification", model="{name}", trust_remote_code=True)
print(classify("{sample}"))
```

The code of the model lies beside its weights, hence `trust_remote_code=True`; with `hf_minigpt` installed,
`import hf_minigpt` does instead.

"""


def format_classification_metrics(metrics: Mapping[str, float]) -> dict[str, str]:
    """The metrics that `CLASSIFICATION_METRICS` knows, in its order: what they are called -> number as text."""
    return format_metrics(metrics, CLASSIFICATION_METRICS)


# what the card calls them -> file in the model's folder
FIGURES = {"Confusion matrix": "confusion_matrix.png", "Reliability": "reliability.png"}
ALL_FIGURES = tuple(FIGURES.values())


def classification_card(report: TrainingReport, figures: Sequence[str] = ALL_FIGURES) -> ModelCard:
    """The card of a classifier; `figures` are the files of `FIGURES` that it shows."""
    images = [f"![{label}]({name})\n" for label, name in FIGURES.items() if name in figures]
    return fill_card(
        TEMPLATE,
        report,
        pipeline_tag="text-classification",
        task_name="Text classification",
        split="test",
        known=CLASSIFICATION_METRICS,
        figures="".join(["\n", *images]) if images else "",
        results=("accuracy", "f1", "roc_auc", "calibration_error"),
        sample=" ".join(report.sample.split()).replace("\\", "").replace('"', "'"),
    )


def save_classification_card(report: TrainingReport, folder: str | Path, figures: Sequence[str] = ALL_FIGURES) -> Path:
    """Write `README.md` into a classifier's folder; `figures` as in `classification_card`."""
    path = Path(folder) / "README.md"
    classification_card(report, figures).save(path)
    return path
