"""What `recipes/sft.py` is made of: flags, what a base model hands down, the trainer, and answers put to the test."""

import hashlib
import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.serialization import safe_globals
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from ..data.corpora import load_documents
from ..data.rows import ShuffledDocumentRows
from ..data.token_store import prepare_corpus
from ..flags import Condition, Needs, check_arguments
from ..model.configuration_minigpt import MiniGPTConfig
from ..model.modeling_minigpt import MiniGPTForCausalLM
from ..tokenization import add_chat_template, check_tokenizer_fits, num_ids
from ..training.arguments import (
    COUNT,
    HELP,
    NOT_NEGATIVE,
    RATE,
    SEED,
    SHARE,
    AttentionImplementation,
    DataArguments,
    LanguageModelArguments,
    best_by,
)
from ..training.evaluation import score_rows
from ..training.loading import MULTIPLE
from ..training.settings import INHERITED, LEARNING_RATES, SETTINGS_FILE, load_settings
from ..training.trainer import LanguageModelTrainer
from .data import (
    Conversation,
    ConversationRows,
    MixedRows,
    PackedRows,
    RecordCounts,
    TokenizedConversations,
    load_records,
    split_held_out,
    tale_conversations,
    to_conversations,
    tokenize_conversations,
)


# The base model of a run without --model: pretrain.py's default, which is long enough to learn who holds what. What
# it hangs on is written out, because the cached model is told by these flags.
EMBEDDED_BASE_FLAGS: tuple[str, ...] = ("--rows", "aligned", "--matrix_learning_rate", "0.01")


@dataclass
class InstructionArguments:
    model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name of the base model: a MiniGPT, or one that converts. Default: a small one is "
            "pretrained on the embedded tales, once."
        },
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or Hub name. Default: that of --model."})
    attn_implementation: Annotated[str | None, AttentionImplementation()] = field(
        default=None, metadata={"help": "Default: sdpa."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that a model or tokenizer on the Hub comes with."}
    )

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Name on the Hub, or a file or folder of .json, .jsonl, .csv, .parquet, of records with messages, "
            "prompt and completion, or instruction, input and output. Default: embedded questions about the tales."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    train_split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    max_examples: Annotated[int | None, COUNT] = field(default=None, metadata={"help": "Use only the first records."})
    validation_fraction: Annotated[float, SHARE] = field(
        default=0.1, metadata={"help": "Share of the records that is held out, prompt by prompt."}
    )
    split_seed: Annotated[int, SEED] = field(
        default=0, metadata={"help": "Seed of the choice of the held-out prompts."}
    )
    max_lost_fraction: Annotated[float, SHARE] = field(
        default=0.1, metadata={"help": "Largest share of the records that may be empty, duplicate or over-long."}
    )

    chat_format: Literal["roles", "alpaca"] | None = field(
        default=None,
        metadata={
            "help": "roles: a token for each role; alpaca: its headers as text. Default: the template that the "
            "tokenizer has, else roles."
        },
    )
    context_length: Annotated[int | None, COUNT] = field(
        default=None, metadata={"help": "Longest record in tokens. Default: the base model's context."}
    )
    packing: bool = field(
        default=True, metadata={"help": "Pack records into rows, none seeing another; else one a row, padded."}
    )
    packed_length: Annotated[int | None, COUNT] = field(
        default=None,
        metadata={"help": "Tokens in a packed row. Default: twice the longest record's, at most the context."},
    )
    train_on_prompt: bool = field(default=False, metadata={"help": "Learn to write the prompts, too."})
    pretraining_fraction: Annotated[float, SHARE] = field(
        default=0.0, metadata={"help": "Share of the rows that are pretraining text, against forgetting."}
    )
    pretraining_dataset: Annotated[str | None, Needs("pretraining_fraction")] = field(
        default=None, metadata={"help": "That text: as --dataset of pretrain.py; default: the tales."}
    )

    learning_rate_factor: Annotated[float, RATE] = field(
        default=0.5, metadata={"help": "Inherited learning rates are the pretraining run's times this."}
    )
    show_examples: Annotated[int, NOT_NEGATIVE] = field(
        default=0, metadata={"help": "Print so many records before the training, trained tokens in green."}
    )
    eval_answers: Annotated[int, NOT_NEGATIVE] = field(
        default=400, metadata={"help": "Held-out records that are answered at the end and compared; 0: none."}
    )
    max_new_tokens: Annotated[int, COUNT] = field(
        default=128, metadata={"help": "Tokens in one of these answers at most."}
    )
    cache_dir: str = field(
        default=DataArguments().cache_dir, metadata={"help": "Where the embedded base model is kept."}
    )

    def __post_init__(self):
        check_arguments(self)
        if self.validation_fraction == 0:
            raise ValueError("validation_fraction=0 leaves nothing to measure by: choose a share above 0.")


@dataclass
class SFTArguments(LanguageModelArguments):
    """`LanguageModelArguments` with defaults for finetuning on instructions."""

    METRICS: ClassVar[dict[str, bool]] = {"loss": False, "perplexity": False, "accuracy": True}
    CONDITIONS: ClassVar[dict[str, tuple[Condition, ...]]] = {"metric_for_best_model": best_by(METRICS)}

    output_dir: str | None = field(default="runs/sft", metadata=HELP["output_dir"])
    warmup_steps: float = field(default=0.05, metadata=HELP["warmup_steps"])
    eval_steps: float | None = field(default=0.25, metadata=HELP["eval_steps"])


# What the base model hands down


def inherited_settings(model: str, learning_rate_factor: float, adapter: bool = False) -> dict[str, Any]:
    """The optimizer's settings of the run that made a model, for another run on it.

    Args:
        model: folder or Hub name; a folder has `training_settings.json` where one of our recipes made it (older
            versions: `training_args.bin`).
        learning_rate_factor: what the learning rates are multiplied by.
        adapter: small matrices that start at zero are to be trained: AdamW at 1e-3 is then the choice.

    Returns:
        By flag. AdamW at 5e-5 where nothing is known; with a warning, if there is an old file that cannot be read.

    Raises:
        ValueError: `training_settings.json` is damaged.
    """
    if adapter:
        return {"optimizer": "adamw", "learning_rate": 1e-3}
    saved = load_settings(model)
    if saved is None:
        saved = _saved_arguments(Path(model) / "training_args.bin")
    if saved is None:
        return {"optimizer": "adamw", "learning_rate": 5e-5}
    settings = {name: saved[name] for name in INHERITED if name in saved}
    if saved.get("optimizer") == "muon" and settings.get("embedding_learning_rate") is None:
        settings["embedding_learning_rate"] = 0.3 * AutoConfig.from_pretrained(model).initializer_range
    for name in LEARNING_RATES:
        if settings.get(name) is not None:
            settings[name] *= learning_rate_factor
    return settings


def _saved_arguments(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    # the folders that PretrainArguments has been in
    parts = ("training", "pretraining")
    # a pickle may come from anywhere: only these classes are made from it
    known: list[Any] = [
        SFTArguments,
        *(AcceleratorConfig, HubStrategy, IntervalStrategy, SaveStrategy),
    ]
    known += [SchedulerType, OptimizerNames, DistributedType, PartialState, torch.device]
    known += [(LanguageModelArguments, f"hf_minigpt.{part}.arguments.PretrainArguments") for part in parts]
    known += [(SFTArguments, "hf_minigpt.training.sft.SFTArguments")]
    try:
        with safe_globals(known):
            return dict(vars(torch.load(path, weights_only=True)))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        warnings.warn(
            f"{path} cannot be read, as by another recipe or version ({reason:.200}), and there is no "
            f"{SETTINGS_FILE}: the optimizer's settings of that run are unknown, and AdamW at 5e-5 is used. Give "
            "--optimizer and --learning_rate if they were others.",
            stacklevel=3,
        )
        return None


def prepare_for_chat(
    model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, chat_format: str | None = None
) -> list[int]:
    """Give a tokenizer a chat template and the model the rows that its tokens need; both are changed in place.

    Returns:
        The ids that are new to the model. They start as the mean of all others.
    """
    first = num_ids(tokenizer)
    add_chat_template(tokenizer, chat_format)
    # behind all others, also where these leave holes
    new_ids = list(range(first, num_ids(tokenizer)))
    if new_ids:
        model.resize_token_embeddings(num_ids(tokenizer), pad_to_multiple_of=MULTIPLE)
        with torch.no_grad():
            for table in (model.model.embed_tokens.weight, model.lm_head.weight):
                table[new_ids] = table[:first].mean(0)
    check_tokenizer_fits(tokenizer, model.config)
    model.generation_config.do_sample = False
    return new_ids


def embedded_base_folder(cache_dir: str) -> Path:
    """Where the base model of a run without --model is kept: another place for another grammar or other flags."""
    content = f"{load_documents().fingerprint} {EMBEDDED_BASE_FLAGS}"
    return Path(cache_dir) / "base_models" / hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


# Data


@dataclass
class Conversations:
    """Conversations for training and held-out ones, and what became of the other records."""

    training: list[Conversation]
    held_out: list[Conversation]
    counts: RecordCounts


@dataclass
class InstructionData:
    """`Conversations`, tokenized. `max_length` is the longest that fits."""

    training: TokenizedConversations
    held_out: TokenizedConversations
    counts: RecordCounts
    max_length: int

    @property
    def held_out_rows(self) -> ConversationRows:
        return ConversationRows(self.held_out)

    def describe(self) -> str:
        training = self.training
        return (
            f"{self.counts}\n{len(training):,} for training ({len(training.tokens):,} tokens, "
            f"{training.num_trained:,} of them trained), {len(self.held_out):,} held out"
        )


def open_conversations(args: InstructionArguments) -> Conversations:
    """The records that the flags name, split.

    Raises:
        ValueError: too many records are lost, or too few are left to hold any out.
    """
    if args.dataset is None:
        return Conversations(*tale_conversations(args.max_examples))
    records = load_records(args.dataset, args.dataset_config, args.train_split)
    records = itertools.islice(records, args.max_examples)
    separator = "\n\n### Input:\n" if args.chat_format == "alpaca" else "\n\n"
    conversations, counts = to_conversations(records, separator)
    counts.check(args.max_lost_fraction)
    if len(conversations) < 2:
        raise ValueError(f"{args.dataset}: {counts}; at least two are needed, one of them to be held out.")
    return Conversations(*split_held_out(conversations, args.validation_fraction, args.split_seed), counts)


def tokenize_splits(
    args: InstructionArguments, conversations: Conversations, tokenizer: PreTrainedTokenizerFast, config: MiniGPTConfig
) -> InstructionData:
    """Both splits as tokens.

    Args:
        config: of the model, whose context is the default of `--context_length`.

    Raises:
        ValueError: too many records are lost, or `--context_length` is beyond the model's learned positions.
    """
    context = config.max_position_embeddings
    max_length = args.context_length or context
    if max_length > context and config.position_embedding_type == "learned":
        raise ValueError(
            f"context_length={max_length} is beyond the {context} learned positions of the base model: choose at most "
            f"{context}."
        )
    counts = conversations.counts
    training = tokenize_conversations(
        tokenizer, conversations.training, max_length, counts, train_on_prompt=args.train_on_prompt
    )
    held_out = tokenize_conversations(tokenizer, conversations.held_out, max_length, counts)
    counts.check(args.max_lost_fraction)
    for name, part in (("training", training), ("held-out", held_out)):
        if not len(part):
            raise ValueError(f"{counts}: no {name} records are left. Raise --context_length, now {max_length}.")
    return InstructionData(training, held_out, counts, max_length)


def training_rows(args: InstructionArguments, data: InstructionData, tokenizer: PreTrainedTokenizerFast, seed: int):
    """The rows that the flags ask for: packed or not, with or without a share of pretraining text."""
    longest = int(data.training.lengths.max())
    # twice: enough room for the gaps to be filled, not so much that attention gets dear
    length = args.packed_length or max(longest, min(2 * longest, data.max_length))
    rows: Any = PackedRows(data.training, length, seed) if args.packing else ConversationRows(data.training)
    if not args.pretraining_fraction:
        return rows
    text = load_documents(args.pretraining_dataset)
    with PartialState().main_process_first():
        corpus = prepare_corpus(text, tokenizer, args.cache_dir)
    return MixedRows(rows, ShuffledDocumentRows(corpus.train, length, seed), args.pretraining_fraction)


# Training


class InstructionTrainer(LanguageModelTrainer):
    """`LanguageModelTrainer` of rows of instructions: held-out figures are over all trained tokens.

    The model may be an adapter's. The token counts include the padding of rows.
    """

    def score(self, model, dataset, max_rows):
        nats, hits, tokens = score_rows(
            model, dataset, self.data_collator, self.args.eval_batch_size, self.accelerator, max_rows=max_rows
        )
        loss = nats / max(tokens, 1)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": hits / max(tokens, 1),
            "tokens": int(tokens),
        }


# Answers


@dataclass(frozen=True)
class Answer:
    """What a model said to a conversation's prompt, and whether it ended by itself."""

    conversation: Conversation
    text: str
    ended: bool

    @property
    def is_exact(self) -> bool:
        return self.text.strip() == self.conversation.answer.strip()


@torch.no_grad()
def answer_all(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 128,
) -> list[Answer]:
    """The likeliest answers to the last prompts of conversations, in their order; generated in batches."""
    was_training = model.training
    model.eval()
    config = model.config
    rendered: Any = tokenizer.apply_chat_template([c.prompt for c in conversations], add_generation_prompt=True)
    prompts: list[list[int]] = rendered["input_ids"]
    answers: dict[int, Answer] = {}
    # about equally long ones together
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        padded = tokenizer.pad({"input_ids": [prompts[i] for i in batch]}, padding_side="left", return_tensors="pt")
        length = padded["input_ids"].shape[1]
        # of positions without a table too: nothing that long was learned
        room = min(max_new_tokens, config.max_position_embeddings)
        if config.position_embedding_type == "learned":
            # the last token written is not read again
            room = min(room, config.max_position_embeddings + 1 - length)
        output = model.generate(
            **padded.to(model.device),
            max_new_tokens=room,
            do_sample=False,
            use_cache=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for i, ids in zip(batch, output[:, length:].tolist(), strict=True):
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            answers[i] = Answer(conversations[i], text, tokenizer.eos_token_id in ids)
    model.train(was_training)
    return [answers[i] for i in range(len(conversations))]


def answer_metrics(answers: Sequence[Answer]) -> dict[str, float]:
    """`exact_match`, over all and by category (`exact_match/CATEGORY`), and `answers_ended`, as shares."""
    by_category: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_category[answer.conversation.category].append(answer)
    metrics = {
        "exact_match": sum(answer.is_exact for answer in answers) / len(answers),
        "answers_ended": sum(answer.ended for answer in answers) / len(answers),
        "answers": len(answers),
    }
    if len(by_category) > 1:
        for category, group in sorted(by_category.items()):
            metrics[f"exact_match/{category}"] = sum(answer.is_exact for answer in group) / len(group)
    return metrics
