"""The parts of a pretraining run, each against what it cannot do without.

    python recipes/benchmarks/parts.py
    python recipes/benchmarks/parts.py --only tokenize fetch --dataset path/to/books

- `train`: FLOP/s of training (modern blocks, 4 layers x 512, 8,192 tokens, 8 rows of 512, the Trainer with fused
  AdamW) against a matrix product of 1536 cubed, by torch.mm (`roofline`) and by the model's own product
  (`of_own_product`). FLOPs are nanoGPT's count, 6 N + 12 L H D T a token, which ignores that causal attention does
  half of its part.
- `tokenize`: text to token store (read, deduplicate, split, tokenize, write) against the tokenizer's `encode_batch`
  alone on the same text in memory, on as many threads (`throughput`).
- `fetch`: a batch of random document-aligned rows from the token store against `datasets` in torch format with
  transformers' default collator (`fetch`).

Both sides take turns. `ratios` are medians over the rounds; more is better.
"""

import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import RandomRows, make_parser, median_ratio, print_result, seconds_per_step, take_turns, timed
from datasets import Dataset
from transformers import default_data_collator

from hf_minigpt import MiniGPTForCausalLM, preset
from hf_minigpt.data.collators import LanguageModelCollator
from hf_minigpt.data.corpora import load_documents
from hf_minigpt.data.rows import AlignedDocumentRows
from hf_minigpt.data.token_store import prepare_corpus
from hf_minigpt.model.products_minigpt import linear
from hf_minigpt.tokenization import load_tokenizer, num_ids, train_tokenizer
from hf_minigpt.training.flops import flops_per_token, measure_flops_per_second
from hf_minigpt.training.processes import use_all_cores


LAYERS, WIDTH, VOCAB_SIZE, ROWS, CONTEXT = 4, 512, 8192, 8, 512


def train(rounds: int) -> dict[str, float]:
    """Return the rate of training over that of two matrix products."""
    config = preset(
        "minigpt-small",
        num_hidden_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=WIDTH // 64,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT,
        skip_logits=True,
    )
    model = MiniGPTForCausalLM(config)
    on_gpu, steps = torch.cuda.is_available(), 4
    data = RandomRows((steps + 3) * ROWS, CONTEXT, VOCAB_SIZE)
    flops = ROWS * CONTEXT * flops_per_token(config, model.num_parameters(), CONTEXT)
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32
    products = {"torch.mm": torch.mm, "own product": linear}
    rates = take_turns(
        {
            "training": lambda: flops / seconds_per_step(model, data, ROWS, steps, bf16=on_gpu),
            **{name: partial(measure_flops_per_second, device, dtype, 1.0, 1536, f) for name, f in products.items()},
        },
        rounds,
    )
    print(", ".join(f"{name} {statistics.median(found) / 1e9:.0f} GFLOP/s" for name, found in rates.items()))
    return {
        "roofline": median_ratio(rates["training"], rates["torch.mm"]),
        "of_own_product": median_ratio(rates["training"], rates["own product"]),
    }


def tokenize(rounds: int, dataset: str | None, num_workers: int) -> dict[str, float]:
    """Return the tokens per second of a whole preparation over those of `encode_batch`."""
    texts = list(load_documents(dataset, max_examples=None if dataset else 15_000))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(texts, VOCAB_SIZE, model_max_length=1024, show_progress=False).save_pretrained(folder)
        file = folder / "corpus.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")

        def ours() -> float:
            tokenizer = load_tokenizer(folder)
            with tempfile.TemporaryDirectory() as store:
                begin = time.perf_counter()
                corpus = prepare_corpus(load_documents(file), tokenizer, store, num_workers=num_workers)
                seconds = time.perf_counter() - begin
                return (corpus.train.num_tokens + corpus.validation.num_tokens) / seconds

        def theirs() -> float:
            # a new one each time, because a tokenizer caches words
            backend = load_tokenizer(folder).backend_tokenizer
            begin = time.perf_counter()
            encodings = backend.encode_batch(texts, add_special_tokens=False)
            return sum(len(encoding.ids) for encoding in encodings) / (time.perf_counter() - begin)

        rates = take_turns({"token store": ours, "encode_batch": theirs}, rounds)
    medians = (f"{name} {statistics.median(found):,.0f} tokens/s" for name, found in rates.items())
    print(f"{', '.join(medians)} on {num_workers} threads")
    return {"throughput": median_ratio(*rates.values())}


def fetch(rounds: int, dataset: str | None, batch_size: int = 32) -> dict[str, float]:
    """Return the seconds of a batch from `datasets` over those of one from the token store."""
    documents = load_documents(dataset, max_examples=None if dataset else 3000)
    tokenizer = train_tokenizer(documents, 1024, model_max_length=CONTEXT, show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        rows = AlignedDocumentRows(prepare_corpus(documents, tokenizer, folder).train, CONTEXT)
        collate = LanguageModelCollator(tokenizer.pad_token_id, num_ids(tokenizer))
        ids = [row["input_ids"].numpy() for row in rows.__getitems__(range(len(rows)))]
        stored = Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")
        rng = np.random.default_rng(0)
        seconds: dict[str, list[float]] = {"token store": [], "datasets": []}
        for _ in range(100 * rounds):
            indices = rng.integers(0, len(rows), batch_size).tolist()
            sides = {
                "token store": lambda indices=indices: timed(lambda: collate(rows.__getitems__(indices))),
                "datasets": lambda indices=indices: timed(lambda: default_data_collator(stored.__getitems__(indices))),
            }
            for name, found in take_turns(sides, 1).items():
                seconds[name] += found
    medians = (f"{name} {1e6 * statistics.median(found):.1f}" for name, found in seconds.items())
    print(f"{', '.join(medians)} microseconds a batch of {batch_size} x {CONTEXT}")
    return {"fetch": median_ratio(seconds["datasets"], seconds["token store"])}


def main() -> None:
    parser = make_parser(__doc__, rounds=3, threads=True)
    parser.add_argument("--only", nargs="+", choices=["train", "tokenize", "fetch"])
    parser.add_argument("--dataset", help="text for tokenize and fetch, as in recipes/pretrain.py; default: the tales")
    args = parser.parse_args()
    use_all_cores(args.threads)
    threads = torch.get_num_threads()
    # read by the tokenizers' thread pool when it starts
    os.environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    parts = {
        "train": partial(train, args.rounds),
        "tokenize": partial(tokenize, args.rounds, args.dataset, threads),
        "fetch": partial(fetch, args.rounds, args.dataset),
    }
    ratios: dict[str, float] = {}
    for name in args.only or parts:
        ratios |= parts[name]()
    print_result(ratios=ratios)


if __name__ == "__main__":
    main()
