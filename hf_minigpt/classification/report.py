"""From a finished classifier to its figures and what its card says."""

import os
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
from ..training.report import HYPERPARAMETERS, TrainingReport, plain
from .arguments import ClassificationArguments, ReviewArguments
from .batching import ReviewRows
from .cards import CLASSIFICATION_METRICS, CLASSIFIER_USE
from .data import LabelledTexts, ReviewSplits
from .metrics import confusion_matrix, load_metric
from .plots import plot_confusion_matrix, plot_reliability


CLASSIFICATION_HYPERPARAMETERS = (
    *("tokens_per_batch", "num_train_epochs", "pooling", "auxiliary_lm_weight", "dropout", "token_dropout"),
    *("adversarial_epsilon", "layer_decay", "frozen_layers", "early_stopping_patience"),
)

LIMITS = (
    "It tells the sentiment of texts like those it was trained on; of other texts, other languages and irony it knows "
    "little, and it always answers.",
    "Its scores are estimates: the reliability diagram above tells how far they can be trusted.",
)

NUM_RESAMPLES = 200


def evaluate_pipeline(
    model: Any, tokenizer: PreTrainedTokenizerBase, data: LabelledTexts, logits: torch.Tensor
) -> dict[str, float]:
    """Accuracy of the text-classification pipeline by evaluate's evaluator, with a bootstrap interval; {} without
    scipy, which it needs.

    Args:
        model: may be one with PEFT's adapters.
        logits: (N, C), what the trainer has found for the same texts; their accuracy is given beside the pipeline's.
    """
    if find_spec("scipy") is None:
        return {}
    import datasets
    import evaluate

    # the evaluator takes transformers' models only: the one inside, whose layers hold the adapters
    inner = model if isinstance(model, PreTrainedModel) else model.get_base_model()

    with warnings.catch_warnings():
        # where all answers are right, or all wrong, no draw differs from another: scipy warns and gives nan
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
    """What is trained and tested on, in a sentence or two."""
    return (
        f"{len(splits.train):,} texts to train on, {len(splits.validation):,} to choose the best epoch, "
        f"{len(splits.test):,} to test; {splits.num_duplicates} duplicates left out, {splits.num_across} of them test "
        f"texts; {splits.num_without_label} rows without a label and {splits.num_without_text} without a text left "
        f"out. {train_rows.lengths.sum():,} tokens an "
        f"epoch; {test_rows.num_truncated / len(test_rows):.1%} of the test texts are longer than "
        f"{test_rows.max_length} tokens: of these, {test_rows.truncation}."
    )


def draw_figures(logits: torch.Tensor, splits: ReviewSplits, folder: str | Path) -> None:
    """Draw confusion_matrix.png and reliability.png into a folder.

    Args:
        logits: (N, C) of the test texts.
    """
    labels = np.asarray(splits.test.labels)
    predictions = logits.argmax(-1).numpy()
    matrix = confusion_matrix(predictions, labels, len(splits.class_names))
    plot_confusion_matrix(matrix, splits.class_names, Path(folder, "confusion_matrix.png"))
    plot_reliability(logits.double().softmax(-1).numpy(), labels, Path(folder, "reliability.png"))


def ask_command(folder: str, lora_args: LoraArguments, text: str) -> str:
    """The command line that asks the classifier in a folder about a text."""
    load, what = "import hf_minigpt", f"model={folder!r}"
    if lora_args.saves_adapter:
        load = "from hf_minigpt.classification.model import load_classifier"
        what = f"model=load_classifier({folder!r}), tokenizer={folder!r}"
    asked = f'pipeline("text-classification", {what})({text!r})'
    return f"python -c {shlex.quote(f'{load}; from transformers import pipeline; print({asked})')}"


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of the sample) of one figure over several seeds."""
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
    """The report of `recipes/finetune_imdb.py`; `metrics` are those of `all_results.json`."""
    on_hub = review_args.dataset is not None and not os.path.exists(review_args.dataset)
    # the folders of somebody's machine are nobody's business
    dataset = splits.name if on_hub or review_args.dataset is None else Path(splits.name).resolve().name
    base = model_args.model
    how = f"finetuned from {Path(base).name if os.path.exists(base) else base}" if base else "trained from scratch"
    names = " or ".join(splits.class_names)
    shown = [*HYPERPARAMETERS, *CLASSIFICATION_HYPERPARAMETERS]
    shown.remove("per_device_train_batch_size")
    if args.optimizer == "muon":
        shown[2:2] = ["matrix_learning_rate"]
    config: Any = model.config
    hyperparameters = {name: plain(getattr(args, name)) for name in shown}
    hyperparameters |= {"truncation": review_args.truncation, "context_length": metrics["context_length"]}
    if lora_args.lora_rank:
        hyperparameters |= {"lora_rank": lora_args.lora_rank}
    figures = {name: metrics[f"test_{name}"] for name in CLASSIFICATION_METRICS if f"test_{name}" in metrics}
    return TrainingReport(
        name=args.hub_model_id or Path(args.output_dir or "").resolve().name,
        description=f"A classifier of texts, {names}, made with hf_minigpt and {how}.",
        num_parameters=sum(p.numel() for p in model.parameters()),
        architecture={
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "heads": config.num_attention_heads,
            "context": config.max_position_embeddings,
            "vocabulary": config.unpadded_vocab_size or config.vocab_size,
        },
        dataset=dataset,
        dataset_on_hub=on_hub,
        data={
            "Trained on": f"{len(splits.train):,} texts",
            "Best epoch chosen on": f"{len(splits.validation):,} texts",
            "Tested on": f"{len(splits.test):,} texts",
            "Duplicates left out": f"{splits.num_duplicates:,}, of which {splits.num_across:,} were test texts",
        },
        hyperparameters=hyperparameters,
        hardware=args.describe_hardware(),
        seconds=metrics["train_runtime"],
        metrics=figures | {"examples_per_second": metrics["train_examples_per_second"]},
        sample=splits.test.texts[0][:80],
        command=command,
        intended_use=CLASSIFIER_USE,
        limits=LIMITS,
        license="mit" if review_args.dataset is None else "unknown",
        language="en" if review_args.dataset is None else None,
        base_model=base if base and not os.path.exists(base) else None,
    )
