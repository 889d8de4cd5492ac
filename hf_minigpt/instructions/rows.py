"""Tokenize conversations, pack them into rows, and collate rows into batches.

Ids and loss mask come from the same rendering of the chat template, so they always agree. Packed conversations do not
see each other: `position_ids` restart at each one, which tells the model where attention ends, and the last position
of a conversation does not predict the first token of the next.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from ..data.collators import IGNORE_INDEX
from ..data.rows import Row, seeded_generator
from .records import Conversation, RecordCounts


TOKENIZER_BATCH_SIZE = 1000


class TokenizedConversations:
    """Token ids of conversations, with a loss mask.

    Attributes:
        tokens: (num_tokens,) int32, the conversations concatenated.
        loss_mask: (num_tokens,) bool, True for tokens that count in the loss.
        offsets: (num_conversations + 1,) int64, where each conversation starts.
        conversations: the conversations themselves.
    """

    def __init__(
        self, ids: Sequence[np.ndarray], loss_masks: Sequence[np.ndarray], conversations: Sequence[Conversation]
    ):
        self.conversations = list(conversations)
        self.tokens = np.concatenate([np.empty(0, np.int32), *ids])
        self.loss_mask = np.concatenate([np.empty(0, bool), *loss_masks])
        self.offsets = np.concatenate([[0], np.cumsum([len(part) for part in ids])]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.conversations)

    @property
    def lengths(self) -> np.ndarray:
        """(num_conversations,): length of each conversation in a row, one less than its number of tokens."""
        return np.diff(self.offsets) - 1

    @property
    def num_trained(self) -> int:
        """Number of tokens that count in the loss."""
        return int(self.loss_mask.sum())

    def row(self, index: int) -> Row:
        """Return a conversation as a row: `input_ids`, `shift_labels`, `position_ids`, each (T,), int64."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        tokens = torch.from_numpy(self.tokens[span].astype(np.int64))
        loss_mask = torch.from_numpy(self.loss_mask[span])
        return {
            "input_ids": tokens[:-1],
            "shift_labels": tokens[1:].where(loss_mask[1:], IGNORE_INDEX),
            "position_ids": torch.arange(len(tokens) - 1),
        }


def tokenize_conversations(
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[Conversation],
    max_length: int,
    counts: RecordCounts | None = None,
    train_on_prompt: bool = False,
) -> TokenizedConversations:
    """Tokenize conversations with the tokenizer's chat template. The loss is on what the template marks as generated.

    Args:
        max_length: longest conversation in a row; longer ones are left out.
        counts: if given, counts over-long conversations.
        train_on_prompt: compute the loss on every token except the first.

    Raises:
        ValueError: the template does not mark the answers, or does not end them with the end token.
    """
    ids: list[np.ndarray] = []
    loss_masks: list[np.ndarray] = []
    kept: list[Conversation] = []
    for start in range(0, len(conversations), TOKENIZER_BATCH_SIZE):
        batch = conversations[start : start + TOKENIZER_BATCH_SIZE]
        messages = [[dict(message) for message in conversation.messages] for conversation in batch]
        # not verbose: records beyond the model's length are counted here, without the tokenizer's warning
        rendered: Any = tokenizer.apply_chat_template(
            messages, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
        )
        for conversation, tokens, mask in zip(batch, rendered["input_ids"], rendered["assistant_masks"], strict=True):
            if len(tokens) - 1 > max_length:
                if counts is not None:
                    counts.lost["over-long"] += 1
                continue
            token_ids, is_answer = np.array(tokens, np.int32), np.array(mask, bool)
            _check_template(tokenizer, conversation, token_ids, is_answer)
            ids.append(token_ids)
            loss_masks.append(np.arange(len(token_ids)) > 0 if train_on_prompt else is_answer)
            kept.append(conversation)
    return TokenizedConversations(ids, loss_masks, kept)


def _check_template(
    tokenizer: PreTrainedTokenizerFast, conversation: Conversation, ids: np.ndarray, is_answer: np.ndarray
) -> None:
    """Raise ValueError unless every answer is marked up to its end token. Else the model would not learn to stop."""
    num_answers = sum(message["role"] == "assistant" for message in conversation.messages)
    last_ids = ids[is_answer & ~np.append(is_answer[1:], False)]
    if len(last_ids) != num_answers or (last_ids != tokenizer.eos_token_id).any() or is_answer[0]:
        raise ValueError(
            f"the chat template does not mark each answer, with {tokenizer.eos_token!r} at its end, as "
            "{% generation %}. Use --chat_format roles or alpaca."
        )


def highlight_loss_tokens(tokenizer: PreTrainedTokenizerFast, data: TokenizedConversations, index: int) -> str:
    """Return a conversation's text, special tokens included, with the tokens of the loss in green (ANSI colours)."""
    span = slice(data.offsets[index], data.offsets[index + 1])
    pairs = zip(data.tokens[span].tolist(), data.loss_mask[span].tolist(), strict=True)
    text = ""
    for in_loss, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
        part = tokenizer.decode([token for token, _ in group])
        text += f"\033[32m{part}\033[0m" if in_loss else f"\033[2m{part}\033[0m"
    return text


class ConversationRows(Dataset):
    """One conversation per row: `input_ids`, `shift_labels`, `position_ids`, each (T,)."""

    def __init__(self, data: TokenizedConversations):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Row:
        return self.data.row(range(len(self))[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        return [self[index] for index in indices]


class PackedRows(Dataset):
    """Conversations packed into rows by best-fit decreasing.

    Each epoch draws another packing: conversations of equal length are exchanged, and the order of the rows and of the
    conversations in a row is random. The number of rows stays the same.

    A row has `input_ids`, `shift_labels` and `position_ids`, each (T,) with T <= `row_length`. `position_ids` restart
    at 0 with every conversation.

    Raises:
        ValueError: a conversation is longer than `row_length`.
    """

    def __init__(self, data: TokenizedConversations, row_length: int, seed: int = 0):
        longest = int(data.lengths.max(initial=0))
        if longest > row_length:
            raise ValueError(
                f"row_length={row_length} is shorter than the longest conversation: set at least {longest}."
            )
        self.data = data
        self.row_length = row_length
        self.seed = seed
        # The same in every epoch; `set_epoch` exchanges conversations of equal length.
        self._packed_indices = pack_best_fit(data.lengths, row_length)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the packing of an epoch. It depends only on the seed and the epoch."""
        self.epoch = epoch
        rng = seeded_generator(self.seed, epoch)
        lengths = self.data.lengths
        by_length = np.argsort(lengths, kind="stable")
        shuffled = rng.permutation(len(lengths))
        shuffled = shuffled[np.argsort(lengths[shuffled], kind="stable")]
        # (num_conversations,): a random permutation that keeps lengths
        replacement = np.empty_like(by_length)
        replacement[by_length] = shuffled
        row_order = rng.permutation(len(self._packed_indices))
        self._rows = [rng.permutation(replacement[self._packed_indices[i]]) for i in row_order]

    def __len__(self) -> int:
        return len(self._packed_indices)

    @property
    def fill(self) -> float:
        """Share of the positions that hold a token."""
        return float(self.data.lengths.sum()) / (self.row_length * max(len(self), 1))

    def __getitem__(self, index: int) -> Row:
        parts = [self.data.row(i) for i in self._rows[range(len(self))[index]]]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        return [self[index] for index in indices]


def pack_best_fit(lengths: np.ndarray, row_length: int) -> list[np.ndarray]:
    """Pack by best-fit decreasing (Ding et al., 2024): longest first, each into the fullest row with enough space.

    Args:
        lengths: (N,), at most `row_length` each.

    Returns:
        For each row, the indices of the items in it.
    """
    rows: list[list[int]] = []
    # rows_by_space[s]: rows with s free positions. A heap or a tree is faster only for rows of many thousand tokens.
    rows_by_space: list[list[int]] = [[] for _ in range(row_length + 1)]
    has_rows = np.zeros(row_length + 1, bool)
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        # argmax finds the first True: the least space that is enough
        space = length + int(has_rows[length:].argmax())
        if has_rows[space]:
            row = rows_by_space[space].pop()
            has_rows[space] = bool(rows_by_space[space])
            rows[row].append(int(index))
        else:
            row, space = len(rows), row_length
            rows.append([int(index)])
        rows_by_space[space - length].append(row)
        has_rows[space - length] = True
    return [np.array(row) for row in rows]


class MixedRows(Dataset):
    """Rows of conversations followed by rows of pretraining text; each epoch has other text.

    Args:
        text_fraction: share of the text among all rows.
    """

    def __init__(self, rows: Any, text_rows: Any, text_fraction: float):
        self.rows = rows
        self.text_rows = text_rows
        self.num_text_rows = round(text_fraction / (1 - text_fraction) * len(rows))
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        for rows in (self.rows, self.text_rows):
            if hasattr(rows, "set_epoch"):
                rows.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.rows) + self.num_text_rows

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]
        if index < len(self.rows):
            return self.rows[index]
        row = self.text_rows[(index - len(self.rows)) % len(self.text_rows)]
        return {**row, "position_ids": torch.arange(len(row["input_ids"]))}

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        return [self[index] for index in indices]


@dataclass
class InstructionCollator:
    """Collate rows into batches, padded on the right.

    Args:
        pad_token_id: padding of `input_ids`. The padding of labels is -100.

    Returns (from a call): `input_ids`, `labels` and `shift_labels`, each (B, T), int64; the labels are shifted
        already, and `labels` are the same tensor. If a row holds several conversations, also `position_ids` (B, T) and
        where each conversation begins in the concatenated rows: `cu_seq_lens_q` and `cu_seq_lens_k` (N + 1,), int32,
        the length of the longest, `max_length_q` and `max_length_k`, int. There is no attention mask: with causal
        attention, no token sees the padding after it.
    """

    pad_token_id: int

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        input_ids = pad_sequence([row["input_ids"] for row in rows], True, padding_value=self.pad_token_id)
        shift_labels = pad_sequence([row["shift_labels"] for row in rows], True, padding_value=IGNORE_INDEX)
        batch: dict[str, Any] = {"input_ids": input_ids, "labels": shift_labels, "shift_labels": shift_labels}
        if any((row["position_ids"][1:] == 0).any() for row in rows):
            length = input_ids.shape[1]
            # Padding forms few documents, since each may be one attention call. None is longer than the longest
            # conversation, so that positions stay within a learned table.
            padding = torch.arange(length) % (1 + max(int(row["position_ids"].max()) for row in rows))
            padded = [torch.cat((row["position_ids"], padding))[:length] for row in rows]
            batch["position_ids"] = torch.stack(padded)
            # found here, because attention would have to wait for the GPU
            is_first = F.pad(batch["position_ids"].diff() != 1, (1, 0), value=True).flatten()
            starts = F.pad(is_first.nonzero()[:, 0], (0, 1), value=is_first.numel()).int()
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = starts
            batch["max_length_q"] = batch["max_length_k"] = int(starts.diff().max())
        return batch
