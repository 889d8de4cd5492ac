"""Turn texts into rows of tokens, and rows into batches of similar length with a limited number of tokens."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerFast

from ..model.pooling_minigpt import num_head_tokens
from ..tokenization import plain_text_encoder
from .arguments import Truncation


# Lengths are rounded up to a multiple of this before shuffling. More rows then share a length and are shuffled among
# each other, at the price of a little padding.
LENGTH_STEP = 8


def model_truncation(truncation: Truncation) -> Literal["head", "tail", "head_tail"]:
    """Return the value of `config.truncation`, which applies in evaluation and inference."""
    return "head_tail" if truncation == "windows" else truncation


class ReviewRows(Dataset):
    """Dataset of tokenized texts, each with an end-of-text token before and after it.

    Item i is `{"input_ids": (T,) int64, "labels": int}`, without "labels" if there are none. Random windows and token
    dropout depend only on (seed, epoch, i). The lengths of rows are the same in all epochs.

    Args:
        texts: cleaned texts.
        labels: class numbers, or None for inference.
        max_length: maximum number of tokens, including both end-of-text tokens.
        truncation: how to truncate longer texts: "head", "tail" or "head_tail", as
            `MiniGPTForSequenceClassification` does with the same `config.truncation`, or "windows": a random window in
            each training epoch, and "head_tail" in evaluation.
        training: whether to apply random windows and token dropout.
        token_dropout: probability of replacing a token by end-of-text.

    Attributes:
        lengths: (N,) number of tokens of each row.
        num_truncated: number of truncated texts.

    Raises:
        ValueError: `truncation` is unknown or `max_length` is below 4.
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[int] | None,
        tokenizer: PreTrainedTokenizerFast,
        max_length: int,
        truncation: Truncation = "head",
        *,
        training: bool = False,
        token_dropout: float = 0.0,
        seed: int = 0,
    ):
        if truncation not in get_args(Truncation):
            raise ValueError(f"truncation={truncation!r} is unknown. Choose one of {', '.join(get_args(Truncation))}.")
        if max_length < 4:
            raise ValueError(f"context_length={max_length} leaves no room for text. Set it to at least 4.")
        assert tokenizer.eos_token_id is not None and not (labels is None and training)
        self.eos = tokenizer.eos_token_id
        self.max_length = max_length
        # without the two end-of-text tokens
        self.room = max_length - 2
        self.truncation = truncation
        self.num_head = num_head_tokens(model_truncation(truncation), max_length) - 1
        self.training = training
        self.token_dropout = token_dropout
        self.seed = seed
        self.epoch = 0
        encodings = plain_text_encoder(tokenizer).encode_batch_fast(list(texts), add_special_tokens=False)
        # One flat array: nested lists of Python integers would take 20 times the memory.
        self.offsets = np.cumsum([0, *(len(encoding) for encoding in encodings)])
        self.tokens = np.concatenate([np.array(e.ids, dtype=np.int32) for e in encodings] or [np.empty(0, np.int32)])
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        sizes = np.diff(self.offsets)
        self.num_truncated = int((sizes > self.room).sum())
        self.lengths = np.minimum(sizes, self.room) + 2

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines random windows and token dropout."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = self.tokens[self.offsets[index] : self.offsets[index + 1]]
        generator = np.random.Generator(np.random.PCG64([self.seed, self.epoch, index])) if self.training else None
        if len(tokens) > self.room:
            tokens = self._truncate(tokens, generator)
        tokens = tokens.astype(np.int64)
        if generator is not None and self.token_dropout > 0:
            tokens[generator.random(len(tokens)) < self.token_dropout] = self.eos
        item = {"input_ids": torch.from_numpy(np.concatenate([[self.eos], tokens, [self.eos]]))}
        return item if self.labels is None else item | {"labels": int(self.labels[index])}

    def _truncate(self, tokens: np.ndarray, generator: np.random.Generator | None) -> np.ndarray:
        if self.truncation == "windows" and generator is not None:
            begin = int(generator.integers(0, len(tokens) - self.room, endpoint=True))
            return tokens[begin : begin + self.room]
        return np.concatenate([tokens[: self.num_head], tokens[len(tokens) - self.room + self.num_head :]])


def batches_by_length(
    lengths: Sequence[int] | np.ndarray,
    tokens_per_batch: int,
    *,
    step: int = LENGTH_STEP,
    order: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Sort rows by length and cut them into batches of at most `tokens_per_batch` tokens, including padding.

    The number of batches and their sizes do not depend on `order`.

    Args:
        lengths: number of tokens of each row.
        step: lengths are rounded up to a multiple of it before sorting.
        order: permutation of the rows that determines the order of rows of equal rounded length. Default: by index.

    Returns:
        Row indices of each batch, from the shortest to the longest rows.

    Raises:
        ValueError: a row is longer than `tokens_per_batch`.
    """
    rounded = -(-np.asarray(lengths) // step) * step
    if len(rounded) and rounded.max() > tokens_per_batch:
        raise ValueError(
            f"tokens_per_batch={tokens_per_batch} is too small for a row of {int(np.max(lengths))} tokens. Set it to "
            f"at least {int(rounded.max())}, or reduce context_length."
        )
    order = np.arange(len(rounded)) if order is None else order
    order = order[np.argsort(rounded[order], kind="stable")]
    batches = []
    begin = 0
    while begin < len(order):
        # The last row of a batch is its longest.
        sizes = np.arange(1, len(order) - begin + 1) * rounded[order[begin:]]
        count = int(np.searchsorted(sizes, tokens_per_batch, side="right"))
        batches.append(order[begin : begin + count])
        begin += count
    return batches


class TokenBudgetBatches(Sampler[list[int]]):
    """Batch sampler that groups training rows by length and shuffles rows and batches in each epoch.

    The batches depend only on (seed, `rows.epoch`), and their number is the same in all epochs, so that a position in
    the training is a single integer. accelerate distributes the batches round-robin; their number is a multiple of
    `num_processes`, so none is repeated.

    Args:
        rows: dataset with `lengths` and `epoch`.
        tokens_per_batch: maximum number of tokens per batch and process, including padding.

    Raises:
        ValueError: there are fewer rows than processes, or a row is longer than `tokens_per_batch`.
    """

    def __init__(self, rows: ReviewRows, tokens_per_batch: int, seed: int = 0, num_processes: int = 1):
        self.rows = rows
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        self.num_processes = num_processes
        if len(rows) < num_processes:
            raise ValueError(
                f"{len(rows)} training rows are too few for {num_processes} processes. Use fewer processes."
            )
        self._length = len(self._batches())

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._batches()
        generator = np.random.Generator(np.random.PCG64([self.seed, self.rows.epoch, 1]))
        for i in generator.permutation(len(batches)):
            yield batches[i].tolist()

    def _batches(self) -> list[np.ndarray]:
        order = np.random.Generator(np.random.PCG64([self.seed, self.rows.epoch])).permutation(len(self.rows))
        batches = batches_by_length(self.rows.lengths, self.tokens_per_batch, order=order)
        while len(batches) % self.num_processes:
            largest = max(range(len(batches)), key=lambda i: len(batches[i]))
            half = len(batches[largest]) // 2
            batches[largest : largest + 1] = [batches[largest][:half], batches[largest][half:]]
        return batches


class ReviewCollator:
    """Collate rows into `input_ids` (B, T), padded on the right, and `labels` (B,).

    There is no attention mask: causal attention ignores padding on the right, and the model finds the end of each text
    by `config.pad_token_id`. A mask would only slow attention down.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [row["input_ids"] for row in rows]
        batch = {"input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id)}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch
