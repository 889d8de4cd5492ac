"""Models, inputs and comparisons that the checks share."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from common import NO_DROPOUT
from torch import nn

from hf_minigpt import MiniGPTForCausalLM, preset
from hf_minigpt.presets import PRESETS

from .harness import Machine


# Largest relative differences (L2) from float32 on a CPU, of logits and of gradients. For float32: what the order of
# summation may change. For 16 bits: three times what emulation on a CPU gives.
TOLERANCES = {
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (3 * 1.1e-2, 3 * 3.2e-2),
    torch.float16: (3 * 1.3e-3, 3 * 1.1e-2),
}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

TINY = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "vocab_size": 320,
    "max_position_embeddings": 64,
}
# The large loss scale of mixed precision, which keeps small gradients of fp16 from becoming zero.
LOSS_SCALE = {torch.float16: 1024.0}


def all_presets(machine: Machine) -> list[str]:
    return ["gpt2", "gpt1", "post-norm", "baby", "minigpt-pico"] if machine.dry_run else list(PRESETS)


def typical_presets(machine: Machine) -> list[str]:
    """One of each family: learned, post-norm, sinusoidal, character and rotary."""
    return all_presets(machine) if machine.dry_run else ["gpt2", "gpt1", "post-norm", "baby-large", "minigpt-base"]


def disturbed_model(machine: Machine, name: str, implementation: str = "sdpa", **overrides: Any) -> MiniGPTForCausalLM:
    """
    Build a preset with two layers and without dropout, on the CPU.

    All weights are disturbed by 0.1 randn (at a width of 64; as much in proportion at others), so that branches that
    start at zero hide nothing.
    """
    sizes = TINY if machine.dry_run else {}
    torch.manual_seed(0)
    config = preset(name, **{"num_hidden_layers": 2, **sizes, **NO_DROPOUT, **overrides})
    model = MiniGPTForCausalLM._from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = math.sqrt(64 / parameter.shape[-1]) if parameter.ndim > 1 else 1.0
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * min(scale, 1.0))
        if config.hidden_act == "relu":
            # Far from the kink, where the smallest rounding changes the gradient: half of the units on, half off. The
            # output's bias takes away what the units' biases add.
            for block in model.model.layers:
                up, down = block.mlp.up_proj, block.mlp.down_proj
                up.bias.fill_(4.0)[::2] *= -1
                down.bias.sub_(down.weight @ up.bias.relu())
    return model


def random_ids(model: MiniGPTForCausalLM, rows: int, length: int) -> torch.Tensor:
    length = min(length, model.config.max_position_embeddings)
    return torch.randint(1, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def logits_and_gradients(
    model: nn.Module, ids: torch.Tensor, dtype: torch.dtype = torch.float32, **inputs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits (B, T, V) and all gradients (N,) of the loss under autocast, in float32 on the CPU.

    Args:
        inputs: more arguments of the model's forward; `labels` are the ids by default.
    """
    scale = LOSS_SCALE.get(dtype, 1.0)
    labels = inputs.pop("labels", ids)
    model.zero_grad()
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False, **inputs).logits
        loss = model(input_ids=ids, labels=labels, use_cache=False, skip_logits=True, **inputs).loss
    (loss * scale).backward()
    return logits.float().cpu(), gradients(model) / scale


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None]).cpu()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative difference in the L2 norm."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


@contextlib.contextmanager
def acausal(model: MiniGPTForCausalLM) -> Iterator[None]:
    """Let every position attend to those that follow it."""
    for block in model.model.layers:
        block.self_attn.is_causal = False
    try:
        yield
    finally:
        for block in model.model.layers:
            block.self_attn.is_causal = True


@contextlib.contextmanager
def weights_in_tf32(model: nn.Module) -> Iterator[None]:
    """Round all weights to the 10 bits of TF32."""
    saved = [p.detach().clone() for p in model.parameters()]
    try:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(round_to_tf32(p))
        yield
    finally:
        with torch.no_grad():
            for p, weights in zip(model.parameters(), saved, strict=True):
                p.copy_(weights)


def round_to_tf32(x: torch.Tensor) -> torch.Tensor:
    return ((x.detach().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
