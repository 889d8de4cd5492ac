"""Quantize linear layers to int8 for faster generation on x86 CPUs, with torch's fbgemm kernels."""

import warnings

import torch
from torch import nn
from transformers import PreTrainedModel

from ..model.products_minigpt import is_plain_linear


class Int8Linear(nn.Module):
    """
    A linear layer with int8 weights, one scale per output, and dynamically quantized inputs.

    Maps (..., in_features) to (..., out_features), in float32. Weights have 8 bits and inputs 7: products of two 8-bit
    numbers overflow on processors without VNNI.

    Args:
        linear: the layer to quantize.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        integers = (weight / scales[:, None]).round().to(torch.int8)
        zeros = torch.zeros(self.out_features, dtype=torch.long)
        with warnings.catch_warnings():
            # torch deprecates quantized tensors, but fbgemm's kernels have no other way to pack weights.
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
            quantized = torch._make_per_channel_quantized_tensor(integers, scales, zeros, 0)
        bias = None if linear.bias is None else linear.bias.detach().float()
        engine = torch.backends.quantized.engine
        # The default engine takes three times as long for one row.
        torch.backends.quantized.engine = "fbgemm"
        try:
            self.packed = torch.ops.quantized.linear_prepack(quantized, bias)
        finally:
            torch.backends.quantized.engine = engine

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic(inputs, self.packed, reduce_range=True)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        raise ValueError(
            f"{prefix.rstrip('.')} is in int8 and cannot be saved. Save the model before quantize_int8, and "
            "quantize it again after loading."
        )


def quantize_int8(model: PreTrainedModel) -> PreTrainedModel:
    """
    Quantize every linear layer, including the head, to int8 in place, for generation on an x86 CPU.

    The embedding stays in float32, also if it was tied to the head. The model can no longer be trained or saved.

    Args:
        model: a MiniGPT in float32 on the CPU, in evaluation mode.

    Returns:
        `model`.

    Raises:
        ValueError: the model has another device, dtype or mode, has adapters or hooks, or torch has no fbgemm.
    """
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ValueError("torch has no fbgemm kernels here, they need an x86 CPU. Generate in float32 or bfloat16.")
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise ValueError(
            f"The model is {model.dtype} on {model.device}. Move it with .to('cpu', torch.float32) first."
        )
    if model.training:
        raise ValueError("The model is in training mode, but int8 is for generation: call .eval() first.")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, linear in linears.items():
        if not is_plain_linear(linear):
            raise ValueError(f"{name} is more than a linear layer. Merge adapters and remove hooks first.")
    for name, linear in linears.items():
        model.set_submodule(name, Int8Linear(linear))
    return model.requires_grad_(False)
