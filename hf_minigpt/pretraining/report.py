"""The model card of a pretrained language model."""

from collections.abc import Mapping
from pathlib import Path

from ..data.streaming import StreamedCorpus
from ..data.token_store import PreparedCorpus
from ..model.modeling_minigpt import MiniGPTForCausalLM
from ..training.arguments import DataArguments, ModelArguments
from ..training.report import (
    TrainingReport,
    code_fence,
    fill_card,
    format_rows,
    markdown_table,
    public_name,
    save_card,
    training_report,
)
from .arguments import PretrainArguments


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

LIMITS = (
    "The model continues text in the style of its training data. It knows nothing else, does not follow instructions, "
    "and may state falsehoods.",
    "It reproduces the biases of its training data, and may repeat passages word for word.",
)

RESULTS = """\
## Results

{metrics}
{plot}
Loss, perplexity, bits per byte and accuracy cover all held-out tokens, including the end-of-text token of each
document. Bits per byte are relative to the UTF-8 bytes of the held-out text, and compare across tokenizers.

An unedited sample:

{fence}text
{sample}
{fence}

## How to use

```python
from transformers import pipeline

generate = pipeline("text-generation", model="{name}", trust_remote_code=True)
print(generate("{prompt}", max_new_tokens=100)[0]["generated_text"])
```

{remote_code} `AutoModelForSequenceClassification.from_pretrained("{name}", num_labels=2)` loads the same weights as a
classifier.
"""


def pretraining_report(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: PretrainArguments,
    model: MiniGPTForCausalLM,
    corpus: PreparedCorpus | StreamedCorpus,
    metrics: Mapping[str, float],
    sample: str,
    command: str,
    plot: str | None = "loss.png",
) -> TrainingReport:
    """Return the report of `recipes/pretrain.py`. `metrics` are the Trainer's, with their prefixes."""
    base = model_args.model
    origin = f"trained further from {public_name(base)}" if base else f"trained from scratch ({model_args.preset})"
    evaluation = {name: metrics[f"eval_{name}"] for name in METRICS if f"eval_{name}" in metrics}
    return training_report(
        args,
        model,
        dataset=data_args.dataset,
        embedded_dataset="the tales of hf_minigpt",
        base_model=base,
        hyperparameters={"tokens seen": f"{metrics['train_tokens']:,}"},
        description=f"A GPT-style language model made with hf_minigpt, {origin}.",
        data=corpus.describe(),
        seconds=metrics["train_runtime"],
        metrics=evaluation | {"tokens_per_second": metrics["train_tokens_per_second"]},
        sample=sample,
        command=command,
        plot=plot,
        limits=LIMITS,
    )


def format_metrics(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return the formatted metrics by label, in the order of `METRICS`. Unknown metrics are left out."""
    return format_rows(metrics, METRICS)


def save_model_card(report: TrainingReport, folder: str | Path) -> Path:
    """Write `README.md` into a language model's folder."""
    card = fill_card(
        RESULTS,
        report,
        pipeline_tag="text-generation",
        task_name="Language modelling",
        split="held out",
        rows=METRICS,
        index=("loss", "perplexity", "bits_per_byte", "accuracy"),
        metrics=markdown_table(["Metric", "Value"], format_metrics(report.metrics).items()),
        plot=f"\n![Loss against tokens]({report.plot})\n" if report.plot else "",
        sample=report.sample.strip(),
        fence=code_fence(report.sample),
        prompt=" ".join(report.sample.split()[:3]).replace('"', '\\"'),
    )
    return save_card(card, folder)
