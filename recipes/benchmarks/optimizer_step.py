"""What a MuonAdamW step costs beyond the matrix products that its Newton-Schulz iteration cannot do without.

    python recipes/benchmarks/optimizer_step.py

For the matrices of 6 layers x 384 (`--layers`, `--width`, `--vocab_size`): the bare batched products against
the whole step with momentum, normalisation, updates and AdamW on the rest; in turn. The last line printed is a JSON
object: `ratios.gemm_floor` is products over step, and `share_of_step` the optimizer's share of a training step of
16,384 tokens, forward and backward pass timed here too.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable

import torch
from peers import alternate

from hf_minigpt import MiniGPTForCausalLM, preset
from hf_minigpt.model.products_minigpt import batched_product
from hf_minigpt.training.optimizers import hidden_matrices, muon_adamw
from hf_minigpt.training.processes import use_all_cores


TOKENS_PER_STEP = 16384


def timed(function: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def products(shapes: Counter, steps: int = 5) -> Callable[[], None]:
    """The products of `orthogonalize`, and nothing else, for so many matrices of each shape."""
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    options = {"device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": torch.bfloat16 if half else None}
    jobs = []
    for (rows, columns), number in shapes.items():
        short, long = sorted((rows, columns))
        wide = torch.randn(number, short, long, **options)
        square = torch.randn(number, short, short, **options)
        by_gram = not half and long >= 2 * short
        jobs.append((wide, square, by_gram))

    def run() -> None:
        for wide, square, by_gram in jobs:
            if by_gram:
                batched_product(wide, wide.mT)
                # a polynomial each; between two of them the next Gram matrix and their product
                for _ in range(steps + 3 * (steps - 1)):
                    batched_product(square, square)
                batched_product(square, wide)
            else:
                for _ in range(steps):
                    batched_product(wide, wide.mT)
                    batched_product(square, square)
                    batched_product(square, wide)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    use_all_cores()
    config = preset(
        "minigpt-small",
        num_hidden_layers=args.layers,
        hidden_size=args.width,
        num_attention_heads=args.width // 64,
        vocab_size=args.vocab_size,
        max_position_embeddings=256,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MiniGPTForCausalLM(config).to(device)
    optimizer = muon_adamw(model, learning_rate=1e-3, matrix_learning_rate=1e-2)
    ids = torch.randint(args.vocab_size, (8, 256), device=device)

    def forward_and_backward() -> None:
        model(input_ids=ids, labels=ids, skip_logits=True, use_cache=False).loss.backward()

    forward_and_backward()
    optimizer.step()
    bare = products(Counter(tuple(p.shape) for p in hidden_matrices(model).values()))
    bare()
    step, floor, _ = alternate(lambda: timed(optimizer.step), lambda: timed(bare), args.rounds)
    passes = min(timed(forward_and_backward) for _ in range(3)) * TOKENS_PER_STEP / ids.numel()
    share = step / (step + passes)
    print(f"products alone {floor * 1e3:.0f} ms, the whole step {step * 1e3:.0f} ms")
    print(f"of a training step of {TOKENS_PER_STEP} tokens ({passes:.1f} s without it): {share:.1%}")
    print(json.dumps({"ratios": {"gemm_floor": floor / step}, "share_of_step": share}))


if __name__ == "__main__":
    main()
