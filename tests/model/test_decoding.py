"""Single-token decoding computes what `forward` computes, and the growing cache works as a `DynamicCache`."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache

import hf_minigpt.model.generation_minigpt as generation
from hf_minigpt.deploy.quantization import Int8Linear, quantize_int8
from hf_minigpt.model.generation_minigpt import GrowingLayer, SingleTokenDecoder, use_growing_layers
from hf_minigpt.model.products_minigpt import fast_paths_enabled, few_rows_linear
from tests.model.test_generation import by_hand, greedy
from tests.tiny import SWITCHES, needs_fast_paths, random_ids, tiny_model


@pytest.fixture
def count_steps(monkeypatch):
    """Return a function that counts the single tokens decoded by the fast path."""
    if not fast_paths_enabled():
        pytest.skip("the fast paths are turned off")
    taken = []
    step = SingleTokenDecoder.step

    def counted(self, *args):
        logits = step(self, *args)
        taken.append(logits is not None)
        return logits

    monkeypatch.setattr(SingleTokenDecoder, "step", counted)
    return lambda: sum(taken)


@torch.no_grad()
def step_logits(model, ids, mask=None):
    """Return the logits after each token from the third on. The first three are read together."""
    cache, logits = DynamicCache(config=model.config), []
    for begin, end in [(0, 3), *((i, i + 1) for i in range(3, ids.shape[1]))]:
        part = None if mask is None else mask[:, :end]
        logits.append(model(ids[:, begin:end], attention_mask=part, past_key_values=cache).logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("small_matrix", [0, 2**16])
@pytest.mark.parametrize("name", SWITCHES)
def test_single_tokens_score_as_in_forward(name, small_matrix, rows, count_steps, monkeypatch):
    # At 0 every product is computed as for a large matrix.
    monkeypatch.setattr(generation, "SMALL_MATRIX", small_matrix)
    model = tiny_model(name)
    ids = random_ids(rows, 9)
    expected = model(ids).logits[:, 2:]
    torch.testing.assert_close(step_logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert count_steps() == (6 if name != "bigram" else 0)


@pytest.mark.parametrize("shape", [(8, 5), (7, 5), (3, 5), (50257, 16)])
@pytest.mark.parametrize("rows", [1, 2, 32])
def test_few_rows_linear_equals_linear(shape, rows):
    inputs, weight, bias = torch.randn(rows, shape[1]), torch.randn(shape), torch.randn(shape[0])
    for some_bias in (None, bias):
        expected = torch.nn.functional.linear(
            inputs.double(), weight.double(), None if some_bias is None else some_bias.double()
        )
        torch.testing.assert_close(few_rows_linear(inputs, weight, some_bias).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "transformer", "modern", "no_positions"])
def test_padded_rows_score_as_in_forward(name, count_steps):
    model = tiny_model(name)
    ids, mask = random_ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :2], mask[1, :1] = 0, 0
    expected = model(ids, attention_mask=mask).logits[:, 2:]
    torch.testing.assert_close(step_logits(model, ids, mask), expected, rtol=1e-4, atol=1e-4)
    assert count_steps() == 6


def test_generate_uses_the_fast_path(count_steps):
    model = tiny_model("gpt2")
    assert torch.equal(greedy(model, random_ids(2, 5), new_tokens=8), by_hand(model, random_ids(2, 5), 8))
    # The prompt's forward pass gives the first token.
    assert count_steps() == 7


def test_changed_weights_are_used_with_the_same_cache():
    model = tiny_model("gpt2")
    ids = random_ids(1, 9)
    step_logits(model, ids)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2.0)
    torch.testing.assert_close(step_logits(model, ids), model(ids).logits[:, 2:], rtol=1e-4, atol=1e-4)

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache)
        before = model(ids[:, 4:5], past_key_values=cache).logits
        cache.crop(-1)
        model.lm_head.weight.mul_(2.0)
        # The embedding is tied to the head, so the plain path gives the expected logits.
        fast = model(ids[:, 4:5], past_key_values=cache).logits
        cache.crop(-1)
        # Recording hidden states excludes the fast path.
        slow = model(ids[:, 4:5], past_key_values=cache, output_hidden_states=True).logits
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(fast, before)


@pytest.mark.parametrize("change", ["module", "parameter", "assigned", "norm", "lora", "hook"])
def test_changed_modules_are_used(change, count_steps):
    model = tiny_model("gpt2")
    ids = random_ids(1, 9)
    step_logits(model, ids)
    block = model.model.layers[0]
    width = model.config.hidden_size
    if change == "module":
        block.self_attn.o_proj = nn.Linear(width, width)
    elif change == "parameter":
        block.self_attn.o_proj.weight = nn.Parameter(torch.randn(width, width))
    elif change == "assigned":
        model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}, assign=True)
    elif change == "norm":
        block.input_layernorm = nn.LayerNorm(width, elementwise_affine=False)
    elif change == "lora":
        lora = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
        lora.eval()
    else:
        block.mlp.up_proj.register_forward_hook(lambda module, inputs, output: output * 2)
    torch.testing.assert_close(step_logits(model, ids), model(ids).logits[:, 2:], rtol=1e-4, atol=1e-4)
    # The fast path still runs, and calls modules that are more than a matrix.
    assert count_steps() == 12


def test_unsupported_requests_use_the_plain_path(count_steps):
    ids = random_ids(1, 5)
    for attention, options, kwargs in (
        ("eager", {}, {}),
        ("sdpa", {}, {"token_type_ids": ids[:, 4:]}),
        ("sdpa", {}, {"labels": ids[:, 4:]}),
        ("sdpa", {}, {"output_hidden_states": True}),
        ("sdpa", {"dtype": torch.bfloat16}, {}),
    ):
        model = tiny_model("gpt2", attn_implementation=attention)
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), torch.autocast("cpu", enabled="dtype" in options):
            model(ids[:, :4], past_key_values=cache)
            output = model(ids[:, 4:], past_key_values=cache, **kwargs)
        assert count_steps() == 0, (attention, options, kwargs)
        assert (output.hidden_states is not None) == ("output_hidden_states" in kwargs)
        assert (output.loss is not None) == ("labels" in kwargs)


def test_generate_returns_hidden_states_attentions_and_scores():
    model = tiny_model("gpt2", attn_implementation="eager")
    output = greedy(
        model,
        random_ids(1, 5),
        new_tokens=3,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_attentions=True,
        output_scores=True,
    )
    assert [states[-1].shape[1] for states in output.hidden_states] == [5, 1, 1]
    assert [weights[0].shape[-1] for weights in output.attentions] == [5, 6, 7]
    assert len(output.scores) == 3


def test_a_copied_model_shares_no_weights():
    model = tiny_model("gpt2")
    ids = random_ids(1, 9)
    step_logits(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not twin.fast_decoder.blocks
        torch.nn.init.normal_(twin.lm_head.weight)
        torch.testing.assert_close(step_logits(twin, ids), twin(ids).logits[:, 2:], rtol=1e-4, atol=1e-4)


@needs_fast_paths
@torch.no_grad()
def test_the_growing_cache_works_as_a_dynamic_cache():
    """Apply random operations of transformers to both, and compare."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        ours, theirs = DynamicCache(), DynamicCache()
        use_growing_layers(ours)
        rows = 2
        for _ in range(30):
            action = int(torch.randint(8, (), generator=generator))
            length = theirs.get_seq_length()
            if action == 0 and length > 3:
                ours.crop(-2), theirs.crop(-2)
            elif action == 1 and length:
                order = torch.randint(rows, (rows,), generator=generator)
                ours.reorder_cache(order), theirs.reorder_cache(order)
            elif action == 2 and length and rows < 8:
                ours.batch_repeat_interleave(2), theirs.batch_repeat_interleave(2)
                rows *= 2
            elif action == 3 and rows > 2:
                ours.batch_select_indices(torch.arange(2)), theirs.batch_select_indices(torch.arange(2))
                rows = 2
            elif action == 4 and length:
                ours = copy.deepcopy(ours)
            else:
                with torch.inference_mode(mode=action == 5):
                    states = torch.randn(2, rows, 3, int(torch.randint(1, 40, (), generator=generator)), 4)
                    ours.update(*states, 0), theirs.update(*states, 0)
            if length:
                assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)
                assert torch.equal(ours.layers[0].values, theirs.layers[0].values)
                assert ours.get_seq_length() == theirs.get_seq_length()
        assert type(ours.layers[0]) is GrowingLayer


def test_gradients_flow_through_a_cache_filled_without_gradients():
    model = tiny_model("gpt2")
    ids = random_ids(1, 6)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :3], past_key_values=cache)
    for i in (3, 4, 5):
        logits = model(ids[:, i : i + 1], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids).logits[:, -1:], rtol=1e-4, atol=1e-4)
    logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["gpt2", "modern", "attention_only"])
def test_int8_stays_close_and_generates(name, count_steps):
    model = tiny_model(name, hidden_size=48)
    ids = random_ids(4, 12)
    exact = model(ids, labels=ids, skip_logits=False)
    quantized = quantize_int8(copy.deepcopy(model))
    rounded = quantized(ids, labels=ids, skip_logits=False)
    assert not torch.equal(exact.logits, rounded.logits)
    assert rounded.loss.item() == pytest.approx(exact.loss.item(), rel=0.03)
    assert isinstance(quantized.lm_head, Int8Linear)
    assert greedy(quantized, ids[:1], new_tokens=8).shape == (1, 20)
    assert count_steps() == 7


def test_int8_refuses_unsupported_models(tmp_path):
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match=r"call \.eval"):
        quantize_int8(copy.deepcopy(model).train())
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        quantize_int8(copy.deepcopy(model).bfloat16())
    hooked = copy.deepcopy(model)
    hooked.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="lm_head is more than a linear layer"):
        quantize_int8(hooked)
    # The failed attempt changed nothing.
    assert not any(isinstance(module, Int8Linear) for module in hooked.modules())
    with pytest.raises(ValueError, match="cannot be saved"):
        quantize_int8(model).save_pretrained(tmp_path)
