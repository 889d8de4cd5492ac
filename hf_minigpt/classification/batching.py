"""Batches of rows of about the same length, under a budget of tokens: hardly any padding, and none computed twice."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from .data import ReviewRows


# Rows whose lengths round up to the same multiple are equals to the shuffle: a little padding for many neighbours.
LENGTH_STEP = 8


def batches_by_length(
    lengths: Sequence[int] | np.ndarray,
    tokens_per_batch: int,
    *,
    step: int = LENGTH_STEP,
    order: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Cut rows, sorted by length, into batches of at most `tokens_per_batch` tokens, padding included.

    How many batches there are, and their sizes, do not depend on `order`.

    Args:
        lengths: tokens of each row.
        step: rows are sorted by their length rounded up to a multiple of it.
        order: permutation of the rows that decides who come first among equals; None for their own.

    Returns:
        Indices, from the shortest to the longest rows.

    Raises:
        ValueError: a row does not fit.
    """
    rounded = -(-np.asarray(lengths) // step) * step
    if len(rounded) and rounded.max() > tokens_per_batch:
        raise ValueError(
            f"tokens_per_batch={tokens_per_batch} is less than a row of {int(np.max(lengths))} tokens takes: give at "
            f"least {int(rounded.max())}, or a smaller context_length."
        )
    order = np.arange(len(rounded)) if order is None else order
    order = order[np.argsort(rounded[order], kind="stable")]
    batches = []
    begin = 0
    while begin < len(order):
        # sorted by length, the last row of a batch decides what it takes
        sizes = np.arange(1, len(order) - begin + 1) * rounded[order[begin:]]
        count = int(np.searchsorted(sizes, tokens_per_batch, side="right"))
        batches.append(order[begin : begin + count])
        begin += count
    return batches


class TokenBudgetBatches(Sampler[list[int]]):
    """Batch sampler for training: batches of like lengths, in another composition and order each epoch.

    The order follows from (seed, `rows.epoch`) alone, and an epoch always has the same number of batches, so that the
    position in a run is one integer. accelerate deals the batches out to the processes in turn; their number is a
    multiple of `num_processes`, hence none is repeated.

    Args:
        rows: with `lengths` and `epoch`.
        tokens_per_batch: of one process, padding included.
    """

    def __init__(self, rows: ReviewRows, tokens_per_batch: int, seed: int = 0, num_processes: int = 1):
        self.rows = rows
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        self.num_processes = num_processes
        if len(rows) < num_processes:
            raise ValueError(f"{len(rows)} training rows do not suffice for {num_processes} processes.")
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
    """Rows in, a batch out: `input_ids` (B, T), padded on the right, and `labels` (B,).

    No attention mask: what stands right of a token does not reach it in a causal model, and `config.pad_token_id`
    tells the model where the text ends. A mask would only cost time.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [row["input_ids"] for row in rows]
        batch = {"input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id)}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch
