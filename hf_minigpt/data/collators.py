"""Collate rows of token ids into batches for language modeling."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .rows import RowBatch


IGNORE_INDEX = -100


@dataclass
class LanguageModelCollator:
    """Collates rows whose targets are already shifted by one.

    A call returns int64 tensors of shape (B, T): `input_ids`; `labels`, the ids with -100 for padding; `shift_labels`,
    the targets; and, if a row is padded, `attention_mask`. It raises ValueError for an empty batch, an empty row, or
    an id or target out of range.

    Args:
        pad_token_id: pads `input_ids` on the right if rows differ in length. Targets are padded with -100.
        num_ids: number of token ids of the model, to check ids here, since the error on a GPU would not show them.
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
            raise ValueError(f"the batch has {len(rows)} rows of lengths {sorted(lengths)}. Leave out empty rows.")
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
            f"{name} contains {wrong[0].item()}, and the model's largest id is {num_ids - 1}. Use the tokenizer saved "
            f"with the model, and {IGNORE_INDEX} for targets to ignore."
        )
