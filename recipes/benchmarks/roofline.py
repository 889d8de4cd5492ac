"""Training FLOP/s of MiniGPT against the rate of a large matrix product on the same machine.

    python recipes/benchmarks/roofline.py

The modern blocks, 4 layers x 512, 8,192 tokens, 8 rows of 512, under transformers' Trainer with fused AdamW. FLOPs
of a token are nanoGPT's count, 6 N + 12 L H D T: N the parameters without the table that is only looked up in, and all
T keys for each query of H heads of D dimensions in L layers, though causal attention does half of that. The matrix
product is 1536 cubed, fp32 on a CPU, bf16 on a GPU; it and the training take turns. The last line printed is a
JSON object; `ratios.roofline` is the median over the rounds, `causal` the same with half of attention's count.
"""

import argparse
import json

import torch
from peers import RandomRows, alternate, seconds_per_step

from hf_minigpt import MiniGPTForCausalLM, preset
from hf_minigpt.training.arguments import use_all_cores
from hf_minigpt.training.flops import flops_per_token, measure_flops_per_second


LAYERS, WIDTH, VOCAB_SIZE, ROWS, CONTEXT = 4, 512, 8192, 8, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    use_all_cores()
    on_gpu = torch.cuda.is_available()
    config = preset(
        "minigpt-small",
        num_hidden_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=WIDTH // 64,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT,
    )
    model = MiniGPTForCausalLM(config)
    rows = RandomRows((args.steps + 3) * ROWS, CONTEXT, VOCAB_SIZE)
    flops = flops_per_token(config, model.num_parameters(), CONTEXT)
    attention = 12 * LAYERS * WIDTH * CONTEXT
    dtype = torch.bfloat16 if on_gpu else torch.float32
    device = torch.device("cuda" if on_gpu else "cpu")
    step, flop_time, ratio = alternate(
        lambda: seconds_per_step(model, rows, ROWS, args.steps, bf16=on_gpu),
        # seconds for as many FLOPs as a step has
        lambda: flops * ROWS * CONTEXT / measure_flops_per_second(device, dtype, 2.0, size=1536),
        args.rounds,
    )
    rate = flops * ROWS * CONTEXT / step
    print(f"training {rate / 1e9:.0f} GFLOP/s, matrix product {rate * step / flop_time / 1e9:.0f} GFLOP/s")
    causal = ratio * (flops - attention / 2) / flops
    print(json.dumps({"ratios": {"roofline": ratio}, "causal": causal}))


if __name__ == "__main__":
    main()
