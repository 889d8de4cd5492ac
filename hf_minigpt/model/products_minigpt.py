"""
Matrix products on a CPU, by whichever of PyTorch's libraries does them faster. It travels with a checkpoint.

PyTorch multiplies float32 by MKL, which on AMD's processors leaves the 512-bit vectors unused; oneDNN, which PyTorch
brings along for its compiler, uses them, and takes half the time. For a token or a few, where a product costs the
time of reading the matrix, MKL has to be asked in the right way.
"""

import functools
import platform
from pathlib import Path

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode


# Below so many rows or multiplications oneDNN's calls cost more than they save.
MIN_ROWS = 8
MIN_MULTIPLICATIONS = 2**21

# `few_rows_linear` is the faster one up to so many rows, and from so many weights on.
FEW_ROWS = 32
SMALL_MATRIX = 2**17
# Outputs from which several rows are multiplied in blocks, which leaves each row's in one piece.
LARGE_HEAD = 2**13


@functools.cache
def prefers_onednn() -> bool:
    """Whether this machine's float32 products are faster in oneDNN: an AMD processor with AVX-512, and MKL."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not has_both or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in processor()


def processor() -> str:
    """What the system says of its processor, with its maker's name."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            return file.read(4096)
    except OSError:
        return platform.processor()


def takes_onednn(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """
    Whether `linear` of inputs (..., I) and weight (O, I) is oneDNN's: plain and large float32 matrices, and nothing
    that knows `F.linear` only. `torch.backends.mkldnn.flags(enabled=False)` makes it False.
    """
    return (
        # a tracer may not know the sizes, and shall not learn of this machine
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and prefers_onednn()
        # neither a tracer's nor a shard's
        and type(inputs) is torch.Tensor
        and type(weight) in (torch.Tensor, nn.Parameter)
        and inputs.device.type == "cpu"
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.numel() >= MIN_ROWS * inputs.shape[-1]
        and inputs.numel() * weight.shape[0] >= MIN_MULTIPLICATIONS
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed()
    )


def is_transformed() -> bool:
    """
    Whether `torch.func` or forward-mode differentiation is at work: then there must be neither a look at values nor an
    autograd function of our own.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def aligned(num_rows: int) -> int:
    """
    The number of rows rounded up, by an eighth at most (or to 8): oneDNN compiles for each shape and keeps what it has
    compiled, half a megabyte, for good, so that they must not be as many as the lengths of texts.
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
        grad_right = outer_product(grad, left) if needs_right else None
        return grad_left, grad_right, grad.sum(0) if needs_bias else None


def run_onednn(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`onednn_product` without gradients."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


def onednn_product(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` of matrices (N, I) and (O, I) of any size and strides, and of a bias (O,) or None: (N, O)."""
    return (_OneDNNProduct.apply if torch.is_grad_enabled() else run_onednn)(left, right, bias)


def outer_product(grad: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The gradient (O, I) of a weight: grad (N, O), transposed, times inputs (N, I)."""
    # oneDNN copies the first factor to transpose it: the smaller one. Then the result lies in memory as (I, O).
    if grad.shape[1] > inputs.shape[1]:
        return onednn_product(inputs.t(), grad.t()).t()
    return onednn_product(grad.t(), inputs.t())


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` of inputs (..., I), a weight (O, I) and a bias (O,) or None: (..., O)."""
    if not takes_onednn(inputs, weight):
        return F.linear(inputs, weight, bias)
    rows = inputs if inputs.ndim == 2 else inputs.flatten(0, -2)
    num_rows = rows.shape[0]
    num_more = aligned(num_rows) - num_rows
    outputs = onednn_product(F.pad(rows, (0, 0, 0, num_more)) if num_more else rows, weight, bias)
    if num_more:
        outputs = outputs[:num_rows]
    return outputs if inputs.ndim == 2 else outputs.view(*inputs.shape[:-1], -1)


def batched_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` of stacks of matrices (N, R, K) and (N, K, C): (N, R, C)."""
    if not takes_onednn(left[0], right[0].mT):
        return left @ right
    return torch.stack([onednn_product(a, b.mT) for a, b in zip(left, right, strict=True)])


class _ByLinear(TorchFunctionMode):
    """Within it every `F.linear` is `linear`'s."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.linear:
            return func(*args, **kwargs)
        # some call it by the names of its arguments
        names = {"inputs" if name == "input" else name: value for name, value in kwargs.items()}
        return linear(*args, **names)


def project(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """
    `module(inputs)` of a linear layer, its product by `linear`.

    The layers themselves are plain `nn.Linear`: tools that quantise, adapt or count ask for exactly that class.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not prefers_onednn():
        return module(inputs)
    if isinstance(module, nn.Linear) and is_plain_linear(module):
        return linear(inputs, module.weight, module.bias)
    # what an adapter wraps, and a layer that somebody listens to, is no slower
    with _ByLinear():
        return module(inputs)


def is_plain_linear(module: nn.Module) -> bool:
    """
    Whether calling `module` is nothing but its matrix product: then its weight may be read past the call.

    False for an adapter (PEFT), a quantised or sharded head, and one that accelerate or a tensor-parallel plan hooks,
    or anyone else, to see the forward or the backward pass.
    """
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and (torch.compiler.is_compiling() or not nn_module._has_any_global_hook())
    )


def few_rows_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """
    `F.linear` of a few rows (B, I) with a large matrix (O, I) in float32 on a CPU, near its memory's speed: (B, O).

    MKL reads the matrix at half that speed or less for one row, and again for each further one. A batch of products
    with blocks of the matrix's rows it shares out among its threads as it should, and several rows are no trouble to
    it on the matrix's right.
    """
    num_outputs, width = weight.shape
    num_rows = inputs.shape[0]
    if num_rows >= MIN_ROWS and takes_onednn(inputs, weight):
        return linear(inputs, weight, bias)
    if num_rows > 1 and num_outputs < LARGE_HEAD:
        if bias is None:
            return torch.mm(weight, inputs.t()).t()
        return torch.addmm(bias[:, None], weight, inputs.t()).t()
    num_blocks = count_blocks(num_outputs, num_rows)
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
def count_blocks(num_outputs: int, num_rows: int) -> int:
    """Equal blocks of a matrix's rows: four or a little more for one row, of some 2,000 for several; else one."""
    smallest = 4 if num_rows == 1 else max(num_outputs // 2048, 1)
    return next((n for n in range(smallest, 8 * smallest + 1) if num_outputs % n == 0), 1)
