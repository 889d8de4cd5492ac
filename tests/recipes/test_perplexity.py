"""Bits per byte match a recomputation in float64, token by token."""

import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.data.corpora import load_documents
from hf_minigpt.data.tales import grammar as tales
from hf_minigpt.data.token_store import held_out_documents, prepare_corpus
from hf_minigpt.deploy.conversion import from_gpt2
from hf_minigpt.recipes import perplexity
from hf_minigpt.tokenization import train_tokenizer
from hf_minigpt.training.evaluation import cut_windows, decode_documents
from tests.tiny import shake, tiny_config


CONTEXT = 16
TEXTS = [
    "A cat met seven mice, café and all, and said to the third: run, or I eat you! " * 4,
    "So.",
    "The mill stood by the brook; <|endoftext|> is what a programmer wrote on its door.",
    "Nobody knew why the miller's daughter had gone.\n\nNobody asked. " * 3,
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A GPT-2 of transformers, the same converted, and a MiniGPT with another tokenizer and rotary positions."""
    folder = tmp_path_factory.mktemp("perplexity")
    tokenizer = train_tokenizer(TEXTS * 5, 320, model_max_length=CONTEXT, show_progress=False)
    gpt2 = shake(GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=24, n_layer=2, n_head=3, n_positions=CONTEXT)))
    modern_tokenizer = train_tokenizer(TEXTS[1:2] * 5, 320, model_max_length=CONTEXT, show_progress=False)
    num_ids = len(modern_tokenizer)
    assert num_ids < len(tokenizer) == 320
    config = tiny_config("modern", vocab_size=320, unpadded_vocab_size=num_ids, max_position_embeddings=CONTEXT)
    modern = shake(MiniGPTForCausalLM(config))
    for name, model, its_tokenizer in (
        ("gpt2", gpt2, tokenizer),
        ("converted", from_gpt2(gpt2), tokenizer),
        ("modern", modern, modern_tokenizer),
    ):
        model.save_pretrained(folder / name)
        its_tokenizer.save_pretrained(folder / name)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


@torch.no_grad()
def by_hand(folder, stride: int) -> tuple[float, int, int]:
    """Nats, tokens and bytes of `TEXTS`, each token predicted from the tokens that its window shows before it."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, num_tokens, num_bytes = 0.0, 0, 0
    for text in TEXTS:
        pieces = tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        ids = [tokenizer.bos_token_id, *pieces]
        for i in range(1, len(ids)):
            # the first window that reaches token i
            start = max(0, math.ceil((i - CONTEXT) / stride)) * stride
            logits = model(torch.tensor([ids[start:i]]), use_cache=False).logits[0, -1]
            total -= logits.log_softmax(-1)[ids[i]].item()
        num_tokens += len(ids) - 1
        num_bytes += len(text.encode())
    return total, num_tokens, num_bytes


@pytest.mark.parametrize("stride", [None, 3, CONTEXT])
def test_every_byte_is_scored_once_as_by_hand(models, stride, tmp_path, capsys):
    names = [str(models / name) for name in ("gpt2", "converted", "modern")]
    flags = [
        "--dataset",
        str(models / "texts.jsonl"),
        "--part",
        "all",
        "--cpu_threads",
        "1",
        "--tokens_per_batch",
        "40",
    ]
    flags += ["--output", str(tmp_path / "figures.json"), *(["--stride", str(stride)] if stride else [])]
    results = perplexity.main([*names, *flags])
    for name in (names[0], names[2]):
        total, num_tokens, num_bytes = by_hand(name, stride or CONTEXT // 2)
        result = results[name]
        assert (result["tokens"], result["bytes"]) == (num_tokens, num_bytes)
        assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(total / num_tokens), rel=1e-4)
        assert result["changed_texts"] == 0
    assert results[names[1]] == pytest.approx(results[names[0]], rel=1e-5)
    assert results[names[1]]["bytes"] == results[names[2]]["bytes"]
    assert json.loads((tmp_path / "figures.json").read_text()) == results
    printed = capsys.readouterr().out
    assert all(f"{results[name]['bits_per_byte']:.4f}" in printed for name in names)


def test_windows_cover_all_lengths():
    for length in range(1, 40):
        for context in (1, 2, 5, 12):
            for stride in range(1, context + 1):
                ids = list(range(length))
                scored = []
                for window, num in cut_windows(ids, context, stride):
                    assert len(window) <= context + 1
                    # each token has context, and at least context - stride tokens inside a document
                    first = len(window) - num
                    assert first >= 1 and (window[0] == 0 or first >= context - stride + 1)
                    scored += window[-num:]
                assert scored == ids[1:]


def test_the_default_corpus_is_what_pretraining_holds_out(models, capsys, tmp_path):
    flags = ["--cpu_threads", "1", "--max_examples", "60", "--validation_fraction", "0.2", "--split_seed", "3"]
    results = perplexity.main([str(models / "modern"), *flags])
    tokenizer = AutoTokenizer.from_pretrained(models / "modern")
    documents = load_documents(max_examples=60)
    corpus = prepare_corpus(documents, tokenizer, tmp_path, validation_fraction=0.2, seed=3)
    held_out = decode_documents(corpus.validation, tokenizer)
    assert results[str(models / "modern")]["bytes"] == sum(len(text.encode()) for text in held_out)
    entropy = -sum(map(tales.log2_probability, held_out)) / sum(len(text.encode()) for text in held_out)
    assert re.search(rf"entropy of the source +{entropy:.4f}\n", capsys.readouterr().out)


def test_a_single_document_is_split_as_in_pretraining(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(TEXTS))
    tokenizer = train_tokenizer(TEXTS, 320, model_max_length=CONTEXT, show_progress=False)
    corpus = prepare_corpus(load_documents(path), tokenizer, tmp_path / "cache", validation_fraction=0.3)
    texts = list(held_out_documents(load_documents(path), validation_fraction=0.3))
    assert texts == decode_documents(corpus.validation, tokenizer)


def test_a_tokenizer_that_changes_texts_is_reported(models, tmp_path, capsys):
    from tokenizers import normalizers

    tokenizer = AutoTokenizer.from_pretrained(models / "gpt2")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(tmp_path)
    flags = [
        "--dataset",
        str(models / "texts.jsonl"),
        "--part",
        "all",
        "--cpu_threads",
        "1",
        "--tokenizer",
        str(tmp_path),
    ]
    results = perplexity.main([str(models / "gpt2"), *flags])
    assert results[str(models / "gpt2")]["changed_texts"] == 4
    assert "changes 4 of 4 texts" in capsys.readouterr().err


def test_invalid_windows_are_refused(models):
    flags = ["--dataset", str(models / "texts.jsonl"), "--part", "all", "--cpu_threads", "1"]
    for wrong, message in (
        (["--context_length", "17"], "has a context of 16"),
        (["--stride", "17"], "stride=17 must be between 1 and the context, 16"),
    ):
        with pytest.raises(ValueError, match=message):
            perplexity.main([str(models / "modern"), *flags, *wrong])


def test_all_models_are_loaded_before_the_first_is_scored(models, tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity, "score_texts", lambda *args, **kwargs: pytest.fail("a model was scored"))
    flags = ["--dataset", str(models / "texts.jsonl"), "--part", "all", "--cpu_threads", "1"]
    good, damaged = str(models / "gpt2"), tmp_path / "damaged"
    AutoTokenizer.from_pretrained(good).save_pretrained(damaged)
    (damaged / "config.json").write_text((models / "gpt2" / "config.json").read_text())
    for wrong in (str(models / "misspelt"), str(damaged)):
        with pytest.raises(OSError, match=wrong.split("/")[-1]):
            perplexity.main([good, wrong, *flags])
    with pytest.raises(ValueError, match="has a context of 16"):
        perplexity.main([good, str(models / "modern"), *flags, "--context_length", "17"])


def test_each_result_is_written_at_once(models, tmp_path, monkeypatch, capsys):
    names = [str(models / "gpt2"), str(models / "modern")]
    output = tmp_path / "figures.json"
    scored = perplexity.score_texts

    def fail_at_the_second(*args, name, **kwargs):
        if name == names[1]:
            raise MemoryError("too large")
        return scored(*args, name=name, **kwargs)

    monkeypatch.setattr(perplexity, "score_texts", fail_at_the_second)
    flags = ["--dataset", str(models / "texts.jsonl"), "--part", "all", "--cpu_threads", "1", "--output", str(output)]
    with pytest.raises(MemoryError):
        perplexity.main([*names, *flags])
    first = json.loads(output.read_text())
    assert list(first) == names[:1]
    assert f"{first[names[0]]['bits_per_byte']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag",
    [
        *(["--stride", "0"], ["--context_length", "-1"], ["--tokens_per_batch", "0"], ["--max_examples", "0"]),
        *(["--validation_fraction", "nan"], ["--split_seed", "-1"], ["--cpu_threads", "0"], ["--dtype", "flaot32"]),
        ["--output", "nowhere/figures.json"],
    ],
)
def test_wrong_flags_end_the_program_before_anything_is_read(flag, monkeypatch, capsys):
    monkeypatch.setattr(perplexity, "load_documents", lambda *args, **kwargs: pytest.fail("the corpus was opened"))
    with pytest.raises(SystemExit):
        perplexity.main(["model", *flag])
    error = capsys.readouterr().err
    assert flag[0] in error and flag[1] in error
