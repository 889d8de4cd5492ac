"""Where text comes from: the embedded tales, files and folders, or a dataset on the Hub, all as `Documents`."""

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
    SUFFIXES,
    Row,
    check_columns,
    check_start,
    file_format,
    find_files,
    open_bytes,
    read_errors,
    read_rows,
    text_of,
)


DEFAULT_NUM_TALES = 30_000
TALES_SEED = 0

# Characters: about a quarter of a novel. Long enough that hardly a row meets a seam, short enough that the 74 million
# sentences of BookCorpus still make tens of thousands of documents to hold some out from.
JOINED_DOCUMENT_LENGTH = 100_000

# Of each text file so much is searched before a run for lines that are a marker between documents.
SEARCHED_BYTES = 1 << 20
MARKER = re.compile(rb"^[ \t]*(<\|\w+\|>|</?s>|\[(?:SEP|EOS)\])[ \t]*\r?$", re.MULTILINE)


class Documents:
    """The documents of a corpus: iterable any number of times, never all in memory.

    Attributes:
        name: what the user called the corpus.
        fingerprint: changes when the text may have changed: paths, sizes and modification times of files, the revision
            of a Hub dataset, or an option.
        num_empty: documents of only white space that the latest iteration left out.
        can_be_split: whether a part of a document may be held out where whole documents do not give the share.

    Args:
        read: gives the documents, each as its text or as the pieces that this is made of.
        max_examples: the first so many only.
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
        self._max_documents = max_examples

    def __iter__(self) -> Iterator[str]:
        return ("".join(pieces) for pieces in self.in_pieces())

    def in_pieces(self) -> Iterator[Iterable[str]]:
        """The same documents, each as the pieces of its text, to be read once: a long file is never all in memory."""
        return itertools.islice(self._not_empty(), self._max_documents)

    def _not_empty(self) -> Iterator[Iterable[str]]:
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
    """Name a corpus, get its documents.

    Args:
        dataset: None for the embedded tales; a file (.txt, .jsonl, .json, .csv, .tsv or .parquet, each also .gz or
            .zst), a folder searched for such files, in sorted order, hidden ones left out, or a glob; else a name on
            the Hub. A .txt file is one document, a row of the others is one. Text files are UTF-8; a byte order mark
            is dropped and line ends become `\\n`.
        config_name, split: of a Hub dataset.
        text_column: the column of the rows that holds the text.
        join_sentences: the rows (of a .txt file, its lines) are sentences, as in the classic BookCorpus: join them
            with line breaks into documents of about 100,000 characters.
        document_separator: text between the documents of a .txt file, such as `<|endoftext|>`.
        max_examples: use only the first documents; for the tales, how many (30,000 by default).

    Raises:
        ValueError: nothing there by that name, nothing in it that can be read (the message names the file); files are
            looked into only by iteration.
    """
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples={max_examples} leaves no text; use 1 or more, or leave it out")
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
            yield from (text for text, _ in _joined(map("".join, texts))) if join_sentences else texts

    return Documents(str(dataset), _digest("files", _content(files), options), read, max_examples)


class ShardedDocuments:
    """The documents of a corpus shard by shard, read from any place on: for corpora larger than the disk.

    Attributes:
        name, fingerprint: as of `Documents`.
        num_shards: files, or the parts that a dataset on the Hub has.
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
        self._join_sentences = join_sentences

    def read(self, shard: int, start: int = 0) -> Iterator[tuple[str, int]]:
        """The documents of a shard from row `start` on, empty ones too, each with the row that follows it."""
        rows = self._read_rows(shard, start)
        documents = _joined(rows) if self._join_sentences else ((text, 1) for text in rows)
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
    """`load_documents` for a corpus that shall not be downloaded, or read, as a whole.

    Raises:
        ValueError: nothing there by that name, nothing in it that can be read.
    """
    options: dict[str, Any] = {"text_column": text_column, "join_sentences": join_sentences}
    files = find_files(dataset)
    separator = _check_separator(files or [], document_separator, join_sentences)
    if separator is not None:
        options["document_separator"] = separator
    if files is not None:

        def read_file(shard: int, start: int) -> Iterator[str]:
            return map("".join, _read_file(files[shard], text_column, join_sentences, separator, start))

        fingerprint = _digest("files", _content(files), options)
        return ShardedDocuments(str(dataset), fingerprint, len(files), read_file, join_sentences)
    name = str(dataset)
    rows, revision = _hub_stream(name, config_name, split)

    def read_shard(shard: int, start: int) -> Iterator[str]:
        return _texts(rows.shard(rows.num_shards, shard), name, text_column, start)

    fingerprint = _digest("hub", name, config_name, split, revision, rows.num_shards, options)
    return ShardedDocuments(name, fingerprint, rows.num_shards, read_shard, join_sentences)


def _content(files: list[Path]) -> list[tuple[str, int, int]]:
    stats = [file.stat() for file in files]
    for file, stat in zip(files, stats, strict=True):
        if stat.st_size == 0:
            raise ValueError(f"{file} is empty; remove it or leave it out")
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)]


def _digest(*content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _tales(num_tales: int) -> Documents:
    from .tales import grammar as tales

    grammar = Path(tales.__file__).read_bytes()
    fingerprint = _digest("tales", hashlib.blake2b(grammar).hexdigest(), num_tales, TALES_SEED)
    return Documents("tales", fingerprint, lambda: tales.tales(num_tales, TALES_SEED), can_be_split=False)


def _check_hub_name(name: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or file_format(name) in SUFFIXES:
        raise ValueError(f"no file or folder {name}, and it does not look like a name on the Hub (owner/dataset)")


def _hub_stream(name: str, config_name: str | None, split: str) -> tuple[Any, str]:
    """A dataset on the Hub as an iterable one, and its revision."""
    _check_hub_name(name)
    import datasets
    import huggingface_hub

    try:
        # the revision that the run begins with is the one that it reads to its end
        revision = huggingface_hub.dataset_info(name).sha
        rows = datasets.load_dataset(name, config_name, split=split, streaming=True, revision=revision)
    except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ValueError(f"no file or folder {name} here, and the Hub did not give a dataset: {error}") from error
    return rows, str(revision)


def _hub_documents(name: str, config_name: str | None, split: str, options: dict[str, Any]) -> Documents:
    _check_hub_name(name)
    import datasets

    try:
        rows = datasets.load_dataset(name, config_name, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"no file or folder {name} here, and the Hub did not give a dataset: {error}") from error
    # the cache folder, of which this is made, is named after the revision
    fingerprint = _digest("hub", name, config_name, split, rows._fingerprint, options)
    text_column = options["text_column"]
    # a missing column shall not wait for a tokenizer to be trained
    check_columns(name, rows.column_names, [text_column])

    def read() -> Iterator[str]:
        texts = _texts(rows, name, text_column)
        return (text for text, _ in _joined(texts)) if options["join_sentences"] else texts

    return Documents(name, fingerprint, read, options["max_examples"])


def _read_file(
    path: Path, text_column: str, by_line: bool, document_separator: str | None, start: int = 0
) -> Iterator[Text]:
    """The texts of a file: its rows', or of a .txt its lines, its parts between separators, or itself in pieces."""
    if file_format(path) != ".txt":
        for row in read_rows(path, [text_column], start):
            yield text_of(row, text_column) or ""
        return
    texts: Iterator[Text]
    if by_line:
        texts = _text_lines(path)
    elif document_separator is not None:
        texts = _separated(path, document_separator)
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


def _separated(path: Path, separator: str) -> Iterator[str]:
    """The texts between separators, without the line breaks around them."""
    rest, is_found = "", False
    for piece in _text_in_pieces(path):
        *texts, rest = (rest + piece).split(separator)
        is_found = is_found or bool(texts)
        yield from (text.strip("\n") for text in texts)
    if not is_found:
        warnings.warn(f"{path} does not hold document_separator={separator!r}: it is one document.", stacklevel=2)
    yield rest.strip("\n")


def _text_in_pieces(path: Path) -> Iterator[str]:
    """The text of a file, which as a whole would take four bytes a character if a single one is an emoji."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    num_read, is_empty = 0, True
    with read_errors(path), open_bytes(path) as file:
        while True:
            data = file.read(PIECE_LENGTH)
            if num_read == 0:
                check_start(path, data[:4096])
            num_read += len(data)
            try:
                piece = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                # what the decoder had in hand ends with what is read
                position = num_read - len(error.object) + error.start
                raise ValueError(
                    f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} in position {position}: "
                    f"{error.reason}; convert the file (iconv -f WINDOWS-1252 -t UTF-8) or leave it out."
                ) from error
            is_empty = is_empty and not piece.strip()
            if not data and is_empty:
                raise ValueError(f"{path} is empty; remove it or leave it out")
            if piece:
                yield piece
            if not data:
                return


def _check_separator(files: list[Path], document_separator: str | None, join_sentences: bool) -> str | None:
    """The separator with its escapes resolved; None for none.

    Raises:
        ValueError: a separator that nothing uses, or text files with several lines that are a marker, such as
            END_OF_TEXT, and no separator.
    """
    texts = [file for file in files if file_format(file) == ".txt"]
    if document_separator and (join_sentences or not texts):
        why = "join_sentences makes the documents" if join_sentences else "there is no .txt file among the data"
        raise ValueError(f"document_separator={document_separator!r} has no use: {why}. Leave it out.")
    if document_separator is not None:
        return document_separator.replace("\\n", "\n").replace("\\t", "\t") or None
    for file in texts:
        with read_errors(file), open_bytes(file) as content:
            found = MARKER.findall(content.read(SEARCHED_BYTES))
        if len(found) > 1:
            marker = max(found, key=found.count).decode()
            raise ValueError(
                f"{file} has {len(found):,} lines in its first MB that are a marker such as {marker}. To split the "
                f"text there: --document_separator '{marker}'. To learn them as text: --document_separator ''."
            )
    return None


def _texts(rows: Any, source: str, text_column: str, start: int = 0) -> Iterator[str]:
    """The texts of a dataset from the Hub."""
    number = 0
    for table in rows.with_format("arrow").iter(ROWS_PER_BATCH):
        check_columns(source, table.column_names, [text_column])
        skipped = min(max(start - number, 0), len(table))
        number += skipped
        for value in table[text_column].slice(skipped).to_pylist():
            number += 1
            yield text_of(Row(f"{source}, row {number}", {text_column: value}), text_column) or ""


def _joined(sentences: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Documents, and the number of sentences in each."""
    part: list[str] = []
    length = 0
    for sentence in sentences:
        part.append(sentence)
        length += len(sentence) + 1
        if length >= JOINED_DOCUMENT_LENGTH:
            yield "\n".join(part), len(part)
            part, length = [], 0
    if part:
        yield "\n".join(part), len(part)
