"""An exported model computes the same logits in its own runtime."""

import copy
import math

import gguf
import numpy as np
import onnxruntime
import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_minigpt import MiniGPTForSequenceClassification
from hf_minigpt.recipes import export
from hf_minigpt.tokenization import train_character_tokenizer, train_tokenizer
from tests.tiny import tiny_model


TEXTS = ["Once upon a time there was a mill, and nobody knew why. 1 + 1 = 2, said the miller\tand left."] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320, model_max_length=64, show_progress=False)


@pytest.fixture
def save(tmp_path, tokenizer):
    """A function that saves a tiny model and its tokenizer, and returns the model."""

    def save(name="gpt2", tokenizer=tokenizer, **fields):
        size = {"vocab_size": len(tokenizer), "unpadded_vocab_size": None, "bos_token_id": 0, "eos_token_id": 0}
        model = tiny_model(name, **(size | {"pad_token_id": 1} | fields))
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return model

    return save


def run(tmp_path, to: str):
    assert export.main([str(tmp_path / "model"), str(tmp_path / "out"), "--to", to]) < 1e-2
    assert not (tmp_path / "out.partial").exists()
    return tmp_path / "out"


@torch.no_grad()
def greedy(model, ids: list[int], num_new: int) -> list[int]:
    return model.generate(torch.tensor([ids]), max_new_tokens=num_new, do_sample=False, eos_token_id=-1)[0].tolist()


def test_transformers_classes_generate_the_same_text(save, tmp_path, tokenizer):
    for name, to in (("gpt2", "gpt2"), ("modern", "nanochat")):
        model = save(name)
        exported = AutoModelForCausalLM.from_pretrained(run(tmp_path, to))
        assert exported.config.model_type == to
        assert greedy(exported, [0, 5, 6], 12) == greedy(model, [0, 5, 6], 12)
        assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS[0]).input_ids == tokenizer(TEXTS[0]).input_ids
        (tmp_path / "out").rename(tmp_path / to)


def test_a_classifier_exports_to_gpt2(tmp_path):
    model = tiny_model(model_class=MiniGPTForSequenceClassification, pad_token_id=1, num_labels=3)
    model.save_pretrained(tmp_path / "model")
    exported = AutoModelForSequenceClassification.from_pretrained(run(tmp_path, "gpt2"))
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(exported(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "gpt1", "transformer", "modern", "no_positions", "bigram"])
def test_torch_export_computes_the_same_logits(save, tmp_path, name):
    fields = {"hidden_size": 320, "vocab_size": 320} if name == "bigram" else {}
    model = save(name, **fields)
    program = torch.export.load(run(tmp_path, "torch-export") / "model.pt2").module(check_guards=False)
    check_graph(model, program)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_onnx_computes_the_same_logits(save, tmp_path, name):
    model = save(name, vocab_size=320, unpadded_vocab_size=300)
    path = run(tmp_path, "onnx") / "model.onnx"
    session = onnxruntime.InferenceSession(path)
    shapes = {node.name: node.shape for node in (*session.get_inputs(), *session.get_outputs())}
    assert shapes["input_ids"] == ["batch", "length"] and shapes["logits"] == ["batch", "length", 320]
    assert shapes["past_key_values.1.value"] == ["batch", 3, "cached", 8]
    names = [f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]

    def step(input_ids, attention_mask, cache):
        tensors = [input_ids, attention_mask, *(tensor for pair in cache for tensor in pair)]
        inputs = dict(zip(["input_ids", "attention_mask", *names], (t.numpy() for t in tensors), strict=True))
        logits, *rest = map(torch.from_numpy, session.run(None, inputs))
        return logits, list(zip(rest[::2], rest[1::2], strict=True))

    check_graph(model, step)


@torch.no_grad()
def check_graph(model, step):
    """The logits are the model's, for several lengths, in one call or several, with and without left padding."""
    config = model.config
    num_ids = config.unpadded_vocab_size or config.vocab_size
    heads, width, num_layers = config.num_attention_heads, config.head_dim, config.num_hidden_layers
    for rows, length, padding, pieces in (
        (1, 1, 0, [1]),
        (1, 5, 0, [1, 1, 3]),
        (3, 9, 4, [7, 1, 1]),
        (2, 63, 2, [63]),
    ):
        ids = torch.randint(num_ids, (rows, length))
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        expected = model(ids, attention_mask=mask).logits
        cache = [(torch.zeros(rows, heads, 0, width),) * 2 for _ in range(num_layers)]
        logits, done = [], 0
        for piece in pieces if num_layers else [length]:
            answer, cache = step(ids[:, done : done + piece], mask[:, : done + piece], cache)
            done += piece
            logits.append(answer)
        actual = torch.cat(logits, 1)[..., :num_ids]
        torch.testing.assert_close(actual[mask.bool()], expected[..., :num_ids][mask.bool()], atol=1e-4, rtol=1e-4)
        assert actual.isfinite().all()


def layer_norm(x, tensors, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def gpt2_graph(tensors: dict[str, np.ndarray], ids: list[int], num_layers: int, num_heads: int) -> np.ndarray:
    """The logits (T, V) of llama.cpp's architecture gpt2, computed by numpy in float64."""

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    x = tensors["token_embd.weight"][ids] + tensors["position_embd.weight"][: len(ids)]
    future = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for layer in range(num_layers):
        block = f"blk.{layer}"
        stacked = linear(layer_norm(x, tensors, f"{block}.attn_norm"), f"{block}.attn_qkv")
        q, k, v = (part.reshape(len(ids), num_heads, -1).swapaxes(0, 1) for part in np.split(stacked, 3, -1))
        scores = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]) + future)
        mixed = scores / scores.sum(-1, keepdims=True) @ v
        x = x + linear(mixed.swapaxes(0, 1).reshape(len(ids), -1), f"{block}.attn_output")
        up = linear(layer_norm(x, tensors, f"{block}.ffn_norm"), f"{block}.ffn_up")
        gelu = up / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        x = x + linear(gelu, f"{block}.ffn_down")
    return layer_norm(x, tensors, "output_norm") @ tensors.get("output.weight", tensors["token_embd.weight"]).T


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_computes_the_same_logits_in_numpy_and_llama_cpp(save, tmp_path, tokenizer, tied):
    num_ids = len(tokenizer)
    fields = {"attention_out_bias": False, "intermediate_size": 40, "tie_word_embeddings": tied}
    model = save(vocab_size=num_ids + 9, unpadded_vocab_size=num_ids, **fields)
    path = run(tmp_path, "gguf") / "model.gguf"
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: np.array(tensor.data, dtype=np.float64) for tensor in reader.tensors}
    assert ("output.weight" in tensors) is not tied
    ids = [0, 70, 71, 5, 200, 201]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, :, :num_ids].double().numpy()
    np.testing.assert_allclose(gpt2_graph(tensors, ids, 2, 3), expected, atol=1e-4)

    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.architecture"], fields["gpt2.context_length"]) == ("gpt2", 64)
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(num_ids))
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.padding_token_id"]) == (0, 1)


@pytest.mark.parametrize("begins", [True, False])
def test_llama_cpp_tokenizes_like_the_tokenizer(save, tmp_path, tokenizer, begins):
    import xllamacpp

    tokenizer = copy.deepcopy(tokenizer)
    template = "<|endoftext|> $A" if begins else "$A"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<|endoftext|>", 0)]
    )
    model = save(tokenizer=tokenizer)
    params = xllamacpp.CommonParams()
    params.model.path = str(run(tmp_path, "gguf") / "model.gguf")
    params.cpuparams.n_threads = 1
    params.n_parallel, params.warmup, params.fit_params, params.verbosity = 1, False, False, -1
    server = xllamacpp.Server(params)
    letter = tokenizer.convert_tokens_to_ids("a")
    text = "Once upon a time, the miller's 11 mills \n\n\tleft élan."
    request = {"prompt": text, "max_tokens": 1, "n_probs": len(tokenizer), "logit_bias": [[letter, 1e9]]}
    answer = server.handle_completions(request)
    # The first token is end-of-text only if the tokenizer adds it.
    ids = tokenizer(text).input_ids
    assert (ids[0] == 0) is begins
    field = gguf.GGUFReader(tmp_path / "out/model.gguf").fields["tokenizer.ggml.add_bos_token"]
    assert field.contents() is begins
    saved = [(tmp_path / name / "tokenizer.json").read_text() for name in ("model", "out")]
    assert saved[0] == saved[1]
    assert answer["usage"]["prompt_tokens"] == len(ids)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        assert abs(token["logprob"] - expected[token["id"]].item()) < 2e-2


@pytest.mark.parametrize(
    ("to", "fields", "named"),
    [
        ("gguf", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("gguf", {"attention_scaling": 1.0}, "attention_scaling=1.0"),
        ("gguf", {"position_embedding_type": "rope"}, "position_embedding_type='rope'"),
        ("gguf", {"lm_head_bias": True}, "lm_head_bias=True"),
        ("gpt2", {"qk_norm": True}, "qk_norm=True"),
        ("nanochat", {}, "norm_type='layernorm'"),
    ],
)
def test_unsupported_fields_are_named(save, tmp_path, to, fields, named):
    save(**fields)
    with pytest.raises(ValueError, match=named):
        export.main([str(tmp_path / "model"), str(tmp_path / "out"), "--to", to])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_gguf_requires_a_byte_level_tokenizer(save, tmp_path):
    save(tokenizer=train_character_tokenizer(TEXTS, model_max_length=64))
    with pytest.raises(ValueError, match="byte-level BPE"):
        run(tmp_path, "gguf")


def test_other_checkpoints_must_be_converted_first(save, tmp_path, capsys):
    save()
    run(tmp_path, "gpt2").rename(tmp_path / "gpt2")
    with pytest.raises(SystemExit):
        export.main([str(tmp_path / "gpt2"), str(tmp_path / "out"), "--to", "onnx"])
    assert "recipes/convert.py" in capsys.readouterr().err


def test_an_export_with_different_logits_is_deleted(save, tmp_path, monkeypatch):
    save()
    monkeypatch.setattr("hf_minigpt.deploy.conversion.compare_logits", lambda *models: float("nan"))
    with pytest.raises(RuntimeError, match="more than rounding"):
        run(tmp_path, "gpt2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
