"""Peak memory of training beyond the loaded process: MiniGPT in GPT-2's shape against GPT2LMHeadModel.

    python recipes/benchmarks/train_memory.py

Each side is a process of its own: it builds the model, notes its resident memory (on a GPU: the allocated), trains
three steps under transformers' Trainer (fused AdamW, fp32 on a CPU, bf16 on a GPU) and tells its peak above that, so
gradients and optimizer state count on both sides. 4 layers x 768, 50,257 tokens, 8 rows of 512. The last line printed
is a JSON object; `ratios.memory` is theirs over ours, the median of the rounds.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from peers import RandomRows, gpt2_peer, our_gpt2, resident, seconds_per_step

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
        # the peak so far is forgotten
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    seconds_per_step(model, RandomRows(4 * ROWS, CONTEXT, VOCAB_SIZE), ROWS, steps=1, bf16=on_gpu)
    return (torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(peak_bytes(args.side))
        return
    peaks: dict[str, list[int]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side, found in peaks.items():
            command = [sys.executable, __file__, "--side", side]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found.append(int(output.splitlines()[-1]))
    ours, theirs = (statistics.median(found) for found in peaks.values())
    print(f"peak above the loaded process: MiniGPT {ours / 2**20:.0f} MiB, GPT2LMHeadModel {theirs / 2**20:.0f} MiB")
    print(json.dumps({"ratios": {"memory": theirs / ours}}))


if __name__ == "__main__":
    main()
