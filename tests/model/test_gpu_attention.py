"""
Attention on a GPU: every kernel keeps packed documents apart and gets query, key and value of one dtype. The CPU waits
for the GPU once a forward at most.

Plain float64 functions stand in for the kernels, so that no GPU is needed.
"""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorWithFlattening
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_minigpt import MiniGPTForCausalLM, preset
from hf_minigpt.model import attention_minigpt
from hf_minigpt.presets import PRESETS
from tests.pretended_gpu import count_syncs, pretended_gpu, record_attention, to_gpu
from tests.tiny import POSITIONS, gradients, random_ids, tiny_model


KERNEL = "kernels-community/some-flash-attention"
FLASH = ["flash_attention_2", "flash_attention_3", KERNEL]
LENGTHS = [[5, 1, 8], [14], [2, 12], [7, 7]]
SIZES = {"hidden_size": 48, "num_attention_heads": 3, "head_dim": 16}


def attend(query, key, value, mask, scale):
    """Plain attention over rows (T, H, D) with a mask (T, S)."""
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    scores = (query @ key.transpose(1, 2) * scale).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(0, 1)


def check_rows(query, key, value):
    assert query.dtype == key.dtype == value.dtype
    assert query.is_contiguous() or query.stride(-1) == 1


def varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    """Documents between the bounds `cu_seqlens`, each with the last query at the last key."""
    check_rows(query, key, value)
    bounds_q, bounds_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    documents, positions = [], []
    for bounds, tokens in ((bounds_q, len(query)), (bounds_k, len(key))):
        index = torch.arange(tokens)
        documents.append(torch.searchsorted(bounds, index, right=True))
        positions.append(index - bounds[documents[-1]])  # Counted from the end of the document.
    mask = (documents[0][:, None] == documents[1]) & (positions[0][:, None] >= positions[1])
    return attend(query, key, value, mask, scale)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    assert causal and cu_seqlens_q.dtype == torch.int32 and type(max_seqlen_q) is int
    if not torch.compiler.is_compiling():
        assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k)
        assert cu_seqlens_q.diff().max() == max_seqlen_q
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    assert causal
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    return torch.stack([attend(*row, mask, softmax_scale) for row in zip(q, k, v, strict=True)])


def torch_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    assert window_size == (-1, 0)
    return varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)


@pytest.fixture
def kernels(monkeypatch):
    """Put plain functions in the place of the kernels of flash-attn and torch."""
    functions = {"_flash_fn": flash_attn_func, "_flash_varlen_fn": flash_attn_varlen_func}
    functions |= {"_flash_with_kvcache_fn": None, "_pad_fn": flash_utils._pad_input}
    functions |= {"_unpad_fn": flash_utils._unpad_input, "_process_with_kvcache_kwargs_fn": dict}
    functions["_process_flash_kwargs_fn"] = flash_utils._lazy_define_process_function(flash_attn_varlen_func)
    for name, function in functions.items():
        monkeypatch.setattr(flash_utils, name, function)
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", loaded_functions)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_varlen_attn)
    # As transformers registers a kernel from the Hub.
    AttentionInterface.register(KERNEL, ALL_ATTENTION_FUNCTIONS["flash_attention_2"])
    AttentionMaskInterface.register(KERNEL, flash_attention_mask)
    yield
    del AttentionInterface._global_mapping[KERNEL], AttentionMaskInterface._global_mapping[KERNEL]


def loaded_functions(*args, **kwargs):
    names = ("_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn")
    process = (flash_utils._process_flash_kwargs_fn, flash_utils._process_with_kvcache_kwargs_fn)
    return tuple(getattr(flash_utils, name) for name in names), process


def model_with(attention, name="modern", monkeypatch=None, **overrides):
    model = tiny_model(name, **{**SIZES, **overrides})
    if attention in ("varlen", "flex"):
        monkeypatch.setattr(attention_minigpt, "kernels_for_packed_rows", lambda *args: [attention])
        monkeypatch.setattr(attention_minigpt, "can_attend_per_document", lambda *args: False)
    else:
        model.config._attn_implementation = attention
    return model


def packed_rows(rows):
    """Token ids and positions (B, 14) of documents, and the documents' places in the rows."""
    rows = LENGTHS[:rows]
    ids = random_ids(len(rows), 14)
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows])
    places = []
    for row, lengths in enumerate(rows):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        places += [(row, slice(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
    return ids, positions, places


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("attention", [*FLASH, "varlen", "sdpa"])
@pytest.mark.parametrize("name", POSITIONS)
def test_packed_rows_equal_documents_alone(name, attention, rows, kernels, monkeypatch):
    """Logits, and gradients of every parameter."""
    ids, positions, places = packed_rows(rows)
    model, alone = model_with(attention, name, monkeypatch).double(), tiny_model(name, **SIZES).double()
    weights = torch.randn(rows, 14, model.config.vocab_size, generator=torch.Generator().manual_seed(0)).double()
    logits = model(ids, position_ids=positions, use_cache=False).logits
    expected = torch.cat([alone(ids[row : row + 1, place]).logits[0] for row, place in places])
    torch.testing.assert_close(logits.flatten(0, 1), expected, rtol=0, atol=1e-6)
    (logits * weights).sum().backward()
    (expected * weights.flatten(0, 1)).sum().backward()
    computed, expected = gradients(model), gradients(alone)
    assert computed.keys() == expected.keys()
    for parameter in expected:
        torch.testing.assert_close(computed[parameter], expected[parameter], rtol=0, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("attention", ["flex", "flex_attention"])
@pytest.mark.parametrize("name", POSITIONS)
def test_packed_rows_equal_documents_alone_with_flex_attention(name, attention, kernels, monkeypatch):
    """On a CPU, flex attention has no gradient."""
    ids, positions, places = packed_rows(4)
    model, alone = model_with(attention, name, monkeypatch), tiny_model(name, **SIZES)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = model(ids, position_ids=positions, use_cache=False).logits
        for row, place in places:
            expected = alone(ids[row : row + 1, place]).logits[0]
            torch.testing.assert_close(logits[row, place], expected, rtol=0, atol=1e-4)


# Rows of padding "0" and documents "a", "b".
PADDED = {
    "right padding": ["aaaaaaaaaa", "aaaaaaa000"],
    "left padding": ["aaaaaaaaaa", "000aaaaaaa"],
    "padding on both sides": ["00aaaaa000", "aaaaaaaaaa"],
    "a row of padding": ["aaaaaaaaaa", "0000000000"],
    "padding within a document": ["aaa0aaaaaa", "0aaaa000aa"],
    "no padding": ["aaaaaaaaaa", "aaaaaaaaaa"],
}
PACKED = {
    "packed, right padding": ["aaabbbb000", "aaaaaabb00"],
    "packed, left padding": ["00aaabbbbb", "aaaaaabbbb"],
    "packed, padding between documents": ["aaa00bbbbb", "aaaaaa0bb0"],
}


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("pad_positions", ["zero", "count_on", "by_default"])
@pytest.mark.parametrize("rows", [*PADDED, *PACKED])
def test_padding_is_not_attended_to(rows, pad_positions, use_cache, kernels):
    layout = {**PADDED, **PACKED}[rows]
    mask = torch.tensor([[int(token != "0") for token in row] for row in layout])
    ids = random_ids(2, 10)
    positions = torch.zeros_like(ids)
    for row, letters in enumerate(layout):
        for t, letter in enumerate(letters):
            if letter != "0":
                positions[row, t] = letters[:t].count(letter)
            elif pad_positions == "count_on" and t > 0:
                positions[row, t] = positions[row, t - 1] + 1
    options = {"attention_mask": mask, "use_cache": use_cache}
    if pad_positions != "by_default":
        options["position_ids"] = positions
    elif rows in PACKED:
        pytest.skip("packed rows have given positions")
    model, alone = model_with("flash_attention_2").double(), tiny_model("modern", **SIZES).double()
    with torch.no_grad():
        logits = model(ids, **options).logits
        assert logits.isfinite().all()
        for row, letters in enumerate(layout):
            for letter in set(letters) - {"0"}:
                place = [t for t, other in enumerate(letters) if other == letter]
                expected = alone(ids[row : row + 1, place]).logits[0]
                torch.testing.assert_close(logits[row, place], expected, rtol=0, atol=1e-6)


def test_padding_within_a_packed_document_is_refused(kernels):
    ids, positions, _ = packed_rows(1)
    mask = torch.ones_like(ids)
    mask[0, 8] = 0
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7, 8]])
    model = model_with("flash_attention_2")
    with pytest.raises(ValueError, match=r"padding within a document .*sdpa"):
        model(ids, position_ids=positions, attention_mask=mask)


def test_generation_from_left_padding_is_that_of_sdpa(kernels):
    ids = random_ids(3, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[2, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = tiny_model("modern", **SIZES).generate(ids, **options)
    assert torch.equal(model_with("flash_attention_2").generate(ids, **options), expected)


def given_lengths(rows):
    """The arguments of flash attention for `packed_rows`."""
    lengths = [length for row in LENGTHS[:rows] for length in row]
    bounds, longest = torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


@pytest.mark.parametrize("with_positions", [True, False])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("attention", [*FLASH, "varlen"])
def test_given_lengths_are_not_searched_for(attention, rows, with_positions, kernels, monkeypatch):
    if attention == "varlen" and not with_positions:
        pytest.skip("sdpa needs positions")
    monkeypatch.setattr(attention_minigpt, "find_lengths", None)
    ids, positions, places = packed_rows(rows)
    # Positions may count on from document to document, if only their distance matters.
    model = model_with(attention, "modern", monkeypatch).double()
    options = {"position_ids": positions} if with_positions else {}
    logits = model(ids, **options, **given_lengths(rows)).logits
    alone = tiny_model("modern", **SIZES).double()
    for row, place in places:
        torch.testing.assert_close(logits[row, place], alone(ids[row : row + 1, place]).logits[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", [*FLASH, "varlen", "sdpa"])
@pytest.mark.parametrize("returns", ["return_flash_attn_kwargs", "return_seq_idx", "return_position_ids"])
def test_batches_of_the_flattening_collator(returns, attention, kernels, monkeypatch):
    documents = [random_ids(length, seed=length).tolist() for length in (5, 3, 9)]
    batch = DataCollatorWithFlattening(**{returns: True}, return_tensors="pt")([{"input_ids": d} for d in documents])
    del batch["labels"]
    logits = model_with(attention, "gpt2", monkeypatch).double()(**batch).logits[0]
    alone = tiny_model("gpt2", **SIZES).double()
    expected = torch.cat([alone(torch.tensor([document])).logits[0] for document in documents])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_incomplete_lengths_are_found_or_refused(kernels):
    ids, positions, _ = packed_rows(4)
    lengths = given_lengths(4)
    incomplete = {name: lengths[name] for name in ("cu_seq_lens_q", "max_length_q")}
    model = model_with("flash_attention_2")
    expected = model(ids, position_ids=positions).logits
    torch.testing.assert_close(model(ids, position_ids=positions, **incomplete).logits, expected)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q .* position_ids"):
        model(ids, **incomplete)
    with pytest.raises(ValueError, match=r"attention_mask and cu_seq_lens_q .* position_ids"):
        model(ids, attention_mask=torch.ones_like(ids), **lengths)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    ("case", "expected"),
    [("packed", 1), ("one document", 1), ("lengths given", 0), ("right padding", 1), ("no positions", 0)],
)
@pytest.mark.parametrize("attention", ["flash_attention_2", "varlen", "dense"])
def test_syncs_once_a_forward_at_most(attention, case, expected, rows, kernels, monkeypatch):
    if attention != "flash_attention_2" and case == "right padding":
        pytest.skip("transformers builds this mask")
    ids, positions, _ = packed_rows(rows)
    inputs = {
        "packed": {"position_ids": positions},
        "one document": {"position_ids": torch.arange(14).expand(rows, -1)},
        "lengths given": {"position_ids": positions, **given_lengths(rows)},
        "right padding": {"attention_mask": torch.arange(14).expand(rows, -1) < 12},
        "no positions": {},
    }[case]
    model = tiny_model("modern", **SIZES, num_hidden_layers=3)
    if attention == "flash_attention_2":
        model.config._attn_implementation = attention
    called = []
    monkeypatch.setattr(attention_minigpt, "installed_kernels", lambda device: ["varlen"] * (attention == "varlen"))
    monkeypatch.setattr(flash_utils, "_flash_varlen_fn", lambda q, *rest, **kwargs: called.append("varlen") or q)
    monkeypatch.setattr(flash_utils, "_flash_fn", lambda q, *rest, **kwargs: called.append("plain") or q)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash_utils._flash_varlen_fn)
    with pretended_gpu(), torch.autocast("cuda", torch.bfloat16):
        model, inputs = to_gpu(model), to_gpu({"input_ids": ids, **inputs})
        with count_syncs() as syncs, record_attention() as sdpa_calls:
            model(**inputs, use_cache=False)
    assert syncs.total() == expected, syncs
    called += ["masked" if call.has_mask else "plain" for call in sdpa_calls]
    separates = "masked" if attention == "dense" else "varlen"
    assert called == [separates if case in ("packed", "lengths given", "right padding") else "plain"] * 3


def test_head_masks_are_not_copied_in_each_layer():
    model = tiny_model("gpt1")
    with pretended_gpu():
        model, ids = to_gpu(model), to_gpu(random_ids(2, 9))
        with count_syncs() as syncs:
            model(ids, use_cache=False)
    assert not syncs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_masks_survive_loading_and_casts(dtype, tmp_path):
    model = tiny_model("gpt1")
    model.save_pretrained(tmp_path)
    loaded = MiniGPTForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.to(dtype)(ids).logits)
    for layer, factors in enumerate([[1.0, 0.0, 1.0], [0.5, 1.0, 1.0]]):
        assert loaded.model.layers[layer].self_attn.head_mask.flatten().tolist() == factors


BFLOAT16 = torch.bfloat16
IS_OFF = {"attn_pdrop": 0.0}


@pytest.mark.parametrize(
    ("dtype", "installed", "options", "expected"),
    [
        (BFLOAT16, ["varlen", "flex"], IS_OFF, "varlen"),
        (torch.float16, ["varlen", "flex"], IS_OFF, "varlen"),
        # Variable-length attention has no float32, and only some sizes of heads.
        (None, ["varlen", "flex"], IS_OFF, "flex"),
        (BFLOAT16, ["varlen", "flex"], {**IS_OFF, "head_dim": 20}, "flex"),
        (BFLOAT16, ["varlen", "flex"], {**IS_OFF, "head_dim": 264}, "flex"),
        (BFLOAT16, ["flex"], IS_OFF, "flex"),
        (BFLOAT16, ["flex"], {**IS_OFF, "head_dim": 8}, "mask"),
        (BFLOAT16, [], IS_OFF, "mask"),
        (BFLOAT16, ["varlen", "flex"], {"attn_pdrop": 0.1}, "mask"),
    ],
)
def test_the_kernel_for_packed_rows_on_a_gpu(dtype, installed, options, expected, monkeypatch):
    ids, positions, _ = packed_rows(4)
    model = tiny_model("modern", **{**SIZES, **options}).train()
    called, warned = [], []

    def stand_in(name):
        def run(module, query, key, value, *args, **kwargs):
            assert query.dtype == key.dtype == value.dtype == (dtype or torch.float32)
            assert kwargs["dropout"] == options["attn_pdrop"]
            called.append(name)
            return value.transpose(1, 2), None

        return run

    monkeypatch.setattr(attention_minigpt, "installed_kernels", lambda device: installed)
    monkeypatch.setattr(attention_minigpt, "varlen_attention", stand_in("varlen"))
    monkeypatch.setattr(attention_minigpt, "flex_mask", lambda document_ids: "blocks")
    monkeypatch.setattr(attention_minigpt.logger, "warning_once", warned.append)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flex_attention", stand_in("flex"))
    with pretended_gpu(), torch.autocast("cuda", dtype or BFLOAT16, enabled=dtype is not None):
        model = to_gpu(model)
        with record_attention() as sdpa_calls:
            model(to_gpu(ids), position_ids=to_gpu(positions), use_cache=False)
    called += ["mask" if call.has_mask else "no mask" for call in sdpa_calls]
    assert called == [expected] * 2
    assert len(set(warned)) == (options["attn_pdrop"] > 0)
    assert all("attn_pdrop=0.1" in text and "Set attn_pdrop=0.0" in text for text in warned)


def test_variable_length_attention_takes_its_arguments():
    """Torch's own function, by shapes alone: its kernel exists on a GPU only."""
    with FakeTensorMode():
        query, key, value = (torch.empty(4, 14, 3, 16, dtype=BFLOAT16, requires_grad=True) for _ in range(3))
        bounds = torch.empty(9, dtype=torch.int32)
        lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 14, "max_length_k": 14}
        heads = (x.transpose(1, 2) for x in (query, key, value))
        output, _ = attention_minigpt.varlen_attention(None, *heads, None, scaling=0.5, dropout=0.0, **lengths)
        output.sum().backward()
    assert output.shape == query.shape
    assert all(x.grad.shape == x.shape for x in (query, key, value))


def test_flex_attention_refuses_dropout():
    model = tiny_model("modern", **SIZES, attn_pdrop=0.1)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"attn_pdrop=0\.1.* Set attn_pdrop=0\.0"):
        model.train()(random_ids(1, 5))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_autocast_gives_query_key_and_value_one_dtype(device, dtype, name, monkeypatch):
    """Flash kernels take no mixture; rotary positions and norms of queries and keys once made them float32."""
    sizes = {"num_hidden_layers": 2, "vocab_size": 67, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16}
    model = MiniGPTForCausalLM(preset(name, **sizes, intermediate_size=64, max_position_embeddings=32))
    dtypes = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def record(query, key, value, **kwargs):
        dtypes.append({query.dtype, key.dtype, value.dtype})
        return sdpa(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    ids = random_ids(2, 9)
    with pretended_gpu() if device == "cuda" else contextlib.nullcontext(), torch.autocast(device, dtype):
        if device == "cuda":
            model, ids = to_gpu(model), to_gpu(ids)
        model(ids, use_cache=False)
    assert dtypes == [{dtype}] * 2


@pytest.mark.parametrize("attention", ["flash_attention_2", "varlen", "flex"])
def test_packed_rows_compile_as_one_graph(attention, kernels, monkeypatch):
    """Flash and variable-length attention need the lengths for that; flex attention finds the documents itself."""
    ids, positions, _ = packed_rows(4)
    inputs = {"position_ids": positions, "use_cache": False}
    if attention != "flex":
        inputs |= given_lengths(4)
    expected = tiny_model("modern", **SIZES)(ids, **inputs).logits
    model = model_with(attention, "modern", monkeypatch)
    if attention != "flex":
        model = model.double()
    torch._dynamo.reset()
    with torch.no_grad():
        logits = torch.compile(model, fullgraph=True, backend="eager")(ids, **inputs).logits
    torch.testing.assert_close(logits[..., :67].float(), expected[..., :67], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("attention", "places"), [("flash_attention_2", {"document_boundaries"}), ("varlen", set())])
def test_graph_breaks_where_lengths_are_not_given(attention, places, kernels, monkeypatch):
    """Flash attention searches before the layers, which are one graph. SDPA falls back to its mask."""
    ids, positions, _ = packed_rows(4)
    model = model_with(attention, "modern", monkeypatch).double()
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(ids, position_ids=positions, use_cache=False)
    assert {reason.user_stack[-1].name for reason in explained.break_reasons} == places


def test_kernels_are_chosen_and_warned_of_while_compiling(monkeypatch):
    """Dynamo traces neither the queries of the device nor a warning."""
    warned = []
    monkeypatch.setattr(attention_minigpt.logger, "warning_once", warned.append)

    def choose(x):
        attention_minigpt.warn_of_dense_mask(0.25)
        return x + ("varlen" in attention_minigpt.installed_kernels(0))

    torch._dynamo.reset()
    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == float("varlen" in attention_minigpt.installed_kernels(0))
    assert len(warned) == 1 and "attn_pdrop=0.25" in warned[0]
