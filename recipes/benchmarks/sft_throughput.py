r"""
Tokens per second of finetuning: records packed into rows, against batches padded to their longest record.

    python recipes/benchmarks/sft_throughput.py --dataset ../shared/data/instructions/instructions.json

The same model in the same Trainer, without dropout, on the same records, about as many of them in a batch (16), by
turns. The peer is transformers' DataCollatorForSeq2Seq. Padding alone could be saved: the bound is the padded
positions of the peer's batches over the tokens in them: longest over mean, batch by batch. `share_of_bound` says how
much of that packing gains, `packed_over_padded` the plain ratio of tokens per second; medians over the rounds. Without
--dataset the records are questions about the tales. The last line printed is a JSON object.

What no packing shortens is the optimizer's work. The model has the size of the smallest GPT-2, and an update takes
four batches, half of what Alpaca took; `--accumulate 1` shows how much it counts in updates of 16 short records.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time

import torch
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
    """Seconds from the end of the first step, which warms up, to that of the last one."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.end = time.perf_counter()
        if state.global_step == 1:
            self.begin = self.end

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class Counting:
    """A collator that counts the positions and the tokens in its batches, those of the first step apart."""

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


def measure(model, rows, collator: Counting, batch_size: int, seed: int) -> tuple[float, float]:
    """Tokens per second, without padding, of an epoch; and positions over tokens."""
    collator.reset()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=collator.accumulate,
            num_train_epochs=1,
            # a last, smaller batch would be another shape
            dataloader_drop_last=True,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        )
        Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[clock]).train()
    return collator.tokens / clock.seconds, collator.positions / collator.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="as in recipes/sft.py")
    parser.add_argument("--max_examples", type=int, default=400)
    parser.add_argument("--accumulate", type=int, default=4, help="batches to an update")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab_size", type=int, default=4096, help="of the tokenizer, trained on the records")
    parser.add_argument("--packed_length", type=int, help="default: four rows hold the 16 records, if none is longer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: all cores")
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
    # as many records in a batch as the peer has
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
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    print(
        f"{len(data)} records of {data.lengths.mean():.0f} tokens on average, {data.lengths.max()} at most; packed: "
        f"{packed_rows} rows of {length} a batch, {packed.fill:.1%} full; {model.num_parameters():,} parameters"
    )

    ours = Counting(InstructionCollator(tokenizer.pad_token_id), tokenizer.pad_token_id, args.accumulate)
    padding = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    theirs = Counting(padding, tokenizer.pad_token_id, args.accumulate)
    ratios, shares, bounds = [], [], []
    for i in range(args.rounds):
        sides = {}
        # who begins changes
        for side in ("packed", "padded") if i % 2 else ("padded", "packed"):
            rows, collator, size = (packed, ours, packed_rows) if side == "packed" else (padded, theirs, BATCH_SIZE)
            sides[side] = measure(model, rows, collator, size, seed=i)
        bound = sides["padded"][1]
        ratio = sides["packed"][0] / sides["padded"][0]
        ratios.append(ratio)
        bounds.append(bound)
        shares.append(ratio / bound)
        print(
            f"packed {sides['packed'][0]:.0f}, padded {sides['padded'][0]:.0f} tokens/s: {ratio:.2f} x of a bound of "
            f"{bound:.2f} x"
        )
    medians = {"share_of_bound": statistics.median(shares), "packed_over_padded": statistics.median(ratios)}
    print(
        json.dumps(
            {"ratios": {k: round(v, 3) for k, v in medians.items()}, "bound": round(statistics.median(bounds), 3)}
        )
    )


if __name__ == "__main__":
    main()
