"""Linear layers in int8, for text at a fraction of the memory traffic: torch's own fbgemm kernels, on x86 CPUs."""

import warnings

import torch
from torch import nn
from transformers import PreTrainedModel

from ..model.products_minigpt import is_plain_linear


class Int8Linear(nn.Module):
    """
    A linear layer with int8 weights, a scale each output, and inputs that are rounded as they come.

    (..., in_features) to (..., out_features), in float32. Eight bits of a weight are kept and seven of an input: the
    product of two full bytes would overflow on processors without VNNI.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        integers = (weight / scales[:, None]).round().to(torch.int8)
        zeros = torch.zeros(self.out_features, dtype=torch.long)
        with warnings.catch_warnings():
            # The tensor class is to go; fbgemm's products, for which nothing else packs yet, are not.
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
            quantized = torch._make_per_channel_quantized_tensor(integers, scales, zeros, 0)
        bias = None if linear.bias is None else linear.bias.detach().float()
        engine = torch.backends.quantized.engine
        # The default engine's kernel for one row takes three times as long.
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
            f"{prefix.rstrip('.')} is in int8 and cannot be saved: save the model before quantize_int8, which takes a "
            "moment and can be repeated after loading."
        )


def quantize_int8(model: PreTrainedModel) -> PreTrainedModel:
    """
    Replace every linear layer, the head too, by int8, in place; for generation on an x86 CPU.

    The embedding stays in float32, also where the head shared its table. The model can neither be trained nor saved
    afterwards.

    Args:
        model: a MiniGPT in float32 on the CPU.

    Raises:
        ValueError: the model is elsewhere, in training, in another precision, has adapters on, or torch has no fbgemm.
    """
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ValueError("This torch has no fbgemm kernels (they are for x86): generate in float32 or bfloat16.")
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise ValueError(
            f"The model is {model.dtype} on {model.device}: move it with .to('cpu', torch.float32) first."
        )
    if model.training:
        raise ValueError("The model is in training mode: int8 is for generation, call .eval() first.")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, linear in linears.items():
        if not is_plain_linear(linear):
            raise ValueError(f"{name} is more than a linear layer: merge adapters and remove hooks first.")
    for name, linear in linears.items():
        model.set_submodule(name, Int8Linear(linear))
    return model.requires_grad_(False)
