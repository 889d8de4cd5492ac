"""Load or stream a text corpus: the embedded tales, files and folders, or a dataset on the Hub."""

import codecs
import hashlib
import io
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..tokenization import PIECE_LENGTH, Text
from .files import (
    ROWS_PER_BATCH,
    Row,
    check_columns,
    check_start,
    empty_file,
    file_format,
    find_files,
    hub_revision,
    load_hub_dataset,
    naming_file,
    not_utf8,
    open_bytes,
    read_rows,
    text_of,
)


DEFAULT_NUM_TALES = 30_000
TALES_SEED = 0

# In characters, about a quarter of a novel. Long enough that few rows cross a document boundary, and short enough that
# the 74 million sentences of BookCorpus make tens of thousands of documents to choose the held-out set from.
JOINED_DOCUMENT_LENGTH = 100_000

# The first bytes of each text file, searched for separator lines before a run.
SEARCHED_BYTES = 1 << 20
SEPARATOR_LINE = re.compile(rb"^[ \t]*(<\|\w+\|>|</?s>|\[(?:SEP|EOS)\])[ \t]*\r?$", re.MULTILINE)


class Documents:
    """The documents of a corpus, iterable any number of times without loading all of them into memory.

    Attributes:
        name: name given by the user.
        fingerprint: changes when the text may have changed: with the paths, sizes and modification times of files, the
            revision of a Hub dataset, and the options.
        num_empty: documents of only white space that the latest iteration skipped.
        can_be_split: whether part of a document may be held out if whole documents do not give the requested share.

    Args:
        read: returns the documents, each as a string or as the pieces of its text.
        max_examples: maximum number of documents.
    """

    def __init__(
        self,
        name: str,
        fingerprint: str,
        read: Callable[[], Iterable[Text]],
        max_examples: int | None = None,
        *,
        can_be_split: bool = True,
    ):
        self.name = name
        self.fingerprint = fingerprint
        self.num_empty = 0
        self.can_be_split = can_be_split
        self._read = read
        self._max_examples = max_examples

    def __iter__(self) -> Iterator[str]:
        return ("".join(pieces) for pieces in self.in_pieces())

    def in_pieces(self) -> Iterator[Iterable[str]]:
        """Yield each document as the pieces of its text, to be read once, so that long files stay out of memory."""
        return itertools.islice(self._non_empty(), self._max_examples)

    def _non_empty(self) -> Iterator[Iterable[str]]:
        self.num_empty = 0
        for document in self._read():
            pieces = iter((document,) if isinstance(document, str) else document)
            blank: list[str] = []
            for piece in pieces:
                if piece.strip():
                    yield itertools.chain(blank, (piece,), pieces)
                    break
                blank.append(piece)
            else:
                self.num_empty += 1


def load_documents(
    dataset: str | Path | None = None,
    *,
    config_name: str | None = None,
    split: str = "train",
    text_column: str = "text",
    join_sentences: bool = False,
    document_separator: str | None = None,
    max_examples: int | None = None,
) -> Documents:
    """Load the documents of a corpus.

    Args:
        dataset: None for the embedded tales; a file (.txt, .jsonl, .json, .csv, .tsv or .parquet, optionally .gz or
            .zst); a folder, searched for such files in sorted order without hidden ones; a glob; or the name of a Hub
            dataset. A .txt file is one document, and each row of the other files is one. Text files are UTF-8. A byte
            order mark is dropped and line ends become `\\n`.
        config_name: configuration of a Hub dataset.
        split: split of a Hub dataset.
        text_column: column that contains the text.
        join_sentences: treat the rows (or the lines of a .txt file) as sentences, as in the original BookCorpus, and
            join them with line breaks into documents of about 100,000 characters.
        document_separator: text between the documents of a .txt file, such as `<|endoftext|>`.
        max_examples: maximum number of documents; for the tales, their number (30,000 by default).

    Raises:
        ValueError: the dataset does not exist or is in no supported format. The content of files is checked only
            during iteration, and errors then name the file.
    """
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples={max_examples} leaves no text. Set it to at least 1, or leave it out.")
    options = {"text_column": text_column, "join_sentences": join_sentences, "max_examples": max_examples}
    files = None if dataset is None else find_files(dataset)
    separator = _check_separator(files or [], document_separator, join_sentences)
    if separator is not None:
        options["document_separator"] = separator
    if dataset is None:
        return _tales(max_examples or DEFAULT_NUM_TALES)
    if files is None:
        return _hub_documents(str(dataset), config_name, split, options)

    def read() -> Iterator[Text]:
        for file in files:
            texts = _read_file(file, text_column, join_sentences, separator)
            yield from (text for text, _ in _join_sentences(map("".join, texts))) if join_sentences else texts

    return Documents(str(dataset), json_digest("files", _file_stats(files), options), read, max_examples)


class ShardedDocuments:
    """The documents of a corpus by shard, readable from any row, for corpora larger than the disk.

    Attributes:
        name, fingerprint: as in `Documents`.
        num_shards: number of files, or of the shards of a Hub dataset.
    """

    def __init__(
        self,
        name: str,
        fingerprint: str,
        num_shards: int,
        read_rows: Callable[[int, int], Iterator[str]],
        join_sentences: bool = False,
    ):
        self.name = name
        self.fingerprint = fingerprint
        self.num_shards = num_shards
        self._read_rows = read_rows
        self._joins_sentences = join_sentences

    def read(self, shard: int, start: int = 0) -> Iterator[tuple[str, int]]:
        """Yield the documents of a shard from row `start`, empty ones too, each with the number of the next row."""
        rows = self._read_rows(shard, start)
        documents = _join_sentences(rows) if self._joins_sentences else ((text, 1) for text in rows)
        for text, num_rows in documents:
            start += num_rows
            yield text, start


def stream_documents(
    dataset: str | Path,
    *,
    config_name: str | None = None,
    split: str = "train",
    text_column: str = "text",
    join_sentences: bool = False,
    document_separator: str | None = None,
) -> ShardedDocuments:
    """Open a corpus that is read while the model trains, instead of being downloaded or read in advance.

    Args and errors are those of `load_documents`.
    """
    options: dict[str, Any] = {"text_column": text_column, "join_sentences": join_sentences}
    files = find_files(dataset)
    separator = _check_separator(files or [], document_separator, join_sentences)
    if separator is not None:
        options["document_separator"] = separator
    if files is not None:

        def read_file(shard: int, start: int) -> Iterator[str]:
            return map("".join, _read_file(files[shard], text_column, join_sentences, separator, start))

        fingerprint = json_digest("files", _file_stats(files), options)
        return ShardedDocuments(str(dataset), fingerprint, len(files), read_file, join_sentences)
    name = str(dataset)
    # pinned, so that a run reads one revision from beginning to end
    revision = hub_revision(name)
    rows = load_hub_dataset(name, config_name, split=split, streaming=True, revision=revision)

    def read_shard(shard: int, start: int) -> Iterator[str]:
        return _column_texts(rows.shard(rows.num_shards, shard), name, text_column, start)

    fingerprint = json_digest("hub", name, config_name, split, revision, rows.num_shards, options)
    return ShardedDocuments(name, fingerprint, rows.num_shards, read_shard, join_sentences)


def _file_stats(files: list[Path]) -> list[tuple[str, int, int]]:
    stats = [file.stat() for file in files]
    for file, stat in zip(files, stats, strict=True):
        if stat.st_size == 0:
            raise empty_file(file)
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)]


def json_digest(*content: Any) -> str:
    """Return a digest of values that JSON can represent."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _tales(num_tales: int) -> Documents:
    from .tales import grammar

    code = hashlib.blake2b(Path(grammar.__file__).read_bytes()).hexdigest()
    fingerprint = json_digest("tales", code, num_tales, TALES_SEED)
    return Documents("tales", fingerprint, lambda: grammar.tales(num_tales, TALES_SEED), can_be_split=False)


def _hub_documents(name: str, config_name: str | None, split: str, options: dict[str, Any]) -> Documents:
    rows = load_hub_dataset(name, config_name, split=split)
    # derived from the cache folder, whose name contains the revision
    fingerprint = json_digest("hub", name, config_name, split, rows._fingerprint, options)
    text_column = options["text_column"]
    # checked here, since training a tokenizer takes long
    check_columns(name, rows.column_names, [text_column])

    def read() -> Iterator[str]:
        texts = _column_texts(rows, name, text_column)
        return (text for text, _ in _join_sentences(texts)) if options["join_sentences"] else texts

    return Documents(name, fingerprint, read, options["max_examples"])


def _read_file(
    path: Path, text_column: str, by_line: bool, document_separator: str | None, start: int = 0
) -> Iterator[Text]:
    """Yield the texts of a file: its rows, or a .txt file's lines, separated parts, or whole text in pieces."""
    if file_format(path) != ".txt":
        for row in read_rows(path, [text_column], start):
            yield text_of(row, text_column) or ""
        return
    texts: Iterator[Text]
    if by_line:
        texts = _text_lines(path)
    elif document_separator is not None:
        texts = _split_at_separator(path, document_separator)
    else:
        texts = iter((_text_in_pieces(path),))
    yield from itertools.islice(texts, start, None)


def _text_lines(path: Path) -> Iterator[str]:
    rest = ""
    for piece in _text_in_pieces(path):
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    if rest:
        yield rest


def _split_at_separator(path: Path, separator: str) -> Iterator[str]:
    """Yield the texts between separators, without the surrounding line breaks."""
    rest, is_found = "", False
    for piece in _text_in_pieces(path):
        *texts, rest = (rest + piece).split(separator)
        is_found = is_found or bool(texts)
        yield from (text.strip("\n") for text in texts)
    if not is_found:
        warnings.warn(f"{path} does not contain document_separator={separator!r}: it is one document.", stacklevel=2)
    yield rest.strip("\n")


def _text_in_pieces(path: Path) -> Iterator[str]:
    """Yield the text of a file in pieces: as one string, a single emoji would make all characters take 4 bytes."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    num_read, is_empty = 0, True
    with naming_file(path), open_bytes(path) as file:
        while True:
            data = file.read(PIECE_LENGTH)
            if num_read == 0:
                check_start(path, data[:4096])
            num_read += len(data)
            try:
                piece = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                # the decoder's input ends at the last byte read
                raise not_utf8(str(path), error, num_read - len(error.object) + error.start) from error
            is_empty = is_empty and not piece.strip()
            if not data and is_empty:
                raise empty_file(path)
            if piece:
                yield piece
            if not data:
                return


def _check_separator(files: list[Path], document_separator: str | None, join_sentences: bool) -> str | None:
    """Return the separator with its escapes resolved, or None.

    Raises:
        ValueError: the separator has no effect, or it is missing and a text file has several separator lines, such as
            END_OF_TEXT.
    """
    texts = [file for file in files if file_format(file) == ".txt"]
    if document_separator and (join_sentences or not texts):
        reason = "join_sentences forms the documents" if join_sentences else "the dataset has no .txt file"
        raise ValueError(f"document_separator={document_separator!r} has no effect: {reason}. Leave it out.")
    if document_separator is not None:
        return document_separator.replace("\\n", "\n").replace("\\t", "\t") or None
    for file in texts:
        with naming_file(file), open_bytes(file) as content:
            found = SEPARATOR_LINE.findall(content.read(SEARCHED_BYTES))
        if len(found) > 1:
            separator = max(found, key=found.count).decode()
            raise ValueError(
                f"{file} has {len(found):,} separator lines such as {separator} in its first MB. To split the text "
                f"there: --document_separator '{separator}'. To keep them as text: --document_separator ''."
            )
    return None


def _column_texts(rows: Any, source: str, text_column: str, start: int = 0) -> Iterator[str]:
    """Yield the texts of a Hub dataset from row `start`."""
    number = 0
    for table in rows.with_format("arrow").iter(ROWS_PER_BATCH):
        check_columns(source, table.column_names, [text_column])
        skipped = min(max(start - number, 0), len(table))
        number += skipped
        for value in table[text_column].slice(skipped).to_pylist():
            number += 1
            yield text_of(Row(f"{source}, row {number}", {text_column: value}), text_column) or ""


def _join_sentences(sentences: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Join sentences into documents and yield each with its number of sentences."""
    document: list[str] = []
    length = 0
    for sentence in sentences:
        document.append(sentence)
        length += len(sentence) + 1
        if length >= JOINED_DOCUMENT_LENGTH:
            yield "\n".join(document), len(document)
            document, length = [], 0
    if document:
        yield "\n".join(document), len(document)
