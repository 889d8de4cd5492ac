import numpy as np
import pytest
import torch

from hf_minigpt.data.collators import LanguageModelCollator
from hf_minigpt.data.rows import RowBatch


PAD = 9


def rows_of(*lengths):
    tokens = [torch.arange(1, length + 2) for length in lengths]
    return [{"input_ids": row[:-1], "shift_labels": row[1:]} for row in tokens]


def test_rows_of_equal_length_have_no_mask():
    batch = LanguageModelCollator(PAD)(rows_of(3, 3))
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2, 3], [1, 2, 3]],
        "labels": [[1, 2, 3], [1, 2, 3]],
        "shift_labels": [[2, 3, 4], [2, 3, 4]],
    }
    # a model that masks labels in place must not change its inputs
    batch["labels"][0, 0] = -100
    assert batch["input_ids"][0, 0] == 1


def test_shorter_rows_are_padded_on_the_right():
    batch = LanguageModelCollator(PAD)(rows_of(1, 3))
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, PAD, PAD], [1, 2, 3]],
        "labels": [[1, -100, -100], [1, 2, 3]],
        "shift_labels": [[2, -100, -100], [2, 3, 4]],
        "attention_mask": [[1, 0, 0], [1, 1, 1]],
    }


def test_tensors_are_int64_and_real_tokens_equal_to_the_padding_token_stay():
    for lengths in ((2, 2), (1, 2)):
        # the padding token also occurs as a real token, which is not masked
        batch = LanguageModelCollator(pad_token_id=1)(rows_of(*lengths))
        assert {value.dtype for value in batch.values()} == {torch.int64}
        assert batch["labels"][0, 0] == 1
        assert batch["shift_labels"][0, 0] == 2


def test_row_batches_collate_like_single_rows():
    tokens = np.array([[1, 2, 3, 8], [4, 5, 6, 7]], np.uint16)
    batch = RowBatch(tokens)
    together, alone = (LanguageModelCollator(PAD, num_ids=9)(rows) for rows in (batch, list(batch)))
    assert together.keys() == alone.keys()
    for name, value in together.items():
        assert value.dtype == torch.int64 and value.is_contiguous() and value.equal(alone[name])
    for rows in (batch, list(batch)):
        with pytest.raises(ValueError, match="contains 8, and the model's largest id is 7"):
            LanguageModelCollator(PAD, num_ids=8)(rows)
