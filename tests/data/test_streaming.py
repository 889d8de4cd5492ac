import itertools
import json
import threading

import datasets
import huggingface_hub
import numpy as np
import pytest

from hf_minigpt.data import corpora, streaming
from hf_minigpt.data.corpora import stream_documents
from hf_minigpt.data.streaming import StreamedRows, is_held_out, prepare_stream, sample_documents
from hf_minigpt.data.tales.grammar import tales
from hf_minigpt.tokenization import train_tokenizer


# one is longer than a batch of the tokenizer in these tests, one is empty, and three occur twice
TEXTS = [*tales(60, seed=1), " ".join(tales(20, seed=2)), "", "short", "Ünïcödé 🙂 中文", *tales(3, seed=1)]
TRAINED_ON = {text for text in TEXTS if text and not is_held_out(text, 0.2, 0)}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 512, model_max_length=128, show_progress=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Write three shards, two Parquet files and one of JSON lines."""
    folder = tmp_path_factory.mktemp("corpus")
    shares = [TEXTS[i::3] for i in range(3)]
    for i, texts in enumerate(shares[:2]):
        datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / f"{i}.parquet", batch_size=7)
    (folder / "2.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in shares[2]))
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr("hf_minigpt.data.token_store.BATCH_LENGTH", 2000)
    monkeypatch.setattr("hf_minigpt.data.token_store.PIECE_LENGTH", 500)


def rows_of(corpus, tokenizer, num_rows=600, **options):
    options = {"rows_per_batch": 4, "shuffle_characters": 6000, "validation_fraction": 0.2, "num_workers": 2} | options
    return StreamedRows(stream_documents(corpus), tokenizer, 16, num_rows, **options)


def read(rows, begin, end):
    """Read the rows of a single process in batches."""
    size = rows.rows_per_batch
    batches = [rows.__getitems__(range(first, first + size)).tokens for first in range(begin, end, size)]
    return np.concatenate(batches)


def documents_in(rows, tokenizer):
    """Return the texts of the stream that rows were cut from. The last one is incomplete."""
    assert (rows[1:, 0] == rows[:-1, -1]).all()
    stream = [*rows[:, :-1].reshape(-1).tolist(), rows[-1, -1].item()]
    assert stream[0] == tokenizer.eos_token_id
    ends = [place for place, token in enumerate(stream) if token == tokenizer.eos_token_id]
    return [tokenizer.decode(stream[begin + 1 : end]) for begin, end in itertools.pairwise([*ends, len(stream)])]


def test_each_epoch_has_each_training_document_once(corpus, tokenizer):
    rows = rows_of(corpus, tokenizer, num_rows=2000)
    texts = documents_in(read(rows, 0, 2000), tokenizer)
    rows.close()
    expected = sorted(text for text in TEXTS if text in TRAINED_ON)
    size = len(expected)
    assert len(texts) > 2 * size + 1
    epochs = [texts[:size], texts[size : 2 * size]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected
    assert epochs[0] != epochs[1]
    # shuffled over more than neighbouring documents
    assert epochs[0][:10] != [text for text in TEXTS if text in epochs[0][:10]]


@pytest.mark.parametrize("options", [{}, {"num_processes": 2, "process_index": 1}, {"num_processes": 5}])
def test_resumed_stream_equals_an_uninterrupted_one(options, corpus, tokenizer, tmp_path):
    rows = rows_of(corpus, tokenizer, num_rows=10_000, **options)
    size, processes = rows.rows_per_batch, rows.num_processes

    def batches(rows, first, number):
        begins = [(i * processes + rows.process_index) * size for i in range(first, first + number)]
        return [rows.__getitems__(range(begin, begin + size)).tokens.tolist() for begin in begins]

    expected = batches(rows, 0, 120)
    rows.close()
    # also beyond one epoch, and after the data loader has read a batch in advance
    for number in (0, 37, 101):
        other = rows_of(corpus, tokenizer, num_rows=10_000, **options)
        assert batches(other, 0, number + 1) == expected[: number + 1]
        other.save_position(tmp_path, number * size)
        other.close()
        resumed = rows_of(corpus, tokenizer, num_rows=10_000, num_workers=1, **options)
        resumed.load_position(tmp_path)
        assert batches(resumed, number, 10) == expected[number : number + 10]
        resumed.close()


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_processes_read_disjoint_documents(num_processes, corpus, tokenizer):
    documents = stream_documents(corpus)
    found = []
    for index in range(num_processes):
        rows = rows_of(corpus, tokenizer, num_processes=num_processes, process_index=index)
        blocks = rows._blocks(streaming.Position())
        for begin, block in blocks:
            if begin.epoch > 0:
                break
            found += block
    assert documents.num_shards == 3
    assert sorted(found) == sorted(text for text in TEXTS if text in TRAINED_ON)


def test_order_depends_only_on_seed_and_block_size(corpus, tokenizer):
    def first(**options):
        rows = rows_of(corpus, tokenizer, **options)
        try:
            return read(rows, 0, 100).tolist()
        finally:
            rows.close()

    expected = first()
    assert first(num_workers=1) == expected
    assert first(seed=1) != expected
    assert first(shuffle_characters=1) != expected
    prints = {rows_of(corpus, tokenizer, **o).fingerprint() for o in ({}, {"seed": 1}, {"shuffle_characters": 1})}
    assert len(prints) == 3 and rows_of(corpus, tokenizer).fingerprint() in prints


def test_shards_are_read_from_any_row(corpus, tmp_path, monkeypatch):
    documents = stream_documents(corpus)
    for shard in range(documents.num_shards):
        everything = list(documents.read(shard))
        assert [row for _, row in everything] == list(range(1, len(everything) + 1))
        for start in (0, 1, len(everything) // 2, len(everything)):
            assert list(documents.read(shard, start)) == everything[start:]
    # each document of joined sentences comes with the row after its last one
    monkeypatch.setattr(corpora, "JOINED_DOCUMENT_LENGTH", 12)
    (tmp_path / "lines.txt").write_text("one two\nthree four\nfive\nsix\nseven\n")
    joined = stream_documents(tmp_path, join_sentences=True)
    assert list(joined.read(0)) == [("one two\nthree four", 2), ("five\nsix\nseven", 5)]
    assert list(joined.read(0, 2)) == [("five\nsix\nseven", 5)]


def test_hub_dataset_is_read_by_shard_at_one_revision(corpus, monkeypatch):
    load_dataset, asked = datasets.load_dataset, []

    def from_folder(name, config_name, **options):
        asked.append((name, config_name, options.pop("revision")))
        return load_dataset("parquet", data_files=[str(corpus / "0.parquet"), str(corpus / "1.parquet")], **options)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    info = type("Info", (), {"sha": "abc123"})
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda name: info)
    documents = stream_documents("someone/books", config_name="en")
    assert asked == [("someone/books", "en", "abc123")]
    assert documents.num_shards == 2
    for shard in range(2):
        texts = TEXTS[shard::3]
        assert list(documents.read(shard, 3)) == list(zip(texts[3:], range(4, len(texts) + 1), strict=True))
    info.sha = "def456"
    assert stream_documents("someone/books", config_name="en").fingerprint != documents.fingerprint


@pytest.mark.filterwarnings("ignore:validation_fraction")
def test_held_out_documents_are_those_of_the_sample(corpus, tokenizer, tmp_path):
    documents = stream_documents(corpus)
    prepared = prepare_stream(documents, tokenizer, tmp_path, num_sampled=50, validation_fraction=0.2)
    store = prepared.validation
    texts = [tokenizer.decode(store.tokens[b : e - 1].tolist()) for b, e in itertools.pairwise(store.offsets)]
    assert 0 < len(texts) < 50 and not set(texts) & TRAINED_ON and set(texts) < set(TEXTS)
    others = list(sample_documents(documents, 50, held_out=False, validation_fraction=0.2, seed=0))
    assert set(others) <= TRAINED_ON and len(others) + len(texts) == 50
    with pytest.raises(ValueError, match=r"none of the first 5 documents .* --streaming_sample"):
        prepare_stream(documents, tokenizer, tmp_path, num_sampled=5, validation_fraction=1e-9)


def test_stream_warns_if_another_share_is_held_out(tokenizer, tmp_path):
    (tmp_path / "corpus").mkdir()
    for name, num_words in (("book", 4000), *((f"note {number}", 20) for number in range(9))):
        (tmp_path / "corpus" / f"{name}.txt").write_text(f"{name}: " + "word " * num_words)
    documents = stream_documents(tmp_path / "corpus")
    options = {"num_sampled": 10, "validation_fraction": 0.2}

    def has_book(seed):
        sample = sample_documents(documents, 10, held_out=True, validation_fraction=0.2, seed=seed)
        return any(text.startswith("book") for text in sample)

    def has_note(seed):
        return any(sample_documents(documents, 10, held_out=True, validation_fraction=0.2, seed=seed))

    for seed in (next(filter(has_book, range(99))), next(s for s in range(99) if has_note(s) and not has_book(s))):
        # the second call finds the held-out set in the cache
        for _ in range(2):
            with pytest.warns(UserWarning, match=r"validation_fraction=0\.2 requests .* the first 10 documents of "):
                prepare_stream(documents, tokenizer, tmp_path, seed=seed, **options)


def test_errors_name_the_remedy_and_closing_ends_the_threads(corpus, tokenizer, tmp_path):
    rows = rows_of(corpus, tokenizer)
    with pytest.raises(ValueError, match="must be read in order"):
        rows.__getitems__([3, 1])
    with pytest.raises(ValueError, match=r"streamed row 40 cannot be read: .* position of this row is unknown"):
        rows.__getitems__(range(40, 44))
    with pytest.raises(ValueError, match="not a checkpoint of a run with --streaming"):
        rows.load_position(tmp_path)
    nothing = rows_of(corpus, tokenizer, validation_fraction=1.0)
    with pytest.raises(ValueError, match=r"no training documents .* Lower validation_fraction=1\.0"):
        nothing[0]
    (tmp_path / "bad.jsonl").write_text('{"body": "text"}\n')
    with pytest.raises(ValueError, match="no column 'text'"):
        rows_of(tmp_path, tokenizer)[0]
    rows[0]
    rows.close()
    nothing.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "stream"]
