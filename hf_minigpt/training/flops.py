"""Counts the floating-point operations of training, and measures those of a device per second."""

import functools
import time
from collections.abc import Callable

import torch

from ..model.configuration_minigpt import MiniGPTConfig
from ..model.products_minigpt import linear


# Dense bf16 / fp16 tensor-core FLOP/s from the vendor's data sheets, by part of the device's name.
PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
    "T4": 65e12,
}


def flops_per_token(config: MiniGPTConfig, num_parameters: int, context_length: int) -> float:
    """Return the FLOPs of one token's forward and backward pass, `6 N + 12 L H Q T` (PaLM, appendix B; nanoGPT).

    N excludes tables that are used only for lookup.
    """
    lookup_only = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    if config.position_embedding_type == "learned":
        lookup_only += config.max_position_embeddings * config.hidden_size
    assert config.head_dim is not None
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * context_length
    return 6 * (num_parameters - lookup_only) + 12 * attention


def measure_flops_per_second(
    device: torch.device,
    dtype: torch.dtype,
    seconds: float = 1.0,
    size: int | None = None,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = linear,
) -> float:
    """Measure the FLOP/s of a large square matrix product on a device.

    Args:
        device: where to measure.
        dtype: of the matrices.
        seconds: duration of the measurement.
        size: number of rows and columns. Default: 8192 on a GPU, 1024 on a CPU.
        product: the matrix product. Default: the one that the model uses.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    product(a, b)
    _synchronize(device)
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        product(a, b)
        _synchronize(device)
        products += 1
    return 2 * size**3 * products / (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def peak_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Return the peak FLOP/s that the model FLOPs utilization (MFU) refers to.

    For 16-bit products on a known GPU it is from the data sheet, otherwise measured with a large matrix product, once
    per process.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        for part, flops in PEAK_FLOPS.items():
            if part in torch.cuda.get_device_name(device):
                return flops
    return measure_flops_per_second(device, dtype, seconds=0.3)
