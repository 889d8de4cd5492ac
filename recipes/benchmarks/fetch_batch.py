"""A training batch from the token store, against `datasets` with torch format and transformers' default collator.

    python recipes/benchmarks/fetch_batch.py
    python recipes/benchmarks/fetch_batch.py --dataset path/to/books

Both sides give a batch of random rows of token ids, with labels, ready for the model: ours from document-aligned rows
cut out of the store on the fly, theirs from rows that were cut beforehand and stored (columns `input_ids` and
`labels`, as the examples of transformers do it). Interleaved, median of all batches. The last line printed is a JSON
object; `ratios.fetch` is their time over ours.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import default_data_collator

from hf_minigpt.data.collators import LanguageModelCollator
from hf_minigpt.data.corpora import load_documents
from hf_minigpt.data.rows import AlignedDocumentRows
from hf_minigpt.data.token_store import prepare_corpus
from hf_minigpt.tokenization import num_ids, train_tokenizer
from hf_minigpt.training.processes import use_all_cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="as in recipes/pretrain.py; default: 3,000 of the embedded tales")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--context_length", type=int, default=512)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    use_all_cores(args.threads)

    documents = load_documents(args.dataset, max_examples=None if args.dataset else 3000)
    tokenizer = train_tokenizer(documents, 1024, model_max_length=args.context_length, show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        rows = AlignedDocumentRows(prepare_corpus(documents, tokenizer, folder).train, args.context_length)
        collate = LanguageModelCollator(tokenizer.pad_token_id, num_ids(tokenizer))
        ids = [row["input_ids"].numpy() for row in rows.__getitems__(range(len(rows)))]
        stored = Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")

        sides: dict[str, Callable[[list[int]], dict[str, Any]]] = {
            "hf_minigpt": lambda indices: collate(rows.__getitems__(indices)),
            "datasets": lambda indices: default_data_collator(stored.__getitems__(indices)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        rng = np.random.default_rng(0)
        for _ in range(args.batches):
            indices = rng.integers(0, len(rows), args.batch_size).tolist()
            batches = {}
            for name, fetch in sides.items():
                begin = time.perf_counter()
                batches[name] = fetch(indices)
                seconds[name].append(time.perf_counter() - begin)
            assert batches["hf_minigpt"]["input_ids"].equal(batches["datasets"]["input_ids"])

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:10} {1e6 * median:8.1f} microseconds a batch of {args.batch_size} x {args.context_length}")
    print(json.dumps({"seconds": medians, "ratios": {"fetch": medians["datasets"] / medians["hf_minigpt"]}}))


if __name__ == "__main__":
    main()
