"""The model card of a model finetuned on instructions, with metrics and samples before and after."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..training.lora import LoraArguments
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
from .answers import Answer
from .arguments import InstructionArguments, SFTArguments
from .data import InstructionData


METRICS = {
    "perplexity": ("Held-out response perplexity", ".2f"),
    "loss": ("Held-out response loss (nats per token)", ".4f"),
    "accuracy": ("Next-token accuracy on responses", ".2%"),
    "exact_match": ("Exact match, greedy decoding", ".1%"),
    "answers_ended": ("Answers that reached the end token", ".1%"),
    "answers": ("Held-out answers compared", ",.0f"),
    "tokens": ("Held-out response tokens", ",.0f"),
}

LIMITS = (
    "The model answers in the style of its training data. It knows little else, and may state falsehoods.",
    "It was not trained to refuse requests. Do not deploy it as if it had been.",
)

RESULTS = """\
## Results

{metrics}

Loss, perplexity and accuracy cover the response tokens only, including the end token of each response.
{categories}{plot}
## Samples

Held-out instructions with the answers of the base model and of this model, by greedy decoding, unedited.
{samples}
## How to use

```python
from transformers import pipeline

chat = pipeline("text-generation", model="{name}", trust_remote_code=True)
print(chat([{{"role": "user", "content": "..."}}])[0]["generated_text"][-1]["content"])
```

Or run `python recipes/chat.py {name}`. {remote_code} The chat template is saved with the tokenizer. Answers end with
{eos}, where generation stops.
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
    """Return the report of `recipes/sft.py`. `metrics` are the Trainer's, with their prefixes."""
    base = "a small model of the embedded tales" if sft_args.model is None else public_name(sft_args.model)
    optional = {name: getattr(sft_args, name) for name in ("packing", "pretraining_fraction", "train_on_prompt")}
    optional["lora_rank"] = lora_args.lora_rank
    return training_report(
        args,
        model,
        dataset=sft_args.dataset,
        embedded_dataset="questions about the tales of hf_minigpt",
        base_model=sft_args.model,
        hyperparameters={"num_train_epochs": args.num_train_epochs}
        | {name: value or None for name, value in optional.items()},
        description=f"An assistant: {base}, finetuned on instructions with hf_minigpt.",
        data={
            "Records": str(data.counts),
            "Training": f"{len(data.training):,} conversations, {len(data.training.tokens):,} tokens, of which "
            f"{data.training.num_trained:,} in answers",
            "Held out": f"{len(data.held_out):,} conversations",
        },
        seconds=metrics["train_runtime"],
        metrics={name: metrics[f"eval_{name}"] for name in METRICS if f"eval_{name}" in metrics},
        sample="",
        command=command,
        plot=plot,
        limits=LIMITS,
        tags=["minigpt", "conversational"],
    )


def _with_prefix(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}


def format_figures(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return the formatted metrics by label: perplexity before training, those of `METRICS`, and those by category."""
    before = {}
    if "before_perplexity" in metrics:
        before["Held-out response perplexity before"] = format(metrics["before_perplexity"], ".2f")
    by_category = _with_prefix(metrics, "eval_exact_match/")
    return (
        before
        | format_rows(_with_prefix(metrics, "eval_"), METRICS)
        | {f"Exact match: {name}": f"{value:.1%}" for name, value in by_category.items()}
    )


def save_sft_card(
    report: TrainingReport,
    metrics: Mapping[str, float],
    before: Sequence[Answer],
    after: Sequence[Answer],
    folder: str | Path,
    eos_token: str = "`<|endoftext|>`",
) -> Path:
    """Write `README.md` into a model's folder.

    Args:
        report: content of the card.
        metrics: the Trainer's metrics, with the prefixes `before_` and `eval_`.
        before: answers of the base model.
        after: answers of the finetuned model to the same prompts.
        folder: folder of the model.
        eos_token: the token that ends an answer.
    """
    old = format_rows(_with_prefix(metrics, "before_"), METRICS)
    new = format_rows(_with_prefix(metrics, "eval_"), METRICS)
    by_category = _with_prefix(metrics, "eval_exact_match/")
    categories = markdown_table(
        ["Category", "Exact match"], [(name, f"{value:.1%}") for name, value in by_category.items()]
    )
    card = fill_card(
        RESULTS,
        report,
        pipeline_tag="text-generation",
        task_name="Instruction following",
        split="held out",
        rows=METRICS,
        index=("loss", "perplexity", "accuracy"),
        metrics=markdown_table(
            ["Metric", "Before", "After"], [(label, old.get(label, ""), value) for label, value in new.items()]
        ),
        categories=f"\n{categories}\n" if by_category else "",
        plot=f"\n![Loss against tokens]({report.plot})\n" if report.plot else "",
        samples="".join(map(_sample, before, after)),
        eos=eos_token,
    )
    return save_card(card, folder)


def _sample(before: Answer, after: Answer) -> str:
    prompt = "\n".join(f"{message['role']}: {message['content']}" for message in after.conversation.messages[:-1])
    text = (
        f"{prompt}\n\nbefore:   {before.text.strip()}\nafter:    {after.text.strip()}\n"
        f"expected: {after.conversation.answer.strip()}"
    )
    fence = code_fence(text)
    return f"\n{fence}text\n{text}\n{fence}\n"
