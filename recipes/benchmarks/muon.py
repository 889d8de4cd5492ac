"""The optimizer's step on several processes that share Muon's work, against the same step done in full by each.

    torchrun --nproc_per_node 2 recipes/benchmarks/muon.py
    torchrun --nproc_per_node 4 recipes/benchmarks/muon.py --rounds 1

For parameters that each process has (`ddp`) and parameters of which it has a shard (`fsdp2`):

- `flops`: the largest share of a process in the FLOPs of one process, as counted by torch. Ideal: 1 / processes.
- `time`: seconds of a step over those of a step without sharing, all processes at work in both. Median over the
  rounds, in turns; the slowest process counts.
- `difference`: the largest difference of a weight from those of one process after five steps.

The matrices are those of a model with `--layers` blocks of `--width`. Each process has one thread, or one GPU. The
times mean something only if each process has a core of its own.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from common import make_parser, median_ratio, print_result, take_turns, timed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from hf_minigpt import MiniGPTForCausalLM, preset
from hf_minigpt.model.products_minigpt import fast_paths
from hf_minigpt.training.optimizers import MuonAdamW, hidden_matrices, muon_adamw


KINDS = ("one", "ddp", "fsdp2")


def build(kind: str, layers: int, width: int, device: torch.device) -> tuple[MiniGPTForCausalLM, MuonAdamW]:
    """Return the same model for every kind, with gradients, and its optimizer."""
    torch.manual_seed(0)
    config = preset(
        "minigpt-small",
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=max(width // 64, 1),
        vocab_size=256,
    )
    model = MiniGPTForCausalLM(config).to(device)
    for parameter in model.parameters():
        # some are initialized to zero
        parameter.data.normal_(std=0.02)
    if kind == "fsdp2":
        fully_shard(model, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
    set_gradients(model, 0)
    group = dist.group.WORLD if kind == "ddp" else None
    return model, muon_adamw(model, learning_rate=1e-3, matrix_learning_rate=0.02, process_group=group)


def set_gradients(model: MiniGPTForCausalLM, step: int) -> None:
    """Set the same random gradients on every process, as they are after the backward pass."""
    for i, parameter in enumerate(model.parameters()):
        generator = torch.Generator(parameter.device).manual_seed(1000 * step + i)
        grad = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        if isinstance(parameter, DTensor):
            grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.grad = grad


def largest(value: float, device: torch.device) -> float:
    """Return the largest of all processes' values."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def flops_of(step: Callable[[], Any]) -> int:
    # the counter does not know oneDNN's products
    with fast_paths(False), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def train(model: MiniGPTForCausalLM, optimizer: MuonAdamW) -> list[torch.Tensor]:
    """Return the whole matrices after five steps."""
    for step in range(5):
        set_gradients(model, step)
        optimizer.step()
    weights = hidden_matrices(model).values()
    return [w.full_tensor() if isinstance(w, DTensor) else w.detach() for w in weights]


def main() -> None:
    parser = make_parser(__doc__, rounds=7)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("RANK is not set. Start with: torchrun --nproc_per_node 2 recipes/benchmarks/muon.py")
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")

    def build_kind(kind: str) -> tuple[MiniGPTForCausalLM, MuonAdamW]:
        return build(kind, args.layers, args.width, device)

    optimizers = {kind: build_kind(kind)[1] for kind in KINDS}
    flops = {kind: largest(flops_of(optimizer.step), device) for kind, optimizer in optimizers.items()}

    def seconds(kind: str) -> float:
        dist.barrier()
        return largest(timed(optimizers[kind].step), device)

    times = take_turns({kind: lambda kind=kind: seconds(kind) for kind in KINDS}, args.rounds)
    weights = {kind: train(*build_kind(kind)) for kind in KINDS}
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, {flops['one'] / 1e9:.4g} GFLOP a step")
        result = {}
        for kind in KINDS[1:]:
            pairs = zip(weights[kind], weights["one"], strict=True)
            result[kind] = {
                "flops": round(flops[kind] / flops["one"], 4),
                "time": round(median_ratio(times[kind], times["one"]), 3),
                "difference": max((a - b).abs().max().item() for a, b in pairs),
            }
        print_result(processes=dist.get_world_size(), **result)
    dist.barrier()
    # a process that destroys FSDP2's groups is sometimes aborted
    os._exit(0)


if __name__ == "__main__":
    main()
