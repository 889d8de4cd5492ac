"""Rows in, batches out."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence


IGNORE_INDEX = -100


@dataclass
class LanguageModelCollator:
    """Batches of rows whose targets are already shifted by one.

    Args:
        pad_token_id: fills `input_ids` on the right where rows differ in length; the targets there are -100.

    Returns (from a call): `input_ids` (B, T), `labels` (B, T), which are the ids with -100 for padding, `shift_labels`
        (B, T), which are what the model learns from, and `attention_mask` (B, T) if some row is padded; all int64.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        inputs = [row["input_ids"] for row in rows]
        targets = [row["shift_labels"] for row in rows]
        lengths = {len(ids) for ids in inputs}
        if len(lengths) == 1:
            input_ids = torch.stack(inputs)
            return {"input_ids": input_ids, "labels": input_ids.clone(), "shift_labels": torch.stack(targets)}
        return {
            "input_ids": pad_sequence(inputs, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(inputs, batch_first=True, padding_value=IGNORE_INDEX),
            "shift_labels": pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in inputs], batch_first=True),
        }
