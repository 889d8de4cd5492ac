"""Every preset and switch on a pretended GPU: no mixed devices, few syncs, attention of one dtype."""

import copy

import pytest
import torch

from hf_minigpt import MiniGPTConfig, MiniGPTForCausalLM, MiniGPTForSequenceClassification, preset
from hf_minigpt.presets import PRESETS
from hf_minigpt.training.optimizers import muon_adamw

from ..pretended_gpu import count_syncs, pretended_gpu, record_attention, to_cpu, to_gpu
from ..tiny import NO_DROPOUT, random_ids, shake, tiny_config


def tiny_preset(name: str) -> MiniGPTConfig:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "intermediate_size": 48, "vocab_size": 67}
    sizes["initializer_range"] = 0.02
    return preset(name, num_hidden_layers=2, max_position_embeddings=64, **sizes, **NO_DROPOUT)


# Most presets differ in size only.
CONFIGS = {repr(config): config for config in map(tiny_preset, PRESETS)}
CONFIGS = {next(name for name in PRESETS if tiny_preset(name) == config): config for config in CONFIGS.values()}
# What no preset has: a mask of heads, a padded vocabulary, partly rotated heads, no blocks.
CONFIGS |= {f"switches-{name}": tiny_config(name) for name in ("gpt1", "modern", "rope", "attention_only", "bigram")}
PRECISIONS = ["float32", "bfloat16", "float16", "bfloat16 weights"]


def to_gpu_in(precision: str, model):
    return to_gpu(model.bfloat16() if precision == "bfloat16 weights" else model)


def autocast(precision: str):
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
    return torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None)


def shaken(config, model_class=MiniGPTForCausalLM):
    return shake(model_class(copy.deepcopy(config)), std=0.1)


def batch(packed: bool) -> dict[str, torch.Tensor]:
    ids = random_ids(3, 16)
    labels = ids.roll(-1, dims=1)
    inputs = {"input_ids": ids, "shift_labels": labels, "num_items_in_batch": torch.tensor(labels.numel())}
    if packed:
        inputs["position_ids"] = torch.cat((torch.arange(7), torch.arange(9))).expand(3, -1)
    return inputs


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_step(name, precision):
    """At most one sync in the forward pass, which finds the documents of packed rows, and none after it."""
    model = shaken(CONFIGS[name])
    with pretended_gpu():
        model = to_gpu_in(precision, model).train()
        optimizer = muon_adamw(model, learning_rate=1e-3, matrix_learning_rate=1e-2)
        for packed in (False, True):
            inputs = to_gpu(batch(packed))
            with autocast(precision), record_attention() as calls, count_syncs() as syncs:
                loss = model(**inputs, skip_logits=True, use_cache=False, count_correct=True).loss
            assert syncs.total() <= packed, syncs
            assert len(calls) == model.config.num_hidden_layers
            assert all(call.query == call.key == call.value for call in calls), calls
            with count_syncs() as syncs:
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                if not packed:
                    optimizer.step()
                    optimizer.zero_grad()
            assert not syncs
        assert all(parameter.grad.is_cuda for parameter in model.parameters())
    assert torch.isfinite(to_cpu(loss))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_equal_the_cpus(name, packed):
    model = shaken(CONFIGS[name])
    loss = model(**batch(packed), skip_logits=True).loss
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with pretended_gpu():
        loss_on_gpu = to_gpu(model)(**to_gpu(batch(packed)), skip_logits=True).loss
        loss_on_gpu.backward()
    torch.testing.assert_close(to_cpu(loss_on_gpu), loss.detach())
    found = {name: to_cpu(parameter.grad) for name, parameter in model.named_parameters()}
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("name", "pooling"), [("gpt2", "last"), ("switches-modern", "mean"), ("switches-gpt1", "attention")]
)
def test_a_padded_classification_step(name, pooling, precision):
    """One sync at most, to read whether the mask has padding."""
    config = copy.deepcopy(CONFIGS[name])
    config.update({"num_labels": 3, "pad_token_id": 0, "pooling": pooling, "auxiliary_lm_weight": 0.5})
    ids = random_ids(3, 12)
    mask = (torch.arange(12) < torch.tensor([12, 7, 4])[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1])}
    model = MiniGPTForSequenceClassification(config)
    with pretended_gpu():
        model = to_gpu_in(precision, model).train()
        optimizer = muon_adamw(model, learning_rate=1e-3, matrix_learning_rate=1e-2)
        inputs = to_gpu(inputs)
        with autocast(precision), record_attention() as calls, count_syncs() as syncs:
            loss = model(**inputs).loss
        assert syncs.total() <= 1, syncs
        assert calls and all(call.query == call.key == call.value for call in calls), calls
        with count_syncs() as syncs:
            loss.backward()
            optimizer.step()
        assert not syncs


@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_padded_texts_are_classified_as_on_the_cpu(side):
    config = copy.deepcopy(CONFIGS["switches-modern"])
    config.update({"num_labels": 3, "pad_token_id": 0})
    lengths = torch.tensor([12, 12, 12] if side == "none" else [12, 7, 4])[:, None]
    positions = torch.arange(12)
    mask = (positions < lengths if side != "left" else positions >= 12 - lengths).long()
    inputs = {"input_ids": random_ids(3, 12), "attention_mask": mask}
    model = shaken(config, MiniGPTForSequenceClassification).eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        with pretended_gpu():
            model, inputs = to_gpu(model), to_gpu(inputs)
            with count_syncs() as syncs, record_attention() as calls:
                logits = model(**inputs).logits
            logits = to_cpu(logits)
    torch.testing.assert_close(logits, expected)
    assert {call.has_mask for call in calls} == {side != "none"}
    assert syncs.total() <= 1, syncs


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16 weights"])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_generation(name, precision):
    """The CPU's tokens in float32, and at most one sync of the package's own."""
    model = shaken(CONFIGS[name])
    ids = random_ids(2, 5)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with pretended_gpu(), autocast(precision), count_syncs() as syncs:
        model, ids = to_gpu_in(precision, model), to_gpu(ids)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    own = {place: number for (_, place), number in syncs.items() if place.startswith("hf_minigpt/")}
    assert sum(own.values()) <= 1, own
    if precision == "float32":
        assert torch.equal(to_cpu(found), expected)


@pytest.mark.parametrize("name", ["gpt2", "switches-modern", "switches-gpt1"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_more_layers_sync_no_more_often(name, attention):
    totals = []
    for num_layers in (2, 4):
        config = copy.deepcopy(CONFIGS[name])
        config.num_hidden_layers = num_layers
        if config.head_mask is not None:
            config.head_mask = config.head_mask[:1] * num_layers
        config._attn_implementation = attention
        model = shaken(config)
        with pretended_gpu():
            to_gpu(model)
            with count_syncs() as syncs:
                for packed in (False, True):
                    model(**to_gpu(batch(packed)), skip_logits=True).loss.backward()
                ids = to_gpu(random_ids(2, 5))
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0
                )
        totals.append(syncs)
    assert totals[0] == totals[1]
