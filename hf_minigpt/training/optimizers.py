"""The optimizers: Muon for the weight matrices of the blocks combined with AdamW for the rest, and plain AdamW."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw
from transformers import PreTrainedModel

from ..model.products_minigpt import batched_product


# Coefficients of the quintic iteration (Keller Jordan, kellerjordan.github.io/posts/muon). They maximize the slope at
# zero; all singular values end between about 0.7 and 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

Scaling = Literal["original", "moonlight"]


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximate the nearest orthogonal matrix U V^T of each matrix U S V^T by Newton-Schulz iterations.

    Singular values end near 1, but not exactly at 1. Runs in bfloat16 on GPUs that support it and in float32
    elsewhere, because bfloat16 is 40 times slower on most CPUs.

    Args:
        matrices: (..., rows, columns). A batch needs one kernel per step instead of one per matrix.
        steps: number of iterations.

    Returns:
        (..., rows, columns), in float32 or bfloat16.
    """
    in_bf16 = matrices.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    x = matrices.to(torch.bfloat16 if in_bf16 else torch.float32)
    shape = x.shape
    # the products x x^T then have the size of the shorter side
    transposed = shape[-2] > shape[-1]
    x = (x.mT if transposed else x).reshape(-1, min(shape[-2:]), max(shape[-2:]))
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    # If x is at least twice as wide as high, iterating on x x^T takes half the time. bfloat16 is too coarse for it.
    if x.dtype == torch.float32 and x.shape[-1] >= 2 * x.shape[-2]:
        x = batched_product(_polynomial_of_gram(x, steps), x)
    else:
        for _ in range(steps):
            x = batched_product(_quintic(batched_product(x, x.mT)), x).add_(x, alpha=NEWTON_SCHULZ[0])
    x = x.reshape(*shape[:-2], *x.shape[-2:])
    return x.mT if transposed else x


def _quintic(gram: torch.Tensor) -> torch.Tensor:
    """Return b G + c G^2 with G = x x^T. One iteration multiplies x by a I plus this."""
    _, b, c = NEWTON_SCHULZ
    return batched_product(gram, gram).mul_(c).add_(gram, alpha=b)


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


class MuonAdamW(torch.optim.Optimizer):
    """
    Muon and AdamW in one optimizer. The `kind` of a parameter group selects the algorithm:

    - `muon`: Nesterov momentum, orthogonalized (Jordan et al., 2024), with decoupled weight decay. For matrices only.
    - `adamw`: AdamW (Loshchilov & Hutter, 2019), with torch's kernels, fused where available.

    State is created in the first `step`, because accelerate replaces the parameters' tensors after construction.
    Parameters may be DTensors (FSDP2).

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

    Raises:
        ValueError: for an unknown kind or scaling, or a parameter in a `muon` group that is not a matrix.
    """

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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[torch.Tensor] = [p for p in group["params"] if p.grad is not None]
            if group["kind"] == "muon":
                self._step_muon(group, parameters)
                group["num_steps"] += 1
            elif parameters:
                self._step_adamw(group, parameters)
        return loss

    def _step_muon(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        stacks: dict[Any, list[torch.Tensor]] = defaultdict(list)
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            stacks[parameter.shape, parameter.dtype, parameter.device].append(parameter)
        for (shape, dtype, _), stack in stacks.items():
            rows, columns = shape
            lr, momentum = group["lr"], _momentum(group)
            buffers = [self.state[p]["momentum_buffer"] for p in stack]
            torch._foreach_lerp_(buffers, _grads(stack), 1 - momentum)
            directions = [_full_tensor(tensor) for tensor in torch._foreach_lerp(_grads(stack), buffers, momentum)]
            updates = orthogonalize(torch.stack(directions), group["newton_schulz_steps"]).to(dtype)
            if group["scaling"] == "original":
                scale = math.sqrt(max(1, rows / columns))
            else:
                scale = 0.2 * math.sqrt(max(rows, columns))
            torch._foreach_mul_(stack, 1 - lr * group["weight_decay"])
            shards = [_shard_like(p, update) for p, update in zip(stack, updates.unbind(), strict=True)]
            torch._foreach_add_(stack, shards, alpha=-lr * scale)

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


# Each process orthogonalizes the whole of a matrix that FSDP2 shards, so that a run is the same on any number of
# processes.


def _full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shard_like(parameter: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return full
    # every process has the full tensor, so that nothing is sent
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)


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
    return OptimizerFactory, {"kind": args.optimizer, **kwargs}
