"""Tiny MiniGPTs for tests, which together cover every switch of the configuration."""

import pytest
import torch
from torch import nn

from hf_minigpt import MiniGPTConfig, MiniGPTForCausalLM
from hf_minigpt.model.products_minigpt import fast_paths_enabled


NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
SIZES = {
    "vocab_size": 67,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}

SWITCHES = {
    "gpt2": {},
    "gpt1": {
        "norm_placement": "post",
        "hidden_act": "gelu",
        "head_mask": [[1.0, 0.0, 1.0], [0.5, 1.0, 1.0]],
    },
    "transformer": {
        "norm_placement": "post",
        "position_embedding_type": "sinusoidal",
        "hidden_act": "relu",
        "head_dim": 5,
        "tie_word_embeddings": False,
        "lm_head_bias": True,
        "residual_init": "normal",
        "vocab_size": 72,
        "unpadded_vocab_size": 67,
    },
    "modern": {
        "vocab_size": 72,
        "unpadded_vocab_size": 67,
        "position_embedding_type": "rope",
        "norm_type": "rmsnorm",
        "norm_affine": False,
        "embedding_norm": True,
        "qk_norm": True,
        "hidden_act": "relu2",
        "qkv_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "final_logit_softcapping": 15.0,
        "residual_init": "zero",
    },
    "rope": {
        "position_embedding_type": "rope",
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "norm_type": "rmsnorm",
        "head_dim": 10,
        "hidden_act": "silu",
        "attention_scaling": 0.4,
        "lm_head_bias": True,
        "embedding_norm": True,
    },
    "no_positions": {
        "position_embedding_type": "none",
        "norm_affine": False,
        "attention_out_bias": False,
        "intermediate_size": 40,
    },
    "attention_only": {
        "intermediate_size": 0,
        "norm_type": "none",
        "residual": False,
        "qkv_bias": False,
        "initializer_range": 0.2,
    },
    "bigram": {
        "num_hidden_layers": 0,
        "hidden_size": 67,
        "head_dim": 8,
        "intermediate_size": 0,
        "position_embedding_type": "none",
        "norm_type": "none",
        "tie_word_embeddings": False,
    },
}

# Marks tests of the fast paths themselves, which MINIGPT_FAST_PATHS=0 turns off.
needs_fast_paths = pytest.mark.skipif(not fast_paths_enabled(), reason="the fast paths are turned off")

# One model for each kind of positions, on which padding, packing and caches depend.
POSITIONS = ["gpt2", "transformer", "modern", "no_positions"]


def tiny_config(name: str, **overrides) -> MiniGPTConfig:
    return MiniGPTConfig(**{**SIZES, **NO_DROPOUT, **SWITCHES[name], **overrides})


@torch.no_grad()
def shake(model: nn.Module, seed: int = 0, std: float = 0.25) -> nn.Module:
    """
    Set parameters far from their initialization, so that no zero bias, norm weight of 1 or zero head hides a mistake.
    Return the model in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * std
        is_norm_weight = "norm" in name and name.endswith("weight")
        parameter.copy_(1 + noise if is_norm_weight else noise)
    return model.eval()


def tiny_model(name: str = "gpt2", model_class=MiniGPTForCausalLM, attn_implementation="sdpa", **overrides):
    config = tiny_config(name, **overrides)
    config._attn_implementation = attn_implementation
    return shake(model_class(config))


def random_ids(*shape: int, vocab_size: int = 67, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
