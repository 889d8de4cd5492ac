"""Every way of cutting a token store into rows, as index views: nothing is copied, no shuffle is written down.

A row is `context_length + 1` consecutive tokens: the inputs are all but the last, the targets all but the first. The
order of an epoch follows from (seed, epoch) alone, so the position in a run is one integer.
"""

from collections.abc import Sequence
from typing import overload

import numpy as np
import torch
from torch.utils.data import Dataset

from .token_store import TokenStore


Row = dict[str, torch.Tensor]

# Share of the rows of `AlignedDocumentRows` that begin without the EOS. A tenth costs nothing: over three seeds of the
# default run, bits per byte over the entropy are 1.054 with it and 1.054 without.
BARE_SHARE = 0.1


def seeded_generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, epoch]))


class RowBatch(Sequence[Row]):
    """Rows of one length, as a sequence of them and as one array.

    Attributes:
        tokens: (n, T + 1), of the store's type.
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
    """Base of the views: item i is `{"input_ids": (T,), "shift_labels": (T,)}`, int64."""

    def __init__(self, store: TokenStore, context_length: int):
        if context_length < 1:
            raise ValueError(f"context_length={context_length} must be at least 1")
        self.store = store
        self.context_length = context_length
        # indexing a plain array is ten times faster than indexing a memory map, and reads the same pages
        self._tokens = store.tokens.view(np.ndarray)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_tokens"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._tokens = self.store.tokens.view(np.ndarray)

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Row:
        # the range knows negative indices and raises the IndexError that ends a for loop
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Row]:
        return RowBatch(self._gather(np.asarray(indices, dtype=np.int64)))

    def _gather(self, indices: np.ndarray) -> np.ndarray:
        """(n,) -> (n, context_length + 1) of the store's type."""
        raise NotImplementedError

    def _join(self, begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """The tokens of pieces of the store one after the other, (sum of sizes,)."""
        places = np.repeat(begins - (np.cumsum(sizes) - sizes), sizes)
        places += np.arange(len(places))
        # (every place is inside: the mode only tells numpy not to check)
        return self._tokens.take(places, mode="wrap")


def _check_one_row(store: TokenStore, context_length: int) -> None:
    if store.num_tokens < context_length + 1:
        raise ValueError(
            f"corpus {store.folder} has {store.num_tokens} tokens, a row of context_length={context_length} needs "
            f"{context_length + 1}; give more text, or a context_length of at most {store.num_tokens - 1}"
        )


class WindowRows(Rows):
    """Base of the views whose rows are windows of the store, told by where they start."""

    def __init__(self, store: TokenStore, context_length: int):
        super().__init__(store, context_length)
        _check_one_row(store, context_length)

    def _starts(self, indices: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _gather(self, indices: np.ndarray) -> np.ndarray:
        windows = np.lib.stride_tricks.sliding_window_view(self._tokens, self.context_length + 1)
        return windows[self._starts(indices)]


class SlidingWindowRows(WindowRows):
    """Windows of `max_length` every `stride` tokens: with a smaller stride they overlap, with a larger one skip."""

    def __init__(self, store: TokenStore, max_length: int, stride: int):
        super().__init__(store, max_length)
        if stride < 1:
            raise ValueError(f"stride={stride} must be at least 1")
        self.stride = stride

    def __len__(self) -> int:
        return len(range(0, self.store.num_tokens - self.context_length, self.stride))

    def _starts(self, indices: np.ndarray) -> np.ndarray:
        return indices * self.stride


class ContextRows(SlidingWindowRows):
    """Row k predicts tokens `k * T + 1` to `k * T + T` of the store: every token once, but for a tail below T."""

    def __init__(self, store: TokenStore, context_length: int):
        super().__init__(store, context_length, stride=context_length)


class RandomWindowRows(WindowRows):
    """`num_rows` windows at random places an epoch, as nanoGPT draws its batches."""

    def __init__(self, store: TokenStore, context_length: int, num_rows: int, seed: int = 0):
        super().__init__(store, context_length)
        self.num_rows = num_rows
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        last_start = self.store.num_tokens - self.context_length - 1
        self._places = seeded_generator(self.seed, epoch).integers(0, last_start, size=self.num_rows, endpoint=True)

    def __len__(self) -> int:
        return self.num_rows

    def _starts(self, indices: np.ndarray) -> np.ndarray:
        return self._places[indices]


class ShuffledDocumentRows(Rows):
    """`ContextRows` of the store with its documents in another order each epoch.

    Rows are of constant length, and over the epochs a token is seen at every position and after other documents; the
    tail that is too short for a row is another one each time.
    """

    def __init__(self, store: TokenStore, context_length: int, seed: int = 0):
        super().__init__(store, context_length)
        _check_one_row(store, context_length)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle the documents for an epoch; the order depends on nothing but the seed and the epoch."""
        self.epoch = epoch
        order = seeded_generator(self.seed, epoch).permutation(self.store.num_documents)
        # the EOS that the store begins with stays in front, as a document of one token
        lengths = np.concatenate([[1], np.diff(self.store.offsets)[order]])
        # (num_documents + 2,): where the documents begin in the shuffled order, and its end
        self._begins = np.concatenate([[0], np.cumsum(lengths)])
        # (num_documents + 1,): from a place in the shuffled order to the place in the store
        self._shifts = np.concatenate([[0], self.store.offsets[order]]) - self._begins[:-1]

    def __len__(self) -> int:
        return (self.store.num_tokens - 1) // self.context_length

    def _gather(self, indices: np.ndarray) -> np.ndarray:
        width = self.context_length + 1
        row_begins = indices * self.context_length
        first = np.searchsorted(self._begins, row_begins, side="right") - 1
        last = np.searchsorted(self._begins, row_begins + width, side="left") - 1
        # one segment for each document in each row
        counts = last - first + 1
        row = np.repeat(np.arange(len(indices)), counts)
        document = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(len(row))
        begins = np.maximum(self._begins[document], row_begins[row])
        ends = np.minimum(self._begins[document + 1], row_begins[row] + width)
        lengths = ends - begins
        return self._join(begins + self._shifts[document], lengths).reshape(len(indices), width)


class AlignedDocumentRows(Rows):
    """Rows that begin with a document, in another order of the documents each epoch.

    The first input of a row is the EOS before a document; documents follow each other until the row is full, and its
    end cuts the last one, which another time is seen whole. So every token has all of its document before it that a
    row can hold, while in `ShuffledDocumentRows` a row's first document lacks its beginning, as it never does in
    evaluation or use (nanochat's rows are such too). A document longer than a row is cut into whole rows of its own:
    the first at its beginning, the last at its end, those between from a random place on.

    A share of the rows begins with the document's first token instead, without the EOS before it: many programs
    tokenize a prompt without special tokens, and a model that has never seen such a text writes nonsense after it.

    An epoch has as many rows as the corpus fills. What the cuts leave out is made up for by other documents, which
    then come twice.

    Args:
        bare_share: share of the rows that begin without the EOS.
    """

    def __init__(self, store: TokenStore, context_length: int, seed: int = 0, bare_share: float = BARE_SHARE):
        super().__init__(store, context_length)
        _check_one_row(store, context_length)
        if not 0 <= bare_share <= 1:
            raise ValueError(f"bare_share={bare_share} is a share of the rows: choose one in [0, 1].")
        self.seed = seed
        self.bare_share = bare_share
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Make the rows of an epoch; they depend on nothing but the seed, the epoch and the share."""
        self.epoch = epoch
        rng = seeded_generator(self.seed, epoch)
        passes: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        num_rows = num_pieces = 0
        # one pass over the documents makes too few rows, where many are cut, or some too many
        while num_rows < len(self):
            pieces, counts = self._one_pass(rng)
            firsts = num_pieces + np.cumsum(counts) - counts
            rows = rng.permutation(len(counts))[: len(self) - num_rows]
            passes.append((pieces, firsts[rows], counts[rows]))
            num_rows += len(rows)
            num_pieces += pieces.shape[1]
        # (2, num_pieces): where a piece of a row begins in the store, and its tokens
        self._pieces = np.concatenate([pieces for pieces, _, _ in passes], axis=1)
        # (num_rows,): a row's first piece, and how many it has
        self._firsts = np.concatenate([firsts for _, firsts, _ in passes])
        self._counts = np.concatenate([counts for _, _, counts in passes])
        # Without the EOS in front a row needs one more token at its end, and the store's last token has none after it.
        lasts = self._pieces[:, self._firsts + self._counts - 1]
        has_next = lasts.sum(axis=0) < self.store.num_tokens
        self._is_bare = (rng.random(len(self)) < self.bare_share) & has_next

    def _one_pass(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Pieces (2, num_pieces) in the order of their rows, and the number of pieces in each row, (num_rows,)."""
        offsets = np.asarray(self.store.offsets)
        lengths = np.diff(offsets)
        is_long = lengths >= self.context_length
        windows = _windows(offsets[:-1][is_long], lengths[is_long], self.context_length, rng)
        order = rng.permutation(np.flatnonzero(~is_long))
        packed, counts = _pack(offsets[order], lengths[order], self.context_length)
        alone = np.stack([windows, np.full_like(windows, self.context_length)])
        return np.concatenate([alone, packed], axis=1), np.concatenate([np.ones_like(windows), counts])

    def __len__(self) -> int:
        return (self.store.num_tokens - 1) // self.context_length

    def _gather(self, indices: np.ndarray) -> np.ndarray:
        counts = self._counts[indices]
        firsts = np.cumsum(counts) - counts
        begins, sizes = self._pieces[:, np.repeat(self._firsts[indices] - firsts, counts) + np.arange(counts.sum())]
        # the first input is the token before the first target
        is_bare = self._is_bare[indices]
        begins[firsts] -= ~is_bare
        sizes[firsts] += ~is_bare
        sizes[firsts + counts - 1] += is_bare
        return self._join(begins, sizes).reshape(len(indices), self.context_length + 1)


def _windows(begins: np.ndarray, lengths: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Where windows of `size` begin that cover documents of at least that length: each its first and its last window,
    and between them every `size` tokens from a random place on."""
    phases = rng.integers(1, size, size=len(begins), endpoint=True)
    inner = np.maximum(0, -((lengths - size - phases) // -size))
    counts = 1 + inner + (lengths > size)
    document = np.repeat(np.arange(len(begins)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = np.where(number == 0, 0, phases[document] + (number - 1) * size)
    return begins[document] + np.minimum(places, lengths[document] - size)


def _pack(begins: np.ndarray, lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill rows with documents in their order, each row anew, its last document cut; the last row takes some again.

    Returns:
        Pieces (2, num_pieces) and the number of pieces in each row, (num_rows,).
    """
    number = len(begins)
    if number == 0:
        return np.zeros((2, 0), np.int64), np.zeros(0, np.int64)
    begins, lengths = np.resize(begins, number + size), np.resize(lengths, number + size)
    ends = np.cumsum(lengths)
    # from a row's first document to the one after its last
    following = (np.searchsorted(ends, ends[:number] - lengths[:number] + size) + 1).tolist()
    firsts = [0]
    while following[firsts[-1]] < number:
        firsts.append(following[firsts[-1]])
    stops = np.array([*firsts[1:], following[firsts[-1]]])
    sizes = lengths[: stops[-1]].copy()
    sizes[stops - 1] -= ends[stops - 1] - (ends[firsts] - lengths[firsts] + size)
    return np.stack([begins[: stops[-1]], sizes]), np.diff(stops, prepend=0)


class DocumentRows(Rows):
    """Rows for evaluation: every token and every EOS of the store predicted exactly once.

    A row begins with a document, its first input the EOS before it, and holds as many whole documents as fit; only a
    document longer than a row is cut, and what follows its last piece are again whole documents. Rows are up to
    `context_length` long and not padded: the collator does that.
    """

    def __init__(self, store: TokenStore, context_length: int):
        super().__init__(store, context_length)
        offsets = np.asarray(store.offsets)
        begins = [1]
        while begins[-1] < store.num_tokens:
            begin = begins[-1]
            end = int(offsets[np.searchsorted(offsets, begin + context_length, side="right") - 1])
            begins.append(end if end > begin else begin + context_length)
        # (num_rows + 1,): the first target of each row, and the end
        self._begins = np.array(begins)

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        rows = []
        for begin, end in zip(self._begins[indices], self._begins[np.asarray(indices) + 1], strict=True):
            tokens = torch.from_numpy(self._tokens[begin - 1 : end].astype(np.int64))
            rows.append({"input_ids": tokens[:-1], "shift_labels": tokens[1:]})
        return rows
