"""Print the plan of a run, and write and print its results: metrics, comparisons, figures and the model card."""

from collections.abc import Mapping
from typing import Any

import torch

from ..training.arguments import ModelArguments
from ..training.console import describe_plan, print_header, print_summary
from ..training.loading import whole_model
from ..training.lora import LoraArguments
from ..training.safeguards import optional
from .arguments import ClassificationArguments, ReviewArguments
from .baseline import compare_with_baseline
from .batching import ReviewRows
from .data import ReviewSplits
from .metrics import accuracy_interval
from .report import (
    FIGURES,
    ask_command,
    classification_report,
    describe_data,
    draw_figures,
    evaluate_pipeline,
    format_classification_metrics,
    save_classification_card,
)
from .trainer import ClassificationTrainer


def print_plan(
    trainer: ClassificationTrainer, model_args: ModelArguments, splits: ReviewSplits, test_rows: ReviewRows
) -> None:
    """Print the model, the data, the device and the training plan of a run."""
    args, model, train_rows = trainer.args, trainer.model, trainer.train_dataset
    assert model is not None and isinstance(train_rows, ReviewRows)
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print_header(
        f"Finetuning into {args.output_dir}",
        {
            "model": f"{model_args.model or 'from scratch'}, {num_parameters:,} trainable parameters",
            "data": describe_data(splits, train_rows, test_rows),
            "device": args.describe_hardware(),
            "plan": f"{describe_plan(args, trainer.num_steps)}, seed {args.seed}",
        },
    )


def save_results(
    trainer: ClassificationTrainer,
    logits: torch.Tensor,
    metrics: dict[str, float],
    splits: ReviewSplits,
    model_args: ModelArguments,
    review_args: ReviewArguments,
    args: ClassificationArguments,
    lora_args: LoraArguments,
    command: str,
) -> None:
    """Write the metrics, figures and model card into the output folder, and print a summary.

    Args:
        logits: (N, C) logits of the test texts.
        metrics: metrics of the run. The confidence interval and the comparisons with the baseline and the pipeline are
            added, with the prefix "test_".
        command: command line of the run, for the card.
    """
    output_dir = str(args.output_dir)
    model: Any = trainer.model
    tokenizer: Any = trainer.processing_class
    figures: list[str] = []

    def save(more: Mapping[str, float]) -> None:
        metrics.update({f"test_{name}": value for name, value in more.items()})
        trainer.save_metrics("finetune", metrics)
        with optional("writing the model card"):
            report = classification_report(model_args, review_args, args, lora_args, model, splits, metrics, command)
            save_classification_card(report, output_dir, figures)

    # Save once before the figures and comparisons, which may take long or fail.
    more = accuracy_interval(logits, splits.test.labels)
    save(more)
    with optional("drawing the figures"):
        draw_figures(logits, splits, output_dir)
        figures.extend(FIGURES.values())
    if review_args.baseline:
        with optional("the baseline"):
            more |= compare_with_baseline(logits.argmax(-1).numpy(), splits)
    if review_args.pipeline_examples > 0:
        with optional("the evaluation through the pipeline"):
            first = splits.test.select(range(min(review_args.pipeline_examples, len(splits.test))))
            more |= evaluate_pipeline(whole_model(model, output_dir), tokenizer, first, logits[: len(first)])
    save(more)
    shown = {name.removeprefix("test_"): value for name, value in metrics.items() if name.startswith("test_")}
    shown["examples_per_second"] = metrics["train_examples_per_second"]
    next_command = ask_command(output_dir, lora_args, splits.test.texts[0][:80])
    print_summary(format_classification_metrics(shown), output_dir, ["README.md", *figures], [next_command])
