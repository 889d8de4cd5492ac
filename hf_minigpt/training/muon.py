"""Muon's updates: orthogonalization by Newton-Schulz iterations, with each matrix on one of the processes."""

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from ..model.products_minigpt import batched_product, uses_onednn


# Coefficients of the quintic iteration (Keller Jordan, kellerjordan.github.io/posts/muon). They maximize the slope at
# zero; all singular values end between about 0.7 and 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

Shape = tuple[int, int]
# Indices of matrices by shape. Those of one shape are orthogonalized in one stack.
Stacks = dict[Shape, list[int]]
NewtonSchulz = Callable[[torch.Tensor, int], torch.Tensor]


def iteration_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 for GPUs that support it, else float32: bfloat16 is 40 times slower on most CPUs."""
    in_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if in_bf16 else torch.float32


def newton_schulz(x: torch.Tensor, steps: int) -> torch.Tensor:
    """Iterate on a stack (N, rows, columns) in its own dtype, with at most as many rows as columns."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    # If x is at least twice as wide as high, iterating on x x^T takes half the time. bfloat16 is too coarse for it.
    if x.dtype == torch.float32 and x.shape[-1] >= 2 * x.shape[-2]:
        return batched_product(_polynomial_of_gram(x, steps), x)
    for _ in range(steps):
        x = _add_product(x, _quintic(batched_product(x, x.mT)), x, beta=NEWTON_SCHULZ[0])
    return x


def compiled_newton_schulz(backend: str | Callable) -> NewtonSchulz:
    """Return `newton_schulz`, compiled with sizes as variables: once for square and once for wide matrices, and again
    for stacks of a single one."""
    compiled = torch.compile(newton_schulz, backend=backend)

    def iterate(x: torch.Tensor, steps: int) -> torch.Tensor:
        x = x.contiguous()
        torch._dynamo.maybe_mark_dynamic(x, [0, 1, 2])
        return compiled(x, steps)

    return iterate


def orthogonalize(matrices: torch.Tensor, steps: int = 5, iterate: NewtonSchulz = newton_schulz) -> torch.Tensor:
    """Approximate the nearest orthogonal matrix U V^T of each matrix U S V^T by Newton-Schulz iterations.

    Singular values end near 1, but not exactly at 1. Runs in `iteration_dtype`.

    Args:
        matrices: (..., rows, columns). A batch needs one kernel per step instead of one per matrix.
        steps: number of iterations.
        iterate: `newton_schulz`, or `compiled_newton_schulz(backend)`.

    Returns:
        (..., rows, columns), in float32 or bfloat16.
    """
    x = matrices.to(iteration_dtype(matrices.device))
    # the products x x^T then have the size of the shorter side
    transposed = x.shape[-2] > x.shape[-1]
    x = x.mT if transposed else x
    x = iterate(x.reshape(-1, *x.shape[-2:]), steps).reshape(x.shape)
    return x.mT if transposed else x


def _add_product(
    addend: torch.Tensor, left: torch.Tensor, right: torch.Tensor, beta: float, alpha: float = 1.0
) -> torch.Tensor:
    """Return beta * addend + alpha * left @ right."""
    if uses_onednn(left[0], right[0].mT):
        return batched_product(left, right).mul_(alpha).add_(addend, alpha=beta)
    # without passes over the result of their own
    return torch.baddbmm(addend, left, right, beta=beta, alpha=alpha)


def _quintic(gram: torch.Tensor) -> torch.Tensor:
    """Return b G + c G^2 with G = x x^T. One iteration multiplies x by a I plus this."""
    _, b, c = NEWTON_SCHULZ
    return _add_product(gram, gram, gram, beta=b, alpha=c)


def _polynomial_of_gram(x: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the product (N, rows, rows) of the factors by which all iterations multiply x (N, rows, columns).

    With P = a I + b G + c G^2, which commutes with G, the next x is P x and the next G is P G P.
    """
    gram = batched_product(x, x.mT)
    factors: list[torch.Tensor] = []
    for _ in range(steps):
        if factors:
            gram = batched_product(batched_product(factors[-1], gram), factors[-1])
        factors.append(_quintic(gram))
        factors[-1].diagonal(dim1=-2, dim2=-1).add_(NEWTON_SCHULZ[0])
    return reduce(batched_product, factors)


# Each matrix on one process


class Layout(NamedTuple):
    """The processes that share the work on a matrix, and how they hold it.

    Attributes:
        replicas: the processes that hold the same as this one, or None.
        shards: the processes over which the matrix is split, or None.
        shard_dim: the dimension that is split, as by `torch.chunk`, or None.
    """

    replicas: dist.ProcessGroup | None = None
    shards: dist.ProcessGroup | None = None
    shard_dim: int | None = None


def layout_of(parameter: torch.Tensor, process_group: dist.ProcessGroup | None) -> Layout:
    """Return the layout of a matrix.

    Args:
        parameter: a DTensor may be split along one dimension of its mesh (FSDP2) and copied along another (HSDP). The
            work on one that is placed otherwise is not shared.
        process_group: processes with the same copy of a parameter that is not a DTensor (DDP), or None.
    """
    if not isinstance(parameter, DTensor):
        return Layout(process_group)
    split = [(i, placement.dim) for i, placement in enumerate(parameter.placements) if type(placement) is Shard]
    copied = [i for i, placement in enumerate(parameter.placements) if placement.is_replicate()]
    if len(split) != 1 or len(copied) > 1 or len(copied) + 1 != len(parameter.placements):
        return Layout()
    get_group = parameter.device_mesh.get_group
    return Layout(get_group(copied[0]) if copied else None, get_group(split[0][0]), split[0][1])


def orthogonalize_shared(
    shapes: Sequence[Shape],
    directions: Callable[[list[int]], list[torch.Tensor]],
    layout: Layout,
    device: torch.device,
    max_stack_bytes: int,
    orthogonalize: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """Orthogonalize matrices, each on one process of the layout, in as many rounds as the memory needs.

    In a round, the shards of a matrix are sent to the process that orthogonalizes it and the results are sent back;
    then each replica sends its results to the others. All is sent in `iteration_dtype`, so that the results are those
    of one process.

    Args:
        shapes: rows and columns of the whole matrices, with the rows as the dimension that may be split.
        directions: called with indices into `shapes`, returns these matrices as this process holds them: its rows, or
            the whole. A replica asks only for those that it orthogonalizes.
        layout: how the processes hold the matrices.
        device: device of the matrices.
        max_stack_bytes: as in `MuonAdamW`.
        orthogonalize: the function of that name, of a stack (N, rows, columns).

    Yields:
        Indices, and their orthogonalized matrices as this process holds them. All processes yield the same indices.
    """
    dtype = iteration_dtype(device)
    replica, num_replicas = _rank_and_size(layout.replicas)
    shard, num_shards = _rank_and_size(layout.shards)

    def num_rows(shape: Shape, shard: int) -> int:
        return _rows_of_shard(shape[0], shard, num_shards)

    def size(stacks: Stacks, shard: int) -> int:
        return sum(len(indices) * num_rows(shape, shard) * shape[1] for shape, indices in stacks.items())

    def unpack(flat: torch.Tensor, stacks: Stacks, shard: int) -> list[torch.Tensor]:
        """View one shard of the stacks as (N, rows, columns) each."""
        views = [(len(indices), num_rows(shape, shard), shape[1]) for shape, indices in stacks.items()]
        parts = flat.split([n * rows * columns for n, rows, columns in views])
        return [part.view(view) for part, view in zip(parts, views, strict=True)]

    def unpack_matrices(flat: torch.Tensor, stacks: list[Stacks]) -> list[torch.Tensor]:
        parts = flat.split([size(s, shard) for s in stacks])
        return [m for part, s in zip(parts, stacks, strict=True) for stack in unpack(part, s, shard) for m in stack]

    # a process also receives the results of the other replicas
    max_elements = max_stack_bytes // num_replicas // dtype.itemsize
    for stacks in plan_rounds(tuple(shapes), num_replicas * num_shards, max_elements):
        of_replica = [stacks[i : i + num_shards] for i in range(0, len(stacks), num_shards)]
        sizes = [sum(size(s, shard) for s in of_shards) for of_shards in of_replica]
        to_do, own = of_replica[replica], of_replica[replica][shard]
        held = torch.empty(sizes[replica], dtype=dtype, device=device)
        if len(held):
            torch._foreach_copy_(unpack_matrices(held, to_do), directions(_indices(to_do)))
        if num_shards > 1:
            here, there = [size(s, shard) for s in to_do], [size(own, i) for i in range(num_shards)]
            pieces = _exchange(held, here, there, layout.shards)
            shards = [unpack(piece, own, i) for i, piece in enumerate(pieces.split(there))]
            for parts in zip(*shards, strict=True):
                result = orthogonalize(torch.cat(parts, dim=1))
                torch._foreach_copy_(list(parts), result.split([part.shape[1] for part in parts], dim=1))
            held = _exchange(pieces, there, here, layout.shards)
        else:
            for stack in unpack(held, own, shard):
                stack.copy_(orthogonalize(stack))
        results = [held]
        if num_replicas > 1:
            # all replicas must send the same number of elements
            longest = max(sizes)
            gathered = held.new_empty(num_replicas * longest)
            dist.all_gather_single(gathered, F.pad(held, (0, longest - len(held))), group=layout.replicas)
            results = [part[:n] for part, n in zip(gathered.split(longest), sizes, strict=True)]
        matrices = [unpack_matrices(flat, to_do) for flat, to_do in zip(results, of_replica, strict=True)]
        yield _indices(stacks), [matrix for of_shards in matrices for matrix in of_shards]


def _rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _indices(stacks: list[Stacks]) -> list[int]:
    return [i for by_shape in stacks for indices in by_shape.values() for i in indices]


def _exchange(
    sent: torch.Tensor, sent_sizes: list[int], received_sizes: list[int], group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Send consecutive parts of a vector to the processes of the group, and return what they have sent."""
    received = sent.new_empty(sum(received_sizes))
    dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=group)
    return received


def _rows_of_shard(rows: int, process: int, num_processes: int) -> int:
    """Number of rows in one of the parts of `torch.chunk`, of which the last may be smaller or missing."""
    rows_per_process = -(-rows // num_processes)
    return min(max(rows - process * rows_per_process, 0), rows_per_process)


def multiplications(shape: Shape) -> int:
    """Return the number of multiplications in one Newton-Schulz iteration of a matrix (rows, columns)."""
    short, long = sorted(shape)
    return short * short * (2 * long + short)


@functools.cache
def plan_rounds(shapes: tuple[Shape, ...], num_processes: int, max_elements: int) -> list[list[Stacks]]:
    """Choose which process orthogonalizes which matrices in which round.

    All processes get about the same number of multiplications, in total and in each round.

    Args:
        shapes: rows and columns of the matrices.
        num_processes: number of processes.
        max_elements: maximum number of elements on a process in a round. One matrix is always possible.

    Returns:
        For each round and process, indices into `shapes`.
    """
    loads = [0] * num_processes
    rounds: list[list[Stacks]] = []
    # number of the last round of each process, and its elements there
    filled = [(-1, max_elements)] * num_processes
    # the largest first, each to the process with the least work
    for i in sorted(range(len(shapes)), key=lambda i: (multiplications(shapes[i]), shapes[i]), reverse=True):
        process = loads.index(min(loads))
        loads[process] += multiplications(shapes[i])
        number, elements = filled[process]
        rows, columns = shapes[i]
        if elements + rows * columns > max_elements:
            number, elements = number + 1, 0
        filled[process] = number, elements + rows * columns
        if number == len(rounds):
            rounds.append([{} for _ in range(num_processes)])
        rounds[number][process].setdefault(shapes[i], []).append(i)
    return rounds
