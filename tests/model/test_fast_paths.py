"""Every fast path computes what the plain path computes, and the model works with all of them turned off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from hf_minigpt import MiniGPTForSequenceClassification
from hf_minigpt.model import attention_minigpt, generation_minigpt, loss_minigpt, products_minigpt
from hf_minigpt.model.products_minigpt import fast_paths
from tests.model import test_classification, test_generation, test_loss, test_modeling
from tests.programs.ways_to_generate import check_way
from tests.tiny import SWITCHES, gradients, random_ids, tiny_model


ROOT = Path(__file__).parents[2]
TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}


@pytest.fixture
def fast_calls(monkeypatch):
    """Record which fast paths run. oneDNN is used for any size, whatever the processor."""
    calls = set()

    def record(owner, name):
        function = getattr(owner, name)

        def recorded(*args, **kwargs):
            result = function(*args, **kwargs)
            if result is not None:
                calls.add(name)
            return result

        monkeypatch.setattr(owner, name, recorded)

    monkeypatch.setattr(products_minigpt, "onednn_is_faster", lambda: hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    monkeypatch.setattr(products_minigpt, "MIN_ROWS", 1)
    monkeypatch.setattr(products_minigpt, "MIN_MULTIPLICATIONS", 1)
    record(products_minigpt, "run_onednn")
    record(attention_minigpt, "attend_per_document")
    record(loss_minigpt._LinearCrossEntropy, "apply")
    record(generation_minigpt, "single_token_inputs")
    record(generation_minigpt.SingleTokenDecoder, "step")
    record(generation_minigpt.GrowingLayer, "update")
    return calls


def train(name, **inputs):
    """Logits, loss and gradients of a training step on given inputs."""
    model = tiny_model(name).train()
    output = model(labels=inputs["input_ids"], **inputs)
    output.loss.backward()
    logits = [] if output.logits is None else [output.logits]
    return [output.loss, *logits, *gradients(model).values()]


def train_packed_rows(name):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5, 0, 1, 2]])
    return train(name, input_ids=random_ids(2, 9), position_ids=positions, use_cache=False)


def train_classifier(name):
    options = {"num_labels": 3, "pad_token_id": 66, "auxiliary_lm_weight": 0.5}
    model = tiny_model(name, model_class=MiniGPTForSequenceClassification, **options).train()
    output = model(random_ids(4, 9, vocab_size=66), labels=torch.tensor([2, 0, 1, 1]))
    output.loss.backward()
    return [output.loss, output.logits, *gradients(model).values()]


@torch.no_grad()
def decode(name):
    """Logits of single tokens, and the ids that `generate` writes."""
    model, ids = tiny_model(name), random_ids(2, 9)
    cache = DynamicCache(config=model.config)
    logits = [model(part, past_key_values=cache).logits for part in ids.split([3, *[1] * 6], dim=1)]
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, pad_token_id=0
    )
    return [*logits, written]


COMPUTATIONS = {
    "logits and loss": lambda name: train(name, input_ids=random_ids(3, 9)),
    "loss without logits": lambda name: train(name, input_ids=random_ids(3, 9), skip_logits=True),
    "packed rows": train_packed_rows,
    "classifier": train_classifier,
    "decoding": decode,
}


@pytest.mark.parametrize("computation", COMPUTATIONS)
@pytest.mark.parametrize("name", [name for name in SWITCHES if name != "bigram"])
def test_fast_and_plain_paths_agree(name, computation, fast_calls):
    with fast_paths(False):
        plain = COMPUTATIONS[computation](name)
    assert not fast_calls
    with fast_paths(True):
        fast = COMPUTATIONS[computation](name)
    expected_calls = {
        "loss without logits": {"apply"},
        "packed rows": {"attend_per_document"},
        "classifier": {"apply"},
        "decoding": {"single_token_inputs", "step", "update"},
    }
    assert expected_calls.get(computation, set()) <= fast_calls
    assert "run_onednn" in fast_calls or not products_minigpt.onednn_is_faster()
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


# Checks against independent computations that also hold without fast paths; the slow test below runs all of them.
CHECKS = [
    (test_modeling.test_logits_equal_a_plain_float64_computation, "sdpa"),
    (test_modeling.test_cached_tokens_score_as_uncached_ones, "sdpa", [5, 1, 1, 5]),
    (test_modeling.test_packed_documents_score_as_separate_ones, None, "no_mask", "sdpa"),
    (test_loss.test_loss_and_gradients_equal_the_definition, True),
    (test_classification.test_auxiliary_loss_equals_its_definition, "right"),
    (test_generation.test_every_cache_and_strategy_is_greedy,),
    (lambda name: check_way("continuous batching", tiny_model(name)),),
]


@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_the_model_works_without_fast_paths(name):
    with fast_paths(False):
        for check, *arguments in CHECKS:
            check(name, *arguments)


@pytest.mark.slow
def test_all_model_tests_pass_without_fast_paths():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/model"]
    environment = {**os.environ, "MINIGPT_FAST_PATHS": "0"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
