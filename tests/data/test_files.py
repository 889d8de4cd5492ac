# ruff: noqa: E501 - tables have one line per case
"""Unusual files are read correctly by all three jobs, or refused with an error that names file, place and remedy."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_minigpt.classification.arguments import ReviewArguments
from hf_minigpt.classification.data import load_reviews
from hf_minigpt.data import files
from hf_minigpt.data.corpora import load_documents, stream_documents
from hf_minigpt.data.files import find_files, read_rows
from hf_minigpt.instructions.records import load_records, to_conversations
from hf_minigpt.recipes import finetune_imdb, pretrain, pretrain_loop, sft


def lines(*rows, **options) -> bytes:
    return "".join(json.dumps(row, **options) + "\n" for row in rows).encode()


def array(*rows, **options) -> bytes:
    return json.dumps(rows, **options).encode()


def parquet(rows, schema=None) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


TEXTS = ["NA", 'say, "so"', "two\nlines", "ü🙂", "null", "7"]
ROWS = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]
CSV = 'text,n\r\nNA,0\r\n"say, ""so""",1\r\n"two\nlines",2\r\nü🙂,3\r\nnull,4\r\n7,5\r\n'.encode()

# name and content of files that all contain TEXTS
GOOD = [
    ("lines.jsonl", lines(*ROWS)),
    ("lines.json", lines(*ROWS)),
    ("array.json", array(*ROWS)),
    ("array.jsonl", array(*ROWS)),
    ("lines.ndjson", lines(*ROWS)),
    ("pretty.json", array(*ROWS, indent=2)),
    ("packed.json", array(*ROWS, separators=(",", ":"))),
    ("mark.jsonl", b"\xef\xbb\xbf" + lines(*ROWS)),
    ("mark.csv", b"\xef\xbb\xbf" + CSV),
    ("windows.jsonl", lines(*ROWS).replace(b"\n", b"\r\n")),
    ("blank lines.jsonl", b"\n" + lines(*ROWS).replace(b"\n", b"\n \n")),
    ("no end.jsonl", lines(*ROWS)[:-1]),
    ("raw.jsonl", lines(*ROWS, ensure_ascii=False)),
    ("a.csv", CSV),
    ("a[1].csv", CSV),
    ("a?*.CSV", CSV),
    ("semicolon.csv", CSV.decode().replace(",", ";").replace("say;", "say,").encode()),
    ("a.tsv", "text\tn\nNA\t0\n\"say, \"\"so\"\"\"\t1\n\"two\nlines\"\t2\nü🙂\t3\nnull\t4\n7\t5\n".encode()),
    ("a.parquet", parquet(ROWS)),
    ("large.parquet", parquet(ROWS, pa.schema([("text", pa.large_string()), ("n", pa.int8())]))),
    ("dictionary.parquet", parquet(ROWS, pa.schema([("text", pa.dictionary(pa.int8(), pa.string())), ("n", pa.int8())]))),
    ("a.jsonl.gz", gzip.compress(lines(*ROWS))),
    ("A.CSV.GZ", gzip.compress(CSV)),
    ("a.json.zst", zst(array(*ROWS))),
    ("a.parquet.gz", gzip.compress(parquet(ROWS))),
    # a column that is not requested may appear late, change its type, or contain anything
    ("late.jsonl", lines(*[row | {"x": x} for row, x in zip(ROWS, [None, 1, "b", [1], {"y": 2}, True], strict=True)])),
    ("long.jsonl", lines(*ROWS).replace(b'"n": 3', b'"n": ' + b"9" * 5000)),
    ("long.json", array(*ROWS).replace(b'"n": 3', b'"n": ' + b"9" * 5000)),
    ("more.jsonl", lines(*ROWS[:-1], ROWS[-1] | {"new": {"deep": [1, "a"]}})),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content"), GOOD, ids=[name for name, _ in GOOD])
def test_every_job_reads_the_file(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    # files that the name would match as a glob
    for other in ("a1.csv", "ab.CSV"):
        if other != name:
            (tmp_path / other).write_text("text,n\nanother,1\n")
    path = tmp_path / name
    assert list(load_documents(path)) == TEXTS
    streamed = stream_documents(path)
    assert [text for text, _ in streamed.read(0)] == TEXTS
    assert [text for text, _ in streamed.read(0, 4)] == TEXTS[4:]
    assert [row.values["text"] for row in read_rows(path, ["text"])] == TEXTS
    assert [record["text"] for record in load_records(str(path))] == TEXTS


def review_rows(values, labels) -> list[dict]:
    return [
        {"text": f"{text} {i}", "label": label} for i in range(12) for text, label in zip(values, labels, strict=True)
    ]


HAM = Features({"text": Value("string"), "label": ClassLabel(names=["spam", "ham"])})
SHORT = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"])})
LETTERS = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
REVERSED = Features({"text": Value("string"), "label": ClassLabel(names=["positive", "negative"])})


def csv_of(rows) -> bytes:
    return ("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)).encode()


# name, content, options, and the classes of the two texts
LABELS = [
    ("names.csv", csv_of(review_rows("ab", ["negative", "positive"])), {}, ["negative", "positive"]),
    ("numbers.csv", csv_of(review_rows("ab", [0, 1])), {}, ["negative", "positive"]),
    ("floats.csv", csv_of(review_rows("ab", [0.0, 1.0])), {}, ["negative", "positive"]),
    ("bools.csv", csv_of(review_rows("ab", [True, False])), {}, ["positive", "negative"]),
    ("bools.jsonl", lines(*review_rows("ab", [True, False])), {}, ["positive", "negative"]),
    ("bools.jsonl", lines(*review_rows("ab", [True, False])), {"class_names": ["False", "True"]}, ["True", "False"]),
    ("bools.csv", csv_of(review_rows("ab", [True, False])), {"label_map": ["true=negative", "false=positive"]}, None),
    ("null.csv", csv_of(review_rows("ab", ["null", "NA"])), {"class_names": ["NA", "null"]}, ["null", "NA"]),
    ("None.jsonl", lines(*review_rows("ab", ["None", "nan"])), {"class_names": ["None", "nan"]}, ["None", "nan"]),
    ("minus.csv", csv_of(review_rows("ab", [-1, 1])), {"label_map": ["-1=negative"]}, ["negative", "positive"]),
    ("minus.jsonl", lines(*review_rows("ab", [-1, 1])), {"class_names": ["-1", "0", "1"][::2]}, ["-1", "1"]),
    ("stars.csv", csv_of(review_rows("ab", [1, 5])), {"class_names": ["5", "1"]}, ["1", "5"]),
    ("declared.parquet", (HAM, review_rows("ab", [0, 1])), {}, ["spam", "ham"]),
    ("declared.parquet", (REVERSED, review_rows("ab", [0, 1])), {}, ["positive", "negative"]),
    ("declared.parquet", (REVERSED, review_rows("ab", [0, 1])), {"class_names": ["negative", "positive"]}, ["positive", "negative"]),
    ("declared.parquet", (HAM, review_rows("ab", [0, 1])), {"class_names": ["bad", "good"]}, ["bad", "good"]),
    ("declared.parquet", (LETTERS, review_rows("ab", [0, 1])), {"class_names": ["bad", "good"]}, ["bad", "good"]),
    ("declared.parquet", (SHORT, review_rows("ab", [0, 1])), {"class_names": ["negative", "positive"]}, ["positive", "negative"]),
    ("declared.parquet", (HAM, review_rows("ab", [0, 1])), {"class_names": ["x", "y"], "label_map": ["spam=y", "ham=x"]}, ["y", "x"]),
    ("declared.parquet", (HAM, [*review_rows("ab", [0, 1]), {"text": "no label", "label": -1}]), {}, ["spam", "ham"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "options", "expected"), LABELS)
def test_labels_are_mapped_to_classes(name, content, options, expected, tmp_path):
    if isinstance(content, tuple):
        features, rows = content
        Dataset.from_list(rows, features).to_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    splits = load_reviews(ReviewArguments(str(tmp_path / name), **options))
    expected = expected or ["negative", "positive"]
    for part in (splits.train, splits.validation, splits.test):
        assert len(part) > 0
        for text, label in zip(part.texts, part.labels, strict=True):
            assert splits.class_names[label] == expected["ab".index(text[0])], text


GOOD_ROW = {"text": "fine", "label": 1, "prompt": "a", "completion": "b"}


def bad(**values) -> dict:
    return GOOD_ROW | values


# name, content, pattern of the error message, and the jobs that refuse the file: pretraining, reviews, sft
BAD = [
    ("latin.csv", "text,label,prompt,completion\nB\xe4r,1,a,b\n".encode("latin1"), r"line 2.*0xe4.*WINDOWS-1252", "prs"),
    ("latin.jsonl", lines(GOOD_ROW) + '{"text": "B\xe4r"}\n'.encode("latin1"), r"line 2.*0xe4.*WINDOWS-1252", "prs"),
    ("utf16.csv", "text,label\na,1\n".encode("utf-16"), r"is UTF-16 text", "prs"),
    ("utf16.json", array(GOOD_ROW).decode().encode("utf-16"), r"is UTF-16 text", "prs"),
    ("utf32.jsonl", lines(GOOD_ROW).decode().encode("utf-32-le"), r"binary", "prs"),
    ("empty.csv", b"", "is empty", "prs"),
    ("blank.jsonl", b"\n \n", "is empty", "prs"),
    ("header.csv", b"text,label,prompt,completion\n", "is empty", "prs"),
    ("none.json", b"[]", "is empty", "prs"),
    ("cut.jsonl", lines(*[GOOD_ROW] * 6) + b'{"text": "a', r"line 7, cannot be read", "prs"),
    ("cut.json", array(*[GOOD_ROW] * 6)[:-9], r"row 6, cannot be read", "prs"),
    ("two.json", array(GOOD_ROW) + b" 1", r"there is text after its array", "prs"),
    ("comma.json", array(GOOD_ROW, GOOD_ROW).replace(b"}, {", b"} {"), r"row 1, .*a comma", "prs"),
    ("list.jsonl", b'["text"]\n["a"]\n', r"row 1 is 'text' and must be an object", "prs"),
    ("strings.jsonl", lines(GOOD_ROW) + b'"text"\n', r"line 2 is 'text' and must be an object", "prs"),
    ("cut.jsonl.gz", gzip.compress(lines(*[GOOD_ROW] * 999))[:-20], r"cannot be read", "prs"),
    ("not.csv.gz", b"text\na\n", r"cannot be read", "prs"),
    ("not.json.zst", b"{}", r"cannot be read", "prs"),
    ("not.parquet", b"text\na\n", r"cannot be read", "prs"),
    ("quote.csv", b'text,label,prompt,completion\nfine,1,a,b\n"a"b,1,a,b\n', r"line 3, cannot be read.*Double the", "prs"),
    ("open.csv", b'text,label,prompt,completion\n"never closed,1,a,b\n', r"line 2, cannot be read", "prs"),
    ("ragged.csv", b"text,label,prompt,completion\nfine,1,a,b\na, b,1,a,b\n", r"line 3, has 5 fields", "prs"),
    ("short.csv", b"text,label,prompt,completion\nfine,1,a,b\nfine,1\n", r"line 3, has 2 fields", "prs"),
    ("twice.csv", b"text,text,label,prompt,prompt\nfine,1,a,b,c\n", r"two columns 'text'", "prs"),
    ("column.jsonl", lines({"body": "a"}), r"no column 'text'.*'body'", "pr"),
    ("column.parquet", parquet([{"body": "a"}]), r"no column 'text'.*'body'", "pr"),
    ("surrogate.jsonl", lines(GOOD_ROW, bad(text="\ud83d", prompt="\ud83d")), r"line 2.*(text|prompt).*unpaired surrogate", "prs"),
    ("number.jsonl", lines(GOOD_ROW, bad(text=3)), r"line 2: column 'text' contains int, not text: 3", "pr"),
    ("bool.jsonl", lines(GOOD_ROW, bad(text=True, prompt=True)), r"line 2.*(text|prompt).*bool", "prs"),
    ("parts.jsonl", lines(bad(text=["a", "b"], prompt=[1])), r"line 1.*(text|prompt).*", "prs"),
    ("object.json", array(GOOD_ROW, bad(text={"a": 1}, prompt={"a": 1})), r"row 2.*(text|prompt).*dict", "prs"),
    ("number.parquet", parquet([{"text": 3, "label": 1}]), r"row 1: column 'text' contains int", "pr"),
    ("late.jsonl", lines(*[GOOD_ROW] * 3000) + b"{\n", r"line 3001, cannot be read", "prs"),
    ("label.csv", b"text,label\na,0\nb,1\nc,2\n", r"line 4: label '2' is neither.*label_map 2=negative", "r"),
    ("label.jsonl", lines(bad(label=0), bad(label=[1])), r"line 2: label '\[1\]' is neither", "r"),
    ("role.jsonl", lines({"messages": [{"role": "boss", "content": "a"}]}), r"line 1: messages\[0\]\.role is 'boss'", "s"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message", "jobs"), BAD, ids=[row[0] for row in BAD])
def test_every_job_refuses_the_file(name, content, message, jobs, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    loaders = {
        "p": lambda: list(load_documents(path)),
        "r": lambda: load_reviews(ReviewArguments(str(path))),
        "s": lambda: to_conversations(load_records(str(path))),
    }
    for job in jobs:
        with pytest.raises(ValueError) as error:
            loaders[job]()
        text = str(error.value)
        assert str(path) in text and re.search(message, text.replace(str(path), name), re.DOTALL), (job, text)


@pytest.mark.parametrize(("name", "content", "message", "jobs"), BAD, ids=[row[0] for row in BAD])
def test_recipes_refuse_the_file_before_they_make_a_model(name, content, message, jobs, tmp_path, monkeypatch):
    path = tmp_path / name
    path.write_bytes(content)
    flags = ["--dataset", str(path), "--output_dir", str(tmp_path / "out")]
    cache = ["--cache_dir", str(tmp_path / "cache")]
    recipes = {
        "p": [(pretrain, "build_model", cache), (pretrain_loop, "build_model", cache)],
        "r": [(finetune_imdb, "build_classifier", [])],
        "s": [(sft, "embedded_base", cache)],
    }
    for job in jobs:
        for recipe, model_function, more in recipes[job]:
            monkeypatch.setattr(recipe, model_function, None)
            with pytest.raises(ValueError) as error:
                recipe.main([*flags, *more])
            assert str(path) in str(error.value), recipe


def test_missing_and_empty_texts_are_skipped_and_counted(tmp_path):
    rows = review_rows("ab", [0, 1])
    odd = [{"text": text, "label": 0} for text in (None, "", " \n", float("nan"))]
    (tmp_path / "a.jsonl").write_bytes(lines(*rows, *odd, {"label": 1}))
    splits = load_reviews(ReviewArguments(str(tmp_path / "a.jsonl")))
    assert splits.num_without_text == 5 and len(splits.train) + len(splits.validation) + len(splits.test) == 24
    documents = load_documents(tmp_path / "a.jsonl")
    assert len(list(documents)) == 24 and documents.num_empty == 5
    (tmp_path / "a.csv").write_bytes(csv_of(rows) + b",0\nNA,0\n")
    splits = load_reviews(ReviewArguments(str(tmp_path / "a.csv")))
    assert splits.num_without_text == 1
    assert "NA" in splits.train.texts + splits.validation.texts + splits.test.texts


def test_file_names_decide_the_split(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, letter in (("train-00000-of-00002", "a"), ("train-00001-of-00002", "b"), ("test-00000-of-00001", "c")):
        rows = [{"text": f"{letter} {i}", "label": i % 2} for i in range(20)]
        (folder / f"{name}.jsonl").write_bytes(lines(*rows))
    (folder / "unsupervised-00000-of-00001.jsonl").write_bytes(lines({"text": "more"}))
    splits = load_reviews(ReviewArguments(str(folder), unlabelled_split="unsupervised"))
    assert {text[0] for text in splits.train.texts} == {"a", "b"} and {text[0] for text in splits.test.texts} == {"c"}
    assert splits.unlabelled == ["more"]
    (folder / "more.jsonl").write_bytes(lines(GOOD_ROW))
    with pytest.raises(ValueError, match=r"more\.jsonl: the file name contains no split"):
        load_reviews(ReviewArguments(str(folder)))
    (folder / "more.jsonl").unlink()
    splits = load_reviews(ReviewArguments(str(folder / "t*.jsonl")))
    assert len(splits.test) == 20
    with pytest.raises(
        ValueError, match=r"no split 'dev'\. Set train_split to one of \['test', 'train', 'unsupervised'\]"
    ):
        load_reviews(ReviewArguments(str(folder), train_split="dev"))


def test_glob_without_supported_files_is_named(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    assert find_files("owner/name") is None
    for pattern in ("*.csv", "*.pdf"):
        with pytest.raises(ValueError, match=re.escape(pattern)):
            find_files(tmp_path / pattern)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_text_file_is_split_at_the_document_separator(size, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_minigpt.data.corpora.PIECE_LENGTH", size)
    stories = ["Once upon\na time.", "Then <b>\n\nan end.", "ünd aus"]
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(stories) + "\n<|endoftext|>\n", encoding="utf-8")
    documents = load_documents(tmp_path, document_separator="<|endoftext|>")
    assert list(documents) == stories and documents.num_empty == 1
    streamed = stream_documents(tmp_path / "stories.txt", document_separator="<|endoftext|>")
    assert [text for text, _ in streamed.read(0, 1)] == [*stories[1:], ""]
    (tmp_path / "stories.txt").write_text("\n\n".join(["a\nb", "c", "d"]) + "\n")
    assert list(load_documents(tmp_path, document_separator="\\n\\n")) == ["a\nb", "c", "d"]


@pytest.mark.parametrize("marker", ["<|endoftext|>", "</s>", "<|end_of_story|>", "[SEP]"])
def test_text_file_with_separator_lines_requires_the_flag(tmp_path, marker):
    path = tmp_path / "a.txt"
    path.write_text(f"one\r\n{marker}\r\ntwo\r\n{marker}\r\n", newline="")
    for load in (load_documents, stream_documents):
        with pytest.raises(
            ValueError, match=rf"a\.txt has 2 separator lines .*--document_separator '{re.escape(marker)}'"
        ):
            load(tmp_path)
    assert list(load_documents(path, document_separator=marker)) == ["one", "two"]
    assert list(load_documents(path, document_separator="")) == [f"one\n{marker}\ntwo\n{marker}\n"]
    path.write_text(f"It ends with\n{marker}\n")
    assert len(list(load_documents(path))) == 1


def test_separator_without_effect_is_reported(tmp_path):
    (tmp_path / "a.txt").write_text("one text")
    with pytest.warns(UserWarning, match=r"a\.txt does not contain document_separator='---'"):
        assert list(load_documents(tmp_path, document_separator="---")) == ["one text"]
    for source, options in ((tmp_path, {"join_sentences": True}), (None, {})):
        with pytest.raises(ValueError, match="document_separator='---' has no effect"):
            load_documents(source, document_separator="---", **options)


def test_first_row_of_a_large_array_needs_only_the_first_part_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_bytes(array(*[{"text": "a" * 1000}] * 1000, indent=0))
    opened = []
    plain = files.open_bytes
    monkeypatch.setattr(files, "open_bytes", lambda path: opened.append(plain(path)) or opened[-1])
    documents = iter(load_documents(tmp_path / "a.json"))
    next(documents)
    assert opened[-1].tell() < 300_000
