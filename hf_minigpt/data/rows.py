"""Cut a token store into rows for training and evaluation, as views that copy no tokens.

A row is `context_length + 1` tokens: all but the last are inputs, all but the first are targets. The order of rows
depends only on the seed and the epoch, so the position in a run is one integer.
"""

from collections.abc import Sequence
from typing import overload

import numpy as np
import torch
from torch.utils.data import Dataset

from .token_store import TokenStore


Row = dict[str, torch.Tensor]

# The default `bare_share` of `AlignedDocumentRows`. Averaged over three seeds of the default run, the bits per byte
# relative to the entropy are 1.054 with it and 1.054 without it.
BARE_SHARE = 0.1


def seeded_generator(seed: int, epoch: int) -> np.random.Generator:
    """Return the random generator of an epoch."""
    return np.random.Generator(np.random.PCG64([seed, epoch]))


class RowBatch(Sequence[Row]):
    """Rows of one length, as a sequence and as one array.

    Attributes:
        tokens: (num_rows, T + 1) array of the store's dtype.
    """

    def __init__(self, tokens: np.ndarray):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "RowBatch": ...
    def __getitem__(self, index: int | slice) -> "Row | RowBatch":
        if isinstance(index, slice):
            return RowBatch(self.tokens[index])
        tokens = torch.from_numpy(self.tokens[index].astype(np.int64))
        return {"input_ids": tokens[:-1], "shift_labels": tokens[1:]}


class Rows(Dataset):
    """Base class of the row datasets. Item i is `{"input_ids": (T,), "shift_labels": (T,)}`, int64."""

    def __init__(self, store: TokenStore, context_length: int):
        if context_length < 1:
            raise ValueError(f"context_length={context_length} must be at least 1.")
        self.store = store
        self.context_length = context_length
        # indexing a plain array is ten times as fast as indexing a memory map, and reads the same pages
        self._tokens = store.tokens.view(np.ndarray)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_tokens"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._tokens = self.store.tokens.view(np.ndarray)

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Row:
        # a range handles negative indices, and raises the IndexError that ends a for loop
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Row]:
        return RowBatch(self._gather(np.asarray(indices, dtype=np.int64)))

    def _gather(self, indices: np.ndarray) -> np.ndarray:
        """Return the tokens of rows: (n,) -> (n, context_length + 1) of the store's dtype."""
        raise NotImplementedError

    def _concatenate(self, begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Concatenate pieces of the store: begins (n,) and sizes (n,) -> (sum of sizes,)."""
        positions = np.repeat(begins - (np.cumsum(sizes) - sizes), sizes)
        positions += np.arange(len(positions))
        # all positions are in range: this mode is faster because it does not check
        return self._tokens.take(positions, mode="wrap")


def _check_one_row(store: TokenStore, context_length: int) -> None:
    if store.num_tokens < context_length + 1:
        raise ValueError(
            f"corpus {store.folder} has {store.num_tokens} tokens, and one row of context_length={context_length} "
            f"requires {context_length + 1}. Provide more text, or set context_length to at most "
            f"{store.num_tokens - 1}."
        )


class WindowRows(Rows):
    """Base class of rows that are windows of consecutive tokens, given by their start positions."""

    def __init__(self, store: TokenStore, context_length: int):
        super().__init__(store, context_length)
        _check_one_row(store, context_length)

    def _starts(self, indices: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _gather(self, indices: np.ndarray) -> np.ndarray:
        windows = np.lib.stride_tricks.sliding_window_view(self._tokens, self.context_length + 1)
        return windows[self._starts(indices)]


class RandomWindowRows(WindowRows):
    """`num_rows` windows per epoch at random positions, like nanoGPT's batches."""

    def __init__(self, store: TokenStore, context_length: int, num_rows: int, seed: int = 0):
        super().__init__(store, context_length)
        self.num_rows = num_rows
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        last_start = self.store.num_tokens - self.context_length - 1
        rng = seeded_generator(self.seed, epoch)
        self._random_starts = rng.integers(0, last_start, size=self.num_rows, endpoint=True)

    def __len__(self) -> int:
        return self.num_rows

    def _starts(self, indices: np.ndarray) -> np.ndarray:
        return self._random_starts[indices]


class ShuffledDocumentRows(Rows):
    """Rows cut from the concatenated documents, which are shuffled each epoch.

    All rows have the same length. Over the epochs a token occurs at different positions and after different documents.
    The tail that is too short for a row is dropped, a different one each epoch.
    """

    def __init__(self, store: TokenStore, context_length: int, seed: int = 0):
        super().__init__(store, context_length)
        _check_one_row(store, context_length)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle the documents. The order depends only on the seed and the epoch."""
        self.epoch = epoch
        order = seeded_generator(self.seed, epoch).permutation(self.store.num_documents)
        # the store's first token, an EOS, stays in front as a document of one token
        lengths = np.concatenate([[1], np.diff(self.store.offsets)[order]])
        # (num_documents + 2,): start positions of the documents in the shuffled order, and its end
        self._begins = np.concatenate([[0], np.cumsum(lengths)])
        # (num_documents + 1,): offset from a position in the shuffled order to the position in the store
        self._shifts = np.concatenate([[0], self.store.offsets[order]]) - self._begins[:-1]

    def __len__(self) -> int:
        return (self.store.num_tokens - 1) // self.context_length

    def _gather(self, indices: np.ndarray) -> np.ndarray:
        width = self.context_length + 1
        row_begins = indices * self.context_length
        first = np.searchsorted(self._begins, row_begins, side="right") - 1
        last = np.searchsorted(self._begins, row_begins + width, side="left") - 1
        # one segment per document and row
        counts = last - first + 1
        row = np.repeat(np.arange(len(indices)), counts)
        document = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(len(row))
        begins = np.maximum(self._begins[document], row_begins[row])
        ends = np.minimum(self._begins[document + 1], row_begins[row] + width)
        lengths = ends - begins
        return self._concatenate(begins + self._shifts[document], lengths).reshape(len(indices), width)


class AlignedDocumentRows(Rows):
    """Rows that each begin at the start of a document, as in nanochat, with the documents shuffled each epoch.

    The first input of a row is the EOS before a document. Documents follow until the row is full, and the last one is
    truncated. So every token sees as much of its own document as fits in a row, as in evaluation and use. In
    `ShuffledDocumentRows`, by contrast, the first document of a row lacks its beginning. A document longer than a row
    is cut into full rows of its own: the first begins at its start, the last ends at its end, and the ones between
    begin at a random offset.

    A share of the rows begins with the document's first token, without the EOS. Many programs tokenize prompts without
    special tokens, and a model that was never trained on such text generates nonsense after it.

    The number of rows per epoch is that of `ShuffledDocumentRows`. Some documents occur twice per epoch, to replace
    the truncated text.

    Args:
        store: tokens and document offsets.
        context_length: T.
        seed: seed of the shuffles.
        bare_share: share of the rows that begin without the EOS.
    """

    def __init__(self, store: TokenStore, context_length: int, seed: int = 0, bare_share: float = BARE_SHARE):
        super().__init__(store, context_length)
        _check_one_row(store, context_length)
        if not 0 <= bare_share <= 1:
            raise ValueError(f"bare_share={bare_share} must be in [0, 1].")
        self.seed = seed
        self.bare_share = bare_share
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Lay out the rows of an epoch. They depend only on the seed, the epoch and `bare_share`."""
        self.epoch = epoch
        rng = seeded_generator(self.seed, epoch)
        passes: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        num_rows = num_pieces = 0
        # one pass over the documents makes too few rows if many are truncated, or a few too many
        while num_rows < len(self):
            pieces, counts = self._one_pass(rng)
            firsts = num_pieces + np.cumsum(counts) - counts
            rows = rng.permutation(len(counts))[: len(self) - num_rows]
            passes.append((pieces, firsts[rows], counts[rows]))
            num_rows += len(rows)
            num_pieces += pieces.shape[1]
        # (2, num_pieces): start in the store and number of tokens of each piece of a row
        self._pieces = np.concatenate([pieces for pieces, _, _ in passes], axis=1)
        # (num_rows,): first piece and number of pieces of each row
        self._firsts = np.concatenate([firsts for _, firsts, _ in passes])
        self._counts = np.concatenate([counts for _, _, counts in passes])
        # Without the EOS a row needs one more token at its end, and the store's last token has no successor.
        lasts = self._pieces[:, self._firsts + self._counts - 1]
        has_next = lasts.sum(axis=0) < self.store.num_tokens
        self._is_bare = (rng.random(len(self)) < self.bare_share) & has_next

    def _one_pass(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the pieces (2, num_pieces) in row order, and the number of pieces of each row (num_rows,)."""
        offsets = np.asarray(self.store.offsets)
        lengths = np.diff(offsets)
        is_long = lengths >= self.context_length
        windows = _cut_long_documents(offsets[:-1][is_long], lengths[is_long], self.context_length, rng)
        order = rng.permutation(np.flatnonzero(~is_long))
        packed, counts = _pack_short_documents(offsets[order], lengths[order], self.context_length)
        alone = np.stack([windows, np.full_like(windows, self.context_length)])
        return np.concatenate([alone, packed], axis=1), np.concatenate([np.ones_like(windows), counts])

    def __len__(self) -> int:
        return (self.store.num_tokens - 1) // self.context_length

    def _gather(self, indices: np.ndarray) -> np.ndarray:
        counts = self._counts[indices]
        firsts = np.cumsum(counts) - counts
        begins, sizes = self._pieces[:, np.repeat(self._firsts[indices] - firsts, counts) + np.arange(counts.sum())]
        # the first input is the token before the first target, except in bare rows
        is_bare = self._is_bare[indices]
        begins[firsts] -= ~is_bare
        sizes[firsts] += ~is_bare
        sizes[firsts + counts - 1] += is_bare
        return self._concatenate(begins, sizes).reshape(len(indices), self.context_length + 1)


def _cut_long_documents(begins: np.ndarray, lengths: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return start positions of windows of `size` tokens that cover documents of at least that length.

    A document gets a window at its start, one at its end, and one every `size` tokens from a random offset between.

    Args:
        begins, lengths: (n,) start and length of each document.
        size: tokens per window.
        rng: source of the offsets.
    """
    phases = rng.integers(1, size, size=len(begins), endpoint=True)
    inner = np.maximum(0, -((lengths - size - phases) // -size))
    counts = 1 + inner + (lengths > size)
    document = np.repeat(np.arange(len(begins)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.where(number == 0, 0, phases[document] + (number - 1) * size)
    return begins[document] + np.minimum(starts, lengths[document] - size)


def _pack_short_documents(begins: np.ndarray, lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill rows with documents in order, truncating the last document of each row.

    The next row begins with the next document. The last row is filled with documents from the beginning.

    Args:
        begins, lengths: (n,) start and length of each document.
        size: tokens per row.

    Returns:
        Pieces (2, num_pieces) and the number of pieces in each row, (num_rows,).
    """
    number = len(begins)
    if number == 0:
        return np.zeros((2, 0), np.int64), np.zeros(0, np.int64)
    begins, lengths = np.resize(begins, number + size), np.resize(lengths, number + size)
    ends = np.cumsum(lengths)
    # (n,): if a row begins with document i, the next row begins with following[i]
    following = (np.searchsorted(ends, ends[:number] - lengths[:number] + size) + 1).tolist()
    firsts = [0]
    while following[firsts[-1]] < number:
        firsts.append(following[firsts[-1]])
    stops = np.array([*firsts[1:], following[firsts[-1]]])
    sizes = lengths[: stops[-1]].copy()
    sizes[stops - 1] -= ends[stops - 1] - (ends[firsts] - lengths[firsts] + size)
    return np.stack([begins[: stops[-1]], sizes]), np.diff(stops, prepend=0)


class DocumentRows(Rows):
    """Rows for evaluation: every token and every EOS of the store is predicted exactly once.

    A row begins with the EOS before a document and contains as many whole documents as fit. Only a document longer
    than a row is cut, and whole documents follow its last piece. Rows have up to `context_length` tokens, and the
    collator pads them.
    """

    def __init__(self, store: TokenStore, context_length: int):
        super().__init__(store, context_length)
        offsets = np.asarray(store.offsets)
        begins = [1]
        while begins[-1] < store.num_tokens:
            begin = begins[-1]
            end = int(offsets[np.searchsorted(offsets, begin + context_length, side="right") - 1])
            begins.append(end if end > begin else begin + context_length)
        # (num_rows + 1,): position of the first target of each row, and the end
        self._begins = np.array(begins)

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        rows = []
        for begin, end in zip(self._begins[indices], self._begins[np.asarray(indices) + 1], strict=True):
            tokens = torch.from_numpy(self._tokens[begin - 1 : end].astype(np.int64))
            rows.append({"input_ids": tokens[:-1], "shift_labels": tokens[1:]})
        return rows
