"""Where text comes from: the embedded tales, files and folders, or a dataset on the Hub, all as `Documents`."""

import codecs
import glob
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..tokenization import PIECE_LENGTH, Text


LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SUFFIXES = (".txt", *LOADERS)

DEFAULT_NUM_TALES = 30_000
TALES_SEED = 0

# Characters: about a quarter of a novel. Long enough that hardly a row meets a seam, short enough that the 74 million
# sentences of BookCorpus still make tens of thousands of documents to hold some out from.
JOINED_DOCUMENT_LENGTH = 100_000

ROWS_PER_BATCH = 1000


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
        max_documents: the first so many only.
    """

    def __init__(
        self,
        name: str,
        fingerprint: str,
        read: Callable[[], Iterable[Text]],
        max_documents: int | None = None,
        *,
        can_be_split: bool = True,
    ):
        self.name = name
        self.fingerprint = fingerprint
        self.num_empty = 0
        self.can_be_split = can_be_split
        self._read = read
        self._max_documents = max_documents

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
    max_documents: int | None = None,
) -> Documents:
    """Name a corpus, get its documents.

    Args:
        dataset: None for the embedded tales; a file (.txt, .jsonl, .json, .csv, .parquet) or a folder searched for
            such files, in sorted order, hidden ones left out; else a name on the Hub. A .txt file is one document,
            a row of the others is one. Text files are UTF-8; a byte order mark is dropped and line ends become `\\n`.
        config_name, split: of a Hub dataset.
        text_column: the column of the rows that holds the text.
        join_sentences: the rows (of a .txt file, its lines) are sentences, as in the classic BookCorpus: join them
            with line breaks into documents of about 100,000 characters.
        max_documents: use only the first documents; for the tales, how many (30,000 by default).

    Raises:
        ValueError: nothing there by that name, nothing in it that can be read (the message names the file); files are
            looked into only by iteration.
    """
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents={max_documents} leaves no text; use 1 or more, or leave it out")
    options = {"text_column": text_column, "join_sentences": join_sentences, "max_documents": max_documents}
    if dataset is None:
        return _tales(max_documents or DEFAULT_NUM_TALES)

    files = _files(dataset)
    if files is None:
        return _hub_documents(str(dataset), config_name, split, options)

    def read() -> Iterator[Text]:
        for file in files:
            if file.suffix.lower() == ".txt" and not join_sentences:
                yield _text_in_pieces(file)
                continue
            rows = _read_file(file, text_column, by_line=join_sentences)
            yield from (text for text, _ in _joined(rows)) if join_sentences else rows

    return Documents(str(dataset), _digest("files", _content(files), options), read, max_documents)


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
) -> ShardedDocuments:
    """`load_documents` for a corpus that shall not be downloaded, or read, as a whole.

    Raises:
        ValueError: nothing there by that name, nothing in it that can be read.
    """
    options = {"text_column": text_column, "join_sentences": join_sentences}
    files = _files(dataset)
    if files is not None:

        def read_file(shard: int, start: int) -> Iterator[str]:
            return _read_file(files[shard], text_column, by_line=join_sentences, start=start)

        fingerprint = _digest("files", _content(files), options)
        return ShardedDocuments(str(dataset), fingerprint, len(files), read_file, join_sentences)
    name = str(dataset)
    rows, revision = _hub_stream(name, config_name, split)

    def read_shard(shard: int, start: int) -> Iterator[str]:
        return _texts(rows.shard(rows.num_shards, shard), name, text_column, start)

    fingerprint = _digest("hub", name, config_name, split, revision, rows.num_shards, options)
    return ShardedDocuments(name, fingerprint, rows.num_shards, read_shard, join_sentences)


def _files(dataset: str | Path) -> list[Path] | None:
    """The files that a path names; None where there is nothing, as for a name on the Hub."""
    root = Path(dataset)
    if root.is_dir():
        files = list(_files_below(root))
        if not files:
            raise ValueError(f"folder {root} holds no file that ends in {', '.join(SUFFIXES)}")
        return files
    if not root.is_file():
        return None
    if root.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{root}: cannot read {root.suffix or 'a file without suffix'}; use {', '.join(SUFFIXES)}")
    return [root]


def _content(files: list[Path]) -> list[tuple[str, int, int]]:
    stats = [file.stat() for file in files]
    for file, stat in zip(files, stats, strict=True):
        if stat.st_size == 0:
            raise ValueError(f"{file} is empty; remove it or leave it out")
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)]


def _digest(*content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _tales(num_tales: int) -> Documents:
    from . import tales

    grammar = Path(tales.__file__).read_bytes()
    fingerprint = _digest("tales", hashlib.blake2b(grammar).hexdigest(), num_tales, TALES_SEED)
    return Documents("tales", fingerprint, lambda: tales.tales(num_tales, TALES_SEED), can_be_split=False)


def _check_hub_name(name: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or name.lower().endswith(SUFFIXES):
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
    _check_column(name, rows.column_names, text_column)

    def read() -> Iterator[str]:
        texts = _texts(rows, name, text_column)
        return (text for text, _ in _joined(texts)) if options["join_sentences"] else texts

    return Documents(name, fingerprint, read, options["max_documents"])


def _files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:
        raise ValueError(f"{folder} is a symbolic link to a folder that it lies in; remove the link")
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files_below(entry, (*above, real))
        elif entry.suffix.lower() in SUFFIXES:
            if not entry.is_file():
                raise ValueError(f"{entry} is not a regular file but, perhaps, a link to nowhere; remove it")
            yield entry


def _read_file(path: Path, text_column: str, by_line: bool, start: int = 0) -> Iterator[str]:
    try:
        if path.suffix.lower() == ".txt":
            yield from itertools.islice(_read_text(path, by_line), start, None)
        else:
            yield from _read_rows(path, text_column, start)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: {error}; convert it (iconv -f LATIN1 -t UTF-8) or leave it out"
        ) from error


def _read_text(path: Path, by_line: bool) -> Iterator[str]:
    if not by_line:
        yield "".join(_text_in_pieces(path))
        return
    with path.open("rb") as file:
        _check_not_binary(path, file.read(4096))
    with path.open(encoding="utf-8-sig") as lines:
        yield from (line.rstrip("\n") for line in lines)


def _check_not_binary(path: Path, start: bytes) -> None:
    # archives and UTF-16 have zero bytes near the start, UTF-8 text has none
    if b"\0" in start:
        raise ValueError(f"{path} is not text but binary (it has zero bytes): an archive, or UTF-16? Convert it")


def _text_in_pieces(path: Path) -> Iterator[str]:
    """The text of a file, which as a whole would take four bytes a character if a single one is an emoji."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    num_read, is_empty = 0, True
    with path.open("rb") as file:
        while True:
            data = file.read(PIECE_LENGTH)
            if num_read == 0:
                _check_not_binary(path, data[:4096])
            num_read += len(data)
            try:
                piece = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                # what the decoder had in hand ends with what is read
                position = num_read - len(error.object) + error.start
                raise ValueError(
                    f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} in position {position}: "
                    f"{error.reason}; convert it (iconv -f LATIN1 -t UTF-8) or leave it out"
                ) from error
            is_empty = is_empty and not piece.strip()
            if not data and is_empty:
                raise ValueError(f"{path} is empty; remove it or leave it out")
            if piece:
                yield piece
            if not data:
                return


def _read_rows(path: Path, text_column: str, start: int) -> Iterator[str]:
    import datasets

    # pandas would take the texts "NA" and "null" for missing
    options = {"keep_default_na": False} if path.suffix.lower() == ".csv" else {}
    try:
        rows = datasets.load_dataset(
            LOADERS[path.suffix.lower()], data_files=glob.escape(str(path)), split="train", streaming=True, **options
        )
        has_rows = start > 0
        for text in _texts(rows, path, text_column, start):
            has_rows = True
            yield text
        if not has_rows:
            raise ValueError(f"{path} is empty; remove it or leave it out")
    except UnicodeDecodeError:
        raise
    except (ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise error if str(path) in str(error) else ValueError(f"{path} cannot be read: {error}") from error


def _check_column(source: str | Path, columns: list[str], text_column: str) -> None:
    if text_column not in columns:
        raise ValueError(f"{source} has no column {text_column!r}; name one of its columns as text column: {columns}")


def _texts(rows: Any, source: str | Path, text_column: str, start: int = 0) -> Iterator[str]:
    for table in rows.with_format("arrow").iter(ROWS_PER_BATCH):
        _check_column(source, table.column_names, text_column)
        skipped = min(start, len(table))
        start -= skipped
        for text in table[text_column].slice(skipped).to_pylist():
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"{source}: column {text_column!r} holds {type(text).__name__}, not text: {text!r:.80}"
                )
            yield text or ""


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
