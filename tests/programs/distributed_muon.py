"""Muon on several processes with gloo, for tests/training/test_distributed_muon.py.

Started from the repository's root: `-m tests.programs.distributed_muon FOLDER NUM_PROCESSES ...`. It forks the
processes, because each would take seconds to import torch. The first process of a world saves what it has found as
`FOLDER/NUM_PROCESSES.pt`.
"""

import copy
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.model.products_minigpt import fast_paths
from hf_minigpt.pretraining.arguments import PretrainArguments
from hf_minigpt.training.muon import iteration_dtype, layout_of, orthogonalize, orthogonalize_shared
from hf_minigpt.training.optimizers import MuonAdamW, hidden_matrices, optimizer_cls_and_kwargs
from tests.tiny import tiny_config


STEPS = 6
# (out, in) of linear layers: rows that 2 or 4 processes cannot share evenly, fewer rows than processes, equal shapes
SHAPES = [(24, 24)] * 5 + [(96, 24), (24, 96)] * 2 + [(7, 24), (3, 5), (1, 9), (10, 6)]
MANY_SHAPES = [(64, 64)] * 16 + [(256, 64), (64, 256)] * 4


class Layers(nn.Module):
    """Linear layers of `SHAPES`. The last two are never trained: one is frozen, one gets no gradient."""

    def __init__(self, shapes: list[tuple[int, int]] = SHAPES):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        layers = []
        for rows, columns in [*shapes, (8, 8), (8, 8)]:
            layers.append(nn.Linear(columns, rows))
            for parameter in layers[-1].parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator)
        self.layers = nn.ModuleList(layers)
        self.layers[-1].requires_grad_(False)

    def forward(self):
        """Only so that FSDP2 may wrap it."""


def make_optimizer(model: nn.Module, **options) -> MuonAdamW:
    """Two groups of matrices with other settings, an empty one, and biases with AdamW."""
    matrices = [p for p in model.parameters() if p.ndim == 2 and p.requires_grad]
    vectors = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]
    groups = [
        {"kind": "muon", "params": matrices[:3]},
        {"kind": "muon", "params": matrices[3:], "lr": 0.05, "initial_momentum": 0.7, "weight_decay": 0.0},
        {"kind": "muon", "params": []},
        {"kind": "adamw", "params": vectors},
    ]
    return MuonAdamW(groups, lr=0.1, weight_decay=0.2, momentum_warmup_steps=3, **options)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def set_gradients(model: Layers, step: int) -> None:
    """Gradients depend on the weights, so that an error in one step shows in the next."""
    generator = torch.Generator().manual_seed(step)
    for parameter in nn.ModuleList(list(model.layers)[:-2]).parameters():
        weight = full(parameter.detach())
        grad = weight - torch.randn(weight.shape, generator=generator)
        if isinstance(parameter, DTensor):
            grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.grad = grad


def train(model: Layers, optimizer: MuonAdamW, steps: range = range(STEPS)) -> dict[str, torch.Tensor]:
    """Return the whole weights after the steps."""
    for step in steps:
        set_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return {name: full(p.detach()).clone() for name, p in model.named_parameters()}


def flops_of_a_step(model: Layers, optimizer: MuonAdamW) -> int:
    set_gradients(model, 0)
    # the counter does not know oneDNN's products
    with fast_paths(False), FlopCounterMode(display=False) as counter:
        optimizer.step()
    return counter.get_total_flops()


# What a world finds


def replicated(**options) -> dict[str, torch.Tensor]:
    model = Layers()
    return train(model, make_optimizer(model, process_group=dist.group.WORLD, **options))


def shard(model: Layers, mesh_shape: tuple[int, ...], dim: int = 0) -> Layers:
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicas", "shards")[-len(mesh_shape) :])
    # FSDP2 cannot split columns unevenly
    splits = [lambda p: Shard(0), lambda p: Shard(int(p.ndim == 2 and p.shape[1] % mesh_shape[-1] == 0))]
    return fully_shard(model, mesh=mesh, shard_placement_fn=splits[dim])


def sharded(mesh_shape: tuple[int, ...], dim: int = 0, **options) -> dict[str, torch.Tensor]:
    model = shard(Layers(), mesh_shape, dim)
    optimizer = make_optimizer(model, **options)
    weights = train(model, optimizer)
    first = model.layers[0].weight
    assert isinstance(first, DTensor) and isinstance(optimizer.state[first]["momentum_buffer"], DTensor)
    return weights


def placed(*placements: Any) -> dict[str, torch.Tensor]:
    """DTensors that FSDP2 alone does not make."""
    model = Layers()
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))

    def place(name: str, module: nn.Module, _: Any) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            where = placements if parameter.ndim == 2 else [Replicate()] * 2
            placed = nn.Parameter(
                distribute_tensor(parameter.data, mesh, where), requires_grad=parameter.requires_grad
            )
            module.register_parameter(key, placed)

    distribute_module(model, mesh, place)
    return train(model, make_optimizer(model))


def independent() -> dict[str, torch.Tensor]:
    """Each process has a model of its own and never waits for the others."""
    model = Layers()
    rank = dist.get_rank()
    for parameter in model.parameters():
        parameter.data += rank
    twin = copy.deepcopy(model)
    optimizer = make_optimizer(twin)
    weights = train(model, make_optimizer(model), range(STEPS + rank))
    expected = train(twin, optimizer, range(STEPS + rank))
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    return {}


def one_matrix() -> dict[str, torch.Tensor]:
    model = Layers([(12, 30)])
    return train(model, make_optimizer(model, process_group=dist.group.WORLD))


def bounded() -> list[int]:
    """Elements of the stacks that this process orthogonalizes at once, with room for a few matrices."""
    stacks = []

    def function(stack: torch.Tensor) -> torch.Tensor:
        stacks.append(stack.numel())
        return orthogonalize(stack)

    matrices = [torch.randn(16, 16, generator=torch.Generator().manual_seed(i)) for i in range(24)]
    layout = layout_of(matrices[0], dist.group.WORLD)
    room = 3 * dist.get_world_size() * matrices[0].nbytes
    rounds = orthogonalize_shared(
        [(16, 16)] * 24, lambda indices: [matrices[i] for i in indices], layout, matrices[0].device, room, function
    )
    for indices, updates in rounds:
        assert sum(update.nbytes for update in updates) <= room
        for i, update in zip(indices, updates, strict=True):
            torch.testing.assert_close(update, orthogonalize(matrices[i]), atol=1e-6, rtol=0)
    assert iteration_dtype(matrices[0].device) == torch.float32
    return stacks


def shares() -> dict[str, list[int]]:
    """FLOPs of a step on each process."""
    world_size = dist.get_world_size()
    found = {}
    for name, mesh_shape in {"replicated": None, "sharded": (world_size,), "both": (2, world_size // 2)}.items():
        model = Layers(MANY_SHAPES)
        if mesh_shape:
            shard(model, mesh_shape)
        group = None if mesh_shape else dist.group.WORLD
        flops: list[Any] = [None] * world_size
        dist.all_gather_object(flops, flops_of_a_step(model, make_optimizer(model, process_group=group)))
        found[name] = flops
    return found


def resumed(folder: Path) -> dict[str, Any]:
    """Weights of runs that other worlds have begun. Begins one for them, with and without shards."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    group = dist.group.WORLD if dist.is_initialized() else None
    # one layer has no state, because it never had a gradient
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
    found = {}
    for kind in ("replicated", "sharded") if dist.is_initialized() else ("alone",):
        for file in sorted(folder.glob("begun_by_*.pt")):
            saved = torch.load(file)
            model = shard(Layers(), (world_size,)) if kind == "sharded" else Layers()
            optimizer = make_optimizer(model, process_group=group)
            states = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
            set_state_dict(model, optimizer, **states, options=options)
            found[f"{kind}, {file.stem}"] = train(model, optimizer, range(STEPS // 2, STEPS))
    for kind in ("replicated", "sharded") if dist.is_initialized() else ("alone",):
        model = shard(Layers(), (world_size,)) if kind == "sharded" else Layers()
        optimizer = make_optimizer(model, process_group=group)
        train(model, optimizer, range(STEPS // 2))
        weights, states = get_state_dict(model, optimizer, options=options)
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save({"model": weights, "optimizer": states}, folder / f"begun_by_{world_size}_{kind}.pt")
    return found


def of_the_recipes(folder: Path) -> dict[str, bool]:
    """Whether the recipes' optimizer shares its work under DDP, where each process has a part of the model, and after
    FSDP2 has replaced the classes of the modules."""
    factory, kwargs = optimizer_cls_and_kwargs(PretrainArguments(str(folder), use_cpu=True))
    model = MiniGPTForCausalLM(tiny_config("modern"))
    found = {"copies": factory()(model, **kwargs).process_group is dist.group.WORLD}
    model._tp_size = dist.get_world_size()
    found["parts"] = factory()(model, **kwargs).process_group is not None
    names = list(hidden_matrices(model))
    for module in (model.model.layers[0].self_attn.q_proj, *model.model.layers, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    found["same matrices"] = list(hidden_matrices(model)) == names
    found["shards"] = all(isinstance(weight, DTensor) for weight in hidden_matrices(model).values())
    return found


def same_everywhere(found: dict[str, torch.Tensor]) -> None:
    for name, tensor in found.items():
        first = tensor.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, tensor), name


def work(rank: int, num_processes: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_processes), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    init_method = f"file://{folder}/rendezvous_{num_processes}"
    # the time limit ends a job that hangs
    dist.init_process_group("gloo", init_method, timedelta(seconds=60), num_processes, rank)
    jobs: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "replicated": replicated,
        "replicated, little memory": lambda: replicated(max_stack_bytes=5000),
        "sharded": lambda: sharded((num_processes,)),
        "sharded, little memory": lambda: sharded((num_processes,), max_stack_bytes=5000),
        "sharded columns": lambda: sharded((num_processes,), dim=1),
        "shards and replicas": lambda: sharded((2, num_processes // 2)),
        "replicas and shards": lambda: placed(Shard(0), Replicate()),
        "split in both dimensions": lambda: placed(Shard(0), Shard(1)),
        "one matrix": one_matrix,
        "independent": independent,
    }
    found: dict[str, Any] = {name: job() for name, job in jobs.items()}
    found |= {"resumed": resumed(folder)}
    for weights in [found[name] for name in jobs] + list(found["resumed"].values()):
        same_everywhere(weights)
    found |= {"bounded": bounded(), "shares": shares(), "recipes": of_the_recipes(folder)}
    if rank == 0:
        torch.save(found, folder / f"{num_processes}.pt")
    dist.barrier()
    # a process that exits with its group alive is sometimes aborted, and one that destroys FSDP2's groups as well
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    for count in map(int, sys.argv[2:]):
        mp.start_processes(work, (count, Path(sys.argv[1])), nprocs=count, start_method="fork")
