"""Named configurations: the published GPTs, and the small modern ones that the recipes start from."""

from typing import Any

from .configuration_minigpt import MiniGPTConfig


_GPT2 = {"vocab_size": 50257, "max_position_embeddings": 1024, "bos_token_id": 50256, "eos_token_id": 50256}

# Radford et al. (2018); OpenAI's code calls the tanh form of GELU "gelu".
_GPT1 = {
    "vocab_size": 40478,
    "max_position_embeddings": 512,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "norm_placement": "post",
    "residual_init": "normal",
}

# transformers' NanoChat: no parameters in the norms, one more on the embedding, rotary positions, query-key norm,
# squared ReLU, no biases, an untied head under a soft cap. Branches and head start at zero, as in modded-nanogpt.
_MODERN = {
    "norm_type": "rmsnorm",
    "norm_affine": False,
    "layer_norm_epsilon": 1e-6,
    "embedding_norm": True,
    "position_embedding_type": "rope",
    "qk_norm": True,
    "hidden_act": "relu2",
    "qkv_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "final_logit_softcapping": 15.0,
    "residual_init": "zero",
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
}


def _modern(layers: int, width: int, head_dim: int, context: int, vocab_size: int = 50304) -> dict[str, Any]:
    return _MODERN | {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": width // head_dim,
        "max_position_embeddings": context,
        "vocab_size": vocab_size,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # Radford et al. (2019)
    "gpt2": _GPT2 | {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
    "gpt2-medium": _GPT2 | {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16},
    "gpt2-large": _GPT2 | {"num_hidden_layers": 36, "hidden_size": 1280, "num_attention_heads": 20},
    "gpt2-xl": _GPT2 | {"num_hidden_layers": 48, "hidden_size": 1600, "num_attention_heads": 25},
    "gpt1": _GPT1,
    "minigpt-nano": _modern(layers=4, width=128, head_dim=32, context=256, vocab_size=1024),
    "minigpt-small": _modern(layers=6, width=384, head_dim=64, context=512),
    "minigpt-base": _modern(layers=12, width=768, head_dim=128, context=1024),
    "minigpt-large": _modern(layers=20, width=1280, head_dim=128, context=2048),
}


def preset(name: str, **overrides: Any) -> MiniGPTConfig:
    """
    The configuration called `name`, with any field overridden.

    Args:
        name: a key of `PRESETS`.
        overrides: fields of `MiniGPTConfig`, by our names or GPT-2's.

    Raises:
        ValueError: no preset has that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown: choose one of {', '.join(PRESETS)}.")
    aliases = MiniGPTConfig.attribute_map
    fields = PRESETS[name] | {aliases.get(key, key): value for key, value in overrides.items()}
    for token in ("bos_token_id", "eos_token_id"):
        # Another, smaller vocabulary has other special tokens.
        if token not in overrides and fields.get(token) is not None and fields[token] >= fields["vocab_size"]:
            fields[token] = None
    return MiniGPTConfig(**fields)
