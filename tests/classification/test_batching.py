"""Batches by length: nothing lost, nothing twice, little padding, the same number every epoch."""

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_minigpt.classification.batching import ReviewCollator, TokenBudgetBatches, batches_by_length


class FakeRows:
    """What the sampler needs of rows."""

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
def test_every_row_once_under_the_budget(lengths, budget, seed):
    order = np.random.default_rng(seed).permutation(len(lengths))
    batches = batches_by_length(lengths, budget, order=order)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * max(lengths[i] for i in batch) <= budget
    # the sizes do not hang on the order
    assert [len(batch) for batch in batches] == [len(batch) for batch in batches_by_length(lengths, budget)]


def test_hardly_any_padding():
    batches = batches_by_length(LENGTHS, 4096)
    padded = sum(len(batch) * LENGTHS[batch].max() for batch in batches)
    assert padded / LENGTHS.sum() < 1.1
    # at random, sixteen at a time, it is a half more
    shuffled = np.random.default_rng(1).permutation(500)[:496].reshape(-1, 16)
    assert sum(16 * LENGTHS[batch].max() for batch in shuffled) / LENGTHS[shuffled].sum() > 1.5


def test_epochs_differ_and_can_be_repeated():
    rows = FakeRows(LENGTHS)
    sampler = TokenBudgetBatches(rows, 4096, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        rows.epoch = epoch
        epochs.append(list(sampler))
        assert len(epochs[-1]) == len(sampler)
        assert sorted(i for batch in epochs[-1] for i in batch) == list(range(500))
    assert epochs[0] == epochs[2]
    # other batches, not the same in another order
    same = {tuple(sorted(b)) for b in epochs[0]} & {tuple(sorted(b)) for b in epochs[1]}
    assert len(same) < len(epochs[0]) / 4
    assert list(TokenBudgetBatches(rows, 4096, seed=4)) != epochs[0]
    # not from the short to the long
    order = np.corrcoef(np.arange(len(sampler)), [LENGTHS[batch].mean() for batch in epochs[0]])[0, 1]
    assert abs(order) < 0.4


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_an_epoch_evenly(num_processes):
    rows = FakeRows(LENGTHS)
    sampler = TokenBudgetBatches(rows, 4096, num_processes=num_processes)
    shares = [list(BatchSamplerShard(sampler, num_processes, rank)) for rank in range(num_processes)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(500))


def test_skipping_as_the_trainer_does_when_it_resumes():
    rows = FakeRows(LENGTHS)
    sampler = TokenBudgetBatches(rows, 4096, seed=3)
    whole = list(sampler)
    loader = DataLoader(range(500), batch_sampler=sampler, collate_fn=list)
    assert list(skip_first_batches(loader, 5)) == whole[5:]


def test_what_does_not_fit_is_refused():
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
