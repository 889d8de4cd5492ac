"""Tokens per second in instruction finetuning: packed rows against batches padded to their longest record.

    python recipes/benchmarks/sft_throughput.py --dataset instructions.json

Both sides train the same model in the same Trainer, without dropout, on the same records, about 16 of them in a batch,
and take turns. The peer pads with transformers' DataCollatorForSeq2Seq. Packing can only save padding, so the bound is
positions over tokens in the peer's batches. `packed_over_padded` is the ratio of tokens per second, `share_of_bound`
that ratio over the bound; medians over the rounds. Without --dataset the records are questions about the tales.

Packing does not shorten the optimizer step. The model has the size of the smallest GPT-2 and an update takes four
batches, half of Alpaca's; with `--accumulate 1` the optimizer step takes a larger share.
"""

import itertools
import math
import statistics
import tempfile
import time

import torch
from common import make_parser, median_ratio, print_result, quiet_arguments, take_turns
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_minigpt import preset
from hf_minigpt.instructions.records import load_records, tale_conversations, to_conversations
from hf_minigpt.instructions.rows import InstructionCollator, PackedRows, tokenize_conversations
from hf_minigpt.tokenization import add_chat_template, padded_vocab_size, train_tokenizer
from hf_minigpt.training.processes import use_all_cores


BATCH_SIZE = 16


class Clock(TrainerCallback):
    """Measures the seconds from the end of the first step, a warmup, to the end of the last one."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.end = time.perf_counter()
        if state.global_step == 1:
            self.begin = self.end

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class CountingCollator:
    """A collator that counts the positions and the tokens in its batches, except those of the first step."""

    def __init__(self, collator, pad_token_id: int, accumulate: int):
        self.collator, self.pad_token_id, self.accumulate = collator, pad_token_id, accumulate
        self.reset()

    def reset(self) -> None:
        self.batches, self.positions, self.tokens = 0, 0, 0

    def __call__(self, rows):
        batch = self.collator(rows)
        self.batches += 1
        if self.batches > self.accumulate:
            self.positions += batch["input_ids"].numel()
            self.tokens += int((batch["input_ids"] != self.pad_token_id).sum())
        return batch


def measure(model, rows, collator: CountingCollator, batch_size: int, seed: int) -> tuple[float, float]:
    """Train an epoch and return tokens per second, padding not counted, and positions over tokens."""
    collator.reset()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            **quiet_arguments(folder),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=collator.accumulate,
            num_train_epochs=1,
            # a smaller last batch would have another shape
            dataloader_drop_last=True,
            seed=seed,
            remove_unused_columns=False,
        )
        Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[clock]).train()
    return collator.tokens / clock.seconds, collator.positions / collator.tokens


def main() -> None:
    parser = make_parser(__doc__, rounds=3, threads=True)
    parser.add_argument("--dataset", help="as in recipes/sft.py")
    parser.add_argument("--max_examples", type=int, default=400)
    parser.add_argument("--accumulate", type=int, default=4, help="batches per update")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab_size", type=int, default=4096, help="of the tokenizer, trained on the records")
    parser.add_argument("--packed_length", type=int, help="default: a quarter of 16 records, or the longest")
    args = parser.parse_args()

    use_all_cores(args.threads)
    set_seed(0)
    if args.dataset is None:
        conversations, _, _ = tale_conversations(args.max_examples, 9)
    else:
        conversations, _ = to_conversations(itertools.islice(load_records(args.dataset), args.max_examples))
    texts = [message["content"] for conversation in conversations for message in conversation.messages]
    tokenizer = train_tokenizer(texts, args.vocab_size, model_max_length=1024, show_progress=False)
    add_chat_template(tokenizer)
    data = tokenize_conversations(tokenizer, conversations, 1024)
    # as many records in a batch as the peer
    tokens_per_batch = BATCH_SIZE * float(data.lengths.mean())
    length = args.packed_length or max(int(data.lengths.max()), math.ceil(tokens_per_batch / 4))
    packed = PackedRows(data, length)
    packed_rows = max(round(tokens_per_batch / (length * packed.fill)), 1)
    padded = []
    for i in range(len(data)):
        span = slice(data.offsets[i], data.offsets[i + 1])
        tokens, trained = torch.from_numpy(data.tokens[span]).long(), torch.from_numpy(data.loss_mask[span])
        padded.append({"input_ids": tokens.tolist(), "labels": tokens.where(trained, -100).tolist()})
    config = preset(
        "minigpt-small",
        vocab_size=padded_vocab_size(tokenizer),
        num_hidden_layers=args.layers,
        hidden_size=args.width,
        num_attention_heads=args.width // 64,
        max_position_embeddings=max(length, 1024),
        skip_logits=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    print(
        f"{len(data)} records of {data.lengths.mean():.0f} tokens on average, {data.lengths.max()} at most; packed: "
        f"{packed_rows} rows of {length} a batch, {packed.fill:.1%} full; {model.num_parameters():,} parameters"
    )

    ours = CountingCollator(InstructionCollator(tokenizer.pad_token_id), tokenizer.pad_token_id, args.accumulate)
    padding = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    theirs = CountingCollator(padding, tokenizer.pad_token_id, args.accumulate)
    rounds = itertools.count()
    sides = {
        "packed": lambda: measure(model, packed, ours, packed_rows, seed=next(rounds) // 2),
        "padded": lambda: measure(model, padded, theirs, BATCH_SIZE, seed=next(rounds) // 2),
    }
    measured = take_turns(sides, args.rounds)
    rates = {side: [rate for rate, _ in found] for side, found in measured.items()}
    bounds = [bound for _, bound in measured["padded"]]
    ratios = [a / b for a, b in zip(rates["packed"], rates["padded"], strict=True)]
    for i in range(args.rounds):
        print(
            f"packed {rates['packed'][i]:.0f}, padded {rates['padded'][i]:.0f} tokens/s: {ratios[i]:.2f} x of a bound "
            f"of {bounds[i]:.2f} x"
        )
    medians = {"share_of_bound": median_ratio(ratios, bounds), "packed_over_padded": statistics.median(ratios)}
    print_result(ratios={k: round(v, 3) for k, v in medians.items()}, bound=round(statistics.median(bounds), 3))


if __name__ == "__main__":
    main()
