"""The optimizers: Muon for the weight matrices of the blocks combined with AdamW for the rest, and plain AdamW."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw
from transformers import PreTrainedModel

from .muon import (
    Layout,
    NewtonSchulz,
    compiled_newton_schulz,
    layout_of,
    newton_schulz,
    orthogonalize,
    orthogonalize_shared,
)


Scaling = Literal["original", "moonlight"]


class MuonAdamW(torch.optim.Optimizer):
    """
    Muon and AdamW in one optimizer. The `kind` of a parameter group selects the algorithm:

    - `muon`: Nesterov momentum, orthogonalized (Jordan et al., 2024), with decoupled weight decay. For matrices only.
    - `adamw`: AdamW (Loshchilov & Hutter, 2019), with torch's kernels, fused where available.

    State is created in the first `step`, because accelerate replaces the parameters' tensors after construction.

    Processes that train one model share the work on Muon's matrices: each is orthogonalized on one process, which
    sends the result to the others. They are those of a parameter's mesh if it is a DTensor (FSDP2, HSDP), or else
    `process_group`. All of them must call `step` with gradients for the same parameters. A state can be loaded by any
    number of processes.

    Args:
        param_groups: dictionaries with `params`, `kind`, and values that replace the defaults below.
        lr: learning rate.
        weight_decay: weight decay, multiplied by the learning rate in each step.
        momentum: momentum of Muon.
        initial_momentum: momentum of Muon in the first step. The first gradients change quickly, so that an average
            over many steps would be stale.
        momentum_warmup_steps: steps over which the momentum rises from `initial_momentum` to `momentum`.
        newton_schulz_steps: iterations of `orthogonalize`.
        scaling: factor of Muon's update: `sqrt(max(1, rows / columns))` (`original`) or `0.2 sqrt(max(rows, columns))`
            (`moonlight`, arXiv 2502.16982, which matches the root mean square of AdamW's update, and so its lr).
        betas: decay rates of AdamW's moments.
        eps: epsilon of AdamW.
        process_group: the processes that hold the same parameters and gradients (DDP). None: each process works alone.
            Never pass the group of processes that train different models.
        max_stack_bytes: how many bytes of matrices a process orthogonalizes, or receives from the others, at once.
            More matrices take more rounds. Each round has room for one matrix on each process. With temporary
            tensors, a step needs a few times this memory.
        compile_backend: backend of `torch.compile` for the Newton-Schulz iterations. None: they are not compiled. The
            rest of `step` should not be: it would be compiled again for each learning rate.

    Raises:
        ValueError: for an unknown kind or scaling, or a parameter in a `muon` group that is not a matrix.
    """

    # a copy (copy.deepcopy, pickle) works alone
    process_group: dist.ProcessGroup | None = None
    max_stack_bytes = 2**28
    _newton_schulz: NewtonSchulz = staticmethod(newton_schulz)

    def __init__(
        self,
        param_groups: Iterable[dict[str, Any]],
        lr: float = 3e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        initial_momentum: float = 0.85,
        momentum_warmup_steps: int = 300,
        newton_schulz_steps: int = 5,
        scaling: Scaling = "original",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        process_group: dist.ProcessGroup | None = None,
        max_stack_bytes: int = 2**28,
        compile_backend: str | Callable | None = None,
    ):
        if scaling not in ("original", "moonlight"):
            raise ValueError(f"scaling={scaling!r} is unknown. Choose 'original' or 'moonlight'.")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "initial_momentum": initial_momentum,
            "momentum_warmup_steps": momentum_warmup_steps,
            # steps taken so far, once per group instead of once per parameter in `state`
            "num_steps": 0,
            "newton_schulz_steps": newton_schulz_steps,
            "scaling": scaling,
            "betas": betas,
            "eps": eps,
            # makes load_state_dict put AdamW's step counts on the parameters' device
            "fused": True,
        }
        super().__init__(param_groups, defaults)
        for group in self.param_groups:
            if group.get("kind") not in ("muon", "adamw"):
                raise ValueError(
                    f"kind={group.get('kind')!r} of a parameter group is unknown. Choose 'muon' or 'adamw'."
                )
            for parameter in group["params"]:
                if group["kind"] == "muon" and parameter.ndim != 2:
                    raise ValueError(
                        f"A parameter of shape {tuple(parameter.shape)} is in a group of kind='muon', which is for "
                        "matrices only. Move it to a group of kind='adamw'."
                    )
        self.process_group, self.max_stack_bytes = process_group, max_stack_bytes
        if compile_backend is not None:
            self._newton_schulz = compiled_newton_schulz(compile_backend)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[torch.Tensor] = [p for p in group["params"] if p.grad is not None]
            if group["kind"] == "adamw" and parameters:
                self._step_adamw(group, parameters)
        muon_groups = [group for group in self.param_groups if group["kind"] == "muon"]
        # matrices of all groups together, so that each process has its share of the work even if groups are small
        pools: dict[Any, list[tuple[dict[str, Any], torch.Tensor]]] = defaultdict(list)
        for group in muon_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    layout = layout_of(parameter, self.process_group)
                    pools[layout, parameter.device, group["newton_schulz_steps"]].append((group, parameter))
        for (layout, device, num_iterations), pool in pools.items():
            self._step_muon([group for group, _ in pool], [p for _, p in pool], layout, device, num_iterations)
        for group in muon_groups:
            group["num_steps"] += 1
        return loss

    def _step_muon(
        self,
        groups: list[dict[str, Any]],
        parameters: list[torch.Tensor],
        layout: Layout,
        device: torch.device,
        num_iterations: int,
    ) -> None:
        """Update matrices with the same layout. `groups` holds the group of each."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [_held(self.state[p]["momentum_buffer"], layout) for p in parameters]
        grads = [_held(grad, layout) for grad in _grads(parameters)]
        weights = [_held(p, layout) for p in parameters]
        shapes = [(p.shape[1], p.shape[0]) if layout.shard_dim == 1 else (p.shape[0], p.shape[1]) for p in parameters]
        for indices in _split(range(len(parameters)), lambda i: id(groups[i])):
            group = groups[indices[0]]
            torch._foreach_lerp_(_at(buffers, indices), _at(grads, indices), 1 - _momentum(group))
            torch._foreach_mul_(_at(weights, indices), 1 - group["lr"] * group["weight_decay"])

        def directions(wanted: list[int]) -> list[torch.Tensor]:
            found: dict[int, torch.Tensor] = {}
            for indices in _split(wanted, lambda i: id(groups[i])):
                momentum = _momentum(groups[indices[0]])
                lerped = torch._foreach_lerp(_at(grads, indices), _at(buffers, indices), momentum)
                found.update(zip(indices, map(_full_tensor, lerped), strict=True))
            return _at(found, wanted)

        function = partial(orthogonalize, steps=num_iterations, iterate=self._newton_schulz)
        rounds = orthogonalize_shared(shapes, directions, layout, device, self.max_stack_bytes, function)
        for wanted, updates in rounds:
            update_of = dict(zip(wanted, updates, strict=True))
            for indices in _split(wanted, lambda i: (id(groups[i]), parameters[i].shape, parameters[i].dtype)):
                group, (rows, columns) = groups[indices[0]], parameters[indices[0]].shape
                if group["scaling"] == "original":
                    scale = math.sqrt(max(1, rows / columns))
                else:
                    scale = 0.2 * math.sqrt(max(rows, columns))
                cast = _cast(_at(update_of, indices), parameters[indices[0]].dtype)
                shards = [_shard_like(weights[i], update) for i, update in zip(indices, cast, strict=True)]
                torch._foreach_add_(_at(weights, indices), shards, alpha=-group["lr"] * scale)

    def _step_adamw(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[p] for p in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            _grads(parameters),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=_has_fused_kernel(parameters),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _held(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """View what this process holds of a tensor, with the dimension that the layout splits as rows."""
    if layout.shard_dim is None:
        return tensor
    assert isinstance(tensor, DTensor)
    return tensor.to_local().mT if layout.shard_dim == 1 else tensor.to_local()


# A DTensor whose layout is not shared is gathered on each process.


def _full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shard_like(parameter: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return full
    # every process has the full tensor, so that nothing is sent
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _cast(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    # one kernel for all
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(cast, tensors)
    return cast


def _split(indices: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """Split indices by a key, in order."""
    by_key: dict[Hashable, list[int]] = defaultdict(list)
    for i in indices:
        by_key[key(i)].append(i)
    return list(by_key.values())


def _at(items: Any, indices: Iterable[int]) -> list[Any]:
    return [items[i] for i in indices]


def _momentum(group: dict[str, Any]) -> float:
    progress = min(group["num_steps"] / max(group["momentum_warmup_steps"], 1), 1.0)
    return group["initial_momentum"] + (group["momentum"] - group["initial_momentum"]) * progress


def _grads(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _has_fused_kernel(parameters: Iterable[torch.Tensor]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)


def hidden_matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trainable weights of the linear layers inside the blocks, by name. Muon trains these.

    A block is a numbered module (`layers.3`). Embeddings, the output head and the head of a classifier are not in one.
    """
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", f".{name}") and module.weight.requires_grad
    }


def muon_adamw(
    model: PreTrainedModel,
    *,
    learning_rate: float,
    matrix_learning_rate: float,
    embedding_learning_rate: float | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    scaling: Scaling = "original",
    layer_decay: float = 1.0,
    process_group: dist.ProcessGroup | None = None,
    compile_backend: str | Callable | None = None,
) -> MuonAdamW:
    """Make an optimizer with Muon for `hidden_matrices(model)` and AdamW for embeddings, head, norms and biases.

    Args:
        model: the model to train.
        learning_rate: learning rate of AdamW.
        matrix_learning_rate: learning rate of Muon.
        embedding_learning_rate: learning rate of the embedding tables. Default: 0.3 times their initial standard
            deviation.
        weight_decay: weight decay of all matrices.
        betas: decay rates of AdamW's moments.
        eps: epsilon of AdamW.
        scaling: as in `MuonAdamW`.
        layer_decay: as in `decayed_by_layer`.
        process_group: as in `MuonAdamW`. Ignored for a model with a tensor-parallel plan in use, whose processes hold
            different parameters.
        compile_backend: as in `MuonAdamW`.
    """
    matrices = hidden_matrices(model)
    embeddings = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    rest = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in matrices}
    adamw_groups = {
        "embeddings": [p for p in rest.values() if id(p) in embeddings],
        "head": [p for p in rest.values() if id(p) not in embeddings and p.ndim >= 2],
        "vectors": [p for p in rest.values() if p.ndim < 2],
    }
    if embedding_learning_rate is None:
        embedding_learning_rate = 0.3 * model.config.initializer_range
    # the Trainer logs the learning rate of the first group
    groups = [
        {"kind": "muon", "params": list(matrices.values()), "lr": matrix_learning_rate},
        {"kind": "adamw", "params": adamw_groups["embeddings"], "lr": embedding_learning_rate},
        {"kind": "adamw", "params": adamw_groups["head"], "lr": learning_rate},
        {"kind": "adamw", "params": adamw_groups["vectors"], "lr": learning_rate, "weight_decay": 0.0},
    ]
    return MuonAdamW(
        decayed_by_layer([group for group in groups if group["params"]], model, layer_decay),
        lr=learning_rate,
        weight_decay=weight_decay,
        scaling=scaling,
        betas=betas,
        eps=eps,
        process_group=None if model.tp_size else process_group,
        compile_backend=compile_backend,
    )


def adamw_decaying_matrices(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    layer_decay: float = 1.0,
) -> torch.optim.AdamW:
    """Make an AdamW, fused if possible, with weight decay on matrices and embeddings but not on norms and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "lr": learning_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        decayed_by_layer([group for group in groups if group["params"]], model, layer_decay),
        lr=learning_rate,
        betas=betas,
        eps=eps,
        fused=_has_fused_kernel(parameters),
    )


def decayed_by_layer(groups: list[dict[str, Any]], model: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    """Split parameter groups by layer, and multiply the learning rate by `layer_decay` per layer below the top.

    Parameters above all blocks keep their learning rate. The embeddings count as one layer below the lowest block.
    This is discriminative finetuning (Howard & Ruder, 2018), which uses a factor of 1 / 2.6.

    Args:
        groups: parameter groups with `params` and `lr`.
        model: the model with these parameters.
        layer_decay: factor per layer.
    """
    if layer_decay == 1:
        return groups
    blocks = {id(p): _block_number(name) for name, p in model.named_parameters()}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    num_blocks = 1 + max((number for number in blocks.values() if number is not None), default=-1)
    split = []
    for group in groups:
        by_depth: dict[int, list[torch.Tensor]] = defaultdict(list)
        for p in group["params"]:
            number = blocks[id(p)]
            outside = num_blocks + 1 if id(p) in embeddings else 0
            by_depth[outside if number is None else num_blocks - number].append(p)
        split += [
            group | {"params": parameters, "lr": group["lr"] * layer_decay**depth}
            for depth, parameters in sorted(by_depth.items())
        ]
    return split


def _block_number(name: str) -> int | None:
    match = re.search(r"\.(\d+)\.", f".{name}")
    return int(match[1]) if match else None


class OptimizerFactory:
    """Makes the optimizer from the model. The Trainer calls `OptimizerFactory()(model, **kwargs)`."""

    def __call__(self, model: PreTrainedModel, kind: str, **kwargs: Any) -> torch.optim.Optimizer:
        return muon_adamw(model, **kwargs) if kind == "muon" else adamw_decaying_matrices(model, **kwargs)


def _replicas(args) -> dist.ProcessGroup | None:
    """Return the processes among which accelerate will copy the model (DDP), or None."""
    # sets `distributed_state`
    is_alone = args.world_size == 1 or args.parallelism_config is not None
    # DDP is MULTI_GPU or MULTI_CPU. So may FSDP2 be, but its parameters are DTensors, which name their group.
    if is_alone or not args.distributed_state.distributed_type.value.startswith("MULTI_"):
        return None
    return dist.group.WORLD


def optimizer_cls_and_kwargs(args) -> tuple[type, dict[str, Any]] | None:
    """Return the Trainer's argument of that name for `RecipeArguments`. None: the Trainer uses `--optim`."""
    kwargs: dict[str, Any] = {
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    if args.optimizer == "trainer":
        return None
    if args.optimizer == "muon":
        kwargs["matrix_learning_rate"] = args.matrix_learning_rate
        kwargs["embedding_learning_rate"] = args.embedding_learning_rate
        kwargs["scaling"] = args.muon_scaling
        kwargs["process_group"] = _replicas(args)
        # a CPU has products of its own, which a compiler would replace
        if args.torch_compile and args.device.type == "cuda":
            kwargs["compile_backend"] = args.torch_compile_backend
    return OptimizerFactory, {"kind": args.optimizer, **kwargs}
