"""Muon for the matrices inside the blocks with AdamW for the rest, as one optimizer; and plain AdamW."""

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


# Coefficients of the quintic iteration (Keller Jordan, kellerjordan.github.io/posts/muon): steepest at zero, and all
# singular values end between 0.7 and 1.2 or so.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

Scaling = Literal["original", "moonlight"]


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest orthogonal matrix U V^T of each matrix U S V^T, roughly: singular values end near 1, not at it.

    Runs in bfloat16 on a GPU that computes in it. Elsewhere in float32: bfloat16 is 40 times slower on most CPUs.

    Args:
        matrices: (..., rows, columns); a batch of one shape takes one kernel a step instead of one a matrix.
        steps: of Newton-Schulz.

    Returns:
        (..., rows, columns), float32 or bfloat16.
    """
    in_bf16 = matrices.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    x = matrices.to(torch.bfloat16 if in_bf16 else torch.float32)
    shape = x.shape
    # the products are of the size of the shorter side
    transposed = shape[-2] > shape[-1]
    x = (x.mT if transposed else x).reshape(-1, min(shape[-2:]), max(shape[-2:]))
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    # Twice as wide as high, the iteration on x x^T takes half the time; bfloat16 is too coarse for it.
    if x.dtype == torch.float32 and x.shape[-1] >= 2 * x.shape[-2]:
        x = batched_product(_polynomial_of_gram(x, steps), x)
    else:
        for _ in range(steps):
            x = batched_product(_quintic(batched_product(x, x.mT)), x).add_(x, alpha=NEWTON_SCHULZ[0])
    x = x.reshape(*shape[:-2], *x.shape[-2:])
    return x.mT if transposed else x


def _quintic(gram: torch.Tensor) -> torch.Tensor:
    """b G + c G^2: with a I it is what one iteration multiplies x by, where G = x x^T."""
    _, b, c = NEWTON_SCHULZ
    return batched_product(gram, gram).mul_(c).add_(gram, alpha=b)


def _polynomial_of_gram(x: torch.Tensor, steps: int) -> torch.Tensor:
    """The product of what all iterations multiply x (N, rows, columns) by: (N, rows, rows).

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
    Each parameter group says by `kind` how it is stepped:

    - `muon`: Nesterov momentum, orthogonalised (Jordan et al., 2024), with decoupled weight decay; matrices only.
    - `adamw`: AdamW (Loshchilov & Hutter, 2019), by torch's own kernels, fused where there are any.

    State is made in the first `step`, because accelerate exchanges the parameters' tensors after construction.
    Parameters may be DTensors (FSDP2).

    Args:
        param_groups: dictionaries with `params`, `kind`, and whatever differs from the defaults below.
        lr: learning rate.
        weight_decay: per step, times the learning rate.
        momentum, newton_schulz_steps: of Muon.
        momentum_warmup_steps: steps in which Muon's momentum rises to `momentum` from `initial_momentum`: an
            average over the first, quickly changing gradients would be stale.
        scaling: Muon's update times `sqrt(max(1, rows / columns))` (`original`) or `0.2 sqrt(max(rows, columns))`
            (`moonlight`, arXiv 2502.16982: the root mean square of AdamW's update, so that its lr can be used).
        betas, eps: of AdamW.

    Raises:
        ValueError: an unknown kind or scaling, or a parameter that is not a matrix in a `muon` group.
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
            raise ValueError(f"scaling={scaling!r} is unknown: choose 'original' or 'moonlight'.")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "initial_momentum": initial_momentum,
            "momentum_warmup_steps": momentum_warmup_steps,
            # steps taken so far; here, not in `state`, so that it is one number a group
            "num_steps": 0,
            "newton_schulz_steps": newton_schulz_steps,
            "scaling": scaling,
            "betas": betas,
            "eps": eps,
            # load_state_dict reads it: AdamW's step counts then come back on the parameters' device
            "fused": True,
        }
        super().__init__(param_groups, defaults)
        for group in self.param_groups:
            if group.get("kind") not in ("muon", "adamw"):
                raise ValueError(f"kind={group.get('kind')!r} of a parameter group: choose 'muon' or 'adamw'.")
            for parameter in group["params"]:
                if group["kind"] == "muon" and parameter.ndim != 2:
                    raise ValueError(
                        f"a parameter of shape {tuple(parameter.shape)} in a group of kind='muon', which "
                        "orthogonalises matrices: put it into a group of kind='adamw'."
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
            directions = [_whole(tensor) for tensor in torch._foreach_lerp(_grads(stack), buffers, momentum)]
            updates = orthogonalize(torch.stack(directions), group["newton_schulz_steps"]).to(dtype)
            if group["scaling"] == "original":
                scale = math.sqrt(max(1, rows / columns))
            else:
                scale = 0.2 * math.sqrt(max(rows, columns))
            torch._foreach_mul_(stack, 1 - lr * group["weight_decay"])
            shards = [_sharded_like(p, update) for p, update in zip(stack, updates.unbind(), strict=True)]
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


# A matrix that FSDP2 has cut into pieces is orthogonalised as a whole, by each process: only then is the run the same
# on any number of them.


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sharded_like(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    # every process has the whole already: none sends anything
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _momentum(group: dict[str, Any]) -> float:
    progress = min(group["num_steps"] / max(group["momentum_warmup_steps"], 1), 1.0)
    return group["initial_momentum"] + (group["momentum"] - group["initial_momentum"]) * progress


def _grads(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _has_fused_kernel(parameters: Iterable[torch.Tensor]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)


def hidden_matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the linear layers inside the blocks, by name: what Muon is for.

    A block is a numbered module (`layers.3`). Embeddings, the output head and what is a classifier's own are outside.
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
    """Muon on `hidden_matrices(model)`, AdamW on the embeddings, the head, norms and biases.

    Args:
        learning_rate: of AdamW.
        matrix_learning_rate: of Muon.
        embedding_learning_rate: of the embedding tables; None: 0.3 of the standard deviation they start at.
        weight_decay: of everything that is a matrix.
        layer_decay: of `decayed_by_layer`.
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
    # the first group's learning rate is the one that the Trainer logs
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
    """AdamW, fused where it can be, with weight decay on matrices (embeddings too) and not on norms and biases."""
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
    """Parameter groups split by layer: each block's learning rates are `layer_decay` times those of the block above.

    What is above all blocks keeps its rate, the embeddings are one step below the lowest block (discriminative
    finetuning: Howard & Ruder, 2018, with a factor of 1 / 2.6; smaller steps for larger models).

    Args:
        groups: each with `params` and `lr`.
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
            top = num_blocks + 1 if id(p) in embeddings else 0
            by_depth[top if number is None else num_blocks - number].append(p)
        split += [
            group | {"params": parameters, "lr": group["lr"] * layer_decay**depth}
            for depth, parameters in sorted(by_depth.items())
        ]
    return split


def _block_number(name: str) -> int | None:
    match = re.search(r"\.(\d+)\.", f".{name}")
    return int(match[1]) if match else None


class OptimizerFactory:
    """What `Trainer(optimizer_cls_and_kwargs=...)` calls as `OptimizerFactory()(model, **kwargs)`."""

    def __call__(self, model: PreTrainedModel, kind: str, **kwargs: Any) -> torch.optim.Optimizer:
        return muon_adamw(model, **kwargs) if kind == "muon" else adamw_decaying_matrices(model, **kwargs)


def optimizer_cls_and_kwargs(args) -> tuple[type, dict[str, Any]] | None:
    """The Trainer's argument of that name, from `RecipeArguments`; None leaves the choice to `--optim`."""
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
