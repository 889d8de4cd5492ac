"""Converted models compute the same logits, and converting back returns the same bits."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    NanoChatConfig,
    NanoChatForCausalLM,
    NanoChatModel,
    OpenAIGPTConfig,
    OpenAIGPTForSequenceClassification,
    OpenAIGPTLMHeadModel,
    OpenAIGPTModel,
    OpenAIGPTTokenizer,
    PreTrainedTokenizerFast,
)

from hf_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification, MiniGPTModel, preset
from hf_minigpt.deploy.conversion import (
    compare_logits,
    detect_layout,
    from_gpt1,
    from_gpt2,
    from_nanochat,
    from_nanogpt,
    nanogpt_as_gpt2,
    to_gpt2,
    to_nanochat,
)
from hf_minigpt.recipes import convert
from tests.tiny import random_ids, shake, tiny_model


VOCAB_SIZE = 67
PAD = 0
TEXT = random_ids(2, 20, vocab_size=VOCAB_SIZE - 1) + 1  # no padding token

GPT_SIZES = {"vocab_size": VOCAB_SIZE, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 48}
LABELS = {
    "id2label": {0: "bad", 1: "good", 2: "odd"},
    "label2id": {"bad": 0, "good": 1, "odd": 2},
    "problem_type": "single_label_classification",
}
HEADS = [MiniGPTForCausalLM, MiniGPTForSequenceClassification, MiniGPTModel]
GPT2_CLASSES = [GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2Model]
GPT1_CLASSES = [OpenAIGPTLMHeadModel, OpenAIGPTForSequenceClassification, OpenAIGPTModel]


def gpt2(model_class=GPT2LMHeadModel, **fields):
    fields = GPT_SIZES | LABELS | {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2} | fields
    return shake(model_class(GPT2Config(**fields)))


def gpt1(model_class=OpenAIGPTLMHeadModel, **fields):
    return shake(model_class(OpenAIGPTConfig(**(GPT_SIZES | LABELS | {"pad_token_id": PAD} | fields))))


def nanochat(model_class=NanoChatForCausalLM, **fields):
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 48,
        "pad_token_id": PAD,
    } | fields
    return shake(model_class(NanoChatConfig(**fields)))


@torch.no_grad()
def answer(model, **inputs):
    output = model(**({"input_ids": TEXT} | inputs))
    return output.logits if "logits" in output else output.last_hidden_state


def greedy(model):
    prompt = TEXT[:1, :5]
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=PAD)


def assert_same_parameters(one, other):
    mine, others = one.state_dict(), other.state_dict()
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == others[name].dtype
        assert torch.equal(tensor, others[name]), name


GPT2_VARIANTS = {
    "plain": {},
    "n_inner": {"n_inner": 40},
    "relu": {"activation_function": "relu"},
    "gelu": {"activation_function": "gelu"},
    "tanh": {"activation_function": "gelu_pytorch_tanh"},
    "unscaled": {"scale_attn_weights": False},
    "untied": {"tie_word_embeddings": False},
    "upcast": {"reorder_and_upcast_attn": True},
    "epsilon": {"layer_norm_epsilon": 0.1},
}
NANOCHAT_VARIANTS = {
    "plain": {},
    "biased": {"attention_bias": True},
    "uncapped": {"final_logit_softcapping": None},
    "capped": {"final_logit_softcapping": 0.5},
    "gelu": {"hidden_act": "gelu"},
    "tied": {"tie_word_embeddings": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 20.0}},
    "share": {"rope_parameters": {"rope_type": "default", "rope_theta": 20.0, "partial_rotary_factor": 0.5}},
    "scaled": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 20.0}},
    "epsilon": {"rms_norm_eps": 0.1},
    "head_dim": {"head_dim": 6},
}


@pytest.mark.smoke
@pytest.mark.parametrize(("model_class", "head"), list(zip(GPT2_CLASSES, HEADS, strict=True)))
@pytest.mark.parametrize("variant", GPT2_VARIANTS)
def test_gpt2_converts_both_ways(model_class, head, variant):
    source = gpt2(model_class, **GPT2_VARIANTS[variant])
    model = from_gpt2(source)
    assert type(model) is head and not model.training
    expected = answer(source)
    assert expected.std() > 0.1
    torch.testing.assert_close(answer(model), expected, atol=1e-5, rtol=0)
    back = to_gpt2(model)
    assert type(back) is model_class
    assert_same_parameters(back, source)
    assert torch.equal(answer(back), expected)


@pytest.mark.smoke
@pytest.mark.parametrize(("model_class", "head"), list(zip(GPT1_CLASSES, HEADS, strict=True)))
@pytest.mark.parametrize(
    "fields",
    [{}, {"afn": "relu"}, {"afn": "swish"}, {"layer_norm_epsilon": 0.1}, {"tie_word_embeddings": False}],
    ids=str,
)
def test_gpt1_converts(model_class, head, fields):
    source = gpt1(model_class, **fields)
    model = from_gpt1(source)
    assert type(model) is head and not model.training
    expected = answer(source)
    assert expected.std() > 0.1
    torch.testing.assert_close(answer(model), expected, atol=1e-5, rtol=0)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("model_class", "head"), [(NanoChatForCausalLM, MiniGPTForCausalLM), (NanoChatModel, MiniGPTModel)]
)
@pytest.mark.parametrize("variant", NANOCHAT_VARIANTS)
def test_nanochat_converts_both_ways(model_class, head, variant):
    source = nanochat(model_class, **NANOCHAT_VARIANTS[variant])
    model = from_nanochat(source)
    assert type(model) is head and not model.training
    expected = answer(source)
    assert expected.std() > 0.1
    torch.testing.assert_close(answer(model), expected, atol=1e-5, rtol=0)
    back = to_nanochat(model)
    assert type(back) is model_class
    assert_same_parameters(back, source)
    assert torch.equal(answer(back), expected)


@pytest.mark.parametrize(
    ("source", "convert"),
    [(gpt2, from_gpt2), (gpt1, from_gpt1), (nanochat, from_nanochat)],
    ids=["gpt2", "gpt1", "nanochat"],
)
def test_greedy_text_and_generation_config_are_the_same(source, convert):
    source = source()
    source.generation_config.update(top_k=7, eos_token_id=66)
    model = convert(source)
    assert torch.equal(greedy(model), greedy(source))
    assert model.generation_config.to_dict() == source.generation_config.to_dict()
    assert model.generation_config is not source.generation_config


@pytest.mark.parametrize("head", ["language model", "classifier"])
def test_gpt2_with_padding_and_token_types(head):
    source = gpt2(GPT2LMHeadModel if head == "language model" else GPT2ForSequenceClassification)
    model = from_gpt2(source)
    input_ids, mask = TEXT.clone(), torch.ones_like(TEXT)
    input_ids[1, 13:], mask[1, 13:] = PAD, 0
    inputs = {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": (TEXT % 3)}
    expected, got = answer(source, **inputs), answer(model, **inputs)
    assert not torch.allclose(expected, answer(source, **(inputs | {"token_type_ids": None})), atol=1e-2)
    if head == "language model":
        expected, got = expected[mask.bool()], got[mask.bool()]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

    # With left padding, GPT-2 needs position ids, and MiniGPT computes them from the mask.
    input_ids, mask = TEXT.clone(), torch.ones_like(TEXT)
    input_ids[1, :7], mask[1, :7] = PAD, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = answer(source, input_ids=input_ids, attention_mask=mask, position_ids=positions)
    got = answer(model, input_ids=input_ids, attention_mask=mask)
    if head == "language model":
        expected, got = expected[mask.bool()], got[mask.bool()]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_class", [OpenAIGPTLMHeadModel, OpenAIGPTForSequenceClassification])
def test_gpt1_with_padding_and_token_types(model_class):
    source = gpt1(model_class)
    model = from_gpt1(source)
    input_ids, mask = TEXT.clone(), torch.ones_like(TEXT)
    input_ids[1, 13:], mask[1, 13:] = PAD, 0
    inputs = {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": (TEXT % 3)}
    expected, got = answer(source, **inputs), answer(model, **inputs)
    assert not torch.allclose(expected, answer(source, **(inputs | {"token_type_ids": None})), atol=1e-2)
    if model_class is OpenAIGPTLMHeadModel:
        expected, got = expected[mask.bool()], got[mask.bool()]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("source", "convert", "back"),
    [
        (gpt2, from_gpt2, to_gpt2),
        (lambda: gpt2(GPT2ForSequenceClassification), from_gpt2, to_gpt2),
        (lambda: gpt2(tie_word_embeddings=False), from_gpt2, to_gpt2),
        (lambda: gpt2(GPT2Model), from_gpt2, to_gpt2),
        (gpt1, from_gpt1, None),
        (nanochat, from_nanochat, to_nanochat),
    ],
    ids=["gpt2", "gpt2-classifier", "gpt2-untied", "gpt2-no-head", "gpt1", "nanochat"],
)
def test_folders_convert_both_ways(source, convert, back, tmp_path):
    source = source()
    source.save_pretrained(tmp_path / "source")
    model = convert(str(tmp_path / "source"))
    assert_same_parameters(model, convert(source))
    model.save_pretrained(tmp_path / "minigpt")
    assert (tmp_path / "minigpt" / "modeling_minigpt.py").is_file()
    reloaded = type(model).from_pretrained(tmp_path / "minigpt")
    assert_same_parameters(reloaded, model)
    torch.testing.assert_close(answer(reloaded), answer(source), atol=1e-5, rtol=0)
    if back is not None:
        back(tmp_path / "minigpt").save_pretrained(tmp_path / "back")
        returned = type(source).from_pretrained(tmp_path / "back")
        assert_same_parameters(returned, source)
        assert torch.equal(answer(returned), answer(source))


def test_a_folder_without_prefixes_and_architecture_converts(tmp_path):
    """The format of OpenAI's weights on the Hub: names without `transformer.`, causal masks, no head."""
    source = gpt2()
    source.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("architectures", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {name: tensor.clone() for name, tensor in source.transformer.state_dict().items()}
    state |= {f"h.{layer}.attn.bias": torch.ones(48, 48).tril()[None, None] for layer in range(2)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = from_gpt2(tmp_path)
    assert type(model) is MiniGPTForCausalLM
    torch.testing.assert_close(answer(model), answer(source), atol=1e-5, rtol=0)


def test_labels_token_ids_and_dtype_are_kept():
    source = gpt2(GPT2ForSequenceClassification, eos_token_id=[2, 5], resid_pdrop=0.3, use_cache=False).to(
        torch.bfloat16
    )
    model = from_gpt2(source)
    back = to_gpt2(model)
    for converted in (model, back):
        assert converted.dtype == converted.config.dtype == torch.bfloat16
        config = converted.config
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, [2, 5], PAD)
        assert (config.id2label, config.label2id, config.problem_type) == tuple(LABELS.values())
        assert (config.num_labels, config.resid_pdrop, config.use_cache) == (3, 0.3, False)
    assert_same_parameters(back, source)
    ours = {"transformers_version", "dtype", "architectures", "n_inner", "_name_or_path"}
    mine, others = back.config.to_dict(), source.config.to_dict()
    assert {k: v for k, v in mine.items() if k not in ours} == {k: v for k, v in others.items() if k not in ours}


def test_half_precision_keeps_rotary_frequencies_in_fp32():
    source = nanochat().to(torch.bfloat16)
    model = from_nanochat(source)
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert_same_parameters(to_nanochat(model), source)


def test_the_result_shares_no_memory_with_the_source():
    source = gpt2()
    model = from_gpt2(source)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    model.train()
    model(input_ids=TEXT, labels=TEXT).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_overrides_replace_converted_fields():
    model = from_gpt2(gpt2(), n_inner=None, attn_pdrop=0.4, unpadded_vocab_size=60)
    assert (model.config.attn_pdrop, model.config.unpadded_vocab_size) == (0.4, 60)
    assert compare_logits(model, gpt2()) < 1e-5
    with pytest.raises(ValueError, match="atn_pdrop"):
        from_gpt2(gpt2(), atn_pdrop=0.4)
    with pytest.raises(ValueError, match=r"layers\.2\..*override"):
        from_gpt2(gpt2(), num_hidden_layers=3)


def test_the_gpt2_preset_equals_a_converted_gpt2_config():
    sizes = {"n_layer": 2, "n_embd": 24, "n_head": 3, "n_positions": 32, "vocab_size": 67}
    converted = from_gpt2(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))).config.to_dict()
    expected = preset("gpt2", **sizes).to_dict()
    for volatile in ("dtype", "architectures", "_name_or_path", "transformers_version"):
        converted.pop(volatile, None)
        expected.pop(volatile, None)
    assert converted == expected


@pytest.mark.parametrize(
    ("convert", "source", "words"),
    [
        (from_gpt2, lambda: gpt2(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx=True"]),
        (from_gpt2, lambda: gpt2(add_cross_attention=True), ["add_cross_attention=True"]),
        (from_gpt2, lambda: gpt2(n_layer=0), ["num_hidden_layers=0"]),
        (from_gpt2, lambda: gpt2(GPT2DoubleHeadsModel), ["GPT2DoubleHeadsModel", "GPT2LMHeadModel"]),
        (from_gpt2, gpt1, ["OpenAIGPTLMHeadModel", "GPT2LMHeadModel"]),
        (from_nanochat, lambda: nanochat(num_key_value_heads=1), ["num_key_value_heads=1", "needs 3"]),
        (to_gpt2, lambda: tiny_model("gpt1"), ["norm_placement='post'", "head_mask=[["]),
        (to_gpt2, lambda: tiny_model("transformer"), ["position_embedding_type='sinusoidal'", "lm_head_bias=True"]),
        (to_gpt2, lambda: tiny_model("transformer"), ["head_dim=5", "norm_placement='post' (needs 'pre')"]),
        (
            to_gpt2,
            lambda: tiny_model("modern"),
            ["norm_type='rmsnorm'", "embedding_norm=True", "qk_norm=True", "final_logit_softcapping=15.0"],
        ),
        (to_gpt2, lambda: tiny_model(attention_scaling=0.3), ["attention_scaling=0.3"]),
        (to_gpt2, lambda: tiny_model(intermediate_size=0), ["intermediate_size=0"]),
        (to_gpt2, lambda: tiny_model(residual=False), ["residual=False"]),
        (
            to_gpt2,
            lambda: tiny_model(model_class=MiniGPTForSequenceClassification, pooling="mean"),
            ["pooling='mean'"],
        ),
        (
            to_gpt2,
            lambda: tiny_model(model_class=MiniGPTForSequenceClassification, auxiliary_lm_weight=0.5),
            ["auxiliary_lm_weight=0.5"],
        ),
        (to_nanochat, tiny_model, ["norm_type='layernorm'", "position_embedding_type='learned'", "mlp_bias=True"]),
        (to_nanochat, lambda: tiny_model("modern", lm_head_bias=True), ["lm_head_bias=True"]),
        (to_nanochat, lambda: tiny_model("modern", norm_affine=True), ["norm_affine=True (needs False)"]),
        (to_nanochat, lambda: tiny_model("modern", attention_scaling=0.3), ["attention_scaling=0.3"]),
        (
            to_nanochat,
            lambda: tiny_model("modern", rope_parameters={"partial_rotary_factor": 0.5}),
            ["partial_rotary_factor=0.5", "needs 1"],
        ),
        (
            to_nanochat,
            lambda: tiny_model("modern", model_class=MiniGPTForSequenceClassification),
            ["MiniGPTForSequenceClassification"],
        ),
    ],
)
def test_unsupported_fields_are_named(convert, source, words):
    with pytest.raises(ValueError) as error:
        convert(source())
    for word in words:
        assert word in str(error.value)


def test_an_auxiliary_head_of_weight_0_is_dropped():
    model = tiny_model(model_class=MiniGPTForSequenceClassification, auxiliary_lm_weight=0.5, pad_token_id=PAD)
    model.config.auxiliary_lm_weight = 0.0
    torch.testing.assert_close(answer(to_gpt2(model)), answer(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"qkv_bias": False, "attention_out_bias": False, "mlp_bias": False},
        {"norm_affine": False},
        {"vocab_size": 72, "unpadded_vocab_size": 67},
        {"vocab_size": 72, "unpadded_vocab_size": 67, "tie_word_embeddings": False},
        {"attention_scaling": 8**-0.5},
    ],
    ids=str,
)
def test_to_gpt2_fills_missing_parameters_and_removes_padding_rows(fields):
    model = tiny_model(**fields)
    gpt2_model = to_gpt2(model)
    assert gpt2_model.config.vocab_size == VOCAB_SIZE
    torch.testing.assert_close(answer(gpt2_model), answer(model)[..., :VOCAB_SIZE], atol=1e-5, rtol=0)
    assert compare_logits(model, gpt2_model) < 1e-5


def test_to_nanochat_fills_missing_parameters_and_removes_padding_rows():
    model = tiny_model("modern", qkv_bias=True)
    converted = to_nanochat(model)
    assert converted.config.vocab_size == VOCAB_SIZE and converted.config.attention_bias
    torch.testing.assert_close(answer(converted), answer(model)[..., :VOCAB_SIZE], atol=1e-5, rtol=0)
    assert torch.equal(greedy(converted), greedy(model))


def test_compare_logits_detects_a_difference():
    source = gpt2()
    model = from_gpt2(source).train()
    assert compare_logits(source, model) < 1e-5
    assert model.training
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.bias[3] += 0.5
    assert compare_logits(source, model) > 1e-3
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.bias[3] = float("nan")
    assert not compare_logits(source, model) < 1


def test_compare_logits_does_not_draw_padding_ids():
    """A GPT-2 classifier treats trailing padding ids as padding, MiniGPT only masked positions."""
    source = gpt2(GPT2ForSequenceClassification, vocab_size=3)
    assert compare_logits(source, from_gpt2(source), num_rows=20) < 1e-5


class TinyNanoGPT(nn.Module):
    """nanoGPT's computation with nanoGPT's parameter names, head by head."""

    def __init__(self, n_layer, n_head, n_embd, block_size, bias, vocab_size, dropout):
        super().__init__()
        self.n_head = n_head

        def norm():
            return nn.LayerNorm(n_embd, bias=bias)

        def block():
            attn = {"c_attn": nn.Linear(n_embd, 3 * n_embd, bias), "c_proj": nn.Linear(n_embd, n_embd, bias)}
            mlp = {"c_fc": nn.Linear(n_embd, 4 * n_embd, bias), "c_proj": nn.Linear(4 * n_embd, n_embd, bias)}
            parts = {"ln_1": norm(), "attn": nn.ModuleDict(attn), "ln_2": norm(), "mlp": nn.ModuleDict(mlp)}
            return nn.ModuleDict(parts)

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(block() for _ in range(n_layer)),
                "ln_f": norm(),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids):
        x = self.transformer.wte(ids) + self.transformer.wpe.weight[: ids.shape[1]]
        causal = torch.ones(ids.shape[1], ids.shape[1]).tril() == 0
        for block in self.transformer.h:
            q, k, v = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=-1)
            heads = []
            for query, key, value in zip(*(t.chunk(self.n_head, dim=-1) for t in (q, k, v)), strict=True):
                scores = query @ key.mT / query.shape[-1] ** 0.5
                heads.append(scores.masked_fill(causal, -torch.inf).softmax(-1) @ value)
            x = x + block.attn.c_proj(torch.cat(heads, dim=-1))
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
        return self.lm_head(self.transformer.ln_f(x))


def save_nanogpt(folder, bias=True, prefix="", masks=False, vocab_size=72):
    model_args = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 32, "bias": bias, "dropout": 0.1}
    model_args["vocab_size"] = vocab_size
    model = shake(TinyNanoGPT(**model_args))
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    if masks:
        state |= {f"{prefix}transformer.h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint = {"model": state, "model_args": model_args, "optimizer": optimizer.state_dict()}
    checkpoint |= {"iter_num": 5, "best_val_loss": torch.tensor(1.5), "config": {"out_dir": "out", "compile": True}}
    folder.mkdir(exist_ok=True)
    torch.save(checkpoint, folder / "ckpt.pt")
    return model


@pytest.mark.parametrize(
    "variant", [{}, {"bias": False}, {"prefix": "_orig_mod."}, {"masks": True, "prefix": "_orig_mod."}], ids=str
)
def test_nanogpt_converts(variant, tmp_path):
    reference = save_nanogpt(tmp_path, **variant)
    with torch.no_grad():
        expected = reference(TEXT)
    assert expected.std() > 0.1
    for source in (tmp_path, str(tmp_path / "ckpt.pt")):
        model = from_nanogpt(source)
        torch.testing.assert_close(answer(model), expected, atol=1e-5, rtol=0)
    stock = nanogpt_as_gpt2(tmp_path)
    torch.testing.assert_close(answer(stock), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(answer(to_gpt2(model)), expected, atol=1e-5, rtol=0)
    assert model.config.qkv_bias == model.config.mlp_bias == variant.get("bias", True)
    assert (model.config.max_position_embeddings, model.config.embd_pdrop) == (32, 0.1)

    masked = from_nanogpt(tmp_path, unpadded_vocab_size=67, eos_token_id=66)
    assert (answer(masked)[..., 67:] < -1e30).all()
    assert compare_logits(masked, stock) < 1e-5
    assert masked.config.eos_token_id == 66


def test_files_that_are_not_nanogpt_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"ckpt\.pt: no such file"):
        from_nanogpt(tmp_path)
    torch.save({"weights": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="model_args"):
        from_nanogpt(tmp_path)


def test_detect_layout_of_every_format(tmp_path):
    for name, model in {"gpt2": gpt2(), "gpt1": gpt1(), "nanochat": nanochat(), "minigpt": tiny_model()}.items():
        model.config.save_pretrained(tmp_path / name)
        assert detect_layout(tmp_path / name) == name
    save_nanogpt(tmp_path / "nanogpt")
    assert detect_layout(tmp_path / "nanogpt") == detect_layout(str(tmp_path / "nanogpt" / "ckpt.pt")) == "nanogpt"
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="model_type='llama'"):
        detect_layout(tmp_path / "llama")


def word_tokenizer(size=VOCAB_SIZE):
    vocabulary = {"<pad>": 0, "<end>": 1} | {f"w{i}": i for i in range(2, size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


def run_recipe(*arguments):
    convert.main([str(argument) for argument in arguments])


def test_recipe_converts_gpt1_with_its_tokenizer(tmp_path, capsys):
    tokens = ["<unk>", "t", "h", "e", "e</w>", "c", "a", "t</w>", "th", "the</w>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = OpenAIGPTTokenizer(vocab=vocabulary, merges=[("t", "h"), ("th", "e</w>")])
    text = "The cat the"
    assert tokenizer(text).input_ids == [9, 5, 6, 7, 9]
    source = gpt1()
    source.save_pretrained(tmp_path / "gpt1")
    tokenizer.save_pretrained(tmp_path / "gpt1")

    run_recipe(tmp_path / "gpt1", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "OpenAIGPTLMHeadModel -> MiniGPTForCausalLM: largest difference of the logits" in printed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is MiniGPTForCausalLM
    torch.testing.assert_close(answer(model), answer(source), atol=1e-5, rtol=0)
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert reloaded(text).input_ids == tokenizer(text).input_ids
    assert reloaded.decode([9, 5, 6, 7]) == tokenizer.decode([9, 5, 6, 7]) == "the cat"

    with pytest.raises(SystemExit):
        run_recipe(tmp_path / "gpt1", tmp_path / "out")
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_recipe(tmp_path / "out", tmp_path / "again")
    assert "is already a MiniGPT" in capsys.readouterr().err


def test_recipe_converts_nanogpt_with_a_tokenizer(tmp_path):
    reference = save_nanogpt(tmp_path / "nanogpt")
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    checkpoint = tmp_path / "nanogpt" / "ckpt.pt"
    run_recipe(checkpoint, "--from", "nanogpt", "--tokenizer", tmp_path / "tokenizer", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.unpadded_vocab_size, model.config.eos_token_id) == (VOCAB_SIZE, 1)
    with torch.no_grad():
        expected = reference(TEXT)[..., :VOCAB_SIZE]
    torch.testing.assert_close(answer(model)[..., :VOCAB_SIZE], expected, atol=1e-5, rtol=0)


def test_recipe_converts_nanogpt_without_a_tokenizer(tmp_path, capsys):
    reference = save_nanogpt(tmp_path / "nanogpt", bias=False)
    run_recipe(tmp_path / "nanogpt" / "ckpt.pt", tmp_path / "out")
    assert "No tokenizer found" in capsys.readouterr().out
    with torch.no_grad():
        expected = reference(TEXT)
    exported = to_gpt2(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(answer(exported), expected, atol=1e-5, rtol=0)


def test_recipe_converts_a_classifier_and_checks_the_tokenizer(tmp_path, capsys):
    source = gpt2(GPT2ForSequenceClassification)
    source.save_pretrained(tmp_path / "gpt2")
    run_recipe(tmp_path / "gpt2", tmp_path / "out")
    assert "No tokenizer found" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == LABELS["id2label"]
    torch.testing.assert_close(answer(model), answer(source), atol=1e-5, rtol=0)

    word_tokenizer(size=80).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="80 ids"):
        run_recipe(tmp_path / "gpt2", "--tokenizer", tmp_path / "tokenizer", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_recipe_writes_nothing_if_logits_differ(tmp_path, monkeypatch):
    gpt2().save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr("hf_minigpt.deploy.conversion.compare_logits", lambda one, other: float("nan"))
    with pytest.raises(RuntimeError, match="more than rounding"):
        run_recipe(tmp_path / "gpt2", tmp_path / "out")
    assert not (tmp_path / "out").exists()
