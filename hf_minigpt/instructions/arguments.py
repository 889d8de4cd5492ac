"""Command-line arguments of instruction finetuning."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from ..flags import Condition, Needs, check_arguments
from ..training.arguments import (
    COUNT,
    HELP,
    NOT_NEGATIVE,
    RATE,
    SEED,
    SHARE,
    CheckpointArguments,
    DataArguments,
    LanguageModelArguments,
    best_by,
)


@dataclass
class InstructionArguments(CheckpointArguments):
    """The base model, the records, the rows made from them, and the evaluation by generated answers."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name of the base model: a MiniGPT, or a checkpoint that converts to one. Default: "
            "a small model is pretrained on the embedded tales and cached."
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Name on the Hub, or a file or folder of .json, .jsonl, .csv or .parquet. Each record has "
            "messages; or prompt and completion; or instruction, output and optionally input. Default: embedded "
            "questions about the tales."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    train_split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    max_examples: Annotated[int | None, COUNT] = field(default=None, metadata={"help": "Use only the first records."})
    validation_fraction: Annotated[float, SHARE] = field(
        default=0.1, metadata={"help": "Share of the records in the held-out set. It shares no prompt with training."}
    )
    split_seed: Annotated[int, SEED] = field(default=0, metadata={"help": "Seed of the split into the two sets."})
    max_lost_fraction: Annotated[float, SHARE] = field(
        default=0.1,
        metadata={"help": "Stop if more than this share of the records is empty, duplicate or over-long."},
    )

    chat_format: Literal["roles", "alpaca"] | None = field(
        default=None,
        metadata={
            "help": "Chat template. roles: one special token per role; alpaca: Alpaca's headers as text. Default: the "
            "tokenizer's own template, else roles."
        },
    )
    context_length: Annotated[int | None, COUNT] = field(
        default=None, metadata={"help": "Longest record in tokens. Default: the base model's context."}
    )
    packing: bool = field(
        default=True,
        metadata={"help": "Pack several records into a row, without attention between them. Else one padded record."},
    )
    packed_length: Annotated[int | None, COUNT] = field(
        default=None,
        metadata={"help": "Tokens in a packed row. Default: twice the longest record, at most --context_length."},
    )
    train_on_prompt: bool = field(default=False, metadata={"help": "Compute the loss on the prompts, too."})
    pretraining_fraction: Annotated[float, SHARE] = field(
        default=0.0, metadata={"help": "Share of the rows that are pretraining text, against forgetting."}
    )
    pretraining_dataset: Annotated[str | None, Needs("pretraining_fraction")] = field(
        default=None, metadata={"help": "The pretraining text, as --dataset of pretrain.py. Default: the tales."}
    )

    learning_rate_factor: Annotated[float, RATE] = field(
        default=0.5,
        metadata={"help": "Learning rates inherited from the base model's run are multiplied by this factor."},
    )
    show_examples: Annotated[int, NOT_NEGATIVE] = field(
        default=0,
        metadata={"help": "Print this many records before training, with the tokens of the loss in green."},
    )
    eval_answers: Annotated[int, NOT_NEGATIVE] = field(
        default=400,
        metadata={"help": "Held-out records to answer after training, for the exact match. 0: none."},
    )
    max_new_tokens: Annotated[int, COUNT] = field(
        default=128, metadata={"help": "Longest generated answer in tokens."}
    )
    cache_dir: str = field(
        default=DataArguments().cache_dir, metadata={"help": "Cache for the embedded base model and tokenized text."}
    )

    def __post_init__(self):
        check_arguments(self)
        if self.validation_fraction == 0:
            raise ValueError("validation_fraction=0 leaves the held-out set empty. Set it above 0, such as to 0.1.")


@dataclass
class SFTArguments(LanguageModelArguments):
    """`LanguageModelArguments` with defaults for instruction finetuning."""

    METRICS: ClassVar[dict[str, bool]] = {"loss": False, "perplexity": False, "accuracy": True}
    CONDITIONS: ClassVar[dict[str, tuple[Condition, ...]]] = {"metric_for_best_model": best_by(METRICS)}

    output_dir: str | None = field(default="runs/sft", metadata=HELP["output_dir"])
    warmup_steps: float = field(default=0.05, metadata=HELP["warmup_steps"])
    eval_steps: float | None = field(default=0.25, metadata=HELP["eval_steps"])
