"""
Estimate the memory and the time of a training step on a GPU from the shapes of its tensors. Needs no GPU.

    python recipes/benchmarks/shapes.py                              # gpt2 at 64 x 512
    python recipes/benchmarks/shapes.py --preset minigpt-base --batch_size 32 --context_length 1024

The step runs on tensors without values (bf16 autocast, SDPA as flash attention, the loss without logits, no dropout),
which record each kernel's FLOPs, the bytes that it reads and writes, and what is allocated. A kernel takes the longer
of the times of its FLOPs and of its bytes at the rates in `GPUS`, which are assumptions, plus the gap before it.
Compiled, neighbouring pointwise kernels and reductions become one, which reads its inputs and writes what others read.
MFU is by nanoGPT's count of FLOPs, of the peak without sparsity. These are estimates; `gpu.py` measures.
"""

import argparse
import contextlib
import json
import sys
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree


sys.path.insert(0, str(Path(__file__).parents[2]))
from hf_minigpt import MiniGPTConfig, MiniGPTForCausalLM, preset
from hf_minigpt.model import loss_minigpt
from hf_minigpt.training.flops import flops_per_token
from hf_minigpt.training.optimizers import adamw_decaying_matrices, muon_adamw
from tests.pretended_gpu import Functions, PretendedTensor, place, pretended_gpu, to_gpu


# the allocator rounds to this many bytes
BLOCK = 512

VIEWS = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "expand", "slice", "select"),
    *("unsqueeze", "squeeze", "detach", "alias", "split", "split_with_sizes", "unbind", "as_strided", "chunk"),
    *("lift_fresh", "diagonal", "narrow", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmm_", "baddbmm_"}
# read or write as many elements of their table as their result or their index has
SPARSE = {"embedding", "gather", "scatter_add_", "scatter_add", "scatter", "scatter_", "index", "index_select"}


PARTS = ["blocks: products", "attention", "blocks: the rest", "head: products", "head: the rest", "optimizer"]


@dataclass(frozen=True)
class GPU:
    """
    A GPU's peak rates (FLOP/s in bf16 and bytes/s, from its data sheet), and the fractions of them that are assumed:
    large matrix products, flash attention, memory. Then the seconds between two kernels that are queued, and those
    that Python takes for a kernel in eager mode.
    """

    peak: float
    bandwidth: float
    products: float
    attention: float
    memory: float
    gap: float = 1.5e-6
    dispatch: float = 8e-6


GPUS = {
    "A100 80GB SXM": GPU(312e12, 2.04e12, products=0.75, attention=0.35, memory=0.85),
    "H100 SXM": GPU(989e12, 3.35e12, products=0.60, attention=0.20, memory=0.85),
}


@dataclass
class Kernel:
    """One kernel: its operation, phase, FLOPs, and bytes read and written of each storage, by serial number."""

    name: str
    phase: str
    flops: int = 0
    reads: dict[int, int] = field(default_factory=dict)
    writes: dict[int, int] = field(default_factory=dict)
    in_head: bool = False

    @property
    def part(self) -> str:
        if self.phase == "optimizer" or self.name == "attention":
            return "optimizer" if self.phase == "optimizer" else "attention"
        return f"{'head' if self.in_head else 'blocks'}: {'products' if self.flops else 'the rest'}"

    @property
    def sizes(self) -> list[int]:
        return [*self.reads.values(), *self.writes.values()]

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes)


class Meter:
    """Runs operations on meta tensors. Records their kernels, and the memory that is allocated.

    Attributes:
        kernels: the kernels since the last `clear`.
        peaks: most bytes allocated since the last `clear`, by phase.
        largest: bytes of the largest tensor made since the last `clear`.
        phase: of the step; forward, backward or optimizer.
    """

    def __init__(self):
        self.phase = ""
        self.allocated = 0
        self.serials: dict[int, int] = {}
        self.references: dict[int, weakref.ref] = {}
        self.num_storages = 0
        self.clear()

    def clear(self) -> None:
        self.kernels: list[Kernel] = []
        self.peaks = {self.phase: self.allocated}
        self.largest = 0

    def __call__(self, func, args, kwargs):
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            return 1
        if name == "nonzero":
            [tensor] = args
            return self.allocate(torch.empty(tensor.numel(), tensor.ndim, dtype=torch.int64, device="meta"))
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for tensor in outputs:
            self.allocate(tensor)
        if name not in VIEWS:
            self.record(func, name, args, kwargs, inputs, outputs)
        return result

    def allocate(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.serials:
            num_bytes = -(-storage.nbytes() // BLOCK) * BLOCK
            self.num_storages += 1
            self.serials[key] = self.num_storages
            self.allocated += num_bytes
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.allocated)
            self.largest = max(self.largest, num_bytes)

            def free(_):
                self.allocated -= num_bytes
                del self.serials[key], self.references[key]

            self.references[key] = weakref.ref(storage, free)
        return tensor

    def traffic(self, tensors) -> dict[int, int]:
        """Return the bytes of tensors by their storage's serial number."""
        found: dict[int, int] = {}
        for tensor in tensors:
            self.allocate(tensor)
            serial = self.serials[tensor.untyped_storage()._cdata]
            # expanded dimensions are in memory once
            sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
            num_bytes = torch.Size(sizes).numel() * tensor.element_size()
            found[serial] = max(found.get(serial, 0), num_bytes)
        return found

    def record(self, func, name, args, kwargs, inputs, outputs) -> None:
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        written = [
            leaf
            for argument in func._schema.arguments
            if argument.alias_info is not None
            and argument.alias_info.is_write
            # AdamW's kernel may scale gradients, but does not
            and not (name == "_fused_adamw_" and argument.name == "grads")
            for leaf in pytree.tree_leaves(given.get(argument.name))
            if isinstance(leaf, torch.Tensor)
        ]
        reads, writes = self.traffic(inputs), self.traffic(written or outputs)
        if name in ("copy_", "fill_", "zero_") or (name in PRODUCTS and kwargs.get("out") is not None):
            reads = {serial: num_bytes for serial, num_bytes in reads.items() if serial not in writes}
        kernel = Kernel(name, self.phase, reads=reads, writes=writes)
        kernel.in_head = place(__file__).startswith("hf_minigpt/model/loss")
        if name in SPARSE:
            most = max(t.numel() * t.element_size() for t in inputs[1:] + ([] if written else outputs))
            kernel.reads = {serial: min(num_bytes, most) for serial, num_bytes in reads.items()}
            kernel.writes = {serial: min(num_bytes, most) for serial, num_bytes in writes.items()}
        if name in PRODUCTS:
            left, right = args[-2:]
            kernel.flops = 2 * left.numel() * right.shape[-1]
        self.kernels.append(kernel)

    def record_attention(self, flops: int, tensors) -> None:
        values = [tensor.values for tensor in tensors]
        self.kernels.append(Kernel("attention", self.phase, flops, reads=self.traffic(values)))

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    def record_chunk(self, logits, bias, targets, row_weights, softcap, num_ids, count_correct, need_grad, need_bias):
        """What the head's compiled chunk does: one kernel that reads the logits, one that reads and replaces them."""
        traffic = self.traffic([logits.values])
        self.kernels.append(Kernel("statistics", self.phase, reads=traffic, in_head=True))
        if need_grad:
            self.kernels.append(Kernel("gradient", self.phase, reads=traffic, writes=traffic, in_head=True))
        zero = torch.zeros((), device="cuda")
        return zero, zero.long(), torch.zeros(logits.shape[1], device="cuda") if need_bias else None


class _Flash(torch.autograd.Function):
    """The memory and the work of FlashAttention: keeps its inputs, its output and a float32 per row."""

    @staticmethod
    def forward(ctx, meter, query, key, value, is_causal):
        output = torch.empty_like(query)
        logsumexp = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.meter = meter
        # two products, half of them masked
        ctx.flops = 4 * query.numel() * key.shape[-2] // (2 if is_causal else 1)
        meter.record_attention(ctx.flops, (query, key, value, output))
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, output, _ = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        # five products instead of two
        ctx.meter.record_attention(ctx.flops * 5 // 2, (query, key, value, output, grad, *grads))
        return None, *grads, None


class _RMSNorm(torch.autograd.Function):
    """The memory and the work of CUDA's fused RMSNorm: one kernel each way, which keeps its input."""

    @staticmethod
    def forward(ctx, inputs):
        scale = torch.empty((*inputs.shape[:-1], 1), dtype=torch.float32, device=inputs.device)
        ctx.save_for_backward(inputs, scale)
        return inputs.neg()

    @staticmethod
    def backward(ctx, grad):
        inputs, _ = ctx.saved_tensors
        return inputs + grad


class _Kernels(Functions):
    """Uses CUDA's fused kernels where a CPU computes with several operations."""

    def __init__(self, meter: Meter):
        super().__init__()
        self.meter = meter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], PretendedTensor):
            if func is F.scaled_dot_product_attention:
                return self.attend(*args, **kwargs)
            if func is F.rms_norm and kwargs.get("weight") is None:
                is_half = torch.is_autocast_enabled("cuda") and args[0].dtype != torch.float32
                return _RMSNorm.apply(args[0].float() if is_half else args[0])
            if func is F.dropout:
                p, training = kwargs.get("p", args[1] if len(args) > 1 else 0.5), kwargs.get("training", True)
                return torch.native_dropout(args[0], p, True)[0] if training and p > 0 else args[0]
        return super().__torch_function__(func, types, args, kwargs)

    def attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        tensors = [query, key, value]
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            tensors = [tensor.to(dtype) for tensor in tensors]
        return _Flash.apply(self.meter, *tensors, is_causal)


@contextlib.contextmanager
def measured_by_shapes():
    """Pretend that there is a GPU whose tensors have shapes only; yields the `Meter` of what happens there."""
    meter = Meter()
    with (
        pretended_gpu(meter, "meta", _Kernels(meter)),
        mock.patch.object(loss_minigpt, "compiles_chunks", lambda hidden: hidden.is_cuda),
        mock.patch.object(loss_minigpt, "run_compiled_chunk", meter.record_chunk),
    ):
        yield meter


def measure_step(
    config: MiniGPTConfig,
    batch_size: int,
    context_length: int,
    optimizer: str = "muon",
    dtype: torch.dtype | None = torch.bfloat16,
    gradient_checkpointing: bool = False,
    skip_logits: bool = True,
) -> Meter:
    """
    Run a training step by shapes, with the optimizer's state there from the beginning, and return its meter.

    Args:
        optimizer: "muon" or "adamw".
        dtype: of autocast; None for float32.
        skip_logits: as in `MiniGPTForCausalLM.forward`.
    """
    with torch.device("meta"):
        model = MiniGPTForCausalLM(config)
    model.tie_weights()
    model.train()
    if gradient_checkpointing:
        # transformers before 5.23 has only the old name
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with measured_by_shapes() as meter:
        for tensor in pytree.tree_leaves([p.values for p in to_gpu(model).state_dict(keep_vars=True).values()]):
            meter.allocate(tensor)
        if optimizer == "muon":
            step = muon_adamw(model, learning_rate=1e-3, matrix_learning_rate=1e-2)
        else:
            step = adamw_decaying_matrices(model, learning_rate=1e-3)
        ids = torch.empty(batch_size, context_length, dtype=torch.int64, device="cuda")
        num_items = torch.ones((), dtype=torch.int64, device="cuda")
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        step.step()  # creates the optimizer's state
        step.zero_grad()
        meter.clear()
        meter.phase = "forward"
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(
                input_ids=ids,
                shift_labels=ids,
                num_items_in_batch=num_items,
                use_cache=False,
                count_correct=True,
                skip_logits=skip_logits,
            ).loss
        meter.phase = "backward"
        loss.backward()
        meter.phase = "optimizer"
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step.step()
    return meter


def compiled(kernels: list[Kernel]) -> list[Kernel]:
    """Return the kernels with each run of neighbours other than products, attention and the optimizer's as one."""
    last_read = {serial: number for number, kernel in enumerate(kernels) for serial in kernel.reads}
    same: dict[int, int] = {}
    fused: list[Kernel] = []
    group: list[Kernel] = []

    def close(number: int) -> None:
        if not group:
            return
        reads: dict[int, int] = {}
        writes: dict[int, int] = {}
        for kernel in group:
            reads |= {serial: size for serial, size in kernel.reads.items() if serial not in writes}
            writes |= kernel.writes
        writes = {serial: size for serial, size in writes.items() if last_read.get(serial, 0) >= number}
        fused.append(Kernel("fused", group[0].phase, reads=reads, writes=writes, in_head=group[0].in_head))
        group.clear()

    copies: dict[tuple, int] = {}
    for number, kernel in enumerate(kernels):
        reads = {same.get(serial, serial): size for serial, size in kernel.reads.items()}
        kernel = replace(kernel, reads=reads)
        if kernel.name == "_to_copy":
            # The same copy for several layers is made once.
            [copy] = kernel.writes
            first = copies.setdefault((*reads, kernel.writes[copy]), copy)
            last_read[first] = max(last_read.get(first, 0), last_read.get(copy, 0))
            if first != copy:
                same[copy] = first
                continue
        if kernel.part in ("blocks: the rest", "head: the rest") and kernel.name not in ("statistics", "gradient"):
            if group and group[0].part != kernel.part:
                close(number)
            group.append(kernel)
        else:
            close(number)
            fused.append(kernel)
    close(len(kernels))
    return fused


def seconds_by_part(kernels: list[Kernel], gpu: GPU) -> dict[str, float]:
    seconds = dict.fromkeys(PARTS, 0.0)
    for kernel in kernels:
        fraction = gpu.attention if kernel.name == "attention" else gpu.products
        compute = kernel.flops / (gpu.peak * fraction)
        seconds[kernel.part] += max(compute, kernel.num_bytes / (gpu.bandwidth * gpu.memory)) + gpu.gap
    return seconds


def estimate(
    config: MiniGPTConfig, batch_size: int, context_length: int, optimizer: str, gpus: dict[str, GPU] = GPUS
) -> dict[str, Any]:
    """Print the table; return its last rows and the peak memory in GiB."""
    meter = measure_step(config, batch_size, context_length, optimizer)
    with torch.device("meta"):
        num_parameters = MiniGPTForCausalLM(config).num_parameters()
    flops = flops_per_token(config, num_parameters, context_length) * batch_size * context_length
    ways = {"eager": meter.kernels, "compiled": compiled(meter.kernels)}
    columns = {}
    for name, gpu in gpus.items():
        for way, kernels in ways.items():
            columns[f"{name}, {way}"] = gpu, len(kernels), seconds_by_part(kernels, gpu)
    print("| ms a step | " + " | ".join(columns) + " | measured |")
    print("|-" * (len(columns) + 2) + "|")
    for part in PARTS:
        print(f"| {part} | " + " | ".join(f"{1000 * s[part]:.1f}" for _, _, s in columns.values()) + " | |")
    step = {name: sum(seconds.values()) for name, (_, _, seconds) in columns.items()}
    mfu = {name: flops / step[name] / gpu.peak for name, (gpu, _, _) in columns.items()}
    print("| step | " + " | ".join(f"{1000 * seconds:.1f}" for seconds in step.values()) + " | |")
    host = [
        f"{1000 * number * gpu.dispatch:.0f}" if "eager" in name else "" for name, (gpu, number, _) in columns.items()
    ]
    print("| Python's work, at the same time | " + " | ".join(host) + " | |")
    print("| MFU | " + " | ".join(f"{share:.0%}" for share in mfu.values()) + " | |")
    peak = meter.peak / 2**30
    print(f"\n{flops / 1e12:.1f} TFLOP a step; peak memory {peak:.1f} GiB, plus the libraries' workspaces.")
    return {
        "step_ms": {name: round(1000 * seconds, 1) for name, seconds in step.items()},
        "mfu": {name: round(share, 3) for name, share in mfu.items()},
        "peak_gib": round(peak, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--context_length", type=int, default=512)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--products", type=float, help="fraction of the peak that matrix products reach, on every GPU")
    args = parser.parse_args()
    config = preset(args.preset, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    gpus = {name: replace(gpu, products=args.products or gpu.products) for name, gpu in GPUS.items()}
    print(json.dumps(estimate(config, args.batch_size, args.context_length, args.optimizer, gpus)))


if __name__ == "__main__":
    main()
