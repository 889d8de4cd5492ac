import json
import os
import zipfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_minigpt.data import corpora
from hf_minigpt.data.corpora import load_documents
from hf_minigpt.data.tales.grammar import tales


ROWS = [{"text": "one\nline", "n": 1}, {"text": "NA", "n": 2}, {"text": 'say, "so"', "n": 3}, {"text": "ü🙂", "n": 4}]
TEXTS = [row["text"] for row in ROWS]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path):
    lines = ['"{}",{}\r\n'.format(row["text"].replace('"', '""'), row["n"]) for row in ROWS]
    path.write_text("text,n\r\n" + "".join(lines), newline="")


WRITERS = {
    "a.jsonl": write_jsonl,
    "a.json": lambda path: path.write_text(json.dumps(ROWS)),
    # an array on several lines, and special characters of globs in the name
    "a[1].json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "a.csv": write_csv,
    "A.PARQUET": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3),
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_of_a_file_are_documents(name, tmp_path):
    WRITERS[name](tmp_path / name)
    documents = load_documents(tmp_path / name)
    assert list(documents) == TEXTS
    assert list(documents) == TEXTS


@pytest.mark.parametrize("name", WRITERS)
def test_missing_column_error_names_file_and_columns(name, tmp_path):
    WRITERS[name](tmp_path / name)
    with pytest.raises(ValueError, match=r"no column 'body'.*\['text', 'n'\]") as error:
        list(load_documents(tmp_path, text_column="body"))
    assert name in str(error.value)


def test_column_of_numbers_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: column 'n' contains int, not text: 1"):
        list(load_documents(tmp_path, text_column="n"))


def test_folder_is_read_in_sorted_order_without_hidden_and_other_files(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "z.txt").write_text("b/deep/z")
    (tmp_path / "b" / "a.txt").write_text("b/a")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a 0"}, {"text": "a 1"}])
    (tmp_path / "c.TXT").write_text("c")
    (tmp_path / "README.md").write_text("not part of the corpus")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    assert list(load_documents(tmp_path)) == ["a 0", "a 1", "b/a", "b/deep/z", "c"]


PIECES = {
    "marks and line ends": "\ufeffein Bär\r\nzwei\r\n\ndrei\rvier\r",
    "characters of two, three and four bytes": "é中🙂é中🙂a\ufeff",
    "blank at first": " \n\r\n\t  \n text",
}


@pytest.mark.parametrize("text", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 1000])
def test_text_file_in_pieces_equals_the_text_that_python_reads(text, length, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE_LENGTH", length)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    expected = path.read_text(encoding="utf-8-sig")
    for _ in range(2):
        documents = load_documents(path)
        assert list(documents) == [expected]
        (pieces,) = map(list, documents.in_pieces())
        assert "".join(pieces) == expected
        # a final carriage return is kept for the next piece
        assert max(map(len, pieces)) <= length + 1
    (streamed,) = (document for document, _ in corpora.stream_documents(path).read(0))
    assert streamed == expected


@pytest.mark.parametrize("length", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("content", "byte", "position"),
    [("é🙂 B".encode() + b"\xe4r", "0xe4", 8), (b"\xff", "0xff", 0), ("\ufeffab".encode() + b"\x80", "0x80", 5)],
)
def test_error_gives_the_position_of_the_byte_that_is_not_utf8(content, byte, position, length, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE_LENGTH", length)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.txt is not UTF-8 text: byte {byte} in position {position}: .*iconv"):
        list(load_documents(tmp_path / "a.txt"))


def test_blank_documents_in_pieces_are_skipped_and_counted():
    documents = corpora.Documents("x", "x", lambda: ["whole", iter([" ", "\n"]), iter([" ", "in ", "pieces"]), "\t"])
    assert [list(pieces) for pieces in documents.in_pieces()] == [["whole"], [" ", "in ", "pieces"]]
    assert documents.num_empty == 2
    assert list(documents) == ["whole", " in pieces"]
    # an unread document does not affect the next one
    assert len(list(documents.in_pieces())) == 2


def test_byte_order_mark_is_dropped_and_line_ends_are_converted(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffein Bär\r\nzwei\r\n".encode())
    assert list(load_documents(tmp_path / "a.txt")) == ["ein Bär\nzwei\n"]


def test_empty_documents_are_left_out_and_counted(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": None}, {"text": " \n"}, {"other": 1}, {"text": "y"}])
    documents = load_documents(tmp_path)
    for _ in range(2):
        assert list(documents) == ["x", "y"]
        assert documents.num_empty == 3


def test_max_examples_counts_documents_with_text(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("", "x", "y", "z")])
    assert list(load_documents(tmp_path, max_examples=2)) == ["x", "y"]
    with pytest.raises(ValueError, match="max_examples=0"):
        load_documents(tmp_path, max_examples=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.parquet", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", "Bär".encode("latin1") * 9, "not UTF-8 text"),
        ("a.txt", "text".encode("utf-16"), "is UTF-16 text"),
        ("a.csv", b"text,n\nB\xe4r,1\n", "not UTF-8 text"),
        ("a.jsonl", b'{"text": "B\xe4r"}\n', "not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "cannot be read"),
        ("a.json", b"\n", "is empty"),
        ("a.json", b"[]", "is empty"),
        ("a.csv", b"text,n\n", "is empty"),
        ("a.csv", b"\n", "cannot be read"),
        ("a.parquet", b"no parquet at all", "cannot be read"),
    ],
)
def test_file_that_cannot_be_read_is_named(name, content, message, tmp_path):
    (tmp_path / "fine.txt").write_text("fine")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(load_documents(tmp_path))
    assert str(tmp_path / name) in str(error.value)


def test_zip_named_txt_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.txt", "w") as archive:
        archive.writestr("book.txt", "text " * 100)
    with pytest.raises(ValueError, match=r"a\.txt is binary, not text"):
        list(load_documents(tmp_path / "a.txt"))


def test_folders_without_text_and_other_files_are_refused(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match=r"contains no file that ends in \.txt, \.jsonl"):
        load_documents(tmp_path)
    with pytest.raises(ValueError, match=r"a\.pdf: cannot read \.pdf"):
        load_documents(tmp_path / "a.pdf")


@pytest.mark.parametrize("name", ["../no/such/folder", "/nowhere", "books.txt", "data/books.txt", "a b", ".x", ""])
def test_name_that_is_neither_path_nor_hub_name_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # the empty name is the current folder
    message = "does not look like a Hub dataset" if name else "contains no file"
    with pytest.raises(ValueError, match=message):
        load_documents(name)


def test_links_are_followed_and_cycles_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("a")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "link").symlink_to(tmp_path / "elsewhere")
    (corpus / "b.txt").symlink_to(tmp_path / "elsewhere" / "a.txt")
    assert list(load_documents(corpus)) == ["a", "a"]
    (corpus / "loop").symlink_to(corpus)
    with pytest.raises(ValueError, match=r"loop is a symbolic link to one of its parent folders"):
        load_documents(corpus)


@pytest.mark.parametrize("target", ["nowhere.txt", "c.txt"])
def test_broken_link_is_named(target, tmp_path):
    (tmp_path / "c.txt").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=r"c\.txt"):
        load_documents(tmp_path)


def test_fingerprint_follows_content_and_options(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")

    def fingerprints():
        return [
            load_documents(tmp_path).fingerprint,
            load_documents(tmp_path, text_column="n").fingerprint,
            load_documents(tmp_path, max_examples=3).fingerprint,
            load_documents(tmp_path, join_sentences=True).fingerprint,
        ]

    first = fingerprints()
    assert len(set(first)) == 4
    assert fingerprints() == first
    stat = (tmp_path / "a.jsonl").stat()
    os.utime(tmp_path / "a.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    second = fingerprints()
    assert not set(first) & set(second)
    (tmp_path / "b.txt").write_text("more")
    assert not set(second) & set(fingerprints())


def test_tales_are_the_default_corpus():
    documents = load_documents(max_examples=20)
    assert list(documents) == list(tales(20, 0))
    assert documents.fingerprint == load_documents(None, max_examples=20).fingerprint
    assert documents.fingerprint != load_documents(max_examples=21).fingerprint


def test_sentences_are_joined_into_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "JOINED_DOCUMENT_LENGTH", 50)
    sentences = [f"sentence number {number} ." for number in range(20)]
    write_jsonl(tmp_path / "a.jsonl", [{"text": sentence} for sentence in sentences])
    from_rows = list(load_documents(tmp_path / "a.jsonl", join_sentences=True))
    assert "\n".join(from_rows) == "\n".join(sentences)
    assert all(50 <= len(document) + 1 < 50 + 22 for document in from_rows[:-1])
    assert len(from_rows) > 5
    (tmp_path / "a.txt").write_text("".join(sentence + "\n" for sentence in sentences))
    assert list(load_documents(tmp_path / "a.txt", join_sentences=True)) == from_rows


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch):
        """Replace `load_dataset` and return the list of its arguments."""
        calls = []

        def load_dataset(name, config_name=None, *, split):
            calls.append((name, config_name, split))
            if name == "owner/missing":
                raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/missing' doesn't exist on the Hub")
            if split == "dev":
                raise ValueError("Unknown split \"dev\". Should be one of ['train'].")
            return datasets.Dataset.from_list(ROWS)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    def test_dataset_is_loaded_with_config_and_split(self, hub):
        documents = load_documents("owner/books-1.0", config_name="plain", split="train[:1%]")
        assert hub == [("owner/books-1.0", "plain", "train[:1%]")]
        assert list(documents) == TEXTS
        assert list(load_documents("imdb", max_examples=2)) == TEXTS[:2]

    def test_fingerprint_depends_on_config_and_split(self, hub):
        fingerprint = load_documents("owner/books").fingerprint
        assert fingerprint == load_documents("owner/books").fingerprint
        assert fingerprint != load_documents("owner/books", split="test").fingerprint
        assert fingerprint != load_documents("owner/books", config_name="x").fingerprint

    def test_errors_name_the_dataset(self, hub):
        with pytest.raises(ValueError, match=r"owner/books .* from the Hub: Unknown split \"dev\""):
            load_documents("owner/books", split="dev")
        with pytest.raises(ValueError, match=r"owner/books has no column 'body'.*\['text', 'n'\]"):
            load_documents("owner/books", text_column="body")
        with pytest.raises(
            ValueError, match=r"no file or folder owner/missing exists, .* from the Hub: .* doesn't exist"
        ):
            load_documents("owner/missing")
