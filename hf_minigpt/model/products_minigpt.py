"""
Matrix products on a CPU, with the faster of PyTorch's two libraries, and the switch that turns every fast path off.

PyTorch computes float32 products with MKL, which leaves the 512-bit vectors of AMD processors unused. oneDNN, which
PyTorch ships for its compiler, uses them and takes half the time. For a few rows, where reading the matrix takes most
of the time, the shape of the MKL call decides the speed.
"""

import contextlib
import functools
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode


# Below these sizes the overhead of an oneDNN call exceeds the gain.
MIN_ROWS = 8
MIN_MULTIPLICATIONS = 2**21

# `few_rows_linear` is faster up to this number of rows, for matrices of at least this number of elements.
FEW_ROWS = 32
SMALL_MATRIX = 2**17
# From this number of outputs on, several rows are multiplied in blocks, so that each output row stays contiguous.
LARGE_HEAD = 2**13

_fast_paths_enabled = os.environ.get("MINIGPT_FAST_PATHS", "1") != "0"


def fast_paths_enabled() -> bool:
    """
    Return whether the fast paths may run: oneDNN products, attention per document, the loss without logits and
    single-token decoding. MINIGPT_FAST_PATHS=0 in the environment turns all of them off.
    """
    return _fast_paths_enabled


@contextlib.contextmanager
def fast_paths(enabled: bool) -> Iterator[None]:
    """Turn every fast path on or off within a `with` block, to compare a fast path with the plain computation."""
    global _fast_paths_enabled
    before, _fast_paths_enabled = _fast_paths_enabled, enabled
    try:
        yield
    finally:
        _fast_paths_enabled = before


@functools.cache
def onednn_is_faster() -> bool:
    """Return whether oneDNN is faster in float32 here: an AMD processor with AVX-512, and a PyTorch with MKL."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not has_both or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in processor_description()


def processor_description() -> str:
    """Return the operating system's description of the processor, which contains the vendor's name."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            return file.read(4096)
    except OSError:
        return platform.processor()


def uses_onednn(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """
    Return whether `linear` of inputs (..., I) and weight (O, I) runs in oneDNN: large float32 matrices, in plain eager
    mode. `torch.backends.mkldnn.flags(enabled=False)` turns it off.
    """
    return (
        # Traced graphs must stay portable, and a tracer may not know the sizes.
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and _fast_paths_enabled
        and onednn_is_faster()
        # Excludes the tensor subclasses of tracers and shards.
        and type(inputs) is torch.Tensor
        and type(weight) in (torch.Tensor, nn.Parameter)
        and inputs.device.type == "cpu"
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.numel() >= MIN_ROWS * inputs.shape[-1]
        and inputs.numel() * weight.shape[0] >= MIN_MULTIPLICATIONS
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not in_function_transform()
    )


def in_function_transform() -> bool:
    """
    Return whether a `torch.func` transform or forward-mode differentiation is active. Values must not be read then,
    and custom autograd functions do not work.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def round_up_rows(num_rows: int) -> int:
    """
    Round a number of rows up, by an eighth at most (or to 8).

    oneDNN compiles a kernel per shape and keeps it forever, half a megabyte each. Rounding keeps the number of shapes
    small for batches of any length.
    """
    step = max(8, 1 << max(num_rows.bit_length() - 4, 0))
    return -(-num_rows // step) * step


class _OneDNNProduct(torch.autograd.Function):
    """`left @ right.T` + bias: (N, I), (O, I), (O,) or None to (N, O)."""

    @staticmethod
    def forward(ctx, left, right, bias):
        ctx.save_for_backward(left, right)
        return run_onednn(left, right, bias)

    @staticmethod
    def backward(ctx, grad):
        left, right = ctx.saved_tensors
        needs_left, needs_right, needs_bias = ctx.needs_input_grad
        grad_left = onednn_product(grad, right.t()) if needs_left else None
        grad_right = weight_gradient(grad, left) if needs_right else None
        return grad_left, grad_right, grad.sum(0) if needs_bias else None


def run_onednn(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `onednn_product` without gradients."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


def onednn_product(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `F.linear` of matrices (N, I) and (O, I) of any size and strides, and a bias (O,) or None: (N, O)."""
    return (_OneDNNProduct.apply if torch.is_grad_enabled() else run_onednn)(left, right, bias)


def weight_gradient(grad: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Compute the gradient (O, I) of a weight: grad (N, O), transposed, times inputs (N, I)."""
    # oneDNN copies the first factor to transpose it. Choose the smaller one; the result then has the layout of (I, O).
    if grad.shape[1] > inputs.shape[1]:
        return onednn_product(inputs.t(), grad.t()).t()
    return onednn_product(grad.t(), inputs.t())


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `F.linear` of inputs (..., I), a weight (O, I) and a bias (O,) or None: (..., O)."""
    if not uses_onednn(inputs, weight):
        return F.linear(inputs, weight, bias)
    rows = inputs if inputs.ndim == 2 else inputs.flatten(0, -2)
    num_rows = rows.shape[0]
    num_padding = round_up_rows(num_rows) - num_rows
    outputs = onednn_product(F.pad(rows, (0, 0, 0, num_padding)) if num_padding else rows, weight, bias)
    if num_padding:
        outputs = outputs[:num_rows]
    return outputs if inputs.ndim == 2 else outputs.view(*inputs.shape[:-1], -1)


def batched_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Compute `left @ right` of stacks of matrices (N, R, K) and (N, K, C): (N, R, C)."""
    if not uses_onednn(left[0], right[0].mT):
        return left @ right
    return torch.stack([onednn_product(a, b.mT) for a, b in zip(left, right, strict=True)])


class _ReplaceLinear(TorchFunctionMode):
    """Context manager that replaces `F.linear` by `linear`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.linear:
            return func(*args, **kwargs)
        kwargs = {"inputs" if name == "input" else name: value for name, value in kwargs.items()}
        return linear(*args, **kwargs)


def project(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """
    Call a linear layer, with its product computed by `linear`.

    The layers stay plain `nn.Linear`, because tools that quantize, adapt or count layers look for exactly that class.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not (_fast_paths_enabled and onednn_is_faster()):
        return module(inputs)
    if isinstance(module, nn.Linear) and is_plain_linear(module):
        return linear(inputs, module.weight, module.bias)
    # Adapters and hooked layers must be called as modules. The products inside them are still replaced.
    with _ReplaceLinear():
        return module(inputs)


def is_plain_linear(module: nn.Module) -> bool:
    """
    Return whether calling `module` computes its matrix product and nothing else, so that callers may use its weight
    directly.

    False for an adapter (PEFT), a quantized or sharded layer, and a layer with forward or backward hooks, for example
    those of accelerate or of a tensor-parallel plan.
    """
    # Written out, because small models spend a noticeable part of decoding here.
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and (torch.compiler.is_compiling() or not nn_module._has_any_global_hook())
    )


def is_fsdp_linear(module: nn.Module) -> bool:
    """
    Return whether `module` is a linear layer that FSDP2 shards, and nothing else hooks: calling it gathers its weight.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing is sharded
    if fsdp is None or type(module).__bases__ != (fsdp.FSDPModule, nn.Linear):
        return False
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return (
        "forward" not in module.__dict__
        and all(hook.__module__.startswith("torch.distributed.fsdp.") for hook in hooks)
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and (torch.compiler.is_compiling() or not nn_module._has_any_global_hook())
    )


def few_rows_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """
    Compute `F.linear` of a few rows (B, I) and a large float32 matrix (O, I) near the speed of memory: (B, O).

    For one row MKL reads the matrix at half that speed or less, and it reads it again for each further row. Blocks of
    the matrix's rows let MKL parallelise; several rows are fast as the right-hand factor.
    """
    num_outputs, width = weight.shape
    num_rows = inputs.shape[0]
    if num_rows >= MIN_ROWS and uses_onednn(inputs, weight):
        return linear(inputs, weight, bias)
    if num_rows > 1 and num_outputs < LARGE_HEAD:
        if bias is None:
            return torch.mm(weight, inputs.t()).t()
        return torch.addmm(bias[:, None], weight, inputs.t()).t()
    num_blocks = choose_num_blocks(num_outputs, num_rows)
    blocks = weight.view(num_blocks, -1, width)
    if num_rows > 1:
        outputs = torch.bmm(inputs.expand(num_blocks, num_rows, width), blocks.mT)
        outputs = outputs.transpose(0, 1).reshape(num_rows, num_outputs)
        return outputs if bias is None else outputs + bias
    column = inputs.t().expand(num_blocks, width, 1)
    if bias is None:
        return torch.bmm(blocks, column).view(1, -1)
    return torch.baddbmm(bias.view(num_blocks, -1, 1), blocks, column).view(1, -1)


@functools.cache
def choose_num_blocks(num_outputs: int, num_rows: int) -> int:
    """Choose into how many equal blocks to split a matrix: 4 or a few more for one row, else about 2,000 rows each."""
    smallest = 4 if num_rows == 1 else max(num_outputs // 2048, 1)
    return next((n for n in range(smallest, 8 * smallest + 1) if num_outputs % n == 0), 1)
