"""The corpus as token ids, written once and read from disk by everything that trains or evaluates on it."""

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

from ..atomic import made_at_once
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

# Characters. A document is handed to the tokenizer in pieces of about PIECE_LENGTH, a thread takes pieces of about
# BATCH_LENGTH at a time: memory stays bounded however long a book is.
BATCH_LENGTH = 1 << 18

# Counts up when other documents are held out than before.
SPLIT_VERSION = 2
# UTF-8 bytes. Neither part of a document of several is shorter: a held-out loss of a few words says nothing.
SHORTEST_PART = 256
# UTF-8 bytes on either side of the place where a document is to be split, searched for a good one.
SPLIT_REACH = 1 << 20

TRAIN, VALIDATION, DUPLICATE = 0, 1, 2


class TokenStore:
    """Documents as one flat array of token ids on disk: `[EOS, document 0, EOS, document 1, EOS, ...]`.

    Attributes:
        tokens: (num_tokens,) uint16 where the vocabulary fits, else uint32; memory-mapped.
        offsets: (num_documents + 1,) int64; document i with the EOS that ends it is
            `tokens[offsets[i] : offsets[i + 1]]`, and `offsets[0] == 1`.
        manifest: what the store holds and how it was made.
        folder: where it lies.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], tokens: np.memmap, offsets: np.ndarray):
        self.folder = folder
        self.manifest = manifest
        self.tokens = tokens
        self.offsets = offsets

    @classmethod
    def open(cls, folder: str | Path) -> "TokenStore":
        """Open a written store; nothing is read yet.

        Raises:
            ValueError: no store there, one of another format, or a file of another size than was written.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        for name, size in manifest["files"].items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else 0
            if found != size:
                raise ValueError(f"{path} has {found} bytes instead of {size}; delete {folder} to tokenize again")
        tokens = np.memmap(folder / "tokens.bin", dtype=manifest["dtype"], mode="r")
        offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        return cls(folder, manifest, tokens, offsets)

    def __reduce__(self) -> tuple:
        # a data loader's worker process opens the files itself: pickling a memory map would copy the whole corpus
        return TokenStore.open, (self.folder,)

    def __repr__(self) -> str:
        return f"TokenStore({str(self.folder)!r}, documents={self.num_documents}, tokens={self.num_tokens})"

    @property
    def num_documents(self) -> int:
        return self.manifest["num_documents"]

    @property
    def num_tokens(self) -> int:
        """Token ids in the store, the `num_documents + 1` separators counted."""
        return self.manifest["num_tokens"]

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the documents, separators not counted."""
        return self.manifest["num_bytes"]

    @property
    def eos_token_id(self) -> int:
        return self.manifest["eos_token_id"]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no token store: it has no manifest.json")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{folder} is a token store of format {manifest['format_version']}, this code reads {FORMAT_VERSION}; "
            "delete it to tokenize again"
        )
    return manifest


def ids_dtype(vocab_size: int) -> np.dtype:
    """The smallest that holds the ids."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class TokenStoreWriter:
    """Writes a `TokenStore` document by document, in constant memory but for 8 bytes a document."""

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
        """Append ids of a document, `num_bytes` of its text, and after the last of them the EOS."""
        self._file.write(ids.astype(self.dtype, copy=False).tobytes())
        self._num_tokens += len(ids)
        self.num_bytes += num_bytes
        if ends_document:
            self._file.write(self._eos)
            self._num_tokens += 1
            self._offsets.append(self._num_tokens)

    def close(self, **details: Any) -> None:
        """Finish the files; the manifest, with `details` in it, comes last."""
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
    """A corpus ready for training, split into two parts.

    Attributes:
        train, validation: the two parts.
        num_duplicates: documents left out because another has exactly the same text.
        num_empty: documents left out because they have none.
        folder: where both parts lie.
    """

    train: TokenStore
    validation: TokenStore
    num_duplicates: int
    num_empty: int
    folder: Path

    def describe(self) -> dict[str, str]:
        """For people: what is trained on, held out and left out."""
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
    """Tokenize a corpus once into `cache_dir`; later calls with the same text, tokenizer and options reuse it.

    Exact duplicates are removed first. Documents are held out in an order that depends on their text and the seed, not
    on where they stand. If that many whole documents are not about that share of the text, documents are taken up to
    the share, and of the one in which it ends the last part, from a paragraph break, else a line or a word, on. So is
    a corpus of a single document split. Warns if the share still comes out more than a third off.
    Several processes may call at once: each works in a folder of its own, and the first to finish wins.

    Args:
        documents: read twice, long files piece by piece.
        cache_dir: each corpus gets a folder of its own in it.
        validation_fraction: share of the text to hold out.
        seed: of the choice.
        num_workers: threads; all cores by default.

    Raises:
        ValueError: no text, a fraction outside (0, 1), a corpus that changes while it is read, or a damaged cache.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction} must lie between 0 and 1, both excluded")
    details = {
        "documents": documents.fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "validation_fraction": validation_fraction,
        "seed": seed,
        "format_version": FORMAT_VERSION,
    }
    # beside the details, which say what a run was trained on: most splits are the same in both versions
    content = json.dumps(details | {"split_version": SPLIT_VERSION}, sort_keys=True)
    fingerprint = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    folder = Path(cache_dir) / fingerprint
    if not folder.is_dir():
        with made_at_once(folder) as work:
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
    """Warn if the share of the text that is held out is more than a third off; sizes in bytes."""
    total = num_train + num_held_out
    if not _is_about(num_held_out, fraction * total, total):
        warnings.warn(
            f"validation_fraction={fraction:g} asks for {fraction * total:,.0f} of the {total:,} bytes of "
            f"{source}, and {num_held_out:,} ({num_held_out / total:.1%}) are held out: its documents are too few and "
            "cannot be split. Give more text, or another validation_fraction.",
            stacklevel=3,
        )


def _is_about(num_held_out: float, wanted: float, total: int) -> bool:
    return abs(num_held_out - wanted) <= wanted / 3 and total - num_held_out >= (total - wanted) * 2 / 3


def _write_corpus(
    documents: Documents, tokenizer: PreTrainedTokenizerFast, work: Path, details: dict[str, Any], num_workers: int
) -> None:
    split = _split(documents, details["validation_fraction"], details["seed"])
    num_empty = documents.num_empty
    if not (split.parts != DUPLICATE).any():
        raise ValueError(f"corpus {documents.name} has no text: {num_empty} documents, all empty")
    eos_token_id = tokenizer.eos_token_id
    writers = [TokenStoreWriter(work / name, eos_token_id, num_ids(tokenizer)) for name in ("train", "validation")]
    with tqdm(total=split.num_bytes, desc="Tokenizing", unit="B", unit_scale=True) as progress:
        for pieces, encoded in tokenize(_parts(documents, split), tokenizer, num_workers):
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
    """What is held out of a corpus.

    Attributes:
        parts: (num_documents,) uint8, of each document.
        num_bytes: UTF-8 bytes of all documents that are kept.
        divided: the document, one for training in `parts`, of which the end is held out; None if there is none.
        begin, size: of it, in bytes: about where the held-out end begins, and the whole.
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
    # sorted by keyed digest, which is a seeded shuffle that does not depend on the order of the documents
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
    number, begin = _share(kept_sizes, validation_fraction, documents.can_be_split)
    parts[kept[:number]] = VALIDATION
    if begin is None:
        return _Split(parts, num_bytes)
    return _Split(parts, num_bytes, divided=int(kept[number]), begin=begin, size=int(kept_sizes[number]))


def _share(sizes: np.ndarray, fraction: float, can_be_split: bool) -> tuple[int, int | None]:
    """How many documents are held out, the first ones, and from which byte on the one after them, if it is split."""
    ends = np.cumsum(sizes)
    total, wanted = int(ends[-1]), fraction * int(ends[-1])
    if len(sizes) == 1:
        return 0, total - round(wanted)

    def is_about(number: int) -> bool:
        return _is_about(int(ends[number - 1]), wanted, total)

    by_count = min(max(1, round(fraction * len(sizes))), len(sizes) - 1)
    if is_about(by_count):
        return by_count, None
    # the document in which the share ends: without it, with it, or with a part of it
    last = min(int(np.searchsorted(ends, wanted)), len(sizes) - 1)
    needed = round(wanted) - int(ends[last] - sizes[last])
    whole = last + int(2 * needed > sizes[last])
    whole = min(max(1, whole), len(sizes) - 1)
    long_enough = needed >= SHORTEST_PART and sizes[last] - needed >= SHORTEST_PART
    if is_about(whole) or not can_be_split or not long_enough:
        return whole, None
    return last, int(sizes[last]) - needed


def _parts(documents: Documents, split: _Split) -> Iterator[tuple[Text, int]]:
    """The texts with the part that each is for, to be read in this order."""
    for number, (document, part) in enumerate(itertools.zip_longest(documents.in_pieces(), split.parts.tolist())):
        if document is None or part is None:
            raise ValueError(f"corpus {documents.name} changed while it was read; run again when it is complete")
        if number == split.divided:
            yield from _divided(document, split, documents.name)
        elif part != DUPLICATE:
            yield document, part


def held_out_documents(documents: Documents, *, validation_fraction: float = 0.1, seed: int = 0) -> Iterator[str]:
    """The texts that `prepare_corpus` holds out with these arguments: the corpus is read twice, nothing written."""
    split = _split(documents, validation_fraction, seed)
    return ("".join(text) for text, part in _parts(documents, split) if part == VALIDATION)


def _divided(document: Iterable[str], split: _Split, name: str) -> Iterator[tuple[Iterable[str], int]]:
    reach = min(min(split.begin, split.size - split.begin) // 3, SPLIT_REACH)
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
        begin = _border(near, split.begin - num_before, reach)
        if num_before + begin == 0 or begin == len(near):
            raise ValueError(
                f"corpus {name} is one document of {len(near)} characters, too short to hold out a part of it"
            )
        held_out.append(near[begin:])
        yield near[:begin]

    def validation() -> Iterator[str]:
        # whoever wants this part only has not read the other
        for _ in beginning:
            pass
        yield from held_out
        yield from pieces

    beginning = training()
    yield beginning, TRAIN
    yield validation(), VALIDATION


def _border(text: str, target: int, reach: int) -> int:
    """Where to split a text, in characters: near byte `target`, at most `reach` bytes away."""
    data = text.encode()
    first, target, last = (len(data[: target + step].decode(errors="ignore")) for step in (-reach, 0, reach))
    # a paragraph break if there is one nearby, else a line break, a space, or any place
    for pattern in (r"\n[^\S\n]*\n\s*", r"\n\s*", r"\s+"):
        ends = [match.end() for match in re.compile(pattern).finditer(text, first, last)]
        if ends:
            return min(ends, key=lambda end: abs(end - target))
    return target


@dataclass(frozen=True)
class Piece:
    """A part of a document's text, with a tag that all its pieces share."""

    text: str
    tag: Any
    ends_document: bool


def _cut_before_spaces(text: Text) -> Iterator[str]:
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
    """Ids of tagged texts in threads, some batches ahead of the consumer; in order, long texts in several pieces.

    Args:
        texts: plain text, that of special tokens too, whole or in pieces that are read in this order; and tags.

    Returns:
        Batches of pieces, and of each the ids, (num_tokens,) uint16 where the vocabulary fits, else uint32.
    """
    encoder = plain_text_encoder(tokenizer)
    cut = _cut_before_spaces if splits_before_spaces(encoder) else _keep_whole
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
    """`encode` in threads (it releases the interpreter lock), a bounded number of batches ahead of the consumer."""
    pending: deque[tuple[list[Piece], Future]] = deque()
    with _one_thread_a_call(), ThreadPoolExecutor(num_workers) as pool:
        for batch in batches:
            pending.append((batch, pool.submit(encode, batch)))
            if len(pending) > 2 * num_workers:
                pieces, future = pending.popleft()
                yield pieces, future.result()
        while pending:
            pieces, future = pending.popleft()
            yield pieces, future.result()


@contextlib.contextmanager
def _one_thread_a_call() -> Iterator[None]:
    """Our threads are the parallelism. The library's own would also make it warn in every data loader worker."""
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
