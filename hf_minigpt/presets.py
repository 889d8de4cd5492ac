"""Named configurations: published GPTs, and small modern ones for the recipes."""

import dataclasses
from typing import Any

from .model.configuration_minigpt import MiniGPTConfig


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

# As NanoChat in transformers: norms without parameters, a norm on the embedding, rotary positions, query-key norm,
# squared ReLU, no biases, an untied head with a soft cap. Branches and head start at zero, as in modded-nanogpt.
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


# A decoder as torch.nn's modules build it: attention with biases, post-norm, ReLU, sinusoidal positions, untied head.
_POST_NORM = {
    "norm_placement": "post",
    "hidden_act": "relu",
    "position_embedding_type": "sinusoidal",
    "lm_head_bias": True,
    "tie_word_embeddings": False,
    "residual_init": "normal",
    "max_position_embeddings": 512,
}

# Baby GPT on characters. Queries, keys and values have no bias, output and feed-forward do. As in the article's code,
# scores are scaled by the square root of the full width instead of the head's.
_BABY = {
    "qkv_bias": False,
    "hidden_act": "relu",
    "lm_head_bias": True,
    "tie_word_embeddings": False,
    "residual_init": "normal",
    "vocab_size": 96,
}


def _baby(width: int, head_dim: int, heads: int, layers: int, context: int, dropout: float, **switches: Any) -> dict:
    return (
        _BABY
        | {
            "hidden_size": width,
            "head_dim": head_dim,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "max_position_embeddings": context,
            "attention_scaling": width**-0.5,
            # The default of torch's linear layers, as in the article. At 0.02 the signal of a stack without residual
            # connections would vanish.
            "initializer_range": (3 * width) ** -0.5,
            "embd_pdrop": 0.0,
            "attn_pdrop": dropout,
            "resid_pdrop": dropout,
        }
        | switches
    )


def _modern(layers: int, width: int, head_dim: int, context: int, vocab_size: int = 50304) -> dict[str, Any]:
    return _MODERN | {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": width // head_dim,
        "initializer_range": round(width**-0.5, 4),
        "max_position_embeddings": context,
        "vocab_size": vocab_size,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # Radford et al. (2019)
    "gpt2": _GPT2 | {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
    "gpt2-medium": _GPT2 | {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16},
    "gpt2-large": _GPT2 | {"num_hidden_layers": 36, "hidden_size": 1280, "num_attention_heads": 20},
    "gpt2-xl": _GPT2 | {"num_hidden_layers": 48, "hidden_size": 1600, "num_attention_heads": 25},
    # GPT-2 as trained on BookCorpus: exact (erf) GELU, context 512
    "gpt2-bookcorpus": _GPT2
    | {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "hidden_act": "gelu",
    },
    "gpt1": _GPT1,
    "post-norm": _POST_NORM
    | {
        "vocab_size": 1000,
        "hidden_size": 512,
        "num_attention_heads": 1,
        "intermediate_size": 1024,
        "num_hidden_layers": 1,
    },
    "post-norm-deep": _POST_NORM
    | {
        "vocab_size": 10000,
        "hidden_size": 2048,
        "num_attention_heads": 2,
        "intermediate_size": 16384,
        "num_hidden_layers": 20,
    },
    # The article's two sizes, for a CPU and a GPU.
    "baby": _baby(width=16, head_dim=4, heads=2, layers=2, context=8, dropout=0.2),
    "baby-large": _baby(width=512, head_dim=16, heads=6, layers=6, context=256, dropout=0.2),
    "minigpt-pico": _modern(layers=2, width=128, head_dim=64, context=256, vocab_size=1024),
    "minigpt-nano": _modern(layers=4, width=128, head_dim=32, context=256, vocab_size=1024),
    "minigpt-small": _modern(layers=6, width=384, head_dim=64, context=512),
    "minigpt-base": _modern(layers=12, width=768, head_dim=128, context=1024),
    "minigpt-large": _modern(layers=20, width=1280, head_dim=128, context=2048),
}


# The rungs of the ladder to Baby GPT: how each differs from the preset. The norm is a LayerNorm over the width; the
# article's own norm averages over the batch.
_NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0}
_NO_NORM = _NO_DROPOUT | {"norm_type": "none"}
_NO_RESIDUAL = _NO_NORM | {"residual": False}
_ONE_BLOCK = _NO_RESIDUAL | {"num_hidden_layers": 1}
_NO_MLP = _ONE_BLOCK | {"intermediate_size": 0}
BABY_RUNGS: dict[str, dict[str, Any]] = {
    # `baby_rung` makes the bigram as wide as the vocabulary, a table of next-token scores, and the single head as wide
    # as all heads together.
    "bigram": _NO_MLP | {"num_hidden_layers": 0, "position_embedding_type": "none"},
    "one-head": _NO_MLP | {"num_attention_heads": 1},
    "several-heads": _NO_MLP,
    "feed-forward": _ONE_BLOCK,
    "blocks": _NO_RESIDUAL,
    "residual": _NO_NORM,
    "layer-norm": _NO_DROPOUT,
    "dropout": {},
    # A CPU trains it in a minute or two. The article's size, for a GPU, is the preset baby-large.
    "scaled-up": _baby(width=64, head_dim=16, heads=4, layers=4, context=64, dropout=0.0),
}


def preset(name: str, **overrides: Any) -> MiniGPTConfig:
    """
    Return the configuration called `name`, with any field overridden.

    Args:
        name: a key of `PRESETS`.
        overrides: fields of `MiniGPTConfig`, or GPT-2's aliases of them.

    Raises:
        ValueError: the preset or a field is unknown.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown. Choose one of {', '.join(PRESETS)}.")
    aliases = MiniGPTConfig.attribute_map
    known = {field.name for field in dataclasses.fields(MiniGPTConfig)} | {
        *aliases,
        "num_labels",
        "attn_implementation",
    }
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"MiniGPTConfig has no field {', '.join(unknown)}. It has {', '.join(sorted(known))}.")
    fields = PRESETS[name] | {aliases.get(key, key): value for key, value in overrides.items()}
    for token in ("bos_token_id", "eos_token_id"):
        # A smaller vocabulary has other special tokens.
        if token not in overrides and fields.get(token) is not None and fields[token] >= fields["vocab_size"]:
            fields[token] = None
    return MiniGPTConfig(**fields)


def baby_rung(name: str, base: str = "baby", **overrides: Any) -> MiniGPTConfig:
    """
    Return the configuration of one rung of the ladder to Baby GPT.

    Args:
        name: a key of `BABY_RUNGS`.
        base: the preset at the top of the ladder, `baby` or `baby-large`.
        overrides: fields of `MiniGPTConfig`; the fields of the rung take precedence.

    Raises:
        ValueError: the rung or the preset is unknown.
    """
    if name not in BABY_RUNGS:
        raise ValueError(f"rung {name!r} is unknown. Choose one of {', '.join(BABY_RUNGS)}.")
    aliases = MiniGPTConfig.attribute_map
    overrides = {aliases.get(key, key): value for key, value in overrides.items()}
    full = preset(base, **overrides)
    fields = overrides | BABY_RUNGS[name]
    if name == "bigram":
        fields["hidden_size"] = full.vocab_size
    if name == "one-head":
        assert full.head_dim is not None
        fields["head_dim"] = full.num_attention_heads * full.head_dim
    return preset(base, **(fields | {"vocab_size": full.vocab_size}))
