"""Batches by length contain each row once, with little padding, in the same number each epoch."""

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_minigpt.classification.batching import ReviewCollator, TokenBudgetBatches, batches_by_length


class FakeRows:
    """The attributes of rows that the sampler uses."""

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths)
        self.epoch = 0

    def __len__(self):
        return len(self.lengths)


LENGTHS = np.random.default_rng(0).lognormal(5, 0.7, 500).clip(3, 512).astype(int)


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    budget=st.integers(64, 400),
    seed=st.integers(0, 5),
)
def test_each_row_is_in_one_batch_within_the_token_limit(lengths, budget, seed):
    order = np.random.default_rng(seed).permutation(len(lengths))
    batches = batches_by_length(lengths, budget, order=order)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * max(lengths[i] for i in batch) <= budget
    # The batch sizes do not depend on the order.
    assert [len(batch) for batch in batches] == [len(batch) for batch in batches_by_length(lengths, budget)]


def test_batches_have_less_than_ten_percent_padding():
    batches = batches_by_length(LENGTHS, 4096)
    padded = sum(len(batch) * LENGTHS[batch].max() for batch in batches)
    assert padded / LENGTHS.sum() < 1.1
    # Random batches of 16 have more than 50%.
    shuffled = np.random.default_rng(1).permutation(500)[:496].reshape(-1, 16)
    assert sum(16 * LENGTHS[batch].max() for batch in shuffled) / LENGTHS[shuffled].sum() > 1.5


def test_epochs_differ_and_are_reproducible():
    rows = FakeRows(LENGTHS)
    sampler = TokenBudgetBatches(rows, 4096, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        rows.epoch = epoch
        epochs.append(list(sampler))
        assert len(epochs[-1]) == len(sampler)
        assert sorted(i for batch in epochs[-1] for i in batch) == list(range(500))
    assert epochs[0] == epochs[2]
    # The composition of the batches differs, not only their order.
    same = {tuple(sorted(b)) for b in epochs[0]} & {tuple(sorted(b)) for b in epochs[1]}
    assert len(same) < len(epochs[0]) / 4
    assert list(TokenBudgetBatches(rows, 4096, seed=4)) != epochs[0]
    # Batches are not sorted by length.
    order = np.corrcoef(np.arange(len(sampler)), [LENGTHS[batch].mean() for batch in epochs[0]])[0, 1]
    assert abs(order) < 0.4


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_get_equal_numbers_of_batches(num_processes):
    rows = FakeRows(LENGTHS)
    sampler = TokenBudgetBatches(rows, 4096, num_processes=num_processes)
    shares = [list(BatchSamplerShard(sampler, num_processes, rank)) for rank in range(num_processes)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(500))


def test_batches_can_be_skipped_on_resume():
    rows = FakeRows(LENGTHS)
    sampler = TokenBudgetBatches(rows, 4096, seed=3)
    whole = list(sampler)
    loader = DataLoader(range(500), batch_sampler=sampler, collate_fn=list)
    assert list(skip_first_batches(loader, 5)) == whole[5:]


def test_too_few_tokens_or_rows_are_refused():
    with pytest.raises(ValueError, match=r"tokens_per_batch=100.*at least 104"):
        batches_by_length([3, 101], 100)
    with pytest.raises(ValueError, match="2 processes"):
        TokenBudgetBatches(FakeRows([4]), 100, num_processes=2)


def test_collator_pads_on_the_right():
    batch = ReviewCollator(9)(
        [{"input_ids": torch.tensor([1, 2, 3]), "labels": 1}, {"input_ids": torch.tensor([4]), "labels": 0}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]] and batch["labels"].tolist() == [1, 0]
    assert set(batch) == {"input_ids", "labels"}
