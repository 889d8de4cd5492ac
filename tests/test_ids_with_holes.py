"""Tokenizers with gaps in their ids, such as reserved ids: `len(tokenizer)` is less than the largest id + 1."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from hf_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification
from hf_minigpt.data.collators import LanguageModelCollator
from hf_minigpt.data.corpora import Documents, stream_documents
from hf_minigpt.data.rows import ShuffledDocumentRows
from hf_minigpt.data.streaming import StreamedRows
from hf_minigpt.data.token_store import prepare_corpus
from hf_minigpt.instructions.model import prepare_for_chat
from hf_minigpt.pretraining.data import given_tokenizer
from hf_minigpt.tokenization import (
    END_OF_TEXT,
    ROLES,
    check_tokenizer_fits,
    load_tokenizer,
    num_ids,
    padded_vocab_size,
    train_tokenizer,
)
from hf_minigpt.training.arguments import ModelArguments
from hf_minigpt.training.loading import build_model, load_base_model


TEXTS = [f"The {animal} sat on the mat and saw {number} others." for animal in ("cat", "dog") for number in range(40)]
NUM_TOKENS = 320
# tokens that get other ids, which leaves gaps
GAPS = {
    "a word's id is large": {"Ġthe": 600},
    "a word has the id that a new token would get": {"Ġthe": NUM_TOKENS},
    "the special tokens' ids are large": {END_OF_TEXT: 450, "<|pad|>": 451},
    "the first id beyond 16 bits": {"Ġthe": 1 << 16},
}
LARGEST_16_BIT_ID = {"Ġthe": (1 << 16) - 1}


def with_ids(tokenizer, ids, has_pad=True):
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["model"]["vocab"] |= ids
    description["post_processor"] = None
    if not has_pad:
        description["added_tokens"] = [
            token for token in description["added_tokens"] if token["content"] == END_OF_TEXT
        ]
        description["model"]["vocab"] = {
            token.replace("<|pad|>", "<|reserved|>"): i for token, i in description["model"]["vocab"].items()
        }
    backend = Tokenizer.from_str(json.dumps(description))
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT} | ({"pad_token": "<|pad|>"} if has_pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="module")
def without_gaps():
    tokenizer = train_tokenizer(TEXTS, NUM_TOKENS, model_max_length=32, show_progress=False)
    assert num_ids(tokenizer) == len(tokenizer) == NUM_TOKENS
    return tokenizer


@pytest.fixture(params=GAPS.values(), ids=GAPS)
def folder(request, without_gaps, tmp_path):
    with_ids(without_gaps, request.param).save_pretrained(tmp_path / "tokenizer")
    assert num_ids(load_tokenizer(tmp_path / "tokenizer")) == max(request.param.values()) + 1
    return tmp_path / "tokenizer"


def ids_are_unique(tokenizer):
    ids = list(tokenizer.get_vocab().values())
    return len(ids) == len(set(ids))


def model_args(folder):
    small = ["hidden_size=16", "head_dim=8"]
    return ModelArguments(tokenizer=str(folder), preset="minigpt-pico", context_length=32, config_overrides=small)


def test_model_has_an_embedding_for_every_id(folder, tmp_path):
    tokenizer = given_tokenizer(model_args(folder))
    model = build_model(model_args(folder), tokenizer)
    assert model.config.vocab_size == padded_vocab_size(tokenizer) == -(-num_ids(tokenizer) // 64) * 64
    assert model.config.unpadded_vocab_size in (None, num_ids(tokenizer))
    check_tokenizer_fits(tokenizer, model.config)
    documents = Documents("corpus", "corpus", lambda: iter(TEXTS))
    corpus = prepare_corpus(documents, tokenizer, tmp_path / "cache", num_workers=1)
    assert corpus.train.tokens.dtype == (np.uint16 if num_ids(tokenizer) <= 1 << 16 else np.uint32)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    stored = [*corpus.train.tokens.tolist(), *corpus.validation.tokens.tolist()]
    assert sorted(i for i in stored if i != tokenizer.eos_token_id) == sorted(i for text in ids for i in text)
    collate = LanguageModelCollator(tokenizer.pad_token_id, num_ids(tokenizer))
    batch = collate([ShuffledDocumentRows(corpus.train, 32)[i] for i in range(2)])
    model(**batch).loss.backward()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for model_class in (MiniGPTForCausalLM, MiniGPTForSequenceClassification):
        loaded, loaded_tokenizer = load_base_model(model_class, str(tmp_path / "model"))
        assert loaded.config.vocab_size == model.config.vocab_size
        assert loaded_tokenizer(TEXTS[0]).input_ids == tokenizer(TEXTS[0]).input_ids


def test_streamed_rows_decode_to_the_text(folder, tmp_path):
    (tmp_path / "corpus").mkdir()
    for number in range(8):
        (tmp_path / "corpus" / f"{number}.txt").write_text(" ".join(TEXTS))
    tokenizer = load_tokenizer(folder)
    rows = StreamedRows(stream_documents(tmp_path / "corpus"), tokenizer, 16, 8, rows_per_batch=8, num_workers=1)
    batch = rows.__getitems__(range(8))
    rows.close()
    known = set(tokenizer.get_vocab().values())
    assert {i for row in batch for i in row["input_ids"].tolist()} <= known
    text = tokenizer.decode(torch.cat([row["input_ids"] for row in batch]), skip_special_tokens=True)
    assert " the mat" in text


@pytest.mark.parametrize("ids", GAPS.values(), ids=GAPS)
def test_new_tokens_get_unused_ids(ids, without_gaps, tmp_path):
    if END_OF_TEXT in ids:
        ids = {END_OF_TEXT: ids[END_OF_TEXT]}
    with_ids(without_gaps, ids, has_pad=False).save_pretrained(tmp_path / "bare")
    before = PreTrainedTokenizerFast.from_pretrained(tmp_path / "bare")
    assert before.pad_token is None
    tokenizer = load_tokenizer(tmp_path / "bare", model_max_length=32)
    assert tokenizer.pad_token_id == num_ids(before)
    assert ids_are_unique(tokenizer)
    model = build_model(model_args(tmp_path / "bare"), tokenizer)
    new_ids = prepare_for_chat(model, tokenizer, "roles")
    assert new_ids == [tokenizer.convert_tokens_to_ids(role) for role in ROLES]
    assert new_ids == list(range(num_ids(before) + 1, num_ids(before) + 4))
    assert ids_are_unique(tokenizer)
    assert model.config.vocab_size >= num_ids(tokenizer)
    tokenizer.save_pretrained(tmp_path / "saved")
    for each in (tokenizer, load_tokenizer(tmp_path / "saved")):
        for text in TEXTS[:3]:
            assert each(text).input_ids == before(text).input_ids
        assert each.pad_token_id == tokenizer.pad_token_id
        assert each("<|user|>", add_special_tokens=False).input_ids == new_ids[1:2]


def test_ids_up_to_16_bits_have_two_bytes(without_gaps, tmp_path):
    tokenizer = with_ids(without_gaps, LARGEST_16_BIT_ID)
    documents = Documents("corpus", "corpus", lambda: iter(TEXTS))
    corpus = prepare_corpus(documents, tokenizer, tmp_path, num_workers=1)
    assert corpus.train.tokens.dtype == np.uint16
    assert corpus.train.tokens.max() == (1 << 16) - 1
