"""Tokens per second of a training step: MiniGPT in GPT-2's shape against transformers' GPT2LMHeadModel.

    python recipes/benchmarks/train_step.py
    python recipes/benchmarks/train_step.py --compile
    python recipes/benchmarks/train_step.py --shapes small_vocab --profile

Both sides run under transformers' Trainer with its default optimizer (fused AdamW), without dropout, in fp32 on a CPU
and bf16 on a GPU. MiniGPT computes the loss without logits (`skip_logits`), as in the recipes. `large_vocab` is 6
layers x 384, 50,257 tokens, 4 rows of 256; `small_vocab` is 4 layers x 256, 8,192 tokens, 8 rows of 256. `--compile`
compiles both sides and does not count the compilation. `--profile` also prints the operators' share of a step.
`ratios` are our tokens per second over theirs, medians over the rounds.
"""

import statistics
from functools import partial

import torch
from common import (
    RandomRows,
    gpt2_peer,
    make_parser,
    median_ratio,
    our_gpt2,
    print_result,
    seconds_per_step,
    take_turns,
)
from torch.profiler import profile

from hf_minigpt.training.processes import use_all_cores


# layers, width, vocabulary, rows, context, steps a round
SHAPES = {"large_vocab": (6, 384, 50257, 4, 256, 4), "small_vocab": (4, 256, 8192, 8, 256, 10)}


def print_profile(label: str, run: partial, steps: int) -> None:
    with profile() as profiled:
        run()
    operators = sorted(profiled.key_averages(), key=lambda operator: -operator.self_cpu_time_total)
    shares = (f"{operator.key} {operator.self_cpu_time_total / 1000 / steps:.0f}" for operator in operators[:10])
    print(f"{label}: ms a step: {', '.join(shares)}")


def main() -> None:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    # a flag, not a second pass: accelerate keeps the first Trainer's choice for the whole process
    parser.add_argument("--compile", action="store_true", help="compile both sides")
    parser.add_argument("--profile", action="store_true", help="print the operators' share of a step")
    args = parser.parse_args()

    use_all_cores()
    ratios = {}
    for name in args.shapes:
        layers, width, vocab_size, rows, context, steps = SHAPES[name]
        data = RandomRows((steps + 4) * rows, context, vocab_size)
        options = {"torch_compile": args.compile, "bf16": torch.cuda.is_available()}
        torch.manual_seed(0)
        sides = {
            side: partial(seconds_per_step, build(layers, width, vocab_size, context), data, rows, steps, 2, **options)
            for side, build in (("MiniGPT", our_gpt2), ("GPT2LMHeadModel", gpt2_peer))
        }
        seconds = take_turns(sides, args.rounds)
        label = f"{name}_compiled" if args.compile else name
        ratios[label] = median_ratio(seconds["GPT2LMHeadModel"], seconds["MiniGPT"])
        rates = (f"{side} {rows * context / statistics.median(times):.0f}" for side, times in seconds.items())
        print(f"{label}: {', '.join(rates)} tokens/s: {ratios[label]:.2f} x")
        if args.profile:
            # last: the profiler leaves an allocator behind with which the peer is a tenth faster
            for side, run in sides.items():
                # the three steps that are not timed are profiled too
                print_profile(f"{name}, {side}", run, steps + 3)
    print_result(ratios=ratios)


if __name__ == "__main__":
    main()
