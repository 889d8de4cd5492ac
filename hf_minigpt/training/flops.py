"""Counts the floating-point operations of training, and measures those of a device per second."""

import functools
import time
from collections.abc import Callable

import torch

from ..model.configuration_minigpt import MiniGPTConfig
from ..model.products_minigpt import linear


# Peak FLOP/s of 16-bit matrix products with fp32 accumulation, without sparsity, by words of the device's name.
# Those of V100, A10, A100, L4, L40S, H100 PCIe and RTX 3090, 4090 and 5090 are checked against published tables, the
# others are not. Data sheets since Ampere print twice the value, for sparse matrices.
PEAK_FLOPS = {
    "V100": 125e12,
    "V100 PCIE": 112e12,
    "V100S": 130e12,
    "T4": 65e12,
    "A100": 312e12,
    "A800": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "A10G": 70e12,
    "A6000": 154.8e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12,
    "RTX 6000 Ada": 364.2e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H800": 989e12,
    "H800 PCIe": 756e12,
    "H20": 148e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}
# Before Ampere, only fp16
WITHOUT_BF16 = {"V100", "V100 PCIE", "V100S", "T4"}
# Words of a name that make it another chip, or a part of one
OTHER_CHIPS = {"Ti", "SUPER", "D", "Laptop", "MIG"}


def peak_flops_of(name: str, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of a GPU in matrix products, from the vendor's data sheet.

    Args:
        name: as `torch.cuda.get_device_name` returns it, such as "NVIDIA A100-SXM4-80GB".
        dtype: of the matrices.

    Returns:
        None if the GPU is not in the table, or `dtype` is not a 16-bit type that its tensor cores have.
    """
    words = set(name.replace("-", " ").split())
    parts = [part for part in PEAK_FLOPS if words.issuperset(part.split())]
    if not parts or words & OTHER_CHIPS or dtype not in (torch.bfloat16, torch.float16):
        return None
    part = max(parts, key=lambda part: len(part.split()))
    return None if dtype == torch.bfloat16 and part in WITHOUT_BF16 else PEAK_FLOPS[part]


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

    It is from the data sheet if `peak_flops_of` knows it, otherwise measured with a large matrix product, once per
    process.
    """
    known = peak_flops_of(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
    return known or measure_flops_per_second(device, dtype, seconds=0.3)
