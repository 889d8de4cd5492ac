"""A baseline for language models: an interpolated modified Kneser-Ney n-gram model over words, in bits per byte.

    python recipes/benchmarks/kneser_ney.py
    python recipes/benchmarks/kneser_ney.py --dataset corpus.txt

The first command trains a 5-gram on embedded tales and compares its bits per byte on held-out tales with the entropy
of their grammar: 0.320 against 0.142, a ratio of 2.25, in seconds. The second scores any text, of unknown entropy.
Words that are not in the training text are spelled out byte by byte.

The model is that of Chen and Goodman (1998), "An empirical study of smoothing techniques for language modeling".
"""

import argparse
import json
import math
import re
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from hf_minigpt.data.tales.grammar import log2_probability, tales


# every character belongs to exactly one piece, so the bits of the pieces add up to those of the text
PIECE = re.compile(r" ?\w+| ?[^\w\s]|\s+")


class KneserNey:
    """An n-gram model over sequences of symbols, each with begin marks in front and an end mark behind.

    Args:
        sequences: The training data.
        order: n; the context is n - 1 symbols.
        vocabulary: Every symbol that may occur; the uniform distribution is over these and the end mark.
    """

    def __init__(self, sequences: Iterable[Sequence[Hashable]], order: int, vocabulary: Iterable[Hashable]):
        self.order = order
        # 0 is the begin mark, 1 the end mark
        self.ids = {symbol: i for i, symbol in enumerate(vocabulary, start=2)}
        self.num_symbols = len(self.ids) + 2
        tokens = self._flatten(sequences)

        # ngram_ids[n - 1][i]: which of the n-grams seen in training ends at position i
        ngram_ids, firsts, self.keys = [], [], []
        previous = np.zeros(len(tokens), dtype=np.int64)
        for _ in range(order):
            key = self._extend(previous, tokens)
            keys, first, previous = np.unique(key, return_index=True, return_inverse=True)
            self.keys.append(keys)
            ngram_ids.append(previous)
            firsts.append(first)

        self.tables = []
        for n in range(order, 0, -1):
            position = firsts[n - 1]
            counts = np.bincount(ngram_ids[n - 1]).astype(np.float64)
            if n < order:
                # the number of different symbols before the n-gram; none precedes a begin mark, whose count stays
                distinct = np.bincount(ngram_ids[n - 1][firsts[n]], minlength=len(counts))
                counts = np.where(tokens[position - n + 1] == 0, counts, distinct)
            # a begin mark is never predicted
            counts[tokens[position] == 0] = 0
            contexts = ngram_ids[n - 2][position - 1] if n > 1 else np.zeros_like(position)
            self.tables.insert(0, _Table(counts, contexts, len(firsts[n - 2]) if n > 1 else 1))

    def _flatten(self, sequences: Iterable[Sequence[Hashable]]) -> np.ndarray:
        # one begin mark more than a context needs, so that position - n + 1 and position - 1 always exist
        begin = [0] * self.order
        return np.array([i for seq in sequences for i in (*begin, *(self.ids[s] for s in seq), 1)], dtype=np.int64)

    def _extend(self, prefix_ids: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the key of the n-gram at each position, from the ids of the (n-1)-grams that end one earlier."""
        shifted = np.concatenate([[0], prefix_ids[:-1]])
        return np.where(shifted < 0, -1, shifted * self.num_symbols + tokens)

    def log2_probabilities(self, sequences: Sequence[Sequence[Hashable]]) -> np.ndarray:
        """Return the log2 probability of each symbol and end mark, the sequences concatenated."""
        tokens = self._flatten(sequences)
        # the begin mark is never predicted, every other symbol may be
        probabilities = np.full(len(tokens), 1 / (self.num_symbols - 1))
        contexts = np.zeros(len(tokens), dtype=np.int64)
        for keys, table in zip(self.keys, self.tables, strict=True):
            key = self._extend(contexts, tokens)
            found = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            ngrams = np.where(keys[found] == key, found, -1)
            shifted = np.concatenate([[0], contexts[:-1]])
            probabilities = table.interpolate(ngrams, shifted, probabilities)
            contexts = ngrams
        return np.log2(probabilities[tokens != 0])


class _Table:
    """The n-grams of one order: discounted probabilities and the weight left to the order below."""

    def __init__(self, counts: np.ndarray, contexts: np.ndarray, num_contexts: int):
        totals = np.bincount(contexts, weights=counts, minlength=num_contexts)
        buckets = np.minimum(counts, 3).astype(np.int64)
        discounts = _discounts(counts)[buckets]
        reserved = np.bincount(contexts, weights=discounts, minlength=num_contexts)
        divisors = np.maximum(totals, 1)
        self.discounted = np.append((counts - discounts) / divisors[contexts], 0.0)
        # a context never seen leaves all weight to the order below; the last entry stands for it
        self.backoff = np.append(np.where(totals > 0, reserved / divisors, 1.0), 1.0)

    def interpolate(self, ngrams: np.ndarray, contexts: np.ndarray, lower: np.ndarray) -> np.ndarray:
        return self.discounted[ngrams] + self.backoff[contexts] * lower


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Return Chen and Goodman's discounts for counts of 0, 1, 2 and more, from the number of n-grams of each count."""
    n1, n2, n3, n4 = (np.count_nonzero(counts == c) for c in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        # too few n-grams for the estimate
        return np.array([0.0, 0.5, 0.75, 1.0])
    y = n1 / (n1 + 2 * n2)
    return np.clip([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3], 0.0, [0.0, 1.0, 2.0, 3.0])


def bits_per_byte(train: Sequence[str], held_out: Sequence[str], order: int = 5) -> float:
    """Return bits per UTF-8 byte on the held-out documents, the end of each document included.

    Training words that occur once stand for unknown words. A held-out word that is unknown or was seen once costs the
    bits of that class plus those of its spelling, by a Kneser-Ney model over the bytes of the words seen once.
    """
    documents = [PIECE.findall(text) for text in train]
    counts = Counter(piece for pieces in documents for piece in pieces)
    known = sorted(piece for piece, count in counts.items() if count > 1)
    rare = [piece.encode() for piece, count in counts.items() if count == 1]
    known_set = set(known)

    def with_unknown(pieces: Sequence[str]) -> list[str | None]:
        return [piece if piece in known_set else None for piece in pieces]

    words = KneserNey(map(with_unknown, documents), order, [*known, None])
    held_out_documents = [PIECE.findall(text) for text in held_out]
    bits = -words.log2_probabilities([with_unknown(pieces) for pieces in held_out_documents]).sum()
    unknown = [piece.encode() for pieces in held_out_documents for piece in pieces if piece not in known_set]
    if unknown:
        spelling = KneserNey(rare, order, range(256))
        bits -= spelling.log2_probabilities(unknown).sum()
    return float(bits / sum(len(text.encode()) for text in held_out))


def entropy_per_byte(texts: Iterable[str]) -> float:
    """Return the entropy of the grammar in bits per byte, estimated on tales."""
    texts = list(texts)
    return -math.fsum(map(log2_probability, texts)) / sum(len(text.encode()) for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="as in recipes/pretrain.py; default: the embedded tales")
    parser.add_argument("--order", type=int, default=5, help="n of the n-grams")
    parser.add_argument("--num_tales", type=int, default=6000, help="tales to train on")
    parser.add_argument("--num_held_out", type=int, default=600, help="tales to test on")
    args = parser.parse_args()

    start = time.perf_counter()
    if args.dataset is None:
        train, held_out = list(tales(args.num_tales, seed=0)), list(tales(args.num_held_out, seed=1))
    else:
        from hf_minigpt.data.corpora import load_documents

        documents = list(load_documents(args.dataset))
        train = [text for i, text in enumerate(documents) if i % 10]
        held_out = documents[::10]
    bits = bits_per_byte(train, held_out, args.order)
    num_bytes = sum(len(text.encode()) for text in train)
    print(f"trained on {len(train)} documents, {num_bytes / 1e6:.2f} MB; {time.perf_counter() - start:.0f} s")
    print(f"Kneser-Ney {args.order}-gram: {bits:.4f} bits per byte on {len(held_out)} held-out documents")
    if args.dataset is None:
        entropy = entropy_per_byte(held_out)
        print(f"entropy of the source: {entropy:.4f} bits per byte; ratio {bits / entropy:.3f}")
        print(json.dumps({"bits_per_byte": bits, "ratios": {"kneser_ney_over_entropy": bits / entropy}}))
    else:
        print(json.dumps({"bits_per_byte": bits}))


if __name__ == "__main__":
    main()
