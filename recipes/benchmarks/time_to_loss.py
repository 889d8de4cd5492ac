"""Tokens and seconds to the loss at which GPT2LMHeadModel ends under the Trainer: MiniGPT against GPT-2.

    python recipes/benchmarks/time_to_loss.py --dataset path/to/reviews.parquet

The peer has GPT-2's blocks and AdamW (betas 0.9 and 0.95, weight decay 0.1, gradients clipped at 1), with warmup over
a tenth of the steps and a cosine to zero. The first seed tries three learning rates with a tied and an untied head;
the other seeds use the best. Ours has the modern blocks of the same width and depth and MuonAdamW. The schedules of
`--our_steps` run in full, from the shortest, until one ends at or below the peer's held-out loss. Both sides read the
same rows in the same order, without dropout, and are scored by the same function. The matrix products per token are
the same; the parameters of the blocks agree within 1 %.

`ratios` are the peer's tokens and seconds of training over ours, medians over the seeds. Evaluation is not timed.
"""

import argparse
import statistics
import tempfile

import torch
from common import gpt2_peer, make_parser, print_result, quiet_arguments
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from hf_minigpt import MiniGPTForCausalLM, preset
from hf_minigpt.data.collators import LanguageModelCollator
from hf_minigpt.data.rows import DocumentRows, ShuffledDocumentRows
from hf_minigpt.pretraining.arguments import PretrainArguments
from hf_minigpt.pretraining.data import open_documents, prepare_data
from hf_minigpt.tokenization import num_ids
from hf_minigpt.training.arguments import DataArguments, ModelArguments
from hf_minigpt.training.optimizers import optimizer_cls_and_kwargs
from hf_minigpt.training.processes import use_all_cores
from hf_minigpt.training.trainer import LanguageModelTrainer


PEER_LEARNING_RATES = (6e-4, 1e-3, 2e-3)
# AdamW's is twice the recipes' default: chosen on another seed for schedules as short as these
LEARNING_RATES = {"learning_rate": 1.6e-2, "matrix_learning_rate": 2e-2}


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, rows: DocumentRows, collator: LanguageModelCollator, num_rows: int) -> float:
    """Return mean nats per token, from the logits of either side."""
    model.eval()
    nats, count = 0.0, 0
    selected = [i * len(rows) // num_rows for i in range(num_rows)]
    for start in range(0, num_rows, 8):
        batch = collator(rows.__getitems__(selected[start : start + 8]))
        targets = batch["shift_labels"]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += int((targets != -100).sum())
    return nats / count


class Race:
    """One corpus and one shape; `peer` and `ours` train a model from a seed to the end of its schedule."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        model_args = ModelArguments(vocab_size=args.vocab_size, context_length=args.context_length)
        data_args = DataArguments(dataset=args.dataset, text_column=args.text_column)
        self.tokenizer, self.corpus = prepare_data(model_args, data_args, open_documents(data_args))
        self.collator = LanguageModelCollator(self.tokenizer.pad_token_id)
        self.held_out = DocumentRows(self.corpus.validation, args.context_length)

    def _finish(self, trainer: Trainer) -> tuple[float, float]:
        seconds = trainer.train().metrics["train_runtime"]
        loss = held_out_loss(trainer.model, self.held_out, self.collator, min(self.args.eval_rows, len(self.held_out)))
        return loss, seconds

    def arguments(self, folder: str, seed: int, max_steps: int) -> dict:
        return quiet_arguments(folder) | {
            "per_device_train_batch_size": self.args.rows,
            "max_steps": max_steps,
            "seed": seed,
            "eval_strategy": "no",
            "remove_unused_columns": False,
        }

    def rows(self, seed: int) -> ShuffledDocumentRows:
        return ShuffledDocumentRows(self.corpus.train, self.args.context_length, seed=seed)

    def peer(self, seed: int, learning_rate: float, tied: bool) -> tuple[float, float]:
        args = self.args
        set_seed(seed)
        model = gpt2_peer(args.layers, args.width, num_ids(self.tokenizer), args.context_length, tied)
        with tempfile.TemporaryDirectory() as folder:
            training_args = TrainingArguments(
                **self.arguments(folder, seed, args.peer_steps),
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=args.peer_steps // 10,
                adam_beta2=0.95,
                weight_decay=0.1,
                bf16=torch.cuda.is_available(),
            )
            return self._finish(
                Trainer(model, training_args, data_collator=self.collator, train_dataset=self.rows(seed))
            )

    def build_ours(self, **overrides) -> MiniGPTForCausalLM:
        args = self.args
        fields = {
            "num_hidden_layers": args.layers,
            "hidden_size": args.width,
            "num_attention_heads": max(args.width // 64, 1),
            "initializer_range": args.width**-0.5,
            "max_position_embeddings": args.context_length,
            "vocab_size": num_ids(self.tokenizer),
        }
        return MiniGPTForCausalLM(preset("minigpt-pico", **(fields | overrides)))

    def ours(self, seed: int, max_steps: int) -> tuple[float, float]:
        set_seed(seed)
        model = self.build_ours()
        with tempfile.TemporaryDirectory() as folder:
            training_args = PretrainArguments(**self.arguments(folder, seed, max_steps), **LEARNING_RATES)
            trainer = LanguageModelTrainer(
                model,
                training_args,
                data_collator=self.collator,
                train_dataset=self.rows(seed),
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(training_args),
            )
            return self._finish(trainer)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", default="stanfordnlp/imdb", help="as in the recipes: a name, a file or a folder")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context_length", type=int, default=256)
    parser.add_argument("--eval_rows", type=int, default=256)


def main() -> None:
    parser = make_parser(__doc__)
    add_arguments(parser)
    parser.add_argument("--peer_steps", type=int, default=500)
    parser.add_argument("--our_steps", type=int, nargs="+", default=[60, 70, 80, 90, 100, 112, 125, 150, 200, 300])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    use_all_cores()
    race = Race(args)
    tokens_per_step = args.rows * args.context_length

    choices = [(learning_rate, tied) for tied in (True, False) for learning_rate in PEER_LEARNING_RATES]
    token_ratios, second_ratios = [], []
    for seed in args.seeds:
        results = {}
        for learning_rate, tied in choices:
            loss, seconds = race.peer(seed, learning_rate, tied)
            results[loss] = (seconds, (learning_rate, tied))
            head = "tied" if tied else "untied"
            print(
                f"seed {seed}, GPT2LMHeadModel, {head}, {learning_rate:g}: {loss:.4f} in {seconds:.0f} s", flush=True
            )
        target = min(results)
        seconds, best = results[target]
        choices = [best]
        for steps in sorted(args.our_steps):
            loss, our_seconds = race.ours(seed, steps)
            print(f"seed {seed}, ours, {steps} steps: {loss:.4f} in {our_seconds:.0f} s", flush=True)
            if loss <= target:
                break
        else:
            raise RuntimeError(
                f"No schedule of --our_steps {args.our_steps} reached the loss {target:.4f}. Add longer ones."
            )
        token_ratios.append(args.peer_steps / steps)
        second_ratios.append(seconds / our_seconds)
        print(
            f"seed {seed}: {target:.4f} after {args.peer_steps * tokens_per_step} tokens and {seconds:.0f} s; ours "
            f"{loss:.4f} after {steps * tokens_per_step} and {our_seconds:.0f} s: {token_ratios[-1]:.2f} x fewer "
            f"tokens, {second_ratios[-1]:.2f} x less time",
            flush=True,
        )
    print_result(ratios={"tokens": statistics.median(token_ratios), "wall": statistics.median(second_ratios)})


if __name__ == "__main__":
    main()
