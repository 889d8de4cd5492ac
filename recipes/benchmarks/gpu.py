"""
Check and time the recipes' precisions, flash attention and torch.compile on this machine's GPU.

    python recipes/benchmarks/gpu.py                             # minigpt-base, 16 x 1024 tokens a step
    python recipes/benchmarks/gpu.py --preset gpt2 --batch_size 8

Compares the loss of bf16, fp16, flash attention and torch.compile with that of float32, within a tolerance for each
precision, times a training step of each, and reports its share of the GPU's peak (MFU, by nanoGPT's count of FLOPs).
Exits with status 1 if a loss differs, and with status 2 if there is no CUDA device.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence

import torch
from common import NO_DROPOUT, make_parser, print_result
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import is_flash_attn_2_available

from hf_minigpt import MiniGPTForCausalLM, preset
from hf_minigpt.training.flops import PEAK_FLOPS, flops_per_token
from hf_minigpt.training.optimizers import muon_adamw


# largest relative difference from the loss in float32 (TF32 off): a few units of the format's last place
TOLERANCE = {"fp32": 1e-5, "tf32": 2e-3, "fp16": 4e-3, "bf16": 2e-2}

Setting = dict[str, object]


def settings() -> list[Setting]:
    """Return what is compared, in order: name, precision, attention, whether it is compiled."""
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    half = "bf16" if has_bf16 else "fp16"
    tried: list[Setting] = [
        {"name": "fp32", "precision": "fp32"},
        {"name": "tf32", "precision": "tf32"},
        {"name": "fp16", "precision": "fp16"},
    ]
    if has_bf16:
        tried.append({"name": "bf16", "precision": "bf16"})
    attention = "flash_attention_2" if is_flash_attn_2_available() else "sdpa_flash"
    tried.append({"name": f"{half}, {attention}", "precision": half, "attention": attention})
    tried.append({"name": f"{half}, compiled", "precision": half, "compile": True})
    return tried


def run(setting: Setting, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return the loss before training, tokens per second of a training step, and peak memory in GiB."""
    precision = setting["precision"]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    config = preset(args.preset, **NO_DROPOUT, residual_init="gpt2")
    implementation = "flash_attention_2" if setting.get("attention") == "flash_attention_2" else "sdpa"
    model = MiniGPTForCausalLM._from_config(config, attn_implementation=implementation).to(device)
    optimizer = muon_adamw(model, learning_rate=1e-3, matrix_learning_rate=0.01)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(str(precision))
    scaler = torch.amp.GradScaler(enabled=precision == "fp16")
    autocast = torch.autocast("cuda", dtype) if dtype is not None else contextlib.nullcontext()
    backends = [SDPBackend.FLASH_ATTENTION]
    if setting.get("attention") != "sdpa_flash":
        backends += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    forward = torch.compile(model) if setting.get("compile") else model

    context_length = min(args.context_length, config.max_position_embeddings)
    shape = (args.batch_size, context_length)
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1)).to(device)

    def step() -> torch.Tensor:
        with autocast, sdpa_kernel(backends):
            loss = forward(input_ids=ids, labels=ids, skip_logits=True, use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss

    first_loss = step().item()
    for _ in range(args.warmup_steps):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(args.steps):
        step()
    torch.cuda.synchronize()
    tokens_per_second = args.steps * ids.numel() / (time.perf_counter() - start)
    results = {
        "loss": first_loss,
        "tokens_per_second": tokens_per_second,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "flops_per_second": tokens_per_second * flops_per_token(config, model.num_parameters(), context_length),
    }
    torch.compiler.reset()
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--preset", default="minigpt-base")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--context_length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup_steps", type=int, default=5)
    parser.add_argument(
        "--peak_flops",
        type=float,
        help="of this GPU, if hf_minigpt/training/flops.py does not list it",
    )
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("No CUDA device: this benchmark times a GPU. On a CPU, recipes/pretrain.py reports its own speed.")
        return 2

    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    known = [flops for part, flops in PEAK_FLOPS.items() if part in name]
    peak = args.peak_flops or (known[0] if known else None)
    print(f"{name}, torch {torch.__version__}, {args.preset}, {args.batch_size} x {args.context_length} tokens a step")
    results: dict[str, dict[str, float]] = {}
    failed = []
    for setting in settings():
        label, precision = str(setting["name"]), str(setting["precision"])
        result = results[label] = run(setting, args, device)
        error = abs(result["loss"] / results["fp32"]["loss"] - 1)
        if not error <= TOLERANCE[precision]:
            failed.append(label)
        if peak is not None and precision in ("fp16", "bf16"):
            result["mfu"] = result["flops_per_second"] / peak
        print(
            f"{label:26} {result['tokens_per_second']:12,.0f} tokens/s {result['memory_gib']:6.1f} GiB   "
            f"MFU {result.get('mfu', float('nan')):6.1%}   loss off by {error:.1e}"
            + ("  FAILED" if label in failed else "")
        )
    base = results["fp32"]["tokens_per_second"]
    ratios = {f"{label} over fp32": result["tokens_per_second"] / base for label, result in results.items()}
    print_result(device=name, results=results, ratios=ratios, failed=failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
