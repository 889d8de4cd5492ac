"""Reviews per second in finetuning: batches of similar length against padding to the longest.

    python recipes/benchmarks/finetune_throughput.py
    python recipes/benchmarks/finetune_throughput.py --dataset reviews.parquet --num_reviews 960

Trains three classifiers of GPT-2's architecture and of one size on the same reviews, truncated to 512 tokens, without
dropout, with the same fused AdamW:

- ours: MiniGPTForSequenceClassification under ClassificationTrainer, batches limited in tokens;
- theirs: transformers' GPT2ForSequenceClassification under its Trainer, random batches of 16 padded to the longest;
- grouped: the same with the Trainer's own `group_by_length`.

The limit is chosen so that our batches also hold 16 reviews on average; the number of steps differs by one or two at
most. Without a dataset the reviews are random ids with the lengths of IMDb's. The sides take turns; figures are
medians over the rounds.
"""

import copy
import statistics
import tempfile
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from common import NO_DROPOUT, make_parser, print_result, quiet_arguments, take_turns, timed
from transformers import (
    DataCollatorWithPadding,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hf_minigpt import MiniGPTForSequenceClassification, preset
from hf_minigpt.classification.arguments import ClassificationArguments, ReviewArguments
from hf_minigpt.classification.batching import LENGTH_STEP, ReviewCollator, ReviewRows
from hf_minigpt.classification.data import load_reviews
from hf_minigpt.classification.trainer import ClassificationTrainer, classification_optimizer
from hf_minigpt.tokenization import train_tokenizer
from hf_minigpt.training.processes import use_all_cores


REVIEWS_PER_BATCH = 16
MAX_LENGTH = 512
# lengths of IMDb's reviews in GPT-2's tokens, roughly
MEDIAN_LENGTH, MEAN_LENGTH = 225, 300


class RandomReviews(ReviewRows):
    """Random ids with log-normal lengths like IMDb's."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, num_reviews: int, vocab_size: int):
        super().__init__([], [], tokenizer, MAX_LENGTH, training=True)
        generator = np.random.default_rng(0)
        sigma = np.sqrt(2 * np.log(MEAN_LENGTH / MEDIAN_LENGTH))
        sizes = np.clip(generator.lognormal(np.log(MEDIAN_LENGTH), sigma, num_reviews), 10, self.room).astype(int)
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.tokens = generator.integers(300, vocab_size, self.offsets[-1]).astype(np.int32)
        self.labels = generator.integers(2, size=num_reviews)
        self.lengths = sizes + 2


def main() -> None:
    parser = make_parser(__doc__, rounds=3, threads=True)
    parser.add_argument("--dataset", help="labelled reviews; default: random ids of IMDb's lengths")
    parser.add_argument("--num_reviews", type=int, default=480)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--vocab_size", type=int, default=4096)
    args = parser.parse_args()
    use_all_cores(args.threads)

    if args.dataset is None:
        tokenizer = train_tokenizer(["a"], 320, model_max_length=MAX_LENGTH, show_progress=False)
        rows: ReviewRows = RandomReviews(tokenizer, args.num_reviews, args.vocab_size)
    else:
        data = load_reviews(ReviewArguments(args.dataset)).train
        tokenizer = train_tokenizer(data.texts, args.vocab_size, model_max_length=MAX_LENGTH, show_progress=False)
        data = data.select(range(args.num_reviews))
        rows = ReviewRows(data.texts, data.labels, tokenizer, MAX_LENGTH, training=True)
    mean_length = (-(-rows.lengths // LENGTH_STEP) * LENGTH_STEP).mean()
    sizes = {"n_layer": args.layers, "n_embd": args.width, "n_head": args.width // 64 or 1, "n_positions": MAX_LENGTH}
    sizes |= {"vocab_size": args.vocab_size, "pad_token_id": tokenizer.pad_token_id, "num_labels": 2}

    with tempfile.TemporaryDirectory() as folder:
        common = quiet_arguments(folder) | {
            "num_train_epochs": 1,
            "learning_rate": 1e-4,
            "eval_strategy": "no",
            "remove_unused_columns": False,
        }

        def ours() -> Trainer:
            training_args = ClassificationArguments(
                **common,
                optimizer="adamw",
                tokens_per_batch=max(int(REVIEWS_PER_BATCH * mean_length), 2 * MAX_LENGTH),
                load_best_model_at_end=False,
                early_stopping_patience=None,
                include_num_input_tokens_seen="no",
            )
            model = MiniGPTForSequenceClassification(preset("gpt2", **sizes, **NO_DROPOUT))
            return ClassificationTrainer(
                model=model,
                args=training_args,
                train_dataset=rows,
                data_collator=ReviewCollator(tokenizer.pad_token_id),
                optimizer_cls_and_kwargs=classification_optimizer(training_args),
            )

        def theirs(strategy: str = "random") -> Trainer:
            training_args = TrainingArguments(
                **common, per_device_train_batch_size=REVIEWS_PER_BATCH, train_sampling_strategy=strategy
            )
            return Trainer(
                model=GPT2ForSequenceClassification(GPT2Config(**sizes, **NO_DROPOUT)),
                args=training_args,
                train_dataset=rows,
                data_collator=DataCollatorWithPadding(tokenizer),
                processing_class=tokenizer,
            )

        sides: dict[str, Callable[[], Trainer]] = {
            "ours": ours,
            "theirs": theirs,
            "grouped": partial(theirs, "group_by_length"),
        }
        num_parameters = {name: sum(p.numel() for p in make().model.parameters()) for name, make in sides.items()}
        assert len(set(num_parameters.values())) == 1, num_parameters
        for make in sides.values():
            # the first steps of a process are slow
            trainer = make()
            trainer.args = copy.copy(trainer.args)
            trainer.args.max_steps = 2
            trainer.train()
        runs = {name: lambda make=make: timed(make().train) for name, make in sides.items()}
        seconds = take_turns(runs, args.rounds)
    rates = {name: len(rows) / statistics.median(times) for name, times in seconds.items()}
    print(
        f"{num_parameters['ours']:,} parameters, {len(rows)} reviews of {rows.lengths.mean():.0f} tokens on average, "
        f"{torch.get_num_threads()} threads; reviews a second: "
        + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
    )
    ratios = {
        "examples": rates["ours"] / rates["theirs"],
        "examples_vs_grouped": rates["ours"] / rates["grouped"],
    }
    print_result(reviews_per_second=rates, ratios=ratios)


if __name__ == "__main__":
    main()
