"""Model cards: what the cards of all jobs share. Each job's report.py adds its results."""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from ..flags import enum_value
from .arguments import RecipeArguments


# Rows of a table: metric -> (label, format)
Rows = Mapping[str, tuple[str, str]]

HYPERPARAMETERS = (
    "optimizer",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "seed",
)

INTENDED_USE = (
    "To study what a language model of this size learns from this dataset, to generate text in its style, and to "
    "finetune for other tasks.",
    "Not for facts, advice or decisions about people, nor for text that is published without review.",
)

LICENCES = {
    "mit": "Code and weights are under the MIT licence.",
    "unknown": "The code is under the MIT licence. The weights were trained on the dataset above, whose terms decide "
    "how they may be used.",
}

REMOTE_CODE = """\
The repository contains the code of the model, which `trust_remote_code=True` allows to run. With `hf_minigpt`
installed, `import hf_minigpt` replaces it."""

HEAD = """\
---
{metadata}
---

# {name}

{description}

"""

TRAINING = """\

## Data

{data}

## Training

```bash
{command}
```

{training}

{hyperparameters}

## Intended use

{intended_use}

## Limits

{limits}

## Licence

{licence}
"""


@dataclass
class TrainingReport:
    """The content of a model card.

    Attributes:
        name: name of the model.
        description: one or two sentences on what it is.
        num_parameters: number of parameters, with embeddings.
        architecture: sizes of the model, by label.
        dataset: name of the dataset.
        data: facts about the data, by label.
        hyperparameters: values by flag.
        hardware: devices and precision.
        seconds: training time.
        metrics: values by metric.
        sample: a generated text, or for a classifier an input.
        command: command line of the run. The card leaves out the value of `--hub_token`.
        plot: file name of the loss plot in the folder of the card.
        limits: sentences on what the model cannot do.
        license: license id of the Hub.
        language: ISO 639-1 code, or None if unknown.
        base_model: Hub name of the model that was finetuned.
        dataset_on_hub: whether `dataset` is a name on the Hub.
        tags: tags on the Hub.
        intended_use: sentences on what the model is for, and what it is not for.
    """

    name: str
    description: str
    num_parameters: int
    architecture: Mapping[str, Any]
    dataset: str
    data: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]
    hardware: str
    seconds: float
    metrics: Mapping[str, float]
    sample: str
    command: str
    plot: str | None = None
    limits: Sequence[str] = ()
    license: str = "unknown"
    language: str | None = None
    base_model: str | None = None
    dataset_on_hub: bool = False
    tags: Sequence[str] = ("minigpt",)
    intended_use: Sequence[str] = INTENDED_USE


def public_name(name_or_path: str) -> str:
    """Return a Hub name as it is, and of a path only the last part, because folders of a machine are private."""
    return Path(name_or_path).resolve().name if os.path.exists(name_or_path) else name_or_path


def training_report(
    args: RecipeArguments,
    model: nn.Module,
    *,
    dataset: str | None,
    embedded_dataset: str,
    base_model: str | None,
    hyperparameters: Mapping[str, Any],
    **fields: Any,
) -> TrainingReport:
    """Make the report of a run from its arguments and model.

    Args:
        args: arguments of the run.
        model: the trained model, with a `MiniGPTConfig`.
        dataset: folder, file or Hub name of the dataset. None: the embedded one.
        embedded_dataset: name of the embedded dataset.
        base_model: folder or Hub name of the model that was finetuned, if any.
        hyperparameters: shown after those of `HYPERPARAMETERS`. Values that are None are left out.
        fields: the other fields of `TrainingReport`.
    """
    config: Any = model.config
    shown = list(HYPERPARAMETERS)
    if args.optimizer == "muon":
        shown[2:2] = ["matrix_learning_rate", "embedding_learning_rate", "muon_scaling"]
    values = {name: enum_value(getattr(args, name)) for name in shown} | dict(hyperparameters)
    return TrainingReport(
        name=args.hub_model_id or Path(args.output_dir or "").resolve().name,
        num_parameters=sum(p.numel() for p in model.parameters()),
        architecture={
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "heads": config.num_attention_heads,
            "context": config.max_position_embeddings,
            "vocabulary": config.unpadded_vocab_size or config.vocab_size,
        },
        dataset=embedded_dataset if dataset is None else public_name(dataset),
        dataset_on_hub=dataset is not None and not os.path.exists(dataset),
        hyperparameters={name: value for name, value in values.items() if value is not None},
        hardware=args.describe_hardware(),
        base_model=base_model if base_model is not None and not os.path.exists(base_model) else None,
        # a base model may have other terms
        license="mit" if dataset is None and base_model is None else "unknown",
        language="en" if dataset is None else None,
        **fields,
    )


def format_rows(metrics: Mapping[str, Any], rows: Rows) -> dict[str, str]:
    """Return the formatted metrics by label, in the order of `rows`. Metrics without a row are left out."""
    return {label: format(metrics[name], spec) for name, (label, spec) in rows.items() if name in metrics}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(map(_escape_cell, line))} |" for line in [header, *rows]]
    lines.insert(1, "|-" * len(header) + "|")
    return "\n".join(lines)


def fill_card(
    results: str,
    report: TrainingReport,
    *,
    pipeline_tag: str,
    task_name: str,
    split: str,
    rows: Rows,
    index: Sequence[str],
    **fields: str,
) -> ModelCard:
    """Return a card with metadata that the Hub reads, including the model index.

    Args:
        results: template of the sections "Results" and "How to use".
        report: the content of the other sections.
        pipeline_tag: the task on the Hub.
        task_name: name of the task in the model index.
        split: part of the dataset that the metrics are about.
        rows: labels of the metrics.
        index: metrics for the model index.
        fields: fields of the template besides `name` and `remote_code`.
    """
    eval_results = [
        EvalResult(
            task_type=pipeline_tag,
            task_name=task_name,
            dataset_type=report.dataset if report.dataset_on_hub else "text",
            dataset_name=f"{report.dataset}, {split}",
            metric_type=name,
            metric_name=rows[name][0],
            metric_value=float(report.metrics[name]),
        )
        for name in index
        # the Hub accepts only finite numbers
        if math.isfinite(report.metrics.get(name, math.nan))
    ]
    card_data = ModelCardData(
        model_name=report.name if eval_results else None,
        language=report.language,
        license=report.license,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=list(report.tags),
        datasets=[report.dataset] if report.dataset_on_hub else None,
        base_model=report.base_model,
        eval_results=eval_results or None,
    )
    sizes = ", ".join(f"{label} {value}" for label, value in report.architecture.items())
    content = (HEAD + results + TRAINING).format(
        metadata=card_data.to_yaml(),
        name=report.name,
        description=f"{report.description} {report.num_parameters / 1e6:.2f} million parameters: {sizes}.",
        remote_code=REMOTE_CODE,
        data=_bullets(f"{label}: {value}" for label, value in {"Dataset": report.dataset, **report.data}.items()),
        command=re.sub(r"(--hub_token[ =])\S+", r"\1...", report.command),
        training=f"{_duration(report.seconds)} on {report.hardware}.",
        hyperparameters=markdown_table(
            ["Hyperparameter", "Value"], [(f"`{name}`", value) for name, value in report.hyperparameters.items()]
        ),
        intended_use=_bullets(report.intended_use),
        limits=_bullets(report.limits),
        licence=LICENCES["mit" if report.license == "mit" else "unknown"],
        **fields,
    )
    return ModelCard(content)


def save_card(card: ModelCard, folder: str | Path) -> Path:
    """Write a card as `README.md` into a model's folder, and return its path."""
    path = Path(folder, "README.md")
    card.save(path)
    return path


def code_fence(text: str) -> str:
    """Return backticks that are longer than any in a text, to fence it with."""
    return "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", text + "`")))


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _escape_cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds / 60:.1f} minutes"
