"""Split a corpus into training and held-out documents, tokenize it once, and read the ids from disk."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from ..atomic import atomic_folder
from ..tokenization import (
    PIECE_LENGTH,
    Text,
    cut_before_spaces,
    num_ids,
    plain_text_encoder,
    splits_before_spaces,
    tokenizer_fingerprint,
)
from .corpora import Documents


FORMAT_VERSION = 1

# In characters. Documents are tokenized in pieces of about PIECE_LENGTH, and a thread tokenizes pieces of about
# BATCH_LENGTH in total at a time, which bounds the memory.
BATCH_LENGTH = 1 << 18

# Incremented when the choice of held-out documents changes.
SPLIT_VERSION = 2
# In UTF-8 bytes. One of several documents is divided only into parts of at least this size, since a held-out loss over
# a few words is meaningless.
MIN_PART_BYTES = 256
# In UTF-8 bytes. Range on both sides of the intended split position that is searched for a paragraph or line break.
SPLIT_SEARCH_BYTES = 1 << 20

TRAIN, VALIDATION, DUPLICATE = 0, 1, 2


class TokenStore:
    """Documents as one flat array of token ids on disk: `[EOS, document 0, EOS, document 1, EOS, ...]`.

    Attributes:
        folder: folder of the store.
        manifest: sizes of the store, and the fingerprints of what it was made from.
        tokens: (num_tokens,) memory-mapped ids, uint16 if the vocabulary fits and uint32 otherwise.
        offsets: (num_documents + 1,) int64. Document i with its final EOS is `tokens[offsets[i] : offsets[i + 1]]`,
            and `offsets[0] == 1`.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], tokens: np.memmap, offsets: np.ndarray):
        self.folder = folder
        self.manifest = manifest
        self.tokens = tokens
        self.offsets = offsets

    @classmethod
    def open(cls, folder: str | Path) -> "TokenStore":
        """Open a store without reading its tokens.

        Raises:
            ValueError: the folder is no token store, or has another format version or a file of the wrong size.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        for name, size in manifest["files"].items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else 0
            if found != size:
                raise ValueError(f"{path} has {found} bytes instead of {size}. Delete {folder} to tokenize again.")
        tokens = np.memmap(folder / "tokens.bin", dtype=manifest["dtype"], mode="r")
        offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        return cls(folder, manifest, tokens, offsets)

    def __reduce__(self) -> tuple:
        # data loader workers open the files themselves, since pickling a memory map would copy the whole corpus
        return TokenStore.open, (self.folder,)

    def __repr__(self) -> str:
        return f"TokenStore({str(self.folder)!r}, documents={self.num_documents}, tokens={self.num_tokens})"

    @property
    def num_documents(self) -> int:
        return self.manifest["num_documents"]

    @property
    def num_tokens(self) -> int:
        """Number of token ids in the store, including the `num_documents + 1` separators."""
        return self.manifest["num_tokens"]

    @property
    def num_bytes(self) -> int:
        """Number of UTF-8 bytes of the documents, without separators."""
        return self.manifest["num_bytes"]

    @property
    def eos_token_id(self) -> int:
        return self.manifest["eos_token_id"]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a token store: it has no manifest.json.")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{folder} is a token store of format {manifest['format_version']}, and this code reads format "
            f"{FORMAT_VERSION}. Delete it to tokenize again."
        )
    return manifest


def ids_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest unsigned integer type that can represent the ids."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class TokenStoreWriter:
    """Writes a `TokenStore` document by document, with 8 bytes of memory per document."""

    def __init__(self, folder: str | Path, eos_token_id: int, vocab_size: int):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True)
        self.dtype = ids_dtype(vocab_size)
        self.eos_token_id = eos_token_id
        self.num_bytes = 0
        self._eos = np.array([eos_token_id], self.dtype).tobytes()
        self._num_tokens = 1
        self._offsets = array("q", [1])
        self._file = (self.folder / "tokens.bin").open("wb", buffering=1 << 20)
        self._file.write(self._eos)

    def add(self, ids: np.ndarray, num_bytes: int, ends_document: bool = True) -> None:
        """Append ids of a document, and the EOS if they are its last ones.

        Args:
            ids: (n,) token ids.
            num_bytes: UTF-8 bytes of their text.
            ends_document: whether the document ends here.
        """
        self._file.write(ids.astype(self.dtype, copy=False).tobytes())
        self._num_tokens += len(ids)
        self.num_bytes += num_bytes
        if ends_document:
            self._file.write(self._eos)
            self._num_tokens += 1
            self._offsets.append(self._num_tokens)

    def close(self, **details: Any) -> None:
        """Close the files, then write the manifest, including `details`."""
        self._file.close()
        np.save(self.folder / "offsets.npy", np.frombuffer(self._offsets, dtype=np.int64))
        manifest = {
            "format_version": FORMAT_VERSION,
            "dtype": self.dtype.name,
            "num_documents": len(self._offsets) - 1,
            "num_tokens": self._num_tokens,
            "num_bytes": self.num_bytes,
            "eos_token_id": self.eos_token_id,
            "files": {name: (self.folder / name).stat().st_size for name in ("tokens.bin", "offsets.npy")},
            **details,
        }
        _write_manifest(self.folder, manifest)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class PreparedCorpus:
    """A tokenized corpus, split into training and held-out documents.

    Attributes:
        train, validation: the two parts.
        num_duplicates: number of documents left out because their text equals that of another one.
        num_empty: number of documents left out because they have no text.
        folder: folder of both parts.
    """

    train: TokenStore
    validation: TokenStore
    num_duplicates: int
    num_empty: int
    folder: Path

    def describe(self) -> dict[str, str]:
        """Describe the training data, the held-out set and what was left out."""
        return {
            "Trained on": f"{self.train.num_documents:,} documents, {self.train.num_tokens:,} tokens",
            "Held out": f"{self.validation.num_documents:,} documents, {self.validation.num_tokens:,} tokens",
            "Exact duplicates left out": f"{self.num_duplicates:,}",
        }


def prepare_corpus(
    documents: Documents,
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: str | Path,
    *,
    validation_fraction: float = 0.1,
    seed: int = 0,
    num_workers: int | None = None,
) -> PreparedCorpus:
    """Tokenize a corpus into `cache_dir`, or reuse the result of an earlier call with the same arguments.

    Exact duplicates are removed first. The documents are then put in an order that depends only on their text and the
    seed, and the first ones are held out: a share `validation_fraction` of the documents. If that is not about the
    same share of the text, documents are held out up to the share of the text instead, and the last of them is divided
    at a paragraph break, or else at a line or word break, so that only its end is held out. A corpus of one document
    is divided in the same way. A warning is issued if the result is off by more than a third.

    Several processes may call this at once: each works in its own folder, and the first to finish wins.

    Args:
        documents: the corpus, read twice, with long files in pieces.
        tokenizer: tokenizer of the model.
        cache_dir: folder in which each corpus gets a folder.
        validation_fraction: share of the text to hold out, between 0 and 1.
        seed: seed of the choice of held-out documents.
        num_workers: number of threads. The default is the number of cores.

    Raises:
        ValueError: the corpus has no text or changes while it is read, the fraction is outside (0, 1), or the cache is
            damaged.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction} must be greater than 0 and less than 1.")
    details = {
        "documents": documents.fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "validation_fraction": validation_fraction,
        "seed": seed,
        "format_version": FORMAT_VERSION,
    }
    # not part of the details, which identify a run's data: most splits are the same in both versions
    content = json.dumps(details | {"split_version": SPLIT_VERSION}, sort_keys=True)
    fingerprint = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    folder = Path(cache_dir) / fingerprint
    if not folder.is_dir():
        with atomic_folder(folder) as work:
            _write_corpus(documents, tokenizer, work, details, num_workers or os.cpu_count() or 1)
    manifest = _read_manifest(folder)
    train, validation = TokenStore.open(folder / "train"), TokenStore.open(folder / "validation")
    warn_of_share(f"corpus {documents.name}", validation_fraction, train.num_bytes, validation.num_bytes)
    return PreparedCorpus(
        train=train,
        validation=validation,
        num_duplicates=manifest["num_duplicates"],
        num_empty=manifest["num_empty"],
        folder=folder,
    )


def warn_of_share(source: str, fraction: float, num_train: int, num_held_out: int) -> None:
    """Warn if the held-out share of the text differs from the requested one by more than a third.

    Args:
        source: the corpus, for the message.
        fraction: requested share.
        num_train, num_held_out: sizes of the parts in bytes.
    """
    total = num_train + num_held_out
    if not _is_close(num_held_out, fraction * total, total):
        warnings.warn(
            f"validation_fraction={fraction:g} requests {fraction * total:,.0f} of the {total:,} bytes of {source}, "
            f"but {num_held_out:,} ({num_held_out / total:.1%}) are held out, because there are too few documents and "
            "they cannot be divided. Provide more text, or change validation_fraction.",
            stacklevel=3,
        )


def _is_close(num_held_out: float, requested: float, total: int) -> bool:
    return abs(num_held_out - requested) <= requested / 3 and total - num_held_out >= (total - requested) * 2 / 3


def _write_corpus(
    documents: Documents, tokenizer: PreTrainedTokenizerFast, work: Path, details: dict[str, Any], num_workers: int
) -> None:
    split = _split(documents, details["validation_fraction"], details["seed"])
    num_empty = documents.num_empty
    if not (split.parts != DUPLICATE).any():
        raise ValueError(f"corpus {documents.name} has no text: all of its {num_empty} documents are empty.")
    eos_token_id = tokenizer.eos_token_id
    writers = [TokenStoreWriter(work / name, eos_token_id, num_ids(tokenizer)) for name in ("train", "validation")]
    with tqdm(total=split.num_bytes, desc="Tokenizing", unit="B", unit_scale=True) as progress:
        for pieces, encoded in tokenize(_texts_with_parts(documents, split), tokenizer, num_workers):
            for piece, ids in zip(pieces, encoded, strict=True):
                size = _num_bytes(piece.text)
                writers[piece.tag].add(ids, size, piece.ends_document)
                progress.update(size)
    for writer in writers:
        writer.close(fingerprints=details)
    _write_manifest(
        work,
        {
            "format_version": FORMAT_VERSION,
            "corpus": documents.name,
            "num_duplicates": int((split.parts == DUPLICATE).sum()),
            "num_empty": num_empty,
            "fingerprints": details,
        },
    )


@dataclass(frozen=True)
class _Split:
    """The division of a corpus into training and held-out text.

    Attributes:
        parts: (num_documents,) uint8: TRAIN, VALIDATION or DUPLICATE.
        num_bytes: UTF-8 bytes of all documents without duplicates.
        divided: index of a document, TRAIN in `parts`, whose end is held out, or None.
        begin: approximate position in that document, in bytes, where the held-out end begins.
        size: size of that document in bytes.
    """

    parts: np.ndarray
    num_bytes: int
    divided: int | None = None
    begin: int = 0
    size: int = 0


def _split(documents: Documents, validation_fraction: float, seed: int) -> _Split:
    digests, sizes = bytearray(), array("q")
    key = seed.to_bytes(8, "little", signed=True)
    for document in tqdm(documents.in_pieces(), desc="Reading", unit=" documents", unit_scale=True):
        digest, size = hashlib.blake2b(digest_size=16, key=key), 0
        for piece in document:
            data = piece.encode()
            digest.update(data)
            size += len(data)
        digests += digest.digest()
        sizes.append(size)
    high, low = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2).T
    # sorting by keyed digest is a seeded shuffle that does not depend on the order of the documents
    order = np.lexsort((low, high))
    is_repeated = np.zeros(len(order), dtype=bool)
    is_repeated[1:] = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
    kept = order[~is_repeated]
    parts = np.full(len(order), DUPLICATE, dtype=np.uint8)
    parts[kept] = TRAIN
    kept_sizes = np.frombuffer(sizes, dtype=np.int64)[kept]
    num_bytes = int(kept_sizes.sum())
    if num_bytes == 0:
        return _Split(parts, 0)
    number, begin = _choose_held_out(kept_sizes, validation_fraction, documents.can_be_split)
    parts[kept[:number]] = VALIDATION
    if begin is None:
        return _Split(parts, num_bytes)
    return _Split(parts, num_bytes, divided=int(kept[number]), begin=begin, size=int(kept_sizes[number]))


def _choose_held_out(sizes: np.ndarray, fraction: float, can_be_split: bool) -> tuple[int, int | None]:
    """Choose how many of the shuffled documents to hold out.

    Args:
        sizes: (n,) bytes of the documents in shuffled order.
        fraction: share of the text to hold out.
        can_be_split: whether a document may be divided.

    Returns:
        The number of documents held out from the beginning, and the byte from which the next document is held out too,
        or None if it is not divided.
    """
    ends = np.cumsum(sizes)
    total, requested = int(ends[-1]), fraction * int(ends[-1])
    if len(sizes) == 1:
        return 0, total - round(requested)

    def is_close(number: int) -> bool:
        return _is_close(int(ends[number - 1]), requested, total)

    by_count = min(max(1, round(fraction * len(sizes))), len(sizes) - 1)
    if is_close(by_count):
        return by_count, None
    # the share is reached in this document: leave it out, include it, or divide it
    last = min(int(np.searchsorted(ends, requested)), len(sizes) - 1)
    needed = round(requested) - int(ends[last] - sizes[last])
    whole = last + int(2 * needed > sizes[last])
    whole = min(max(1, whole), len(sizes) - 1)
    is_long_enough = needed >= MIN_PART_BYTES and sizes[last] - needed >= MIN_PART_BYTES
    if is_close(whole) or not can_be_split or not is_long_enough:
        return whole, None
    return last, int(sizes[last]) - needed


def _texts_with_parts(documents: Documents, split: _Split) -> Iterator[tuple[Text, int]]:
    """Yield each text with its part, TRAIN or VALIDATION. The texts must be read in this order."""
    for number, (document, part) in enumerate(itertools.zip_longest(documents.in_pieces(), split.parts.tolist())):
        if document is None or part is None:
            raise ValueError(f"corpus {documents.name} changed while it was read. Run again when it is complete.")
        if number == split.divided:
            yield from _divide_document(document, split, documents.name)
        elif part != DUPLICATE:
            yield document, part


def held_out_documents(documents: Documents, *, validation_fraction: float = 0.1, seed: int = 0) -> Iterator[str]:
    """Return the texts that `prepare_corpus` holds out with these arguments, without writing a token store."""
    split = _split(documents, validation_fraction, seed)
    return ("".join(text) for text, part in _texts_with_parts(documents, split) if part == VALIDATION)


def _divide_document(document: Iterable[str], split: _Split, name: str) -> Iterator[tuple[Iterable[str], int]]:
    """Yield the beginning of a document for training and its end for validation, each in pieces."""
    reach = min(min(split.begin, split.size - split.begin) // 3, SPLIT_SEARCH_BYTES)
    pieces = iter(document)
    held_out = []

    def training() -> Iterator[str]:
        num_before, near = 0, ""
        for piece in pieces:
            size = _num_bytes(piece)
            if not near and num_before + size < split.begin - reach:
                num_before += size
                yield piece
                continue
            near += piece
            if num_before + _num_bytes(near) > split.begin + reach:
                break
        begin = _split_position(near, split.begin - num_before, reach)
        if num_before + begin == 0 or begin == len(near):
            raise ValueError(
                f"corpus {name} is one document of {len(near)} characters, too short to hold out a part of it. "
                "Provide more text."
            )
        held_out.append(near[begin:])
        yield near[:begin]

    def validation() -> Iterator[str]:
        # the beginning is still unread if the caller needs only this part
        for _ in beginning:
            pass
        yield from held_out
        yield from pieces

    beginning = training()
    yield beginning, TRAIN
    yield validation(), VALIDATION


def _split_position(text: str, target: int, reach: int) -> int:
    """Return where to split a text, in characters, at most `reach` bytes away from byte `target`."""
    data = text.encode()
    first, target, last = (len(data[: target + step].decode(errors="ignore")) for step in (-reach, 0, reach))
    # prefer a paragraph break, then a line break, then a space
    for pattern in (r"\n[^\S\n]*\n\s*", r"\n\s*", r"\s+"):
        ends = [match.end() for match in re.compile(pattern).finditer(text, first, last)]
        if ends:
            return min(ends, key=lambda end: abs(end - target))
    return target


@dataclass(frozen=True)
class Piece:
    """A piece of a document's text, with the document's tag."""

    text: str
    tag: Any
    ends_document: bool


def _cut_into_pieces(text: Text) -> Iterator[str]:
    return cut_before_spaces(text, PIECE_LENGTH)


def _keep_whole(text: Text) -> Iterator[str]:
    yield "".join(text)


def _batches(texts: Iterable[tuple[Text, Any]], cut: Callable[[Text], Iterator[str]]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    length = 0
    for text, tag in texts:
        pieces = cut(text)
        piece: str | None = next(pieces)
        while piece is not None:
            following = next(pieces, None)
            batch.append(Piece(piece, tag, ends_document=following is None))
            length += len(piece)
            if length >= BATCH_LENGTH:
                yield batch
                batch, length = [], 0
            piece = following
    if batch:
        yield batch


def tokenize(
    texts: Iterable[tuple[Text, Any]], tokenizer: PreTrainedTokenizerFast, num_workers: int
) -> Generator[tuple[list[Piece], list[np.ndarray]], None, None]:
    """Tokenize tagged texts in threads, a few batches ahead of the consumer, in order and with long texts in pieces.

    Args:
        texts: texts with tags. A text is a string or pieces, which are read in order, and special tokens in it are
            encoded as plain text.
        tokenizer: tokenizer of the model.
        num_workers: number of threads.

    Yields:
        A batch of pieces, and the ids of each piece, (num_tokens,) uint16 if the vocabulary fits and uint32 otherwise.
    """
    encoder = plain_text_encoder(tokenizer)
    cut = _cut_into_pieces if splits_before_spaces(encoder) else _keep_whole
    dtype = ids_dtype(num_ids(tokenizer))

    def encode(pieces: list[Piece]) -> list[np.ndarray]:
        encodings = encoder.encode_batch_fast([piece.text for piece in pieces], add_special_tokens=False)
        return [np.array(encoding.ids, dtype) for encoding in encodings]

    return _map_in_order(encode, _batches(texts, cut), num_workers)


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _map_in_order(
    encode: Callable[[list[Piece]], list[np.ndarray]], batches: Iterable[list[Piece]], num_workers: int
) -> Generator[tuple[list[Piece], list[np.ndarray]], None, None]:
    """Call `encode`, which releases the interpreter lock, in threads, a few batches ahead of the consumer."""
    pending: deque[tuple[list[Piece], Future]] = deque()
    with _without_tokenizer_threads(), ThreadPoolExecutor(num_workers) as pool:
        for batch in batches:
            pending.append((batch, pool.submit(encode, batch)))
            if len(pending) > 2 * num_workers:
                pieces, future = pending.popleft()
                yield pieces, future.result()
        while pending:
            pieces, future = pending.popleft()
            yield pieces, future.result()


@contextlib.contextmanager
def _without_tokenizer_threads() -> Iterator[None]:
    """Disable the threads of the tokenizers library, which would also make it warn in every data loader worker."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
