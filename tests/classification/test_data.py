"""Labelled texts are loaded, deduplicated, split, truncated and tokenized correctly."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_minigpt.classification.arguments import ReviewArguments
from hf_minigpt.classification.batching import ReviewRows, model_truncation
from hf_minigpt.classification.data import clean_text, load_reviews, stratified_split, text_key, write_texts
from hf_minigpt.classification.model import frame_with_end_of_text
from hf_minigpt.data.corpora import load_documents
from hf_minigpt.model.pooling_minigpt import truncate_rows
from hf_minigpt.tokenization import train_tokenizer


TEXTS = [f"Film number {i} is {'good' if i % 3 else 'bad'}" for i in range(60)]
LABELS = [int(i % 3 > 0) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320, model_max_length=64, show_progress=False)


def load(dataset, **options):
    return load_reviews(ReviewArguments(str(dataset), **options))


def write(path, texts=TEXTS, labels=LABELS, **columns):
    frame = pd.DataFrame({"text": texts, "label": labels, **columns})
    getattr(frame, {".csv": "to_csv", ".parquet": "to_parquet"}[path.suffix])(path, index=False)
    return path


def test_html_breaks_become_newlines():
    assert clean_text(" A<br />B <br/> <BR>\n<br /><br />C  D ") == "A\nB\nC  D"


def test_one_file_is_deduplicated_and_split_by_class(tmp_path):
    # The first two texts differ only in case, white space and markup.
    texts = ["Twice  the<br />same", "twice the same", "", *TEXTS]
    path = write(tmp_path / "all.parquet", texts, [0, 0, 1, *LABELS])
    splits = load(path, validation_fraction=0.25, test_fraction=0.2)
    parts = [splits.train, splits.validation, splits.test]
    assert [len(part) for part in parts] == [37, 12, 12]
    assert (splits.num_duplicates, splits.num_across, splits.num_without_text) == (1, 0, 1)
    keys = [text_key(text) for part in parts for text in part.texts]
    assert len(set(keys)) == len(keys) == 61
    # Texts keep their labels, and each part has the same share of each class.
    expected = dict(zip(map(clean_text, texts), [0, 0, 1, *LABELS], strict=True))
    for part in parts:
        assert [expected[text] for text in part.texts] == part.labels
        assert abs(np.mean(part.labels) - np.mean(LABELS)) < 0.05
    again = load(path, validation_fraction=0.25, test_fraction=0.2)
    assert again == splits
    other = load(path, validation_fraction=0.25, test_fraction=0.2, split_seed=1)
    assert set(other.test.texts) != set(splits.test.texts)
    # max_examples does not change the held-out sets.
    fewer = load(path, validation_fraction=0.25, test_fraction=0.2, max_examples=5)
    assert len(fewer.train) == 5 and (fewer.test, fewer.validation) == (splits.test, splits.validation)


def hub(monkeypatch, **splits):
    """Replace the Hub by a dataset like `stanfordnlp/imdb`: declared classes, and -1 for unlabelled rows."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    data = DatasetDict({k: Dataset.from_dict({"text": v[0], "label": v[1]}, features) for k, v in splits.items()})

    def load_dataset(name, config=None):
        assert name == "stanfordnlp/imdb"
        return data

    monkeypatch.setattr("datasets.load_dataset", load_dataset)


def test_given_test_split_is_kept_whole_and_its_texts_are_removed_elsewhere(monkeypatch):
    unlabelled = [TEXTS[3], TEXTS[50], "a new one", "a  new one"]
    hub(
        monkeypatch,
        train=(TEXTS[:40], LABELS[:40]),
        test=([*TEXTS[38:60], TEXTS[59]], [*LABELS[38:60], LABELS[59]]),
        unsupervised=(unlabelled, [-1] * 4),
    )
    splits = load("stanfordnlp/imdb", unlabelled_split="unsupervised")
    assert splits.test.texts == [*TEXTS[38:60], TEXTS[59]]
    assert sorted(splits.train.texts + splits.validation.texts) == sorted(TEXTS[:38])
    assert splits.unlabelled == ["a new one"]
    assert (splits.num_across, splits.num_duplicates) == (3, 5)
    assert splits.class_names == ["neg", "pos"]
    held_out = set(map(text_key, splits.test.texts + splits.validation.texts))
    assert not held_out & set(map(text_key, splits.pretraining_texts))
    with pytest.raises(ValueError, match="test_fraction"):
        load("stanfordnlp/imdb", test_fraction=0.2)
    with pytest.raises(ValueError, match=r"no split 'dev'.*train"):
        load("stanfordnlp/imdb", train_split="dev")


def test_unlabelled_copies_of_held_out_texts_are_removed(monkeypatch):
    hub(monkeypatch, train=(TEXTS, LABELS), unsupervised=([*TEXTS, "another"], [-1] * 61))
    splits = load("stanfordnlp/imdb", unlabelled_split="unsupervised")
    assert splits.unlabelled == ["another"] and len(splits.test) == 12


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (["negative", "positive"], {}),
        (["0", "1"], {}),
        ([0.0, 1.0], {}),
        (["neg", "pos"], {"label_map": ["neg=negative", "pos=positive"]}),
        # label_map takes precedence over class numbers
        ([1, 0], {"label_map": ["0=positive", "1=negative"]}),
        (["bad", "good"], {"class_names": ["bad", "good"]}),
    ],
)
def test_labels_may_be_numbers_names_or_mapped(tmp_path, values, options):
    path = write(tmp_path / "a.csv", labels=[values[label] for label in LABELS])
    splits = load(path, **options)
    expected = dict(zip(TEXTS, LABELS, strict=True))
    assert [expected[text] for text in splits.train.texts] == splits.train.labels


def test_rows_without_a_label_are_skipped_and_counted(tmp_path):
    for labels in ([-1, -1, *LABELS[2:]], [None, None, *LABELS[2:]]):
        features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
        Dataset.from_dict({"text": TEXTS, "label": labels}, features).to_parquet(tmp_path / "a.parquet")
        splits = load(tmp_path / "a.parquet")
        assert splits.num_without_label == 2 and splits.class_names == ["bad", "good"]
        assert len(splits.train) + len(splits.validation) + len(splits.test) == 58
    # Without declared classes, -1 is an ordinary value.
    path = write(tmp_path / "b.parquet", labels=[-1, -1, *LABELS[2:]])
    with pytest.raises(ValueError, match=r"b\.parquet, row 1: label '-1' is neither .*--label_map -1=negative"):
        load(path)


def test_errors_name_the_value_and_the_remedy(tmp_path):
    path = write(tmp_path / "a.csv", labels=["neg" if label else "meh" for label in LABELS])
    with pytest.raises(ValueError, match=r"'meh' is neither.*label_map meh=negative"):
        load(path)
    with pytest.raises(ValueError, match="'neutral' is not among"):
        load(path, label_map=["meh=neutral"])
    with pytest.raises(ValueError, match=r"no column 'review'.*text"):
        load(path, text_column="review")
    with pytest.raises(ValueError, match="only number"):
        load(write(tmp_path / "b.csv", labels=[0] * 60))
    with pytest.raises(ValueError, match="validation_fraction"):
        load(path, validation_fraction=1.0)
    with pytest.raises(ValueError, match=r"\.txt"):
        (tmp_path / "a.txt").write_text("x")
        load(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="class 1 has a single text"):
        stratified_split([0, 0, 1], 0.5, 0)


@pytest.mark.parametrize(
    ("sizes", "fraction", "message"),
    [
        ([50, 50], 0.1, None),
        ([2, 98], 0.1, None),
        ([5, 5], 0.1, None),
        ([2] * 77, 0.1, r"fraction of 0\.1 means 15 of 154 texts, but 77 \(50\.0%\).*each of the 77 classes"),
        ([2] * 77, 0.9, r"fraction of 0\.9 means 139 of 154 texts, but 77 \(50\.0%\)"),
        ([5] * 10 + [60], 0.02, r"means 2 of 110 texts, but 11 \(10\.0%\)"),
    ],
)
def test_held_out_part_far_from_its_fraction_warns(sizes, fraction, message, recwarn):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    rest, held_out = stratified_split(labels, fraction, 0)
    assert sorted([*rest, *held_out]) == list(range(len(labels)))
    assert {labels[i] for i in rest} == {labels[i] for i in held_out} == set(labels)
    messages = [str(warning.message) for warning in recwarn.list]
    assert len(messages) == (message is not None)
    assert message is None or re.search(message, messages[0])


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_written_texts_can_be_loaded_for_pretraining(tmp_path, suffix):
    texts = ["Über\nzwei Zeilen", "NA", 'with "quotes", commas']
    write_texts(texts, tmp_path / f"texts{suffix}")
    assert list(load_documents(tmp_path / f"texts{suffix}")) == texts


def test_files_named_train_and_test_are_two_splits(tmp_path):
    write(tmp_path / "train.csv", TEXTS[:40], LABELS[:40])
    write(tmp_path / "test.csv", TEXTS[40:], LABELS[40:])
    splits = load(tmp_path)
    assert splits.test.texts == TEXTS[40:]


LONG = " ".join(f"w{i}" for i in range(40))


def rows(texts, tokenizer, length, truncation="head", **options):
    return ReviewRows(texts, [1] * len(texts), tokenizer, length, truncation, **options)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("truncation", ["head", "tail", "head_tail", "windows"])
def test_rows_equal_texts_tokenized_and_truncated_by_the_saved_tokenizer_and_model(
    tokenizer, truncation, padding_side, tmp_path
):
    length = 20
    framed = frame_with_end_of_text(tokenizer)
    framed.save_pretrained(tmp_path)
    framed = type(framed).from_pretrained(tmp_path, padding_side=padding_side)
    raw = ["", "short", LONG, " a<br /><BR>\n\nb<br>c\n\n\n d\t", " ".join(["w1"] * 7)]
    data = rows([clean_text(text) for text in raw], tokenizer, length, truncation)
    batch = framed(raw, padding=True, return_tensors="pt")
    kept, mask = truncate_rows(batch.input_ids, batch.attention_mask != 0, model_truncation(truncation), length)
    for i, text in enumerate(raw):
        assert data[i]["input_ids"].tolist() == kept[i][mask[i] != 0].tolist(), text
        assert data[i]["labels"] == 1
    assert data.lengths.tolist() == [len(data[i]["input_ids"]) for i in range(len(raw))]
    assert data.num_truncated == 2 and data.lengths.max() == length


def test_head_tail_keeps_the_first_quarter_and_the_last_three_quarters(tokenizer):
    ids = tokenizer(LONG, add_special_tokens=False)["input_ids"]
    (row,) = [rows([LONG], tokenizer, 22, "head_tail")[0]["input_ids"].tolist()]
    assert row == [tokenizer.eos_token_id, *ids[:5], *ids[-15:], tokenizer.eos_token_id]


def test_windows_change_in_each_training_epoch(tokenizer):
    texts = ["short", LONG, "other"]
    train = rows(texts, tokenizer, 22, "windows", training=True, seed=3)
    assert len(train) == 3
    seen = set()
    for epoch in range(20):
        train.set_epoch(epoch)
        seen.add(tuple(train[1]["input_ids"].tolist()))
        assert len(train[1]["input_ids"]) == train.lengths[1] == 22
        assert torch.equal(train[1]["input_ids"], train[1]["input_ids"])
    assert len(seen) > 10


def test_token_dropout_depends_on_seed_epoch_and_row(tokenizer):
    texts = [LONG] * 3
    plain = rows(texts, tokenizer, 64)[0]["input_ids"]
    data = rows(texts, tokenizer, 64, training=True, token_dropout=0.25, seed=5)
    again = rows(texts, tokenizer, 64, training=True, token_dropout=0.25, seed=5)
    drawn, shares = set(), []
    for epoch in range(20):
        data.set_epoch(epoch)
        again.set_epoch(epoch)
        for i in (2, 0):
            ids = data[i]["input_ids"]
            assert torch.equal(ids, again[i]["input_ids"])
            changed = ids != plain
            assert (ids[changed] == tokenizer.eos_token_id).all()
            shares.append(changed[1:-1].float().mean().item())
            drawn.add(tuple(ids.tolist()))
    assert len(drawn) == 40
    assert abs(np.mean(shares) - 0.25) < 0.03


def test_unknown_truncation_and_short_context_are_refused(tokenizer):
    with pytest.raises(ValueError, match="middle"):
        rows(["a"], tokenizer, 20, "middle")
    with pytest.raises(ValueError, match="context_length=3"):
        rows(["a"], tokenizer, 3)
