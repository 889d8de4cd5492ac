"""Model cards whose numbers come from the run that made the model."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData


INTENDED_USE = (
    "To study what a language model of this size learns from this corpus, to write in its manner for fun, and to "
    "finetune for a task of your own.",
    "Not for facts, advice or decisions about people, nor for text that goes before readers unread.",
)


@dataclass
class TrainingReport:
    """What a card tells of a model.

    Attributes:
        name: of the model.
        description: a sentence or two on what it is.
        num_parameters: embeddings included.
        architecture: fields of the configuration worth showing.
        dataset: what the corpus is called; `dataset_on_hub` if that is its name on the Hub.
        data: facts about the corpus, by label.
        hyperparameters: by flag.
        hardware, seconds: what it ran on, and how long.
        metrics: by name as in `METRICS`.
        sample: a text drawn from the model, unedited.
        command: which made it; the card leaves a `--hub_token` out.
        plot: file name of the loss plot, beside the card.
        limits: sentences on what not to expect of it.
        intended_use: sentences on what it is for, and what not.
        license: an id of the Hub's list.
        language: ISO 639-1 code; None if unknown.
        base_model: Hub name of the model it was trained on from.
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
    tags: Sequence[str] = field(default_factory=lambda: ["minigpt"])
    intended_use: Sequence[str] = INTENDED_USE


# name -> (what the card calls it, digits)
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

METRICS = {
    "loss": ("Held-out loss (nats per token)", ".4f"),
    "perplexity": ("Held-out perplexity", ".2f"),
    "bits_per_byte": ("Held-out bits per byte", ".4f"),
    "accuracy": ("Next-token accuracy", ".2%"),
    "tokens": ("Held-out tokens", ",.0f"),
    "entropy_bits_per_byte": ("Entropy of the source (bits per byte)", ".4f"),
    "bits_per_byte_over_entropy": ("Bits per byte over the entropy", ".3f"),
    "sentences_parsed": ("Sampled sentences that parse", ".1%"),
    "claims_true": ("Sampled claims that are true", ".1%"),
    "tokens_per_second": ("Tokens per second in training", ",.0f"),
}

ORIGIN = """\
## Data

{data}

## Training

```bash
{command}
```

{training}

| Hyperparameter | Value |
|-|-|
{hyperparameters}

## Intended use

{intended_use}

## Limits

{limits}

## Licence

{licence}
"""

TEMPLATE = """\
---
{metadata}
---

# {name}

{description}

## Results

{metrics}
{plot}
Loss, perplexity, bits per byte and accuracy are over all held-out tokens, each document's end-of-text included; bits
per byte are over the UTF-8 bytes of the held-out text, so they compare across tokenizers.

A sample, unedited:

{fence}text
{sample}
{fence}

## How to use

```python
from transformers import pipeline

generate = pipeline("text-generation", model="{name}", trust_remote_code=True)
print(generate("{prompt}", max_new_tokens=100)[0]["generated_text"])
```

The code of the model lies beside its weights, hence `trust_remote_code=True`; with `hf_minigpt` installed,
`import hf_minigpt` does instead. `AutoModelForSequenceClassification.from_pretrained("{name}", num_labels=2)` takes
the same weights as the trunk of a classifier.

"""


def format_metrics(metrics: Mapping[str, float], known: Mapping[str, tuple[str, str]] = METRICS) -> dict[str, str]:
    """The metrics that `known` names, in its order: what they are called -> number as text."""
    return {label: format(metrics[name], digits) for name, (label, digits) in known.items() if name in metrics}


def model_card(report: TrainingReport) -> ModelCard:
    """The card of a trained language model."""
    return fill_card(
        TEMPLATE,
        report,
        pipeline_tag="text-generation",
        task_name="Language modelling",
        split="held out",
        known=METRICS,
        results=("loss", "perplexity", "bits_per_byte", "accuracy"),
        plot=f"\n![Loss against tokens]({report.plot})\n" if report.plot else "",
        sample=report.sample.strip(),
        # longer than any in the text
        fence="`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", report.sample + "`"))),
        prompt=" ".join(report.sample.split()[:3]).replace('"', '\\"'),
    )


def fill_card(
    template: str,
    report: TrainingReport,
    *,
    pipeline_tag: str,
    task_name: str,
    split: str,
    known: Mapping[str, tuple[str, str]],
    results: Sequence[str],
    **fields: str,
) -> ModelCard:
    """A card with metadata that the Hub reads (model-index among them).

    Args:
        split: which part of the data the metrics are of.
        known: metrics that the card shows, as `METRICS`.
        results: those that the metadata has as well.
        template: the card down to its data; how the model was made follows.
        fields: of the template, beside those that every report fills.
    """
    eval_results = [
        EvalResult(
            task_type=pipeline_tag,
            task_name=task_name,
            dataset_type=report.dataset if report.dataset_on_hub else "text",
            dataset_name=f"{report.dataset}, {split}",
            metric_type=name,
            metric_name=known[name][0],
            metric_value=float(report.metrics[name]),
        )
        for name in results
        # the Hub takes no infinity for a number
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
    shape = ", ".join(f"{label} {value}" for label, value in report.architecture.items())
    content = (template + ORIGIN).format(
        metadata=card_data.to_yaml(),
        name=report.name,
        description=f"{report.description} {report.num_parameters / 1e6:.2f} million parameters: {shape}.",
        metrics=_table("Figure", "Value", format_metrics(report.metrics, known)),
        data=_bullets(f"{label}: {value}" for label, value in {"Corpus": report.dataset, **report.data}.items()),
        command=re.sub(r"(--hub_token[ =])\S+", r"\1...", report.command),
        training=f"{_minutes(report.seconds)} on {report.hardware}.",
        hyperparameters="\n".join(f"| `{name}` | {_cell(value)} |" for name, value in report.hyperparameters.items()),
        intended_use=_bullets(report.intended_use),
        limits=_bullets(report.limits),
        licence=LICENCES[report.license == "mit"],
        **fields,
    )
    return ModelCard(content)


LICENCES = (
    "The code is under the MIT licence. The weights were trained on the corpus above: its terms decide what they may "
    "be used for.",
    "Code and weights are under the MIT licence.",
)


def _table(left: str, right: str, rows: Mapping[str, str]) -> str:
    return "\n".join([f"| {left} | {right} |", "|-|-|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _minutes(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds / 60:.1f} minutes"


def save_model_card(report: TrainingReport, folder: str | Path) -> Path:
    """Write `README.md` into a model's folder."""
    path = Path(folder) / "README.md"
    model_card(report).save(path)
    return path


def plain(value: object) -> object:
    """What an enumeration stands for; anything else as it is."""
    return getattr(value, "value", value)
