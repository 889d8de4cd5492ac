import math

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from hf_minigpt import functional_minigpt
from tiny import SWITCHES, gradients, random_ids, tiny_model


LOSS_SWITCHES = ["gpt2", "transformer", "modern", "rope", "bigram"]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a few rows: the tiny batches of these tests would fit into one."""
    monkeypatch.setitem(functional_minigpt.CHUNK_ELEMENTS, "cpu", 1)
    monkeypatch.setattr(functional_minigpt, "MIN_CHUNK_ROWS", 3, raising=False)


def batch(rows=3, length=11):
    """Ids, and labels of which some are ignored."""
    ids = random_ids(rows, length)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, 7:] = -100
    return ids, labels


def plain_loss(model, ids, labels, divide_by=None, **inputs):
    """The definition: minus the log-probability of each next token among the real ids, summed over what counts."""
    logits = model(ids, **inputs).logits[..., : model.config.unpadded_vocab_size].double()
    log_probabilities = logits.log_softmax(-1)
    losses = [
        -log_probabilities[row, t, labels[row, t + 1]]
        for row in range(ids.shape[0])
        for t in range(ids.shape[1] - 1)
        if labels[row, t + 1] != -100
    ]
    return torch.stack(losses).sum() / (divide_by or len(losses))


def assert_same_gradients(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("name", SWITCHES)
def test_loss_and_gradients_equal_the_definition(name, skip_logits):
    ids, labels = batch()
    reference = tiny_model(name)
    expected = plain_loss(reference, ids, labels)
    expected.backward()
    model = tiny_model(name)
    output = model(ids, labels=labels, skip_logits=skip_logits)
    assert (output.logits is None) == skip_logits
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-5)
    output.loss.backward()
    assert_same_gradients(gradients(model), gradients(reference), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSS_SWITCHES)
def test_chunks_make_no_difference(name, monkeypatch):
    hidden = torch.randn(150, 24, requires_grad=True)
    weight = torch.randn(72, 24, requires_grad=True)
    bias = torch.randn(72, requires_grad=True)
    targets = torch.randint(67, (150,))
    targets[::7] = -100
    row_weights = torch.rand(150)
    results = []
    for elements in (2**23, 1):
        monkeypatch.setitem(functional_minigpt.CHUNK_ELEMENTS, "cpu", elements)
        total, correct = functional_minigpt.linear_cross_entropy(
            hidden, weight, bias, targets, row_weights=row_weights, softcap=15.0, num_ids=67
        )
        results.append((total, correct, *torch.autograd.grad(total * 0.3, (hidden, weight, bias))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
