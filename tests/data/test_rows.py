import itertools
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_minigpt.data.collators import LanguageModelCollator
from hf_minigpt.data.course import SlidingWindowRows
from hf_minigpt.data.rows import AlignedDocumentRows, DocumentRows, RandomWindowRows, ShuffledDocumentRows
from hf_minigpt.data.token_store import TokenStore, TokenStoreWriter


EOS = 0

LENGTHS = st.lists(st.integers(1, 12) | st.integers(30, 60), min_size=1, max_size=12)


def store_of(lengths, folder):
    """Return a store of documents of these lengths, in which all tokens differ."""
    writer = TokenStoreWriter(folder, eos_token_id=EOS, vocab_size=60_000)
    first = 1
    for length in lengths:
        writer.add(np.arange(first, first + length), num_bytes=length)
        first += length
    writer.close()
    return TokenStore.open(folder)


@pytest.fixture
def store(tmp_path):
    return store_of([5, 1, 9, 30, 2, 2, 17, 40, 3], tmp_path / "store")


def with_store(lengths, check):
    with tempfile.TemporaryDirectory() as folder:
        check(store_of(lengths, Path(folder) / "store"))


def as_lists(rows):
    """Return the tokens of each row, and check that targets are the inputs shifted by one."""
    result = []
    for row in rows:
        inputs, targets = row["input_ids"], row["shift_labels"]
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs[1:].tolist() == targets[:-1].tolist()
        result.append([*inputs.tolist(), targets[-1].item()])
    return result


VIEWS = {
    "aligned": lambda store: AlignedDocumentRows(store, 8, seed=3),
    "shuffled": lambda store: ShuffledDocumentRows(store, 8, seed=3),
    "document": lambda store: DocumentRows(store, 8),
    "sliding": lambda store: SlidingWindowRows(store, 8, 3),
    "random": lambda store: RandomWindowRows(store, 8, 20, seed=3),
}


@pytest.mark.parametrize("view", VIEWS)
def test_rows_are_the_same_one_by_one_and_in_batches(view, store):
    rows = VIEWS[view](store)
    one_by_one = as_lists([rows[index] for index in range(len(rows))])
    assert as_lists(rows) == one_by_one
    order = np.random.default_rng(0).permutation(len(rows)).tolist() * 2
    assert as_lists(rows.__getitems__(order)) == [one_by_one[index] for index in order]
    assert as_lists([rows[-1]]) == one_by_one[-1:]
    for outside in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            rows[outside]


@pytest.mark.parametrize("view", VIEWS)
def test_pickled_rows_contain_no_tokens(view, tmp_path):
    store = store_of([5000, 5000], tmp_path / "store")
    rows = VIEWS[view](store)
    data = pickle.dumps(rows)
    # document rows store the start of each row (8 bytes), and aligned rows the positions of their pieces
    assert len(data) < 1500 + {"document": 8, "aligned": 40}.get(view, 0) * len(rows)
    assert as_lists(pickle.loads(data)) == as_lists(rows)


@pytest.mark.parametrize("view", VIEWS)
def test_data_loader_and_collator_keep_every_row(view, store):
    rows = VIEWS[view](store)
    loader = DataLoader(rows, batch_size=2, collate_fn=LanguageModelCollator(pad_token_id=59_999))
    batches = list(loader)
    assert sum(len(batch["input_ids"]) for batch in batches) == len(rows)
    kept = [row[row != -100].tolist() for batch in batches for row in batch["shift_labels"]]
    assert kept == [row[1:] for row in as_lists(rows)]


@given(lengths=LENGTHS, context_length=st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_windows_as_far_apart_as_they_are_long_predict_every_token_once(lengths, context_length):
    def check(store):
        if store.num_tokens <= context_length:
            return
        stream = store.tokens.tolist()
        rows = as_lists(SlidingWindowRows(store, context_length, context_length))
        expected, start = [], 0
        while start + context_length < len(stream):
            expected.append(stream[start : start + context_length + 1])
            start += context_length
        assert rows == expected
        predicted = [token for row in rows for token in row[1:]]
        assert predicted == stream[1 : len(predicted) + 1]
        assert len(stream) - 1 - len(predicted) < context_length

    with_store(lengths, check)


@given(lengths=LENGTHS, context_length=st.integers(1, 40), seed=st.integers(0, 99), epoch=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_shuffled_document_rows_have_each_document_once(lengths, context_length, seed, epoch):
    def check(store):
        if store.num_tokens <= context_length:
            return
        rows = ShuffledDocumentRows(store, context_length, seed=seed)
        rows.set_epoch(epoch)
        assert len(rows) == (store.num_tokens - 1) // context_length
        cut = as_lists(rows)
        assert all(len(row) == context_length + 1 for row in cut)
        # each row continues where the previous one ended
        stream = cut[0][:1] + [token for row in cut for token in row[1:]]
        assert [row[0] for row in cut[1:]] == [row[-1] for row in cut[:-1]]
        # the stream consists of documents, each at most once, in some order, and only the last may be truncated
        assert stream[0] == EOS
        tokens = store.tokens.tolist()
        remaining = {tokens[begin]: tokens[begin:end] for begin, end in itertools.pairwise(store.offsets.tolist())}
        position = 1
        while position < len(stream):
            document = remaining.pop(stream[position])
            found = stream[position : position + len(document)]
            assert found == document[: len(found)]
            position += len(document)
        assert store.num_tokens - len(stream) < context_length

    with_store(lengths, check)


@given(lengths=LENGTHS, context_length=st.integers(1, 40), seed=st.integers(0, 99), epoch=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_aligned_document_rows_begin_with_a_document(lengths, context_length, seed, epoch):
    def check(store):
        if store.num_tokens <= context_length:
            return
        rows = AlignedDocumentRows(store, context_length, seed=seed, bare_share=0)
        rows.set_epoch(epoch)
        assert len(rows) == (store.num_tokens - 1) // context_length
        tokens = store.tokens.tolist()
        documents = {tokens[begin]: tokens[begin:end] for begin, end in itertools.pairwise(store.offsets.tolist())}
        for row in as_lists(rows):
            assert len(row) == context_length + 1
            if row[0] != EOS or row[1] not in documents or len(documents[row[1]]) >= context_length:
                # the whole row is from one long document, and the first input is the token before
                begin = tokens.index(row[1]) if row[1] != EOS else tokens.index(row[0]) + 1
                assert row == tokens[begin - 1 : begin + context_length]
                document = np.searchsorted(store.offsets, begin, side="right") - 1
                assert store.offsets[document + 1] >= begin + context_length
                continue
            # short documents, of which only the last is truncated
            position = 1
            while position < len(row):
                document = documents[row[position]]
                assert len(document) < context_length
                assert row[position : position + len(document)] == document[: len(row) - position]
                position += len(document)

    with_store(lengths, check)


@given(lengths=LENGTHS, context_length=st.integers(1, 40), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_bare_rows_are_shifted_by_one_token(lengths, context_length, seed):
    def check(store):
        if store.num_tokens <= context_length:
            return
        tokens = store.tokens.tolist()
        with_eos = as_lists(AlignedDocumentRows(store, context_length, seed=seed, bare_share=0))
        bare = as_lists(AlignedDocumentRows(store, context_length, seed=seed, bare_share=1))
        some = as_lists(AlignedDocumentRows(store, context_length, seed=seed, bare_share=0.5))
        # all ids but the EOS are unique, so a row's last piece shows which token follows
        for row, bare_row, either in zip(with_eos, bare, some, strict=True):
            assert either in (row, bare_row)
            if bare_row != row:
                assert bare_row[:-1] == row[1:]
                last = next(i for i in range(len(row) - 1, -1, -1) if row[i] != EOS)
                assert bare_row[-1] == tokens[tokens.index(row[last]) + len(row) - last]
            else:
                # at the end of the store
                assert row[-1] == EOS

    with_store(lengths, check)


def test_a_tenth_of_the_aligned_rows_is_bare(tmp_path):
    rows = AlignedDocumentRows(store_of([9] * 4000, tmp_path / "store"), 20, seed=0)
    assert 0.08 < np.mean([row[0] != EOS for row in as_lists(rows)]) < 0.12
    with pytest.raises(ValueError, match=r"bare_share=1\.5"):
        AlignedDocumentRows(rows.store, 20, bare_share=1.5)


def test_aligned_rows_cover_all_tokens_within_a_few_epochs(tmp_path):
    store = store_of([300, 41, 80, *[11] * 40, 7, 3], tmp_path / "store")
    rows = AlignedDocumentRows(store, 40, seed=0)
    everything = set(store.tokens.tolist()[1:])
    seen = set()
    for epoch in range(4):
        rows.set_epoch(epoch)
        seen |= {token for row in as_lists(rows) for token in row[1:]}
    assert seen == everything
    # one pass over the corpus includes the beginning of each document
    pieces, counts = rows._one_pass(np.random.default_rng(0))
    assert counts.sum() == pieces.shape[1]
    assert set(pieces[0].tolist()) >= set(store.offsets[:-1].tolist())


@pytest.mark.parametrize("view", [AlignedDocumentRows, ShuffledDocumentRows])
def test_shuffle_depends_only_on_seed_and_epoch(view, tmp_path):
    store = store_of(range(1, 60), tmp_path / "store")

    def rows_in(epoch, seed=0, earlier=()):
        rows = view(store, 16, seed=seed)
        for each in (*earlier, epoch):
            rows.set_epoch(each)
        return as_lists(rows)

    assert rows_in(2) == rows_in(2, earlier=(5, 1)) == rows_in(2, earlier=(2,))
    assert as_lists(view(store, 16)) == rows_in(0)
    different = [
        rows_in(0),
        rows_in(1),
        rows_in(0, seed=1),
        rows_in(1, seed=1),
        as_lists(SlidingWindowRows(store, 16, 16)),
    ]
    assert all(different[i] != different[j] for i in range(5) for j in range(i))


@given(lengths=LENGTHS, context_length=st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_document_rows_pack_whole_documents_greedily(lengths, context_length):
    def check(store):
        tokens, offsets = store.tokens.tolist(), store.offsets.tolist()
        # greedy packing, one document at a time
        expected: list[list[int]] = []
        row: list[int] = []
        for begin, end in itertools.pairwise(offsets):
            document = tokens[begin:end]
            if len(row) + len(document) > context_length:
                if row:
                    expected.append(row)
                while len(document) > context_length:
                    expected.append(document[:context_length])
                    document = document[context_length:]
                row = []
            row = row + document
        if row:
            expected.append(row)

        rows = as_lists(DocumentRows(store, context_length))
        assert [row[1:] for row in rows] == expected
        # every token once, after its predecessor in the store
        assert [token for row in rows for token in row[1:]] == tokens[1:]
        begins = np.cumsum([1] + [len(row) - 1 for row in rows])[:-1]
        assert [row[0] for row in rows] == [tokens[begin - 1] for begin in begins]
        # only a document longer than a row is ever cut
        for begin in set(begins.tolist()) - set(offsets):
            document = np.searchsorted(offsets, begin, side="right") - 1
            assert offsets[document + 1] - offsets[document] > context_length
        assert all(row[0] == EOS for row, begin in zip(rows, begins, strict=True) if begin in offsets)

    with_store(lengths, check)


def test_random_windows_are_drawn_from_all_windows_of_the_store(store):
    stream = store.tokens.tolist()
    windows = {tuple(stream[start : start + 9]) for start in range(len(stream) - 8)}
    rows = RandomWindowRows(store, 8, 1500, seed=1)
    drawn = as_lists(rows)
    assert len(drawn) == 1500
    # all windows, including the first and the last, and nothing else
    assert {tuple(row) for row in drawn} == windows
    rows.set_epoch(1)
    assert as_lists(rows) != drawn
    rows.set_epoch(0)
    assert as_lists(rows) == drawn
    assert as_lists(RandomWindowRows(store, 8, 1500, seed=1)) == drawn
    assert as_lists(RandomWindowRows(store, 8, 1500, seed=2)) != drawn


@pytest.mark.parametrize("view", [AlignedDocumentRows, ShuffledDocumentRows])
def test_corpus_must_fill_one_row(view, store):
    assert len(view(store, 118)) == 1
    with pytest.raises(
        ValueError,
        match=r"has 119 tokens, and one row of context_length=119 requires 120\..*context_length to at most 118",
    ):
        view(store, 119)


def test_invalid_arguments_are_refused(store):
    with pytest.raises(ValueError, match="context_length=0 must be at least 1"):
        DocumentRows(store, 0)
    with pytest.raises(ValueError, match="stride=0 must be at least 1"):
        SlidingWindowRows(store, 4, 0)
    with pytest.raises(ValueError, match="context_length=500 requires 501"):
        RandomWindowRows(store, 500, 10)
