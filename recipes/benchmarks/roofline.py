"""Training FLOP/s of MiniGPT against the rate of a large matrix product on the same machine.

    python recipes/benchmarks/roofline.py

The modern blocks, 4 layers x 512, 8,192 tokens, 8 rows of 512, under transformers' Trainer with fused AdamW. FLOPs
of a token are nanoGPT's count, 6 N + 12 L H D T: N the parameters without the table that is only looked up in, and all
T keys for each query of H heads of D dimensions in L layers, though causal attention does half of that. The matrix
product is torch.mm's, 1536 cubed, fp32 on a CPU, bf16 on a GPU; it and the training take turns. On an AMD processor
the model's own products are twice as fast as torch.mm, so they are measured, too. The last line printed is a JSON
object; `ratios.roofline` is the median over the rounds, `ratios.of_own_product` that over the model's own product,
`causal` the first with half of attention's count.
"""

import argparse
import json
import statistics

import torch
from peers import RandomRows, seconds_per_step

from hf_minigpt import MiniGPTForCausalLM, preset
from hf_minigpt.model.products_minigpt import linear
from hf_minigpt.training.flops import flops_per_token, measure_flops_per_second
from hf_minigpt.training.processes import use_all_cores


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
    products = {"torch.mm": torch.mm, "the model's own": linear}

    def seconds_of_products() -> tuple[float, ...]:
        """Seconds for as many FLOPs as a step has, by product."""
        rates = [measure_flops_per_second(device, dtype, 1.0, 1536, product) for product in products.values()]
        return tuple(flops * ROWS * CONTEXT / rate for rate in rates)

    steps, times = [], []
    for i in range(args.rounds):
        if i % 2:
            times.append(seconds_of_products())
        steps.append(seconds_per_step(model, rows, ROWS, args.steps, bf16=on_gpu))
        if not i % 2:
            times.append(seconds_of_products())
    shares = []
    rate = flops * ROWS * CONTEXT / statistics.median(steps)
    print(f"training {rate / 1e9:.0f} GFLOP/s")
    for name, seconds in zip(products, zip(*times, strict=True), strict=True):
        shares.append(statistics.median(a / b for a, b in zip(seconds, steps, strict=True)))
        rate = flops * ROWS * CONTEXT / statistics.median(seconds)
        print(f"product of matrices, {name}: {rate / 1e9:.0f} GFLOP/s")
    causal = shares[0] * (flops - attention / 2) / flops
    print(json.dumps({"ratios": {"roofline": shares[0], "of_own_product": shares[1]}, "causal": causal}))


if __name__ == "__main__":
    main()
