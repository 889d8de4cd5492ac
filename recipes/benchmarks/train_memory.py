"""Peak memory of training above the loaded process: MiniGPT in GPT-2's shape against GPT2LMHeadModel.

    python recipes/benchmarks/train_memory.py

Each side runs in its own process: it builds the model, notes its resident memory (on a GPU: the allocated memory),
trains three steps under transformers' Trainer (fused AdamW, fp32 on a CPU, bf16 on a GPU) and reports its peak above
that, gradients and optimizer state included. MiniGPT computes the loss without logits (`skip_logits`), as in the
recipes. 4 layers x 768, 50,257 tokens, 8 rows of 512. `ratios.memory` is their peak over ours, from the medians of the
rounds.
"""

import argparse
import gc
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from common import RandomRows, gpt2_peer, make_parser, our_gpt2, print_result, resident, seconds_per_step, take_turns

from hf_minigpt.training.processes import use_all_cores


SIDES = {"MiniGPT": our_gpt2, "GPT2LMHeadModel": gpt2_peer}
LAYERS, WIDTH, VOCAB_SIZE, ROWS, CONTEXT = 4, 768, 50257, 8, 512


def peak_bytes(side: str) -> int:
    use_all_cores()
    on_gpu = torch.cuda.is_available()
    model = SIDES[side](LAYERS, WIDTH, VOCAB_SIZE, CONTEXT)
    if on_gpu:
        model.cuda()
    gc.collect()
    if on_gpu:
        before = torch.cuda.memory_allocated()
    else:
        # reset the peak so far
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    seconds_per_step(model, RandomRows(4 * ROWS, CONTEXT, VOCAB_SIZE), ROWS, steps=1, bf16=on_gpu)
    return (torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")) - before


def peak_bytes_of_process(side: str) -> int:
    command = [sys.executable, __file__, "--side", side]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return int(output.splitlines()[-1])


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(peak_bytes(args.side))
        return
    peaks = take_turns({side: partial(peak_bytes_of_process, side) for side in SIDES}, args.rounds)
    ours, theirs = (statistics.median(found) for found in peaks.values())
    print(f"peak above the loaded process: MiniGPT {ours / 2**20:.0f} MiB, GPT2LMHeadModel {theirs / 2**20:.0f} MiB")
    print_result(ratios={"memory": theirs / ours})


if __name__ == "__main__":
    main()
