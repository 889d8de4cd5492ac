"""The card of a finetuned model: figures before and after, samples before and after."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..training.lora import LoraArguments
from ..training.report import HYPERPARAMETERS, TrainingReport, model_card
from .answers import Answer
from .arguments import InstructionArguments, SFTArguments
from .data import InstructionData


# name -> (what the card calls it, digits), in the order of the card
FIGURES = {
    "perplexity": ("Held-out response perplexity", ".2f"),
    "loss": ("Held-out response loss (nats per token)", ".4f"),
    "accuracy": ("Next-token accuracy on responses", ".2%"),
    "exact_match": ("Exact match, greedy", ".1%"),
    "answers_ended": ("Answers that ended by themselves", ".1%"),
    "answers": ("Held-out answers compared", ",.0f"),
    "tokens": ("Held-out response tokens", ",.0f"),
}

LIMITS = (
    "It answers in the manner of its instructions; it knows little else, and what it says may be false.",
    "It has not been taught to refuse anything. Do not put it before people as if it had.",
)

RESULTS = """\
## Results

{figures}

Loss, perplexity and accuracy are over the response tokens alone, the end token of each included.
{categories}
{plot}
## Samples

Held-out instructions; what the base model said, and what this one says, by the likeliest token each time, unedited.
{samples}
## How to use

```python
from transformers import pipeline

chat = pipeline("text-generation", model="{name}", trust_remote_code=True)
print(chat([{{"role": "user", "content": "..."}}])[0]["generated_text"][-1]["content"])
```

Or `python recipes/chat.py {name}`. The chat template is saved with the tokenizer, and answers end with {eos}, where
generation stops by itself.

"""


def sft_report(
    sft_args: InstructionArguments,
    args: SFTArguments,
    lora_args: LoraArguments,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    data: InstructionData,
    metrics: Mapping[str, float],
    command: str,
    plot: str | None = "loss.png",
) -> TrainingReport:
    """The report of `recipes/sft.py`; `metrics` are the Trainer's, with their prefixes."""
    on_tales = sft_args.dataset is None
    on_hub = not on_tales and not os.path.exists(str(sft_args.dataset))
    # the folders of somebody's machine are nobody's business
    dataset = "questions about the tales of hf_minigpt" if on_tales else str(sft_args.dataset)
    dataset = dataset if on_tales or on_hub else Path(dataset).resolve().name
    base_on_hub = sft_args.model is not None and not os.path.exists(sft_args.model)
    base = "a small model of the tales" if sft_args.model is None else str(sft_args.model)
    base = base if sft_args.model is None or base_on_hub else Path(base).resolve().name
    shown = [*HYPERPARAMETERS, "num_train_epochs"]
    if args.optimizer == "muon":
        shown[2:2] = ["matrix_learning_rate", "embedding_learning_rate", "muon_scaling"]
    hyperparameters = {name: getattr(getattr(args, name), "value", getattr(args, name)) for name in shown}
    for name in ("packing", "pretraining_fraction", "train_on_prompt"):
        if value := getattr(sft_args, name):
            hyperparameters[name] = value
    if lora_args.lora_rank:
        hyperparameters["lora_rank"] = lora_args.lora_rank
    config = model.config
    return TrainingReport(
        name=args.hub_model_id or Path(args.output_dir or "").resolve().name,
        description=f"An assistant: {base}, finetuned on instructions with hf_minigpt.",
        num_parameters=model.num_parameters(),
        architecture={
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "heads": config.num_attention_heads,
            "context": config.max_position_embeddings,
            "vocabulary": len(tokenizer),
        },
        dataset=dataset,
        dataset_on_hub=on_hub,
        data={
            "Records": str(data.counts),
            "Trained on": f"{len(data.training):,} conversations, {len(data.training.tokens):,} tokens, "
            f"{data.training.num_trained:,} of them in answers",
            "Held out": f"{len(data.held_out):,} conversations",
        },
        hyperparameters=hyperparameters,
        hardware=args.describe_hardware(),
        seconds=metrics["train_runtime"],
        metrics={
            name: metrics[f"eval_{name}"] for name in ("loss", "perplexity", "accuracy") if f"eval_{name}" in metrics
        },
        sample="",
        command=command,
        plot=plot,
        limits=LIMITS,
        license="mit" if on_tales and sft_args.model is None else "unknown",
        language="en" if on_tales else None,
        base_model=sft_args.model if base_on_hub else None,
        tags=["minigpt", "conversational"],
    )


def format_figures(metrics: Mapping[str, float]) -> dict[str, str]:
    """The figures of `FIGURES` after training, those by category, and perplexity before, as text by label."""
    figures = {}
    if "before_perplexity" in metrics:
        figures["Held-out response perplexity before"] = format(metrics["before_perplexity"], ".2f")
    for name, (label, digits) in FIGURES.items():
        if f"eval_{name}" in metrics:
            figures[label] = format(metrics[f"eval_{name}"], digits)
    return figures | {f"Exact match: {name}": format(share, ".1%") for name, share in _by_category(metrics).items()}


def _by_category(metrics: Mapping[str, float]) -> dict[str, float]:
    prefix = "eval_exact_match/"
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}


def save_sft_card(
    report: TrainingReport,
    metrics: Mapping[str, float],
    before: Sequence[Answer],
    after: Sequence[Answer],
    folder: str | Path,
    eos_token: str = "`<|endoftext|>`",
) -> Path:
    """Write `README.md` into a model's folder: `report`, with figures and samples before and after."""
    rows = ["| Figure | Before | After |", "|-|-|-|"]
    for name, (label, digits) in FIGURES.items():
        if f"eval_{name}" in metrics:
            old = f"before_{name}"
            rows.append(
                f"| {label} | {format(metrics[old], digits) if old in metrics else ''} "
                f"| {format(metrics[f'eval_{name}'], digits)} |"
            )
    categories = _by_category(metrics)
    table = ["", "| Kind of instruction | Exact match |", "|-|-|"]
    table += [f"| {name} | {share:.1%} |" for name, share in categories.items()]
    samples = []
    for said, new in zip(before, after, strict=False):
        turns = [f"{message['role']}: {message['content']}" for message in new.conversation.messages[:-1]]
        samples.append(
            "\n```text\n" + "\n".join(turns) + f"\n\nbefore:   {said.text.strip()}\nafter:    {new.text.strip()}\n"
            f"expected: {new.conversation.answer.strip()}\n```\n"
        )
    results = RESULTS.format(
        figures="\n".join(rows),
        categories="\n".join([*table, ""]) if categories else "",
        plot=f"\n![Loss against tokens]({report.plot})\n" if report.plot else "",
        samples="".join(samples),
        name=report.name,
        eos=eos_token,
    )
    card = model_card(report)
    head, rest = card.content.split("## Results\n", 1)
    card.content = head + results + rest[rest.index("## Data\n") :]
    path = Path(folder) / "README.md"
    card.save(path)
    return path
