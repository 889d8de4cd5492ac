"""The results of a finished classifier: its evaluation by the pipeline, its figures and its model card."""

import shlex
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..training.arguments import ModelArguments
from ..training.lora import LoraArguments
from ..training.report import (
    TrainingReport,
    fill_card,
    format_rows,
    markdown_table,
    public_name,
    save_card,
    training_report,
)
from .arguments import ClassificationArguments, ReviewArguments
from .batching import ReviewRows
from .data import LabelledTexts, ReviewSplits
from .metrics import confusion_matrix, load_metric
from .plots import plot_confusion_matrix, plot_reliability


NUM_RESAMPLES = 200

HYPERPARAMETERS = (
    *("tokens_per_batch", "num_train_epochs", "pooling", "auxiliary_lm_weight", "dropout", "token_dropout"),
    *("adversarial_epsilon", "layer_decay", "frozen_layers", "early_stopping_patience"),
)

CLASSIFICATION_METRICS = {
    "accuracy": ("Accuracy", ".2%"),
    # made from accuracy_low and accuracy_high
    "accuracy_interval": ("Accuracy, 95% confidence interval", ""),
    "accuracy_mean": ("Accuracy, mean over seeds", ".2%"),
    "accuracy_spread": ("Accuracy, standard deviation over seeds", ".2%"),
    "f1": ("F1 (macro)", ".4f"),
    "roc_auc": ("ROC AUC", ".4f"),
    "calibration_error": ("Expected calibration error (15 bins)", ".4f"),
    "loss": ("Loss (nats)", ".4f"),
    "pipeline_accuracy": ("Accuracy of the pipeline on the first test texts", ".2%"),
    "same_texts_accuracy": ("Accuracy of the recipe on the same texts", ".2%"),
    "baseline_accuracy": ("Accuracy of TF-IDF and logistic regression", ".2%"),
    "only_network_right": ("Texts classified correctly by the model only", ",.0f"),
    "only_baseline_right": ("Texts classified correctly by the baseline only", ",.0f"),
    "mcnemar_p": ("McNemar p-value (exact)", ".2g"),
    "share_truncated": ("Test texts longer than the context", ".1%"),
    "examples_per_second": ("Texts per second in training", ",.0f"),
}

INTENDED_USE = (
    "To classify texts like those it was trained on, in their language, and to study how a small model learns to.",
    "Not for other kinds of text without testing it on some of them first, nor for decisions about people.",
)

LIMITS = (
    "The model detects the sentiment of texts like those it was trained on. It is unreliable on other texts, other "
    "languages and irony, and it always gives an answer.",
    "Its scores are estimates. The reliability diagram above shows how far they can be trusted.",
)

# label -> file in the model's folder
FIGURES = {"Confusion matrix": "confusion_matrix.png", "Reliability": "reliability.png"}

RESULTS = """\
## Results

On the test texts, which were not used in training:

{metrics}
{figures}
## How to use

```python
from transformers import pipeline

classify = pipeline("text-classification", model="{name}", trust_remote_code=True)
print(classify("{sample}"))
```

{remote_code}
"""


def evaluate_pipeline(
    model: Any, tokenizer: PreTrainedTokenizerBase, data: LabelledTexts, logits: torch.Tensor
) -> dict[str, float]:
    """Measure the accuracy of the text-classification pipeline with evaluate's evaluator.

    Args:
        model: a classifier, with or without PEFT adapters.
        tokenizer: its tokenizer.
        data: the texts and their labels.
        logits: (N, C) logits of the trainer on the same texts, for comparison.

    Returns:
        The accuracy with a bootstrap interval and the speed, and the accuracy of `logits`. Empty if scipy, which the
        evaluator requires, is not installed.
    """
    if find_spec("scipy") is None:
        return {}
    import datasets
    import evaluate

    # the evaluator accepts transformers models only; the layers of the inner model contain the adapters
    inner = model if isinstance(model, PreTrainedModel) else model.get_base_model()

    with warnings.catch_warnings():
        # if all answers are correct, or all wrong, all resamples are equal: scipy warns and returns nan
        warnings.simplefilter("ignore")
        results: Any = evaluate.evaluator("text-classification").compute(
            model_or_pipeline=inner,
            tokenizer=tokenizer,
            data=datasets.Dataset.from_dict({"text": data.texts, "label": data.labels}),
            metric=load_metric("accuracy"),
            label_mapping=inner.config.label2id,
            strategy="bootstrap",
            n_resamples=NUM_RESAMPLES,
            random_state=0,
        )
    accuracy = results["accuracy"]
    low, high = np.nan_to_num(accuracy["confidence_interval"], nan=accuracy["score"])
    return {
        "pipeline_accuracy": accuracy["score"],
        "same_texts_accuracy": (logits.argmax(-1) == torch.tensor(data.labels)).double().mean().item(),
        "pipeline_accuracy_low": float(low),
        "pipeline_accuracy_high": float(high),
        "pipeline_examples_per_second": results["samples_per_second"],
    }


def describe_data(splits: ReviewSplits, train_rows: ReviewRows, test_rows: ReviewRows) -> str:
    """Return a description of the training and test data in a few sentences."""
    return (
        f"{len(splits.train):,} training, {len(splits.validation):,} validation and {len(splits.test):,} test texts, "
        f"without {splits.num_duplicates} duplicates ({splits.num_across} of them test texts), "
        f"{splits.num_without_label} rows without a label and {splits.num_without_text} without a text. "
        f"{train_rows.lengths.sum():,} tokens per epoch. {test_rows.num_truncated / len(test_rows):.1%} of the test "
        f"texts exceed {test_rows.max_length} tokens and are truncated ({test_rows.truncation})."
    )


def draw_figures(logits: torch.Tensor, splits: ReviewSplits, folder: str | Path) -> None:
    """Draw confusion_matrix.png and reliability.png into a folder.

    Args:
        logits: (N, C) logits of the test texts.
        splits: the data, with the labels of the test texts.
        folder: where the figures are written.
    """
    labels = np.asarray(splits.test.labels)
    predictions = logits.argmax(-1).numpy()
    matrix = confusion_matrix(predictions, labels, len(splits.class_names))
    plot_confusion_matrix(matrix, splits.class_names, Path(folder, "confusion_matrix.png"))
    plot_reliability(logits.double().softmax(-1).numpy(), labels, Path(folder, "reliability.png"))


def ask_command(folder: str, lora_args: LoraArguments, text: str) -> str:
    """Return a shell command that classifies a text with the model in a folder."""
    load, options = "import hf_minigpt", f"model={folder!r}"
    if lora_args.saves_adapter:
        load = "from hf_minigpt.classification.model import load_classifier"
        options = f"model=load_classifier({folder!r}), tokenizer={folder!r}"
    call = f'pipeline("text-classification", {options})({text!r})'
    return f"python -c {shlex.quote(f'{load}; from transformers import pipeline; print({call})')}"


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation of a metric over several seeds."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def classification_report(
    model_args: ModelArguments,
    review_args: ReviewArguments,
    args: ClassificationArguments,
    lora_args: LoraArguments,
    model: torch.nn.Module,
    splits: ReviewSplits,
    metrics: Mapping[str, float],
    command: str,
) -> TrainingReport:
    """Return the report of `recipes/finetune_imdb.py`. `metrics` are those of `all_results.json`."""
    base = model_args.model
    origin = f"finetuned from {public_name(base)}" if base else "trained from scratch"
    hyperparameters = {name: getattr(args, name) for name in HYPERPARAMETERS}
    hyperparameters |= {"truncation": review_args.truncation, "context_length": metrics["context_length"]}
    # batches are measured in tokens
    hyperparameters |= {"lora_rank": lora_args.lora_rank or None, "per_device_train_batch_size": None}
    prefixed = {name.removeprefix("test_"): value for name, value in metrics.items() if name.startswith("test_")}
    return training_report(
        args,
        model,
        dataset=review_args.dataset,
        embedded_dataset=splits.name,
        base_model=base,
        hyperparameters=hyperparameters,
        description=f"A text classifier ({' or '.join(splits.class_names)}) made with hf_minigpt, {origin}.",
        data={
            "Training": f"{len(splits.train):,} texts",
            "Validation (choice of the best epoch)": f"{len(splits.validation):,} texts",
            "Test": f"{len(splits.test):,} texts",
            "Duplicates removed": f"{splits.num_duplicates:,}, of which {splits.num_across:,} were test texts",
        },
        seconds=metrics["train_runtime"],
        metrics=prefixed | {"examples_per_second": metrics["train_examples_per_second"]},
        sample=splits.test.texts[0][:80],
        command=command,
        intended_use=INTENDED_USE,
        limits=LIMITS,
    )


def format_classification_metrics(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return the formatted metrics by label, in the order of `CLASSIFICATION_METRICS`. Unknown ones are left out."""
    shown: dict[str, Any] = dict(metrics)
    if {"accuracy_low", "accuracy_high"} <= metrics.keys():
        shown["accuracy_interval"] = f"{metrics['accuracy_low']:.2%} to {metrics['accuracy_high']:.2%}"
    return format_rows(shown, CLASSIFICATION_METRICS)


def save_classification_card(
    report: TrainingReport, folder: str | Path, figures: Sequence[str] = tuple(FIGURES.values())
) -> Path:
    """Write `README.md` into a classifier's folder.

    Args:
        report: content of the card.
        folder: folder of the model.
        figures: files of `FIGURES` to show.
    """
    images = [f"![{label}]({name})\n" for label, name in FIGURES.items() if name in figures]
    card = fill_card(
        RESULTS,
        report,
        pipeline_tag="text-classification",
        task_name="Text classification",
        split="test",
        rows=CLASSIFICATION_METRICS,
        index=("accuracy", "f1", "roc_auc", "calibration_error"),
        metrics=markdown_table(["Metric", "Value"], format_classification_metrics(report.metrics).items()),
        figures="".join(["\n", *images]) if images else "",
        sample=" ".join(report.sample.split()).replace("\\", "").replace('"', "'"),
    )
    return save_card(card, folder)
