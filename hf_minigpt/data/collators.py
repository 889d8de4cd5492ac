"""Rows in, batches out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .rows import RowBatch


IGNORE_INDEX = -100


@dataclass
class LanguageModelCollator:
    """Batches of rows whose targets are already shifted by one.

    Args:
        pad_token_id: fills `input_ids` on the right where rows differ in length; the targets there are -100.
        num_ids: real ids of the model, to find others here: on a GPU the error would neither name nor show them.

    Returns (from a call): `input_ids` (B, T), `labels` (B, T), which are the ids with -100 for padding, `shift_labels`
        (B, T), which are what the model learns from, and `attention_mask` (B, T) if some row is padded; all int64.

    Raises:
        ValueError: no rows, a row without tokens, an id or a target out of range.
    """

    pad_token_id: int
    num_ids: int | None = None

    def __call__(self, rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if isinstance(rows, RowBatch) and rows.tokens.size:
            return self._split(rows.tokens)
        inputs = [row["input_ids"] for row in rows]
        targets = [row["shift_labels"] for row in rows]
        lengths = {len(ids) for ids in inputs}
        if not rows or 0 in lengths:
            raise ValueError(f"{len(rows)} rows of {sorted(lengths)} tokens in a batch: leave empty rows out.")
        if self.num_ids is not None:
            _check_ids("input_ids", torch.cat(inputs), self.num_ids)
            all_targets = torch.cat(targets)
            _check_ids("shift_labels", all_targets[all_targets != IGNORE_INDEX], self.num_ids)
        if len(lengths) == 1:
            input_ids = torch.stack(inputs)
            return {"input_ids": input_ids, "labels": input_ids.clone(), "shift_labels": torch.stack(targets)}
        return {
            "input_ids": pad_sequence(inputs, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(inputs, batch_first=True, padding_value=IGNORE_INDEX),
            "shift_labels": pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in inputs], batch_first=True),
        }

    def _split(self, tokens: np.ndarray) -> dict[str, torch.Tensor]:
        if self.num_ids is not None and tokens.max() >= self.num_ids:
            _check_ids("input_ids", torch.from_numpy(tokens.astype(np.int64)), self.num_ids)
        parts = {"input_ids": tokens[:, :-1], "labels": tokens[:, :-1], "shift_labels": tokens[:, 1:]}
        return {name: torch.from_numpy(part.astype(np.int64, order="C")) for name, part in parts.items()}


def _check_ids(name: str, ids: torch.Tensor, num_ids: int) -> None:
    wrong = ids[(ids < 0) | (ids >= num_ids)]
    if len(wrong):
        raise ValueError(
            f"{name} has {wrong[0].item()}, and the model's ids end at {num_ids - 1}: tokenize the text with the "
            f"tokenizer saved with the model (targets to be left out are {IGNORE_INDEX})."
        )
