"""Adversarial training by perturbation of the embeddings."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def perturbed_embeddings(model: nn.Module, inputs: Mapping[str, Any], share: float) -> Iterator[None]:
    r"""Perturb the embeddings of `inputs` in the direction that increases the loss most, within the context.

    The embeddings $E$ (T, C) of each row become $E + s\,|E|\,g/|g|$, where $g$ is the gradient of the loss. Norms are
    over all tokens and channels of the row except padding. Computing $g$ costs a forward and half a backward pass,
    and leaves the gradients of the weights unchanged.

    Source: Miyato et al. (2017), "Adversarial training methods for semi-supervised text classification".

    Args:
        model: model with `get_input_embeddings()` that returns `.loss`; not sharded.
        inputs: inputs of the forward pass.
        share: $s$, the norm of the perturbation relative to that of the embeddings. The paper's LSTM uses about 0.02.
    """
    embeddings: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[0]

    table = model.get_input_embeddings()  # type: ignore[operator]
    # Our Python autograd functions compute the gradients of all parameters that require one, although unused here.
    learned = [p for p in model.parameters() if p.requires_grad]
    hook = table.register_forward_hook(keep)
    try:
        for p in learned:
            p.requires_grad_(False)
        loss = model(**inputs).loss
        (gradient,) = torch.autograd.grad(loss, embeddings)
    finally:
        hook.remove()
        for p in learned:
            p.requires_grad_(True)
    # The gradient is zero at padding.
    is_text = (gradient != 0).any(-1, keepdim=True)
    length = torch.linalg.vector_norm(embeddings[0].detach() * is_text, dim=(1, 2), keepdim=True)
    gradient_length = torch.linalg.vector_norm(gradient, dim=(1, 2), keepdim=True)
    # The clamp avoids division by zero: a row without a gradient is not perturbed.
    step = share * length * gradient / gradient_length.clamp(min=torch.finfo(gradient.dtype).tiny)
    hook = table.register_forward_hook(lambda module, args, output: output + step)
    try:
        yield
    finally:
        hook.remove()
