"""Tokens per second of a training step: MiniGPT in GPT-2's shape against transformers' GPT2LMHeadModel.

    python recipes/benchmarks/train_step.py
    python recipes/benchmarks/train_step.py --compile
    python recipes/benchmarks/train_step.py --shapes small_vocab --profile

Both under transformers' Trainer with its default optimizer (fused AdamW), in fp32 on a CPU and bf16 on a GPU, without
dropout, in turn: `large_vocab` is 6 layers x 384, 50,257 tokens, 4 rows of 256; `small_vocab` 4 layers x 256, 8,192
tokens, 8 rows of 256. With `--compile` both sides run with `--torch_compile`, compiling not counted, and the names
end in `_compiled`. `--profile` also prints what a step's milliseconds go to, by operator. The last line printed is a
JSON object; `ratios` are our tokens per second over theirs, the medians over the rounds.
"""

import argparse
import json
from functools import partial

import torch
from peers import RandomRows, alternate, gpt2_peer, our_gpt2, seconds_per_step
from torch.profiler import profile

from hf_minigpt.training.processes import use_all_cores


# layers, width, vocabulary, rows, context, steps a round
SHAPES = {"large_vocab": (6, 384, 50257, 4, 256, 4), "small_vocab": (4, 256, 8192, 8, 256, 10)}


def print_profile(label: str, timed: partial, steps: int) -> None:
    with profile() as profiled:
        timed()
    operators = sorted(profiled.key_averages(), key=lambda operator: -operator.self_cpu_time_total)
    shares = (f"{operator.key} {operator.self_cpu_time_total / 1000 / steps:.0f}" for operator in operators[:10])
    print(f"{label}: ms a step: {', '.join(shares)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    # not both in one process: accelerate takes up the first Trainer's choice for all
    parser.add_argument("--compile", action="store_true", help="compile both sides")
    parser.add_argument("--profile", action="store_true", help="print the operators' share of a step")
    args = parser.parse_args()

    use_all_cores()
    ratios = {}
    for name in args.shapes:
        layers, width, vocab_size, rows, context, steps = SHAPES[name]
        data = RandomRows((steps + 4) * rows, context, vocab_size)
        torch.manual_seed(0)
        sides = [build(layers, width, vocab_size, context) for build in (our_gpt2, gpt2_peer)]
        options = {"torch_compile": args.compile, "bf16": torch.cuda.is_available()}
        timed = [partial(seconds_per_step, model, data, rows, steps, warmup=2, **options) for model in sides]
        ours, theirs, ratio = alternate(*timed, args.rounds)
        label = f"{name}_compiled" if args.compile else name
        ratios[label] = ratio
        tokens = rows * context
        print(f"{label}: MiniGPT {tokens / ours:.0f}, GPT2LMHeadModel {tokens / theirs:.0f} tokens/s: {ratio:.2f} x")
        if args.profile:
            # afterwards: it leaves an allocator behind with which the peer is a tenth faster
            for side, timed_side in zip(("MiniGPT", "GPT2LMHeadModel"), timed, strict=True):
                # the three steps that are not timed are in it
                print_profile(f"{name}, {side}", timed_side, steps + 3)
    print(json.dumps({"ratios": ratios}))


if __name__ == "__main__":
    main()
