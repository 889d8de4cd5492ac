"""Training rows from a corpus that is never stored: read, shuffled and tokenized while the model trains.

A process's rows follow from the corpus, the seed and its number alone, and a place in them is a few integers (a
`Position`): a run is resumed by reading one shard from a row on, not by replaying what it has seen.

Each epoch puts the shards into another order and deals them out to the processes. A process reads its shards in that
order, collects a block of documents, shuffles the block, and cuts the documents, one after another with an EOS
between, into rows. The shuffle of a block depends on nothing but where the block begins.
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

from ..atomic import made_at_once
from ..tokenization import num_ids, tokenizer_fingerprint
from .corpora import Documents, ShardedDocuments
from .rows import Row, RowBatch
from .token_store import TokenStore, TokenStoreWriter, tokenize, warn_of_share


# Chunks of rows, of about 60,000 tokens each, that are made before they are asked for.
NUM_AHEAD = 8


@dataclass(frozen=True)
class Position:
    """A place in a process's stream of tokens.

    Attributes:
        epoch: passes over the corpus.
        shard: where the current block of documents begins: number in the process's order of this epoch, and
        row: in that shard.
        document: number in the shuffled block.
        token: of the EOS before that document, and its ids.
    """

    epoch: int = 0
    shard: int = 0
    row: int = 0
    document: int = 0
    token: int = 0


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Whether a document is for validation: it depends on its text alone, so no copy of it is trained on."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little", signed=True)).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


class StreamedRows(Dataset):
    """`num_rows` rows of a stream without end: item i is `{"input_ids": (T,), "shift_labels": (T,)}`, int64.

    Items can only be asked for in their order (`train_sampling_strategy="sequential"`), by the process that they
    belong to: batch i is one of process `i % num_processes`. An epoch of the Trainer is the whole run; the stream
    goes over the corpus as often as that takes.

    Args:
        documents: the corpus.
        tokenizer: of the model.
        context_length: T.
        num_rows: of all processes together.
        rows_per_batch: of one process.
        num_processes, process_index: with fewer shards than processes, all read all shards and take every
            `num_processes`-th document.
        seed: of the shuffles.
        shuffle_characters: documents are shuffled in blocks of this many characters; two blocks are in memory.
        validation_fraction, split_seed: of `is_held_out`; those documents are left out.
        num_workers: threads that tokenize; default: this process's share of the cores.
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
        # by this process's rows: where the next batches begin
        self._positions = {0: Position()}
        self._stream: Iterator[tuple[np.ndarray, list[Position]]] | None = None
        self._next_row = 0

    def fingerprint(self) -> str:
        """Changes when the rows do."""
        names = ("context_length", "num_rows", "rows_per_batch", "num_processes", "seed", "shuffle_characters")
        settings = [getattr(self, name) for name in (*names, "validation_fraction", "split_seed")]
        return _digest(self.documents.fingerprint, tokenizer_fingerprint(self.tokenizer), settings)

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
                f"process {self.process_index} was asked for rows {list(indices)[:4]}...: rows of a stream are read "
                "in their order only. Set train_sampling_strategy='sequential' and the batch size of the run."
            )
        if self._stream is None or first != self._next_row:
            self._start(first)
        return RowBatch(self._take(len(indices)))

    def _start(self, row: int) -> None:
        if row not in self._positions:
            raise ValueError(
                f"row {row} of a stream was asked for, of which {self._next_row} are read, and no position there is "
                "known: resume from a checkpoint that this run has written."
            )
        self.close()
        self._stream = _ahead(self._chunks(self._positions[row]))
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
        # the Trainer reads a batch or two ahead of what it trains on
        while len(self._positions) > 64:
            del self._positions[min(self._positions)]
        return taken

    def close(self) -> None:
        """Stop reading ahead."""
        if self._stream is not None:
            self._stream.close()  # type: ignore[attr-defined]
            self._stream = None

    def save_position(self, folder: str | Path, num_rows: int) -> None:
        """Write down where this process goes on after its first `num_rows` rows."""
        position = dataclasses.asdict(self._positions[num_rows])
        content = {"num_rows": num_rows, "position": position}
        self._position_file(folder).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def load_position(self, folder: str | Path) -> None:
        """Know the place that `save_position` wrote down, so that the row there can be asked for.

        Raises:
            ValueError: the folder is not from a streaming run of as many processes.
        """
        path = self._position_file(folder)
        if not path.is_file():
            raise ValueError(f"{path} is missing: {folder} is no checkpoint of a run with --streaming.")
        content = json.loads(path.read_text(encoding="utf-8"))
        self._positions = {0: Position(), content["num_rows"]: Position(**content["position"])}

    def _position_file(self, folder: str | Path) -> Path:
        return Path(folder, f"stream_{self.process_index}.json")

    def _shards(self, epoch: int) -> list[int]:
        order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.documents.num_shards)
        is_split = self.documents.num_shards >= self.num_processes
        return (order[self.process_index :: self.num_processes] if is_split else order).tolist()

    def _is_for_here(self, text: str, row: int) -> bool:
        if self.documents.num_shards < self.num_processes and row % self.num_processes != self.process_index:
            return False
        return bool(text.strip()) and not is_held_out(text, self.validation_fraction, self.split_seed)

    def _blocks(self, position: Position) -> Iterator[tuple[Position, list[str]]]:
        """Blocks of documents in the order of the corpus, each with where it begins."""
        first_shard, row = position.shard, position.row
        for epoch in itertools.count(position.epoch):
            begin, block, size, is_empty = Position(epoch, first_shard, row), [], 0, epoch > position.epoch
            shards = self._shards(epoch)
            for number in range(first_shard, len(shards)):
                for text, row in self.documents.read(shards[number], row):  # noqa: B020
                    if not self._is_for_here(text, row):
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
                    f"corpus {self.documents.name} has no documents to train on for process {self.process_index} of "
                    f"{self.num_processes}, but for those held out; lower validation_fraction, or use fewer processes"
                )
            first_shard = row = 0

    def _shuffled(self, start: Position) -> Iterator[tuple[str, Position]]:
        """Documents from a position on, each with its own."""
        skipped = start.document
        for begin, block in self._blocks(start):
            entropy = [self.seed, begin.epoch, begin.shard, begin.row, self.process_index]
            order = np.random.Generator(np.random.PCG64(entropy)).permutation(len(block))
            for number in range(skipped, len(block)):
                yield block[order[number]], dataclasses.replace(begin, document=number)
            skipped = 0

    def _chunks(self, start: Position) -> Iterator[tuple[np.ndarray, list[Position]]]:
        """Rows (n, T + 1) from a position on, and of each where the next one begins."""
        width = self.context_length
        batches = tokenize(self._shuffled(start), self.tokenizer, self.num_workers)
        tokens, first = np.zeros(0, np.int64), 0
        skipped = start.token
        # where documents begin, counted in tokens from that of `start`
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
                for place in range(first + width, first + count * width + 1, width):
                    while len(begins) > 1 and begins[1][0] <= place:
                        begins.popleft()
                    begin, position = begins[0]
                    following.append(dataclasses.replace(position, token=place - begin))
                windows = np.lib.stride_tricks.sliding_window_view(tokens, width + 1)[: count * width : width]
                yield windows, following
                tokens, first = tokens[count * width :], first + count * width


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, made by a thread some time before they are asked for; closing it ends the thread."""
    results: queue.Queue = queue.Queue(NUM_AHEAD)
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
            # it is raised where the items are read
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
    """A corpus to train on by streaming, and the documents of its beginning that are held out.

    Attributes:
        documents: the corpus.
        validation: the held-out documents among the first ones.
        num_sampled: how many these were.
    """

    documents: ShardedDocuments
    validation: TokenStore
    num_sampled: int

    def describe(self) -> dict[str, str]:
        """For people: what is trained on and held out."""
        return {
            "Trained on": f"a stream of {self.documents.num_shards:,} shards",
            "Held out": f"{self.validation.num_documents:,} documents, {self.validation.num_tokens:,} tokens",
        }


def sample_documents(
    documents: ShardedDocuments, number: int, *, held_out: bool, validation_fraction: float, seed: int
) -> Documents:
    """Of the first documents, in a seeded order of the shards, those that are held out, or the others."""

    def read() -> Iterator[str]:
        for text in _first_documents(documents, number, seed):
            if is_held_out(text, validation_fraction, seed) == held_out:
                yield text

    fingerprint = _digest(documents.fingerprint, number, held_out, validation_fraction, seed)
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
    """Tokenize the held-out documents among the first `num_sampled`; later calls find them in `cache_dir`.

    Warns if they are not about that share of the text: documents of a stream are held out whole.

    Raises:
        ValueError: none of them is held out.
    """
    held_out = sample_documents(
        documents, num_sampled, held_out=True, validation_fraction=validation_fraction, seed=seed
    )
    folder = Path(cache_dir) / _digest("stream", held_out.fingerprint, tokenizer_fingerprint(tokenizer))
    if not folder.is_dir():
        with made_at_once(folder) as work:
            writer = TokenStoreWriter(work / "validation", tokenizer.eos_token_id, num_ids(tokenizer))
            num_documents = 0
            for pieces, encoded in tokenize(((text, None) for text in held_out), tokenizer, os.cpu_count() or 1):
                for piece, ids in zip(pieces, encoded, strict=True):
                    writer.add(ids, len(piece.text.encode()), piece.ends_document)
                    num_documents += piece.ends_document
            if num_documents == 0:
                raise ValueError(
                    f"none of the first {num_sampled} documents of {documents.name} is held out at "
                    f"validation_fraction={validation_fraction}; raise --streaming_sample or --validation_fraction"
                )
            sampled = _first_documents(documents, num_sampled, seed)
            writer.close(sampled_bytes=sum(len(text.encode()) for text in sampled))
    validation = TokenStore.open(folder / "validation")
    # stores of earlier versions do not say it
    if sampled_bytes := validation.manifest.get("sampled_bytes"):
        source = f"the first {num_sampled} documents of {documents.name}"
        warn_of_share(source, validation_fraction, sampled_bytes - validation.num_bytes, validation.num_bytes)
    return StreamedCorpus(documents, validation, num_sampled)


def _digest(*content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
