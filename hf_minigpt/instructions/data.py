"""Load, split and tokenize the records that the arguments name, and make training rows of them."""

import itertools
from dataclasses import dataclass
from typing import Any

from accelerate.state import PartialState
from transformers import PreTrainedTokenizerFast

from ..data.corpora import load_documents
from ..data.rows import ShuffledDocumentRows
from ..data.token_store import prepare_corpus
from ..model.configuration_minigpt import MiniGPTConfig
from .arguments import InstructionArguments
from .records import Conversation, RecordCounts, load_records, split_held_out, tale_conversations, to_conversations
from .rows import ConversationRows, MixedRows, PackedRows, TokenizedConversations, tokenize_conversations


@dataclass
class ConversationSplits:
    """Training and held-out conversations, and the counts of the records they come from."""

    training: list[Conversation]
    held_out: list[Conversation]
    counts: RecordCounts


@dataclass
class InstructionData:
    """Training and held-out conversations as tokens.

    Attributes:
        counts: of records read and left out.
        max_length: longest conversation allowed, in tokens.
    """

    training: TokenizedConversations
    held_out: TokenizedConversations
    counts: RecordCounts
    max_length: int

    @property
    def held_out_rows(self) -> ConversationRows:
        return ConversationRows(self.held_out)

    def describe(self) -> str:
        """Return a line on records, tokens and the size of the held-out set."""
        training = self.training
        return (
            f"{self.counts}; training set {len(training):,} ({len(training.tokens):,} tokens, "
            f"{training.num_trained:,} in the loss), held-out set {len(self.held_out):,}"
        )


def load_conversations(args: InstructionArguments) -> ConversationSplits:
    """Load the records that the arguments name and split them.

    Raises:
        ValueError: a record cannot be read, too many records are left out, or fewer than two remain.
    """
    if args.dataset is None:
        return ConversationSplits(*tale_conversations(args.max_examples))
    records = load_records(args.dataset, args.dataset_config, args.train_split)
    records = itertools.islice(records, args.max_examples)
    separator = "\n\n### Input:\n" if args.chat_format == "alpaca" else "\n\n"
    conversations, counts = to_conversations(records, separator)
    counts.check(args.max_lost_fraction)
    if len(conversations) < 2:
        raise ValueError(f"{args.dataset}: {counts}. At least two are required, one of them for the held-out set.")
    return ConversationSplits(*split_held_out(conversations, args.validation_fraction, args.split_seed), counts)


def tokenize_splits(
    args: InstructionArguments,
    conversations: ConversationSplits,
    tokenizer: PreTrainedTokenizerFast,
    config: MiniGPTConfig,
) -> InstructionData:
    """Tokenize both splits.

    Args:
        config: the model's configuration. Its context is the default of `--context_length`.

    Raises:
        ValueError: `--context_length` exceeds the model's learned positions, too many records are left out, or none
            remain.
    """
    context = config.max_position_embeddings
    max_length = args.context_length or context
    if max_length > context and config.position_embedding_type == "learned":
        raise ValueError(
            f"context_length={max_length} exceeds the {context} learned positions of the base model. Set it to at "
            f"most {context}."
        )
    counts = conversations.counts
    training = tokenize_conversations(
        tokenizer, conversations.training, max_length, counts, train_on_prompt=args.train_on_prompt
    )
    held_out = tokenize_conversations(tokenizer, conversations.held_out, max_length, counts)
    counts.check(args.max_lost_fraction)
    for name, part in (("training", training), ("held-out", held_out)):
        if not len(part):
            raise ValueError(f"{counts}: the {name} set is empty. Raise context_length={max_length}.")
    return InstructionData(training, held_out, counts, max_length)


def training_rows(
    args: InstructionArguments, data: InstructionData, tokenizer: PreTrainedTokenizerFast, seed: int
) -> PackedRows | ConversationRows | MixedRows:
    """Return the training rows: packed or not, with or without pretraining text."""
    longest = int(data.training.lengths.max())
    # Twice the longest record: long enough for packing to leave few gaps, short enough to keep attention cheap.
    length = args.packed_length or max(longest, min(2 * longest, data.max_length))
    rows: Any = PackedRows(data.training, length, seed) if args.packing else ConversationRows(data.training)
    if not args.pretraining_fraction:
        return rows
    documents = load_documents(args.pretraining_dataset)
    with PartialState().main_process_first():
        corpus = prepare_corpus(documents, tokenizer, args.cache_dir)
    return MixedRows(rows, ShuffledDocumentRows(corpus.train, length, seed), args.pretraining_fraction)
