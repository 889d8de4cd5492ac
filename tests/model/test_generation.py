"""`generate`, with every cache and strategy, gives the argmax of full forward passes; wrong arguments are refused."""

import copy

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    TextStreamer,
    pipeline,
)

from tests.tiny import POSITIONS, random_ids, tiny_model


def greedy(model, ids, mask=None, new_tokens=8, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0, **kwargs}
    return model.generate(ids, attention_mask=mask, **options)


def continuous(model, prompts, new_tokens, **kwargs):
    # A few small pages. By default the paged cache takes most of the memory.
    batching = ContinuousBatchingConfig(page_size=16, num_blocks=32, max_batch_tokens=64)
    config = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0, **kwargs)
    outputs = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=batching)
    assert len(outputs) == len(prompts)
    return {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}


def by_hand(model, ids, new_tokens=8):
    """Decode greedily without a cache: the definition for every other way."""
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.smoke
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", POSITIONS)
def test_greedy_is_the_argmax_of_each_step(name, attention):
    model = tiny_model(name, attn_implementation=attention)
    ids = random_ids(2, 5)
    expected = by_hand(model, ids)
    assert torch.equal(greedy(model, ids), expected)
    assert torch.equal(greedy(model, ids, use_cache=False), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", POSITIONS)
def test_left_padded_rows_generate_as_unpadded_ones(name, attention):
    model = tiny_model(name, attn_implementation=attention)
    rows = [random_ids(1, length, seed=length) for length in (9, 3, 1, 6)]
    ids = torch.zeros(4, 9, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, -row.shape[1] :], mask[i, -row.shape[1] :] = row[0], 1
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        together = greedy(model, ids, mask, **options)
        for i, row in enumerate(rows):
            assert torch.equal(together[i, 9:], by_hand(model, row)[0, row.shape[1] :]), (options, i)


@pytest.mark.parametrize("name", POSITIONS)
def test_every_cache_and_strategy_is_greedy(name):
    model = tiny_model(name)
    ids = random_ids(2, 5)
    expected = by_hand(model, ids)
    assert torch.equal(greedy(model, ids, cache_implementation="static"), expected)
    # The prompt in chunks.
    assert torch.equal(greedy(model, ids, prefill_chunk_size=2), expected)
    # Drafts by the model itself, and from the prompt.
    one, one_expected = ids[:1], expected[:1]
    assert torch.equal(greedy(model, one, assistant_model=copy.deepcopy(model)), one_expected)
    assert torch.equal(greedy(model, one, prompt_lookup_num_tokens=2), one_expected)
    # A cache that already holds the beginning of the prompt.
    cache = DynamicCache(config=model.config)
    model(ids[:, :3], past_key_values=cache)
    assert torch.equal(greedy(model, ids, past_key_values=cache), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", POSITIONS)
def test_generate_batch_equals_greedy(name, attention):
    model = tiny_model(name, attn_implementation=attention)
    prompts = [random_ids(length, seed=length).tolist() for length in (7, 2, 12)]
    generated = continuous(model, prompts, 6, do_sample=False)
    for prompt in prompts:
        assert generated[tuple(prompt)] == by_hand(model, torch.tensor([prompt]), 6)[0, len(prompt) :].tolist()


def test_beam_search_is_at_least_as_likely_as_greedy():
    model = tiny_model("modern")
    ids = random_ids(2, 5)
    beams = greedy(model, ids, num_beams=3, num_return_sequences=3)
    assert beams.shape == (6, 13)

    def log_likelihood(rows):
        log_probabilities = model(rows).logits.log_softmax(-1)[:, 4:-1]
        return log_probabilities.gather(-1, rows[:, 5:, None]).sum((1, 2))

    scores = log_likelihood(beams).view(2, 3)
    assert (scores[:, 0] >= log_likelihood(by_hand(model, ids)) - 1e-3).all()
    assert (scores.diff(dim=1) <= 1e-3).all()


@pytest.mark.parametrize("name", POSITIONS)
def test_a_small_model_drafts_for_a_large_one(name):
    model, draft = tiny_model(name, num_hidden_layers=3), tiny_model(name, num_hidden_layers=1)
    ids = random_ids(1, 5)
    assert torch.equal(greedy(model, ids, assistant_model=draft, new_tokens=16), by_hand(model, ids, 16))


def test_logits_processors_are_applied():
    class EvenIds(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 1::2] = -torch.inf
            return scores

    model = tiny_model("modern")
    ids = random_ids(2, 5)
    written = greedy(model, ids, new_tokens=8, logits_processor=LogitsProcessorList([EvenIds()]))
    expected = ids
    for _ in range(8):
        scores = model(expected, use_cache=False).logits[:, -1]
        expected = torch.cat([expected, 2 * scores[:, ::2].argmax(-1, keepdim=True)], 1)
    assert torch.equal(written, expected)


def test_stop_strings_end_the_generation():
    model, tokenizer = tiny_model("gpt2", vocab_size=28), tiny_tokenizer()
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    free = greedy(model, ids)
    stop = tokenizer.decode(free[0, 9:11])
    stopped = greedy(model, ids, stop_strings=[stop], tokenizer=tokenizer)
    text, begin = tokenizer.decode(stopped[0, ids.shape[1] :]), stopped.shape[1]
    assert text.endswith(stop) and torch.equal(stopped[0], free[0, :begin]) and begin <= 11


def test_padded_ids_are_never_sampled():
    model = tiny_model("modern")
    real = model.config.unpadded_vocab_size
    with torch.no_grad():
        model.lm_head.weight[real:] = 50.0
    ids = random_ids(8, 3)
    sampled = greedy(model, ids, do_sample=True, temperature=50.0, top_k=0, new_tokens=40)
    assert sampled.max() < real
    for generated in continuous(model, ids.tolist(), 10, do_sample=True, temperature=50.0, top_k=0).values():
        assert max(generated) < real


def test_generation_stops_at_eos_and_pads():
    model = tiny_model("gpt2")
    ids = random_ids(3, 4)
    free = greedy(model, ids)
    eos = free[0, 6].item()
    stopped = greedy(model, ids, eos_token_id=eos)
    for row, free_row in zip(stopped, free, strict=True):
        ends = (free_row[4:] == eos).nonzero()
        end = 4 + int(ends[0]) + 1 if len(ends) else len(free_row)
        assert torch.equal(row[:end], free_row[:end])
        assert not row[end:].any()


def test_generating_beyond_learned_positions_is_refused():
    model = tiny_model("gpt2", max_position_embeddings=12)
    assert greedy(model, random_ids(1, 6), new_tokens=6).shape == (1, 12)
    with pytest.raises(ValueError, match="max_position_embeddings=12"):
        greedy(model, random_ids(1, 6), new_tokens=8)


def test_other_positions_generate_beyond_the_context():
    for name in ("transformer", "modern", "no_positions"):
        model = tiny_model(name, max_position_embeddings=12)
        ids = random_ids(1, 6)
        assert torch.equal(greedy(model, ids, new_tokens=12), by_hand(model, ids, 12)), name


@pytest.mark.smoke
def test_generated_ids_equal_those_of_transformers_gpt2():
    """An independent implementation, with the same random weights."""
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=67, n_embd=24, n_layer=2, n_head=3, n_positions=64, initializer_range=0.3)
    ).eval()
    model = tiny_model("gpt2")
    source = gpt2.state_dict()
    state = {"model.embed_tokens.weight": source["transformer.wte.weight"]}
    state["lm_head.weight"] = source["transformer.wte.weight"]
    state["model.embed_positions.weight"] = source["transformer.wpe.weight"]
    for kind in ("weight", "bias"):
        state[f"model.norm.{kind}"] = source[f"transformer.ln_f.{kind}"]
        for i in range(2):
            ours, theirs = f"model.layers.{i}", f"transformer.h.{i}"
            for part, tensor in zip("qkv", source[f"{theirs}.attn.c_attn.{kind}"].chunk(3, dim=-1), strict=True):
                state[f"{ours}.self_attn.{part}_proj.{kind}"] = tensor.t()
            for our_name, their_name in {
                "input_layernorm": "ln_1",
                "post_attention_layernorm": "ln_2",
                "self_attn.o_proj": "attn.c_proj",
                "mlp.up_proj": "mlp.c_fc",
                "mlp.down_proj": "mlp.c_proj",
            }.items():
                state[f"{ours}.{our_name}.{kind}"] = source[f"{theirs}.{their_name}.{kind}"].t()
    model.load_state_dict(state)
    ids = random_ids(2, 9)
    torch.testing.assert_close(model(ids).logits, gpt2(ids).logits, rtol=0, atol=1e-5)
    assert torch.equal(greedy(model, ids, new_tokens=20), greedy(gpt2, ids, new_tokens=20))


def tiny_tokenizer():
    letters = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyzĠ"]
    vocab = {letter: i for i, letter in enumerate(letters)}
    return GPT2Tokenizer(vocab=vocab, merges=[], pad_token="<|endoftext|>", padding_side="left")


@pytest.mark.smoke
def test_the_pipeline_generates_text():
    model, tokenizer = tiny_model("gpt2", vocab_size=28), tiny_tokenizer()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["the cat", "a"]
    alone = [write(p, max_new_tokens=5, do_sample=False)[0]["generated_text"] for p in prompts]
    together = write(prompts, max_new_tokens=5, do_sample=False, batch_size=2)
    assert [result[0]["generated_text"] for result in together] == alone
    for prompt, text in zip(prompts, alone, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert text == tokenizer.decode(by_hand(model, ids, 5)[0])


def test_text_is_streamed(capsys):
    model, tokenizer = tiny_model("gpt2", vocab_size=28), tiny_tokenizer()
    inputs = tokenizer("the cat", return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=5, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.strip() == tokenizer.decode(output[0]).strip()


@pytest.mark.parametrize("cache_name", ["cache", "memory"])
def test_a_cache_is_found_under_any_name(cache_name):
    model = tiny_model("modern")
    ids = random_ids(2, 5)
    cache = DynamicCache(config=model.config)
    model(ids[:, :4], **{cache_name: cache})
    assert cache.get_seq_length() == 4
    logits = model(ids[:, 4:], **{cache_name: cache}).logits
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits[:, 4:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("attention", "given", "error", "words"),
    [
        ("sdpa", {"atention_mask": torch.ones(1, 3)}, TypeError, "atention_mask=Tensor"),
        ("eager", {"memory": [1, 2]}, TypeError, "memory=list"),
        # Arguments that only other attention functions read.
        ("sdpa", {"sliding_window": 2}, TypeError, "sliding_window=int"),
        ("eager", {"softcap": 30.0}, TypeError, "softcap=float"),
        ("eager", {"s_aux": torch.zeros(3)}, TypeError, "s_aux=Tensor"),
        ("sdpa", {"cu_seq_lens_q": torch.tensor([0, 2, 3])}, ValueError, "cu_seq_lens_q .* position_ids"),
        ("eager", {"seq_idx": torch.tensor([[0, 0, 1]])}, ValueError, "seq_idx .* position_ids"),
        ("sdpa", {"is_causal": False}, ValueError, "is_causal"),
        # Values that are not caches, under names of caches.
        ("sdpa", {"cache": "static"}, TypeError, "cache=str"),
        ("sdpa", {"block_table": torch.zeros(1)}, TypeError, "block_table=Tensor"),
        ("sdpa", {"past_key_values": ((torch.zeros(1), torch.zeros(1)),)}, TypeError, "past_key_values=tuple"),
        ("sdpa", {"memory": DynamicCache(), "past_key_values": DynamicCache()}, TypeError, "memory is a second cache"),
    ],
)
def test_an_argument_that_nothing_reads_is_refused(attention, given, error, words):
    model = tiny_model(attn_implementation=attention)
    with pytest.raises(error, match=words):
        model(random_ids(1, 3), **given)


def test_document_boundaries_are_accepted_with_positions():
    """As `DataCollatorWithFlattening` returns them, for any attention."""
    model, ids = tiny_model("modern"), random_ids(1, 7)
    boundaries = {
        "cu_seq_lens_q": torch.tensor([0, 3, 7]),
        "max_length_q": 4,
        "seq_idx": torch.tensor([[0] * 3 + [1] * 4]),
    }
    logits = model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), **boundaries).logits
    apart = torch.cat([model(ids[:, :3]).logits, model(ids[:, 3:]).logits], 1)
    torch.testing.assert_close(logits, apart, rtol=0, atol=1e-5)


def test_a_model_drafts_for_itself_with_fewer_layers():
    model = tiny_model("modern")
    ids = random_ids(1, 5)
    assert torch.equal(greedy(model, ids, assistant_early_exit=1), by_hand(model, ids))
    assert model.config.num_hidden_layers == 2
    assert torch.equal(greedy(model, ids), by_hand(model, ids))
