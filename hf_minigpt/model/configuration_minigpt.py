"""The configuration of MiniGPT: every switch of the architecture, validated when it is set."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters


# Every checkpoint lists all four: a language model may be loaded as a classifier, and vLLM loads AutoModel.
AUTO_MAP = {
    "AutoConfig": "configuration_minigpt.MiniGPTConfig",
    "AutoModel": "modeling_minigpt.MiniGPTModel",
    "AutoModelForCausalLM": "modeling_minigpt.MiniGPTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_minigpt.MiniGPTForSequenceClassification",
}


# The required and the optional keys of each rope_type, besides `rope_theta` and `partial_rotary_factor`.
ROPE_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": ({"factor"}, {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    "longrope": ({"short_factor", "long_factor"}, {"factor", "attention_factor"}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, set()),
    "proportional": (set(), {"factor"}),
}
# The smallest valid value of each number, and its description.
ROPE_NUMBERS = {
    "rope_theta": (1, "a number of at least 1, the value used in training; usually 10000.0"),
    "factor": (1, "a number of at least 1, by which the context is extended"),
    "original_max_position_embeddings": (2, "the context length before the extension, at least 2"),
    "attention_factor": (1e-6, "a number above 0, or omit it to derive it from factor"),
    "beta_fast": (1e-6, "a number above 0, usually 32"),
    "beta_slow": (1e-6, "a number above 0, usually 1"),
    "mscale": (1e-6, "a number above 0"),
    "mscale_all_dim": (1e-6, "a number above 0"),
    "low_freq_factor": (1e-6, "a number above 0, usually 1"),
    "high_freq_factor": (1e-6, "a number above 0, usually 4"),
}


def is_number(value: Any, minimum: float) -> bool:
    is_numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_numeric and math.isfinite(value) and value >= minimum


def check_rope_parameters(parameters: Mapping[str, Any], head_dim: int) -> None:
    """
    Refuse rotary parameters that the model would ignore, or that give no frequencies.

    Raises:
        ValueError: names the key, its value and the remedy.
    """
    rope_type = parameters.get("rope_type", "default")
    types = {*ROPE_KEYS, *ROPE_INIT_FUNCTIONS}
    if not isinstance(rope_type, str) or rope_type not in types:
        raise ValueError(
            f"rope_parameters has rope_type={rope_type!r}, which is unknown. Choose one of {', '.join(sorted(types))}."
        )
    if rope_type in ROPE_KEYS:
        required, optional = ROPE_KEYS[rope_type]
        known = set().union(*(keys for pair in ROPE_KEYS.values() for keys in pair))
        for name, value in parameters.items():
            # transformers warns of names that no type reads, and later versions may read more names.
            if name in known - required - optional or isinstance(value, dict):
                raise ValueError(
                    f"rope_parameters has {name}={value!r}, which rope_type={rope_type!r} does not read. Omit it, "
                    "or choose the rope_type that reads it. All layers share the parameters."
                )
        missing = sorted(required - parameters.keys())
        if missing:
            raise ValueError(
                f"rope_parameters={dict(parameters)} with rope_type={rope_type!r} lacks {', '.join(missing)}. Add it."
            )
    # A changed config may lack rope_theta. The default need not be the value used in training.
    parameters = {"rope_theta": None, **parameters}
    for name, (minimum, description) in ROPE_NUMBERS.items():
        if name in parameters and not is_number(parameters[name], minimum):
            raise ValueError(f"rope_parameters has {name}={parameters[name]!r}. Choose {description}.")
    if rope_type == "yarn" and parameters["rope_theta"] == 1:
        raise ValueError(
            "rope_parameters has rope_theta=1, but rope_type='yarn' requires more than 1, usually 10000.0."
        )
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        defaults = {"beta_slow": 1, "beta_fast": 32}
        values = [parameters.get(name, defaults.get(name)) for name in (low, high)]
        if None not in values and values[0] >= values[1]:
            raise ValueError(f"rope_parameters has {low}={values[0]} and {high}={values[1]}. Choose a larger {high}.")
    if not isinstance(parameters.get("truncate", True), bool):
        raise ValueError(f"rope_parameters has truncate={parameters['truncate']!r}. Choose true or false.")

    share = parameters.get("partial_rotary_factor", 1.0)
    if not is_number(share, 0) or not 0 < share <= 1:
        raise ValueError(
            f"rope_parameters has partial_rotary_factor={share!r}, the rotated share of a head's dimensions. Choose "
            "a number above 0 and up to 1, or omit it."
        )
    num_rotated = head_dim if rope_type == "proportional" else int(head_dim * share)
    # `dynamic` raises its base to the power of n / (n - 2).
    minimum = 4 if rope_type == "dynamic" else 2
    if num_rotated % 2 or num_rotated < minimum:
        raise ValueError(
            f"head_dim={head_dim} with partial_rotary_factor={share} has {num_rotated} rotated dimensions. Rotary "
            f"positions rotate pairs: choose an even number, at least {minimum}."
        )
    for name in ("short_factor", "long_factor"):
        factors = parameters.get(name, [1] * (num_rotated // 2))
        if not isinstance(factors, (list, tuple)) or not all(is_number(factor, 1e-6) for factor in factors):
            raise ValueError(f"rope_parameters has {name}={factors!r}. Choose a list of numbers above 0.")
        if len(factors) != num_rotated // 2:
            raise ValueError(
                f"rope_parameters has {len(factors)} numbers in {name}={factors!r}, but {num_rotated} dimensions of "
                f"each head are rotated: give {num_rotated // 2}."
            )


@strict
class MiniGPTConfig(PreTrainedConfig):
    r"""
    Configuration of a MiniGPT. The defaults are GPT-2 small (124M); `hf_minigpt.presets` has named configurations.

    GPT-2's names (`n_embd`, `n_layer`, `n_head`, `n_positions`, `n_inner`, `activation_function`) are accepted as
    aliases.

    Args:
        vocab_size (`int`): rows of the embedding table.
        unpadded_vocab_size (`int`, *optional*): size of the tokenizer, if `vocab_size` is padded to suit the GPU. Ids
            from here on are masked in the logits and in the loss. None: the embedding table is not padded.
        hidden_size (`int`): width of the residual stream.
        intermediate_size (`int`, *optional*): width inside the MLP. None: `4 * hidden_size`; 0: no MLP.
        num_hidden_layers (`int`): number of blocks; 0 is a bigram model.
        num_attention_heads (`int`): heads per block.
        head_dim (`int`, *optional*): width of a head. None: `hidden_size / num_attention_heads`.
        max_position_embeddings (`int`): context length, and the number of learned positions.
        hidden_act (`str`): a key of transformers' `ACT2FN`. `gelu_new` uses the fused tanh GELU.
        norm_type (`str`): `layernorm`, `rmsnorm` or `none`.
        norm_affine (`bool`): whether norms have parameters.
        norm_placement (`str`): `pre` (GPT-2: before each branch, and at the end) or `post` (GPT-1 and the original
            Transformer: after each residual sum).
        layer_norm_epsilon (`float`): added to the variance in every norm.
        embedding_norm (`bool`): whether the embedding is also normed (NanoChat).
        residual (`bool`): whether each branch is added to its input.
        position_embedding_type (`str`): `learned`, `sinusoidal`, `rope` or `none`.
        rope_parameters (`dict`, *optional*): transformers' rotary parameters: `rope_type` (`default`, `linear`,
            `dynamic`, `yarn`, `longrope`, `llama3`, `proportional` or one registered in `ROPE_INIT_FUNCTIONS`),
            `rope_theta`, the keys that the type reads, and `partial_rotary_factor`, the share of each head's
            dimensions that is rotated, from the first on. None: all dimensions, with base 10000.
        qk_norm (`bool`): whether queries and keys are RMS-normed, without parameters, after the rotation (NanoChat).
        attention_scaling (`float`, *optional*): factor of the attention scores. None: `head_dim ** -0.5`.
        qkv_bias, attention_out_bias, mlp_bias, lm_head_bias (`bool`): which projections have a bias.
        tie_word_embeddings (`bool`): whether the output head is the embedding table.
        final_logit_softcapping (`float`, *optional*): cap of the logits, `cap * tanh(logits / cap)`.
        skip_logits (`bool`): whether training with labels computes the loss without the logits, which saves memory
            if the vocabulary is large. The output then has no logits. The `skip_logits` argument of the forward pass
            takes precedence.
        residual_init (`str`): initial standard deviation of the projections that end a branch:
            `initializer_range / sqrt(2 * layers)` (`gpt2`), `initializer_range` (`normal`), or zero, also for an
            untied output head (`zero`).
        initializer_range (`float`): standard deviation of the normal initialisation.
        embd_pdrop, attn_pdrop, resid_pdrop (`float`): dropout of the embedding, the attention weights and each branch.
        head_mask (`list[list[float]]`, *optional*): factor of each head's output, by layer and head; 0 prunes it.
        pooling (`str`): how the classifier pools hidden states: the `last` non-padding token, the `mean` over
            non-padding tokens, or a mean with learned weights (`attention`).
        auxiliary_lm_weight (`float`): weight of the language-model loss added to the classifier's (GPT-1's lambda).
            Above 0 the classifier also has a language-model head.
        truncation_length (`int`, *optional*): number of tokens to which the classifier truncates a longer text. None:
            no truncation.
        truncation (`str`): the tokens to keep: `head`, `tail`, or `head_tail`, which takes a quarter from the head.
            The first and the last token are always kept, because they are special tokens.

    Raises:
        An error that names field, value and remedy, if fields contradict each other.
    """

    model_type = "minigpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "n_inner": "intermediate_size",
        "activation_function": "hidden_act",
    }
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50257
    unpadded_vocab_size: int | None = None
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    head_dim: int | None = None
    max_position_embeddings: int = 1024
    hidden_act: str = "gelu_new"
    norm_type: Literal["layernorm", "rmsnorm", "none"] = "layernorm"
    norm_affine: bool = True
    norm_placement: Literal["pre", "post"] = "pre"
    layer_norm_epsilon: float = 1e-5
    embedding_norm: bool = False
    residual: bool = True
    position_embedding_type: Literal["learned", "sinusoidal", "rope", "none"] = "learned"
    rope_parameters: RopeParameters | dict | None = None
    qk_norm: bool = False
    attention_scaling: float | int | None = None
    qkv_bias: bool = True
    attention_out_bias: bool = True
    mlp_bias: bool = True
    lm_head_bias: bool = False
    tie_word_embeddings: bool = True
    final_logit_softcapping: float | int | None = None
    skip_logits: bool = False
    residual_init: Literal["gpt2", "zero", "normal"] = "gpt2"
    initializer_range: float = 0.02
    embd_pdrop: float | int = 0.1
    attn_pdrop: float | int = 0.1
    resid_pdrop: float | int = 0.1
    head_mask: list[list[float | int]] | None = None
    pooling: Literal["last", "mean", "attention"] = "last"
    auxiliary_lm_weight: float | int = 0.0
    truncation_length: int | None = None
    truncation: Literal["head", "tail", "head_tail"] = "head"
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        # The config.json of a GPT-2 contains "gpt2".
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)
        # After the line above, which sets the aliases among kwargs.
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.head_dim is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not divisible by num_attention_heads="
                    f"{self.num_attention_heads}. Choose a divisible hidden_size, or set head_dim."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.rope_parameters = self.complete_rope_parameters() if self.position_embedding_type == "rope" else None

    def complete_rope_parameters(self) -> dict[str, Any]:
        """Return `rope_parameters` without keys that are None, and with defaults."""
        given: Mapping[str, Any] = self.rope_parameters or {}
        parameters = {name: value for name, value in given.items() if value is not None}
        parameters = {"rope_type": "default", "rope_theta": self.default_theta} | parameters
        original: Any = parameters.get("original_max_position_embeddings")
        if parameters["rope_type"] == "yarn" and is_number(original, 1) and original < self.max_position_embeddings:
            parameters.setdefault("factor", self.max_position_embeddings / original)
        return parameters

    def validate_rope(self):
        """Called by `@strict`, as `validate_architecture`. The method of transformers only warns of wrong values."""
        # `validate_architecture` refuses a wrong head_dim.
        if self.position_embedding_type == "rope" and is_number(self.head_dim, minimum=1):
            check_rope_parameters(self.rope_parameters or {}, self.head_dim)
            super().validate_rope()

    def to_dict(self):
        # A saved model from the Hub must refer to its own copy of the code, not to that repository.
        return super().to_dict() | {"auto_map": dict(AUTO_MAP)}

    def validate_architecture(self):
        """Called by `@strict` when the config is built, and before it is saved."""
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings", "head_dim"):
            value = getattr(self, name)
            if value is None or value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        for name in ("num_hidden_layers", "intermediate_size", "auxiliary_lm_weight", "initializer_range"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a probability. Choose one in [0, 1).")
        for name in ("layer_norm_epsilon", "attention_scaling", "final_logit_softcapping"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive (or None, if allowed).")
        if self.truncation_length is not None and self.truncation_length < 4:
            raise ValueError(f"truncation_length={self.truncation_length} leaves no room for text. Choose at least 4.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown. Choose one of {', '.join(sorted(ACT2FN))}.")
        if self.unpadded_vocab_size is not None and not 1 <= self.unpadded_vocab_size <= self.vocab_size:
            raise ValueError(
                f"unpadded_vocab_size={self.unpadded_vocab_size} must be between 1 and vocab_size={self.vocab_size}. "
                "Set it to the size of the tokenizer; vocab_size is the size of the padded embedding table."
            )
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} is odd, but sinusoidal positions are pairs of sine and cosine. "
                "Choose an even hidden_size."
            )
        if self.num_hidden_layers == 0 and self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings=True with num_hidden_layers=0 gives b after a the same score as a after b. "
                "Set tie_word_embeddings=False."
            )
        if self.norm_type == "none" and (self.qk_norm or self.embedding_norm):
            raise ValueError(
                f"norm_type='none' with qk_norm={self.qk_norm}, embedding_norm={self.embedding_norm} is "
                "contradictory. Set those to False, or norm_type to 'rmsnorm'."
            )
        if self.head_mask is not None:
            shape = (self.num_hidden_layers, self.num_attention_heads)
            if len(self.head_mask) != shape[0] or any(len(heads) != shape[1] for heads in self.head_mask):
                raise ValueError(
                    f"head_mask={self.head_mask} must have num_hidden_layers={shape[0]} lists of "
                    f"num_attention_heads={shape[1]} factors."
                )


__all__ = ["MiniGPTConfig"]
