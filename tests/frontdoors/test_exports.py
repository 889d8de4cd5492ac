"""A trained checkpoint in other engines: its tokenizer and its figures, text in and text out."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from hf_minigpt.data.tales import grammar as tales
from hf_minigpt.recipes import export
from hf_minigpt.training.evaluation import score_texts


TEXTS = [text[:400] for text in tales.tales(8, seed=2028)]
PROMPT = " ".join(TEXTS[0].split()[:4])


@pytest.fixture(scope="module")
def model(trained_gpt2_folder):
    return AutoModelForCausalLM.from_pretrained(trained_gpt2_folder).eval()


@pytest.fixture(scope="module")
def tokenizer(trained_gpt2_folder):
    return AutoTokenizer.from_pretrained(trained_gpt2_folder)


@pytest.fixture(scope="module")
def nats(model, tokenizer) -> float:
    """Our own figure: nats per token of the texts, the first token given end-of-text."""
    return math.log(score_texts(model, tokenizer, TEXTS)["perplexity"])


def greedy(model, tokenizer, num_new: int) -> str:
    ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=num_new, do_sample=False)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


@torch.no_grad()
def test_gpt2_s_own_class(model, tokenizer, nats, trained_gpt2_folder, tmp_path):
    export.main([str(trained_gpt2_folder), str(tmp_path / "out"), "--to", "gpt2"])
    stock = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    its_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    total = count = 0
    for text in TEXTS:
        ids = its_tokenizer(text, return_tensors="pt").input_ids
        total += stock(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert total / count == pytest.approx(nats, rel=1e-4)
    assert greedy(stock, its_tokenizer, 30) == greedy(model, tokenizer, 30)


@torch.no_grad()
def test_llama_cpp(model, tokenizer, trained_gpt2_folder, tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp")
    export.main([str(trained_gpt2_folder), str(tmp_path / "out"), "--to", "gguf"])
    params = xllamacpp.CommonParams()
    params.model.path = str(tmp_path / "out" / "model.gguf")
    params.cpuparams.n_threads = 1
    params.n_parallel, params.warmup, params.fit_params, params.verbosity = 1, False, False, -1
    server = xllamacpp.Server(params)
    answer = server.handle_completions({"prompt": PROMPT, "max_tokens": 30, "temperature": 0, "n_probs": 1})
    (choice,) = answer["choices"]
    ids = tokenizer(PROMPT).input_ids
    assert answer["usage"]["prompt_tokens"] == len(ids)
    chosen = [token["id"] for token in choice["logprobs"]["content"]]
    logits = model(torch.tensor([ids + chosen])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    ours = logits.gather(-1, torch.tensor(chosen)[:, None]).squeeze(-1)
    theirs = torch.tensor([token["logprob"] for token in choice["logprobs"]["content"]])
    # each token is as likely there as here, and here too the likeliest but for its rounding
    torch.testing.assert_close(theirs, ours, atol=2e-2, rtol=0)
    torch.testing.assert_close(ours, logits.amax(-1), atol=2e-2, rtol=0)
    assert choice["text"] == tokenizer.decode(chosen)


@pytest.mark.slow
def test_onnxruntime(model, tokenizer, nats, trained_gpt2_folder, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    export.main([str(trained_gpt2_folder), str(tmp_path / "out"), "--to", "onnx"])
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    its_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    config = model.config
    names = [node.name for node in session.get_inputs() if node.name.startswith("past_key_values")]
    empty = torch.zeros(1, config.num_attention_heads, 0, config.head_dim).numpy()
    total = count = 0
    for text in TEXTS:
        ids = its_tokenizer(text, return_tensors="pt").input_ids
        feed = {
            "input_ids": ids.numpy(),
            "attention_mask": torch.ones_like(ids).numpy(),
            **dict.fromkeys(names, empty),
        }
        logits = torch.from_numpy(session.run(["logits"], feed)[0])
        total += torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    assert total / count == pytest.approx(nats, rel=1e-4)
