"""Adversarial training: texts with their embeddings moved a little to where the loss is higher."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def perturbed_embeddings(model: nn.Module, inputs: Mapping[str, Any], share: float) -> Iterator[None]:
    r"""Within it, `model` sees each row of `inputs` with its embeddings $E$ (T, C) at $E + s\,|E|\,g/|g|$.

    $g$ is the gradient of the row's loss at $E$, lengths are over all tokens and channels of the row, padding left
    out. So it is the small step that raises the loss most, and learning it away makes the model smooth around its
    training texts (Miyato et al., 2017, "Adversarial training methods for semi-supervised text classification").
    It costs a forward and half a backward pass; no gradient of a weight changes.

    Args:
        model: with `get_input_embeddings()`, whose forward pass returns `.loss`; whole, not sharded.
        inputs: of the forward pass.
        share: $s$, the length of the step as a share of the embeddings' own. Theirs, for an LSTM, is about 0.02.
    """
    embeddings: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[0]

    table = model.get_input_embeddings()  # type: ignore[operator]
    # their gradients would be computed, and thrown away, by autograd functions written in Python
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
    # no gradient reaches padding
    is_text = (gradient != 0).any(-1, keepdim=True)
    length = torch.linalg.vector_norm(embeddings[0].detach() * is_text, dim=(1, 2), keepdim=True)
    gradient_length = torch.linalg.vector_norm(gradient, dim=(1, 2), keepdim=True)
    # a row without any gradient stays where it is
    step = share * length * gradient / gradient_length.clamp(min=torch.finfo(gradient.dtype).tiny)
    hook = table.register_forward_hook(lambda module, args, output: output + step)
    try:
        yield
    finally:
        hook.remove()
