"""The model equals an independent float64 computation, in every mode of attention, caching, packing and saving."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_minigpt import MiniGPTConfig, MiniGPTForCausalLM, MiniGPTForSequenceClassification, MiniGPTModel
from tests.tiny import POSITIONS, SWITCHES, gradients, random_ids, tiny_config, tiny_model


# Two orders of summation in float32 differ by this much at logits of about 10.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}


def assert_close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **{**TOLERANCE, **tolerance})


def plain_norm(config, x, weights, name):
    if config.norm_type == "none":
        return x
    if config.norm_type == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.layer_norm_epsilon)
    if config.norm_affine:
        x = x * weights[f"{name}.weight"]
        if config.norm_type == "layernorm":
            x = x + weights[f"{name}.bias"]
    return x


def plain_linear(x, weights, name):
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def plain_activation(name, x):
    return {
        "gelu_new": lambda: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "gelu": lambda: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
        "relu": lambda: np.maximum(x, 0),
        "relu2": lambda: np.maximum(x, 0) ** 2,
        "silu": lambda: x / (1 + np.exp(-x)),
    }[name]()


def plain_rotate(x, positions, theta):
    """Rotate x (T, D), read as complex numbers x[d] + i x[d + D/2], by position * theta^(-2d/D)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-2.0 * np.arange(half) / x.shape[-1])
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def plain_attention(config, x, positions, weights, layer):
    name = f"model.layers.{layer}.self_attn"
    q, k, v = (plain_linear(x, weights, f"{name}.{part}_proj") for part in "qkv")
    outputs = []
    for head in range(config.num_attention_heads):
        dims = slice(head * config.head_dim, (head + 1) * config.head_dim)
        query, key = q[:, dims], k[:, dims]
        if config.position_embedding_type == "rope":
            theta = config.rope_parameters["rope_theta"]
            query, key = plain_rotate(query, positions, theta), plain_rotate(key, positions, theta)
        if config.qk_norm:
            query, key = (
                part / np.sqrt((part**2).mean(-1, keepdims=True) + config.layer_norm_epsilon) for part in (query, key)
            )
        scores = query @ key.T * (config.attention_scaling or 1 / math.sqrt(config.head_dim))
        scores[np.triu_indices(len(x), 1)] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        factor = config.head_mask[layer][head] if config.head_mask else 1.0
        outputs.append(factor * (scores / scores.sum(-1, keepdims=True)) @ v[:, dims])
    return plain_linear(np.concatenate(outputs, -1), weights, f"{name}.o_proj")


def plain_mlp(config, x, weights, layer):
    name = f"model.layers.{layer}.mlp"
    return plain_linear(
        plain_activation(config.hidden_act, plain_linear(x, weights, f"{name}.up_proj")), weights, f"{name}.down_proj"
    )


def plain_logits(model, ids, positions=None):
    """Compute the logits (T, unpadded vocabulary) of one row of token ids."""
    config = model.config
    weights = {name: w.detach().double().numpy() for name, w in model.state_dict().items()}
    positions = np.arange(len(ids)) if positions is None else np.asarray(positions)
    x = weights["model.embed_tokens.weight"][np.asarray(ids)]
    if config.position_embedding_type == "learned":
        x = x + weights["model.embed_positions.weight"][positions]
    if config.position_embedding_type == "sinusoidal":
        table = np.empty_like(x)
        for i in range(0, config.hidden_size, 2):
            angle = positions / 10000 ** (i / config.hidden_size)
            table[:, i], table[:, i + 1] = np.sin(angle), np.cos(angle)
        x = x + table
    if config.embedding_norm:
        x = plain_norm(config, x, weights, "model.embedding_norm")

    def branch(x, function, norm_name):
        if config.norm_placement == "pre":
            y = function(plain_norm(config, x, weights, norm_name))
            return x + y if config.residual else y
        y = function(x)
        return plain_norm(config, x + y if config.residual else y, weights, norm_name)

    for i in range(config.num_hidden_layers):
        block = f"model.layers.{i}"
        x = branch(x, lambda y, i=i: plain_attention(config, y, positions, weights, i), f"{block}.input_layernorm")
        if config.intermediate_size:
            x = branch(x, lambda y, i=i: plain_mlp(config, y, weights, i), f"{block}.post_attention_layernorm")
    if config.norm_placement == "pre" and config.num_hidden_layers:
        x = plain_norm(config, x, weights, "model.norm")
    logits = plain_linear(x, weights, "lm_head")
    if config.final_logit_softcapping:
        logits = config.final_logit_softcapping * np.tanh(logits / config.final_logit_softcapping)
    return torch.tensor(logits[:, : config.unpadded_vocab_size])


@pytest.mark.smoke
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SWITCHES)
def test_logits_equal_a_plain_float64_computation(name, attention):
    model = tiny_model(name, attn_implementation=attention)
    ids = random_ids(2, 13)
    logits = model(ids).logits
    assert logits.shape == (2, 13, model.config.vocab_size)
    for row in range(2):
        expected = plain_logits(model, ids[row])
        assert expected.std() > 0.1
        assert_close(logits[row, :, : expected.shape[-1]].double(), expected)


@pytest.mark.parametrize("name", POSITIONS)
def test_logits_at_given_positions(name):
    model = tiny_model(name)
    positions = torch.arange(20, 33)[None]
    ids = random_ids(1, 13)
    expected = plain_logits(model, ids[0], positions[0].numpy())
    assert_close(model(ids, position_ids=positions).logits[0, :, : expected.shape[-1]].double(), expected)


@pytest.mark.parametrize("name", SWITCHES)
def test_padded_ids_have_probability_zero(name):
    model = tiny_model(name)
    real = model.config.unpadded_vocab_size
    if real is None:
        return
    with torch.no_grad():
        # A head that prefers them.
        model.lm_head.weight[real:] = 50.0
    logits = model(random_ids(2, 13)).logits
    assert logits[..., real:].max() < logits[..., :real].min() - 1e4
    assert logits.softmax(-1)[..., real:].max() == 0
    assert torch.isfinite(logits).all()


@pytest.mark.smoke
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", POSITIONS)
def test_padded_rows_score_as_unpadded_ones(name, side, attention):
    model = tiny_model(name, attn_implementation=attention)
    lengths = [11, 4, 1, 7]
    rows = [random_ids(1, length, seed=length) for length in lengths]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(ids.shape[1] - row.shape[1], None) if side == "left" else slice(0, row.shape[1])
        ids[i, where], mask[i, where] = row[0], 1
    logits = model(ids, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    for i, row in enumerate(rows):
        assert_close(logits[i][mask[i].bool()], model(row).logits[0])
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask).logits
    assert_close(embedded[mask.bool()], logits[mask.bool()])
    assert_close(model(ids, attention_mask=mask.bool()).logits[mask.bool()], logits[mask.bool()])


@pytest.mark.smoke
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 5], [1, 8, 3]])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", POSITIONS)
def test_cached_tokens_score_as_uncached_ones(name, attention, pieces):
    model = tiny_model(name, attn_implementation=attention)
    ids = random_ids(2, 12)
    expected = model(ids, use_cache=False)
    assert expected.past_key_values is None
    cache, logits = None, []
    for piece in ids.split(pieces, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert cache.get_seq_length() == 12
    assert_close(torch.cat(logits, 1), expected.logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", POSITIONS)
def test_cached_rows_with_left_padding_score_as_unpadded_ones(name, attention):
    """In a chunked prefill whose first chunk is padded, later positions follow from the mask, not from the cache."""
    model = tiny_model(name, attn_implementation=attention)
    alone, other = random_ids(1, 9), random_ids(1, 12, seed=2)
    ids = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), alone], 1), other])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache, logits, seen = DynamicCache(config=model.config), [], 0
    for piece in ids.split([4, 1, 6, 1], dim=1):
        seen += piece.shape[1]
        logits.append(model(piece, attention_mask=mask[:, :seen], past_key_values=cache).logits)
    logits = torch.cat(logits, 1)
    assert_close(logits[0, 3:], model(alone).logits[0])
    assert_close(logits[1], model(other).logits[0])


@pytest.mark.parametrize("name", POSITIONS)
def test_a_static_cache_scores_as_no_cache(name):
    model = tiny_model(name)
    ids = random_ids(2, 12)
    cache = StaticCache(config=model.config, max_cache_len=20)
    logits = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split([7, 1, 4], dim=1)]
    assert_close(torch.cat(logits, 1), model(ids).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", POSITIONS)
def test_given_positions_work_with_a_static_cache(name, attention):
    model = tiny_model(name, attn_implementation=attention)
    ids = random_ids(2, 9)
    for positions in (torch.arange(9)[None], torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])):
        for options in ({}, {"attention_mask": torch.ones_like(ids)}):
            cache = StaticCache(config=model.config, max_cache_len=16)
            logits = model(ids, position_ids=positions, past_key_values=cache, **options).logits
            assert_close(logits, model(ids, position_ids=positions, use_cache=False).logits)


@pytest.mark.smoke
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", ["no_mask", "ones"])
@pytest.mark.parametrize("use_cache", [None, False, True])
@pytest.mark.parametrize("name", POSITIONS)
def test_packed_documents_score_as_separate_ones(name, use_cache, mask, attention):
    model = tiny_model(name, attn_implementation=attention)
    documents = [random_ids(1, length, seed=length) for length in (5, 1, 8, 3)]
    ids = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    attention_mask = torch.ones_like(ids) if mask == "ones" else None
    logits = model(ids, position_ids=positions, attention_mask=attention_mask, use_cache=use_cache).logits
    for document, packed in zip(documents, logits.split([d.shape[1] for d in documents], dim=1), strict=True):
        assert_close(packed, model(document).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pad_positions", ["zero", "count_on"])
@pytest.mark.parametrize("name", POSITIONS)
def test_packed_documents_with_right_padding_score_as_separate_ones(name, pad_positions, attention):
    model = tiny_model(name, attn_implementation=attention)
    rows = [[random_ids(1, 5, seed=3), random_ids(1, 4, seed=4)], [random_ids(1, 6, seed=5)]]
    ids = torch.zeros(2, 9, dtype=torch.long)
    positions = torch.arange(9).repeat(2, 1) if pad_positions == "count_on" else torch.zeros_like(ids)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        start = 0
        for document in row:
            where = slice(start, start + document.shape[1])
            ids[i, where], mask[i, where] = document[0], 1
            positions[i, where] = torch.arange(document.shape[1])
            start = where.stop
    logits = model(ids, position_ids=positions, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    for i, row in enumerate(rows):
        start = 0
        for document in row:
            assert_close(logits[i, start : start + document.shape[1]], model(document).logits[0])
            start += document.shape[1]


@pytest.mark.parametrize("name", POSITIONS)
def test_sdpa_equals_eager_in_value_and_gradient(name):
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, :4] = 0
    mask[1, 8:] = 0
    ids = random_ids(3, 10)
    labels = ids.masked_fill(mask == 0, -100)
    # The prediction at a padding position is undefined: here that of the first token after left padding.
    labels[0, 4] = -100
    results = []
    for attention in ("sdpa", "eager"):
        model = tiny_model(name, attn_implementation=attention)
        output = model(ids, attention_mask=mask, labels=labels)
        output.loss.backward()
        results.append((output, gradients(model)))
    (sdpa, sdpa_gradients), (eager, eager_gradients) = results
    assert_close(sdpa.logits[mask.bool()], eager.logits[mask.bool()])
    assert_close(sdpa.loss, eager.loss)
    assert sdpa_gradients.keys() == eager_gradients.keys()
    for parameter, gradient in sdpa_gradients.items():
        assert torch.isfinite(gradient).all()
        assert_close(gradient, eager_gradients[parameter], msg=parameter)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", POSITIONS)
def test_four_dimensional_masks_are_used_unchanged(name, attention):
    """Score two continuations of one prompt in one row, as in tree-based speculative decoding."""
    model = tiny_model(name, attn_implementation=attention)
    prompt, one, two = random_ids(1, 4), random_ids(1, 3, seed=5), random_ids(1, 3, seed=6)
    allowed = torch.ones(10, 10).tril().bool()
    allowed[7:, 4:7] = False
    mask = allowed[None, None]
    if attention == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6]])
    logits = model(torch.cat([prompt, one, two], 1), attention_mask=mask, position_ids=positions).logits
    assert_close(logits[:, :7], model(torch.cat([prompt, one], 1)).logits)
    assert_close(logits[:, 7:], model(torch.cat([prompt, two], 1)).logits[:, 4:])


def test_a_position_beyond_a_learned_table_is_refused():
    model = tiny_model("gpt2", max_position_embeddings=8)
    model(random_ids(1, 8))
    with pytest.raises(ValueError, match="8"):
        model(random_ids(1, 9))
    with pytest.raises(ValueError, match="8"):
        model(random_ids(1, 3), position_ids=torch.tensor([[6, 7, 8]]))
    cache = model(random_ids(1, 8), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="8"):
        model(random_ids(1, 1), past_key_values=cache)


def test_a_long_flattened_row_stays_within_a_learned_table():
    model = tiny_model("gpt2", max_position_embeddings=8)
    ids = random_ids(1, 24)
    logits = model(ids, position_ids=torch.arange(8).repeat(3)[None]).logits
    assert_close(logits[:, 16:], model(ids[:, 16:]).logits)


def test_left_padding_does_not_count_against_a_learned_table():
    model = tiny_model("gpt2", max_position_embeddings=8)
    ids = torch.cat([torch.zeros(1, 5, dtype=torch.long), random_ids(1, 6)], 1)
    mask = torch.tensor([[0] * 5 + [1] * 6])
    assert_close(model(ids, attention_mask=mask).logits[:, 5:], model(ids[:, 5:]).logits)


@pytest.mark.parametrize("name", ["transformer", "modern", "no_positions"])
def test_other_positions_extend_beyond_the_context(name):
    model = tiny_model(name, max_position_embeddings=8)
    ids = random_ids(1, 24)
    expected = plain_logits(model, ids[0])
    assert_close(model(ids).logits[0, :, : expected.shape[-1]].double(), expected)


@pytest.mark.parametrize("name", POSITIONS)
def test_embeddings_may_replace_ids(name):
    model = tiny_model(name)
    ids = random_ids(2, 7)
    embeds = model.get_input_embeddings()(ids)
    assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    with pytest.raises(ValueError, match="input_ids"):
        model(ids, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="input_ids"):
        model()


def test_token_type_ids_add_their_embedding_as_in_gpt2():
    model = tiny_model("gpt2")
    ids, types = random_ids(2, 7), random_ids(2, 7, seed=2)
    embed = model.get_input_embeddings()
    assert_close(model(ids, token_type_ids=types).logits, model(inputs_embeds=embed(ids) + embed(types)).logits)


@pytest.mark.parametrize("name", ["gpt2", "modern", "bigram"])
def test_logits_to_keep_selects_positions(name):
    model = tiny_model(name)
    ids = random_ids(2, 7)
    logits = model(ids).logits
    assert_close(model(ids, logits_to_keep=1).logits, logits[:, -1:])
    assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    keep = torch.tensor([0, 4, 5])
    assert_close(model(ids, logits_to_keep=keep).logits, logits[:, keep])
    each = torch.tensor([[0, 3], [2, 1]])
    assert_close(
        model(ids, logits_to_keep=each).logits, torch.stack([row[at] for row, at in zip(logits, each, strict=True)])
    )
    assert_close(model(ids, logits_to_keep=ids > 30).logits, logits[ids > 30])


def test_hidden_states_and_attentions_are_recorded():
    model = tiny_model("gpt2", attn_implementation="eager")
    ids = random_ids(2, 7)
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert all(states.shape == (2, 7, model.config.hidden_size) for states in output.hidden_states)
    positions = model.model.embed_positions.weight[:7]
    assert_close(output.hidden_states[0], model.get_input_embeddings()(ids) + positions)
    assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    assert len(output.attentions) == model.config.num_hidden_layers
    for weights in output.attentions:
        assert weights.shape == (2, model.config.num_attention_heads, 7, 7)
        assert_close(weights.sum(-1), torch.ones(2, 3, 7))
        assert weights.triu(1).abs().max() == 0
    assert model(ids).hidden_states is None and model(ids).attentions is None


def test_return_dict_false_returns_tuples():
    model = tiny_model("gpt2")
    ids = random_ids(2, 7)
    loss, logits = model(ids, labels=ids, return_dict=False)[:2]
    assert_close(loss, model(ids, labels=ids).loss)
    assert_close(logits, model(ids).logits)
    assert_close(model.model(ids, return_dict=False)[0], model.model(ids).last_hidden_state)


def test_a_custom_attention_function_gets_the_callers_arguments():
    """Flash attention's document boundaries, the paged cache and vLLM rely on it."""
    seen = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.layer_idx, module.is_causal, kwargs["scaling"], kwargs["note"], kwargs["position_ids"]))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("noting", attention)
    model = tiny_model("rope")
    ids, positions = random_ids(2, 7), torch.arange(7)[None]
    expected = model(ids).logits
    model.set_attn_implementation("noting")
    assert_close(model(ids, position_ids=positions, note="from the caller").logits, expected)
    assert [entry[:4] for entry in seen] == [(layer, True, 0.4, "from the caller") for layer in (0, 1)]
    assert all(torch.equal(entry[4], positions) for entry in seen)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "transformer", "modern"])
def test_gradient_checkpointing_changes_no_gradient(name, use_reentrant):
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    results = []
    for checkpointing in (False, True):
        # With dropout: the random state of the second forward pass must be that of the first.
        model = tiny_model(name, resid_pdrop=0.2, embd_pdrop=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        loss = model(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        results.append((loss, gradients(model)))
    (loss, plain), (checkpointed_loss, checkpointed) = results
    assert_close(loss, checkpointed_loss)
    assert plain.keys() == checkpointed.keys()
    for parameter in plain:
        assert_close(plain[parameter], checkpointed[parameter], msg=parameter)


def checkpointed_model(model_class=MiniGPTForCausalLM, use_reentrant=False, **overrides):
    model = tiny_model("modern", model_class, **overrides).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("cache_name", [None, "past_key_values", "cache", "memory"])
@pytest.mark.parametrize("model_class", [MiniGPTForCausalLM, MiniGPTForSequenceClassification])
def test_gradient_checkpointing_keeps_no_cache(model_class, cache_name, use_reentrant):
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    labels = ids if model_class is MiniGPTForCausalLM else torch.tensor([0, 1])
    results = []
    for checkpointing in (False, True):
        model = tiny_model("modern", model_class).train()
        options = {"use_cache": False}
        if checkpointing:
            model = checkpointed_model(model_class, use_reentrant)
            options = {"use_cache": True}
            if cache_name is not None:
                options[cache_name] = DynamicCache(config=model.config)
        outputs = model(ids, attention_mask=mask, labels=labels, **options)
        outputs.loss.backward()
        results.append((outputs.loss, gradients(model)))
        assert outputs.get("past_key_values") is None and outputs.get("cache") is None
        assert cache_name not in options or options[cache_name].get_seq_length() == 0
    (loss, plain), (checkpointed_loss, checkpointed) = results
    assert_close(loss, checkpointed_loss)
    assert plain.keys() == checkpointed.keys()
    for parameter in plain:
        assert_close(plain[parameter], checkpointed[parameter], msg=parameter)


def test_gradient_checkpointing_refuses_a_cache_with_tokens():
    model, ids = checkpointed_model(), random_ids(1, 6)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache)
    assert cache.get_seq_length() == 4
    with pytest.raises(ValueError, match="past_key_values holds 4 tokens"):
        model(ids[:, 4:], past_key_values=cache, labels=ids[:, 4:])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_generates_in_training_with_gradient_checkpointing(use_reentrant):
    model, ids = checkpointed_model(use_reentrant=use_reentrant), random_ids(2, 5)
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert torch.equal(written, expected)


@pytest.mark.parametrize("switch", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_acts_in_training_only(switch, attention):
    model = tiny_model("gpt2", attn_implementation=attention, **{switch: 0.3})
    reference = tiny_model("gpt2")
    ids = random_ids(2, 9)
    assert_close(model(ids).logits, reference(ids).logits)
    model.train()
    assert (model(ids).logits - model(ids).logits).abs().max() > 1e-2
    assert_close(reference.train()(ids).logits, reference.eval()(ids).logits)


def test_branches_start_scaled_by_depth_and_the_rest_does_not():
    config = tiny_config("gpt2", hidden_size=192, num_hidden_layers=8, vocab_size=500)
    for model_class in (MiniGPTForCausalLM, MiniGPTForSequenceClassification, MiniGPTModel):
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any(), name
            elif "norm" in name:
                assert (parameter == 1).all(), name
            else:
                ends_branch = "o_proj" in name or "down_proj" in name
                std = 0.02 / math.sqrt(16) if ends_branch else 0.02
                # three standard errors of the sample's own standard deviation, at least 2 %
                relative = max(3 / math.sqrt(2 * parameter.numel()), 0.02)
                assert abs(parameter.std().item() / std - 1) < relative, name
                assert abs(parameter.mean().item()) < 4 * std / math.sqrt(parameter.numel()), name


@pytest.mark.parametrize("residual_init", ["gpt2", "normal", "zero"])
def test_residual_init(residual_init):
    model = MiniGPTForCausalLM(
        tiny_config("modern", hidden_size=96, num_hidden_layers=8, residual_init=residual_init, vocab_size=512)
    )
    expected = {"gpt2": 0.02 / 4, "normal": 0.02, "zero": 0.0}[residual_init]
    for layer in model.model.layers:
        assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert layer.mlp.down_proj.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    head_std = model.lm_head.weight.std().item()
    assert head_std == pytest.approx(0.0 if residual_init == "zero" else 0.02, rel=0.1)
    tied = MiniGPTForCausalLM(tiny_config("modern", residual_init=residual_init, tie_word_embeddings=True))
    assert tied.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_new_model_has_the_loss_of_a_uniform_guess():
    for name in SWITCHES:
        model = MiniGPTForCausalLM(tiny_config(name)).eval()
        loss = model(random_ids(8, 32), labels=random_ids(8, 32)).loss
        assert abs(loss.item() - math.log(67)) < 0.25, name


def test_from_config_supports_bfloat16():
    model = MiniGPTForCausalLM._from_config(tiny_config("modern"), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(random_ids(1, 9)).logits).all()


@pytest.mark.smoke
@pytest.mark.parametrize("way", ["plain", "meta", "auto"])
@pytest.mark.parametrize("name", SWITCHES)
def test_a_loaded_model_equals_the_saved_one(name, way, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    arguments = {"plain": {}, "meta": {"low_cpu_mem_usage": True, "device_map": "cpu"}, "auto": {}}[way]
    load = AutoModelForCausalLM if way == "auto" else MiniGPTForCausalLM
    loaded, info = load.from_pretrained(tmp_path, output_loading_info=True, **arguments)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert isinstance(loaded, MiniGPTForCausalLM) and not loaded.training
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    for (key, buffer), (_, loaded_buffer) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(buffer, loaded_buffer), key
    ids = random_ids(2, 13)
    assert torch.equal(model(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize("name", SWITCHES)
def test_loaded_in_bfloat16_keeps_exact_positions(name, tmp_path):
    """The rotary frequencies stay float32, so that the loaded model is the float32 one with rounded weights."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    loaded = MiniGPTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for (key, buffer), (_, loaded_buffer) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert loaded_buffer.dtype == torch.float32 and torch.equal(buffer, loaded_buffer), key
    ids = random_ids(2, 13)
    real = slice(0, model.config.unpadded_vocab_size)
    error = (loaded(ids).logits.float() - model(ids).logits)[..., real].abs().mean()
    assert error < 0.1 * model(ids).logits[..., real].std()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_angles_are_exact_in_half_precision(dtype):
    """Activations are half precision, the frequencies not: `from_pretrained` keeps them, as tested above."""
    model = tiny_model("modern")
    positions = torch.tensor([[0, 1, 4001, 4002]])
    cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=dtype), positions)
    angles = positions[0, :, None].double() * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    for actual, expected in ((cos, angles.cos()), (sin, angles.sin())):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.squeeze().double(), expected.repeat(1, 2), rtol=0, atol=4e-3)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_tied_head_is_saved_once(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    expected = set(model.state_dict())
    if model.config.tie_word_embeddings:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        expected.remove("lm_head.weight")
    else:
        assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert keys == expected
    loaded = MiniGPTForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings


def test_the_base_model_loads_from_and_into_every_head(tmp_path):
    model = tiny_model("gpt2", pad_token_id=0)
    model.save_pretrained(tmp_path / "lm")
    base, info = MiniGPTModel.from_pretrained(tmp_path / "lm", output_loading_info=True)
    assert not info["missing_keys"]
    classifier = MiniGPTForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=3)
    base.save_pretrained(tmp_path / "base")
    again = MiniGPTForCausalLM.from_pretrained(tmp_path / "base")
    for key, tensor in model.model.state_dict().items():
        for other in (base, classifier.model, again.model):
            assert torch.equal(tensor, other.state_dict()[key]), key
    ids = random_ids(2, 7)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_sharded_checkpoints_load(tmp_path):
    model = tiny_model("modern")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    ids = random_ids(2, 7)
    assert torch.equal(MiniGPTForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["gpt2", "transformer", "rope"])
def test_embeddings_can_be_resized(name, tmp_path):
    model = tiny_model(name, unpadded_vocab_size=None, vocab_size=67)
    ids = random_ids(2, 9)
    with torch.no_grad():
        before = model(ids).logits
    model.resize_token_embeddings(80)
    assert model.config.vocab_size == 80
    assert model.get_output_embeddings().weight.shape[0] == 80
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    with torch.no_grad():
        after = model(ids).logits
    assert after.shape[-1] == 80
    assert_close(after[..., :67], before)
    model(ids, labels=random_ids(2, 9, vocab_size=80)).loss.backward()
    model.save_pretrained(tmp_path)
    assert torch.equal(MiniGPTForCausalLM.from_pretrained(tmp_path)(ids).logits, after)
    model.resize_token_embeddings(50)
    small = random_ids(2, 9, vocab_size=50)
    assert model(small).logits.shape[-1] == 50


@pytest.mark.parametrize("size", [50, 67, 70, 80])
def test_a_padded_embedding_can_be_resized(size, tmp_path):
    """As after `tokenizer.add_tokens`, exactly the requested ids have a probability."""
    for multiple in (None, 16):
        model = tiny_model("modern")
        model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
        ids = random_ids(2, 9, vocab_size=50)
        probabilities = model(ids).logits.softmax(-1)
        assert probabilities[..., :size].min() > 0
        assert not probabilities[..., size:].any()
        model.save_pretrained(tmp_path)
        assert torch.equal(MiniGPTForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_a_model_can_be_copied_and_cast():
    model = tiny_model("gpt2")
    ids = random_ids(2, 9)
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)
    assert_close(model.double()(ids).logits.float(), tiny_model("gpt2")(ids).logits)


@pytest.mark.parametrize("name", SWITCHES)
def test_every_matrix_of_a_block_is_in_the_tensor_parallel_plan(name):
    model = tiny_model(name)
    modules = dict(model.model.named_modules())
    plan = model.config.base_model_tp_plan

    def matches(pattern, module):
        parts, names = pattern.split("."), module.split(".")
        return len(parts) == len(names) and all(p in ("*", n) for p, n in zip(parts, names, strict=True))

    for module in modules:
        if module.startswith("layers.") and module.endswith("_proj"):
            styles = [style for pattern, style in plan.items() if matches(pattern, module)]
            ends_branch = module.endswith(("o_proj", "down_proj"))
            assert styles == ["rowwise" if ends_branch else "colwise"], module
    if name == "gpt2":
        for pattern in plan:
            assert any(matches(pattern, module) for module in modules), pattern
    for module in model.config.base_model_pp_plan:
        assert module in modules
    assert set(model._no_split_modules) <= {type(m).__name__ for m in MiniGPTModel(tiny_config("gpt2")).modules()}


def test_device_map_splits_between_blocks():
    from accelerate import infer_auto_device_map

    model = tiny_model("gpt2", num_hidden_layers=4)
    size = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    device_map = infer_auto_device_map(
        model, {0: 3 * size, "cpu": 100 * size}, no_split_module_classes=model._no_split_modules
    )
    assert len(set(device_map.values())) == 2
    assert all(name.count(".") <= 2 for name in device_map), device_map


@pytest.mark.parametrize("name", POSITIONS)
def test_compiles_as_one_graph(name):
    model = tiny_model(name)
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(ids, use_cache=False).logits, model(ids).logits)
        output = compiled(ids, attention_mask=mask, use_cache=False).logits
        assert_close(output[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])


@pytest.mark.parametrize("mask", ["no_mask", "right_padding"])
def test_compiles_packed_rows(mask):
    model = tiny_model("modern")
    ids = random_ids(2, 9)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5, 0, 1, 2]])
    attention_mask = torch.ones_like(ids)
    attention_mask[:, 8:] = 0
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    if mask == "right_padding":
        inputs["attention_mask"] = attention_mask
    torch._dynamo.reset()
    with torch.no_grad():
        logits = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits
        assert_close(logits[:, :8], model(**inputs).logits[:, :8])


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_compiled_training_step(name, skip_logits):
    ids = random_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    results = []
    torch._dynamo.reset()
    for compile_it in (False, True):
        model = tiny_model(name).train()
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compile_it else model
        loss = forward(ids, labels=labels, skip_logits=skip_logits, use_cache=False).loss
        loss.backward()
        results.append((loss, gradients(model)))
    (loss, plain), (compiled_loss, compiled) = results
    assert_close(loss, compiled_loss)
    assert plain.keys() == compiled.keys()
    for parameter in plain:
        assert_close(plain[parameter], compiled[parameter], msg=parameter)


def test_compiles_with_the_default_backend():
    model = tiny_model("modern")
    ids = random_ids(2, 9)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True)(ids, use_cache=False).logits, model(ids).logits)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", POSITIONS)
def test_exports_with_a_dynamic_length(name, strict):
    model = tiny_model(name)
    length = torch.export.Dim("length", min=2, max=60)
    ids = random_ids(2, 9)
    program = torch.export.export(
        model,
        (),
        {"input_ids": ids, "use_cache": False},
        dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
        strict=strict,
    )
    for size in (9, 23):
        ids = random_ids(2, size, seed=size)
        assert_close(program.module()(input_ids=ids, use_cache=False).logits, model(ids).logits)


def test_exports_with_a_mask():
    model = tiny_model("gpt2")
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    program = torch.export.export(
        model, (), {"input_ids": ids, "attention_mask": mask, "use_cache": False}, strict=False
    )
    other = torch.ones_like(ids)
    other[1, :5] = 0
    logits = program.module()(input_ids=ids, attention_mask=other, use_cache=False).logits
    assert_close(logits[other.bool()], model(ids, attention_mask=other).logits[other.bool()])


def test_default_config_is_gpt2_small():
    with torch.device("meta"):
        model = MiniGPTForCausalLM(MiniGPTConfig())
    assert model.num_parameters() == 124_439_808
