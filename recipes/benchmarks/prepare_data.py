"""From text to the token store, against the tokenizer's `encode_batch` alone on as many cores.

    python recipes/benchmarks/prepare_data.py
    python recipes/benchmarks/prepare_data.py --dataset path/to/books

Ours reads the corpus twice, leaves out duplicates, chooses what is held out, tokenizes and writes the store; theirs
has the text in memory already, in a list, and tokenizes it. Interleaved, median of the repetitions. Then the peak
memory of preparing a corpus, each time in a process of its own, and of one of four times the size. The last line
printed is a JSON object; `ratios.throughput` is our tokens per second over theirs, `ratios.memory` the peak of the
smaller corpus over that of the larger: 1 where memory does not depend on the size.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

from peers import resident

from hf_minigpt.data.corpora import Documents, load_documents
from hf_minigpt.data.token_store import prepare_corpus
from hf_minigpt.tokenization import load_tokenizer, train_tokenizer


def seconds_of_ours(file: Path, tokenizer_folder: Path, num_workers: int) -> tuple[float, int]:
    """Seconds for a whole preparation, and the tokens that it wrote."""
    tokenizer = load_tokenizer(tokenizer_folder)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        corpus = prepare_corpus(load_documents(file), tokenizer, folder, num_workers=num_workers)
        return time.perf_counter() - begin, corpus.train.num_tokens + corpus.validation.num_tokens


def seconds_of_theirs(texts: list[str], tokenizer_folder: Path) -> tuple[float, int]:
    """Seconds for `encode_batch`, and the tokens that it gave."""
    # a fresh one each time: it remembers words
    backend = load_tokenizer(tokenizer_folder).backend_tokenizer
    begin = time.perf_counter()
    encodings = backend.encode_batch(texts, add_special_tokens=False)
    return time.perf_counter() - begin, sum(len(encoding.ids) for encoding in encodings)


def peak_memory(texts: list[str], copies: int, tokenizer_folder: Path, num_workers: int) -> int:
    """Bytes that this process held at most, preparing so many copies of the texts, each with a number before it."""
    documents = Documents("copies", "", lambda: (f"{i} {text}" for i in range(copies) for text in texts))
    with tempfile.TemporaryDirectory() as folder:
        prepare_corpus(documents, load_tokenizer(tokenizer_folder), folder, num_workers=num_workers)
    # not getrusage's: that counts the process from which this one was started
    return resident("VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="as in recipes/pretrain.py; default: 15,000 of the embedded tales")
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    # read by the tokenizers' thread pool, when it is first needed
    os.environ |= {"RAYON_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "true"}

    texts = list(load_documents(args.dataset, max_examples=None if args.dataset else 15_000))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(texts, args.vocab_size, model_max_length=1024, show_progress=False).save_pretrained(folder)
        file = folder / "corpus.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        rates: dict[str, list[float]] = {"hf_minigpt": [], "encode_batch": []}
        for _ in range(args.repetitions):
            for side, (seconds, tokens) in (
                ("hf_minigpt", seconds_of_ours(file, folder, args.threads)),
                ("encode_batch", seconds_of_theirs(texts, folder)),
            ):
                rates[side].append(tokens / seconds)
        context = multiprocessing.get_context("spawn")
        peaks = []
        for copies in (1, 4):
            with context.Pool(1) as pool:
                peaks.append(pool.apply(peak_memory, (texts, copies, folder, args.threads)))

    medians = {side: statistics.median(values) for side, values in rates.items()}
    size = sum(len(text.encode()) for text in texts)
    for side, median in medians.items():
        print(f"{side:12} {median:12,.0f} tokens per second on {args.threads} threads")
    for copies, peak in zip((1, 4), peaks, strict=True):
        print(f"peak memory  {peak / 1e6:8.1f} MB for {copies * size / 1e6:,.1f} MB of text")
    ratios = {"throughput": medians["hf_minigpt"] / medians["encode_batch"], "memory": peaks[0] / peaks[1]}
    print(json.dumps({"tokens_per_second": medians, "peak_bytes": peaks, "ratios": ratios}))


if __name__ == "__main__":
    main()
