"""Stream training rows from a corpus that is read, shuffled and tokenized while the model trains.

The rows of a process depend only on the corpus, the seed and the process index. A place in them is a `Position` of a
few integers, so a run resumes by reading one shard from some row, without replaying what it has seen.

Each epoch shuffles the shards and divides them among the processes. A process reads its shards in that order, collects
a block of documents, shuffles the block, concatenates the documents with an EOS between, and cuts them into rows. The
shuffle of a block depends only on the seed, the process and the position where the block begins.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from ..atomic import atomic_folder
from ..tokenization import num_ids, tokenizer_fingerprint
from .corpora import Documents, ShardedDocuments, json_digest
from .rows import Row, RowBatch, seeded_generator
from .token_store import TokenStore, TokenStoreWriter, tokenize, warn_of_share


# Number of chunks of rows, of about 60,000 tokens each, that are prepared in advance.
NUM_PREFETCHED = 8


@dataclass(frozen=True)
class Position:
    """A position in the token stream of a process.

    Attributes:
        epoch: number of finished passes over the corpus.
        shard: index, in the process's order of this epoch, of the shard where the current block of documents begins.
        row: row in that shard where the block begins.
        document: index of the document in the shuffled block.
        token: index of the token in the document, with the EOS before the document as token 0.
    """

    epoch: int = 0
    shard: int = 0
    row: int = 0
    document: int = 0
    token: int = 0


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Return whether a document is held out. It depends only on its text and the seed, so copies are held out too."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little", signed=True)).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


class StreamedRows(Dataset):
    """Rows from an endless stream. Item i is `{"input_ids": (T,), "shift_labels": (T,)}`, int64.

    Items must be requested in order (`train_sampling_strategy="sequential"`) and by their process: batch i belongs to
    process `i % num_processes`. One epoch of the Trainer is the whole run, which may pass over the corpus several
    times.

    Args:
        documents: the corpus.
        tokenizer: tokenizer of the model.
        context_length: T.
        num_rows: number of rows of all processes.
        rows_per_batch: number of rows in a batch of one process.
        num_processes, process_index: with fewer shards than processes, each process reads all shards and uses every
            `num_processes`-th document.
        seed: seed of the shuffles.
        shuffle_characters: documents are shuffled in blocks of this many characters, two of which are in memory.
        validation_fraction, split_seed: arguments of `is_held_out`. Held-out documents are skipped.
        num_workers: number of tokenizer threads. The default is this process's share of the cores.
    """

    def __init__(
        self,
        documents: ShardedDocuments,
        tokenizer: PreTrainedTokenizerFast,
        context_length: int,
        num_rows: int,
        *,
        rows_per_batch: int,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        shuffle_characters: int = 1 << 24,
        validation_fraction: float = 0.1,
        split_seed: int = 0,
        num_workers: int | None = None,
    ):
        self.documents = documents
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.num_rows = num_rows
        self.rows_per_batch = rows_per_batch
        self.num_processes = num_processes
        self.process_index = process_index
        self.seed = seed
        self.shuffle_characters = shuffle_characters
        self.validation_fraction = validation_fraction
        self.split_seed = split_seed
        self.num_workers = num_workers or max(1, (os.cpu_count() or 1) // num_processes)
        # positions where the next batches begin, by the number of rows that this process has read
        self._positions = {0: Position()}
        self._stream: Iterator[tuple[np.ndarray, list[Position]]] | None = None
        self._next_row = 0

    def fingerprint(self) -> str:
        """Return a digest that changes if the rows change."""
        names = ("context_length", "num_rows", "rows_per_batch", "num_processes", "seed", "shuffle_characters")
        settings = [getattr(self, name) for name in (*names, "validation_fraction", "split_seed")]
        return json_digest(self.documents.fingerprint, tokenizer_fingerprint(self.tokenizer), settings)

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Row:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> RowBatch:
        batch, within = divmod(indices[0], self.rows_per_batch)
        first = batch // self.num_processes * self.rows_per_batch + within
        in_order = list(indices) == list(range(indices[0], indices[0] + len(indices)))
        if not in_order or batch % self.num_processes != self.process_index:
            raise ValueError(
                f"process {self.process_index} cannot read rows {list(indices)[:4]}...: streamed rows must be read in "
                "order. Set train_sampling_strategy='sequential', and the batch size of the run."
            )
        if self._stream is None or first != self._next_row:
            self._start(first)
        return RowBatch(self._take(len(indices)))

    def _start(self, row: int) -> None:
        if row not in self._positions:
            raise ValueError(
                f"streamed row {row} cannot be read: {self._next_row} rows have been read, and the position of this "
                "row is unknown. Resume from a checkpoint of this run."
            )
        self.close()
        self._stream = _prefetch(self._chunks(self._positions[row]))
        self._next_row = row
        self._rows = np.zeros((0, self.context_length + 1))
        self._following: deque[Position] = deque()

    def _take(self, number: int) -> np.ndarray:
        assert self._stream is not None
        while len(self._rows) < number:
            rows, following = next(self._stream)
            self._rows = np.concatenate([self._rows, rows]) if len(self._rows) else rows
            self._following += following
        taken, self._rows = self._rows[:number], self._rows[number:]
        for _ in range(number):
            position = self._following.popleft()
        self._next_row += number
        self._positions[self._next_row] = position
        # the Trainer reads only a batch or two ahead
        while len(self._positions) > 64:
            del self._positions[min(self._positions)]
        return taken

    def close(self) -> None:
        """Stop prefetching."""
        if self._stream is not None:
            self._stream.close()  # type: ignore[attr-defined]
            self._stream = None

    def save_position(self, folder: str | Path, num_rows: int) -> None:
        """Save the position of this process after its first `num_rows` rows."""
        position = dataclasses.asdict(self._positions[num_rows])
        content = {"num_rows": num_rows, "position": position}
        self._position_file(folder).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def load_position(self, folder: str | Path) -> None:
        """Load the position that `save_position` saved, so that reading can resume there.

        Raises:
            ValueError: the folder is not a checkpoint of a streaming run with as many processes.
        """
        path = self._position_file(folder)
        if not path.is_file():
            raise ValueError(f"{path} is missing: {folder} is not a checkpoint of a run with --streaming.")
        content = json.loads(path.read_text(encoding="utf-8"))
        self._positions = {0: Position(), content["num_rows"]: Position(**content["position"])}

    def _position_file(self, folder: str | Path) -> Path:
        return Path(folder, f"stream_{self.process_index}.json")

    def _shards(self, epoch: int) -> list[int]:
        order = seeded_generator(self.seed, epoch).permutation(self.documents.num_shards)
        is_split = self.documents.num_shards >= self.num_processes
        return (order[self.process_index :: self.num_processes] if is_split else order).tolist()

    def _is_for_this_process(self, text: str, row: int) -> bool:
        if self.documents.num_shards < self.num_processes and row % self.num_processes != self.process_index:
            return False
        return bool(text.strip()) and not is_held_out(text, self.validation_fraction, self.split_seed)

    def _blocks(self, position: Position) -> Iterator[tuple[Position, list[str]]]:
        """Yield blocks of documents in the order of the corpus, each with the position where it begins."""
        first_shard, row = position.shard, position.row
        for epoch in itertools.count(position.epoch):
            begin, block, size, is_empty = Position(epoch, first_shard, row), [], 0, epoch > position.epoch
            shards = self._shards(epoch)
            for number in range(first_shard, len(shards)):
                for text, row in self.documents.read(shards[number], row):  # noqa: B020
                    if not self._is_for_this_process(text, row):
                        continue
                    block.append(text)
                    size += len(text)
                    is_empty = False
                    if size >= self.shuffle_characters:
                        yield begin, block
                        begin, block, size = Position(epoch, number, row), [], 0
                row = 0
            if block:
                yield begin, block
            if is_empty:
                raise ValueError(
                    f"corpus {self.documents.name} has no training documents for process {self.process_index} of "
                    f"{self.num_processes}. Lower validation_fraction={self.validation_fraction}, or use fewer "
                    "processes."
                )
            first_shard = row = 0

    def _shuffled(self, start: Position) -> Iterator[tuple[str, Position]]:
        """Yield shuffled documents from a position, each with its own position."""
        skipped = start.document
        for begin, block in self._blocks(start):
            entropy = [self.seed, begin.epoch, begin.shard, begin.row, self.process_index]
            order = np.random.Generator(np.random.PCG64(entropy)).permutation(len(block))
            for number in range(skipped, len(block)):
                yield block[order[number]], dataclasses.replace(begin, document=number)
            skipped = 0

    def _chunks(self, start: Position) -> Iterator[tuple[np.ndarray, list[Position]]]:
        """Yield rows (n, T + 1) from a position, and for each row the position where the next one begins."""
        width = self.context_length
        batches = tokenize(self._shuffled(start), self.tokenizer, self.num_workers)
        tokens, first = np.zeros(0, np.int64), 0
        skipped = start.token
        # start of each document, in tokens from the start of the first one
        begins: deque[tuple[int, Position]] = deque()
        begins_document = True
        with contextlib.closing(batches):
            for pieces, encoded in batches:
                parts, end = [tokens], first + len(tokens)
                for piece, ids in zip(pieces, encoded, strict=True):
                    if begins_document:
                        begins.append((end, piece.tag))
                        parts.append(np.array([self.tokenizer.eos_token_id], ids.dtype))
                        end += 1
                    parts.append(ids)
                    end += len(ids)
                    begins_document = piece.ends_document
                tokens = np.concatenate(parts[len(tokens) == 0 :])
                now = min(skipped, len(tokens))
                tokens, first, skipped = tokens[now:], first + now, skipped - now
                # the last token of a row is the first of the next one
                count = max(0, len(tokens) - 1) // width
                if count == 0:
                    continue
                following = []
                for row_start in range(first + width, first + count * width + 1, width):
                    while len(begins) > 1 and begins[1][0] <= row_start:
                        begins.popleft()
                    begin, position = begins[0]
                    following.append(dataclasses.replace(position, token=row_start - begin))
                windows = np.lib.stride_tricks.sliding_window_view(tokens, width + 1)[: count * width : width]
                yield windows, following
                tokens, first = tokens[count * width :], first + count * width


def _prefetch(items: Iterator[Any]) -> Iterator[Any]:
    """Yield items that a thread prepares in advance. Closing the iterator ends the thread."""
    results: queue.Queue = queue.Queue(NUM_PREFETCHED)
    is_closed = threading.Event()

    def put(result: tuple[Any, BaseException | None]) -> None:
        while not is_closed.is_set():
            with contextlib.suppress(queue.Full):
                return results.put(result, timeout=0.1)

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if is_closed.is_set():
                    break
        except BaseException as error:
            # raised in the consumer
            put((None, error))
        finally:
            items.close()  # type: ignore[attr-defined]

    thread = threading.Thread(target=work, name="stream", daemon=True)
    thread.start()
    try:
        while True:
            item, error = results.get()
            if error is not None:
                raise error
            yield item
    finally:
        is_closed.set()
        thread.join()


@dataclass(frozen=True)
class StreamedCorpus:
    """A streamed corpus and its held-out set.

    Attributes:
        documents: the corpus.
        validation: the held-out documents among the first `num_sampled` documents.
        num_sampled: number of documents that were searched for held-out ones.
    """

    documents: ShardedDocuments
    validation: TokenStore
    num_sampled: int

    def describe(self) -> dict[str, str]:
        """Describe the training data and the held-out set."""
        return {
            "Trained on": f"a stream of {self.documents.num_shards:,} shards",
            "Held out": f"{self.validation.num_documents:,} documents, {self.validation.num_tokens:,} tokens",
        }


def sample_documents(
    documents: ShardedDocuments, number: int, *, held_out: bool, validation_fraction: float, seed: int
) -> Documents:
    """Return the held-out documents, or the other ones, among the first documents of the shuffled shards."""

    def read() -> Iterator[str]:
        for text in _first_documents(documents, number, seed):
            if is_held_out(text, validation_fraction, seed) == held_out:
                yield text

    fingerprint = json_digest(documents.fingerprint, number, held_out, validation_fraction, seed)
    return Documents(documents.name, fingerprint, read)


def _first_documents(documents: ShardedDocuments, number: int, seed: int) -> Iterator[str]:
    order = np.random.Generator(np.random.PCG64(seed)).permutation(documents.num_shards).tolist()
    texts = (text for shard in order for text, _ in documents.read(shard) if text.strip())
    return itertools.islice(texts, number)


def prepare_stream(
    documents: ShardedDocuments,
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: str | Path,
    *,
    num_sampled: int,
    validation_fraction: float,
    seed: int = 0,
) -> StreamedCorpus:
    """Tokenize the held-out documents among the first `num_sampled` ones into `cache_dir`, or find them there.

    Warns if their share of the text is far from `validation_fraction`, since whole documents are held out.

    Raises:
        ValueError: none of these documents is held out.
    """
    held_out = sample_documents(
        documents, num_sampled, held_out=True, validation_fraction=validation_fraction, seed=seed
    )
    folder = Path(cache_dir) / json_digest("stream", held_out.fingerprint, tokenizer_fingerprint(tokenizer))
    if not folder.is_dir():
        with atomic_folder(folder) as work:
            writer = TokenStoreWriter(work / "validation", tokenizer.eos_token_id, num_ids(tokenizer))
            num_documents = 0
            for pieces, encoded in tokenize(((text, None) for text in held_out), tokenizer, os.cpu_count() or 1):
                for piece, ids in zip(pieces, encoded, strict=True):
                    writer.add(ids, len(piece.text.encode()), piece.ends_document)
                    num_documents += piece.ends_document
            if num_documents == 0:
                raise ValueError(
                    f"none of the first {num_sampled} documents of {documents.name} is held out with "
                    f"validation_fraction={validation_fraction}. Increase --streaming_sample or --validation_fraction."
                )
            sampled = _first_documents(documents, num_sampled, seed)
            writer.close(sampled_bytes=sum(len(text.encode()) for text in sampled))
    validation = TokenStore.open(folder / "validation")
    # stores of earlier versions lack this field
    if sampled_bytes := validation.manifest.get("sampled_bytes"):
        source = f"the first {num_sampled} documents of {documents.name}"
        warn_of_share(source, validation_fraction, sampled_bytes - validation.num_bytes, validation.num_bytes)
    return StreamedCorpus(documents, validation, num_sampled)
