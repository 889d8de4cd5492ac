"""The configuration of MiniGPT: every architectural switch, checked as soon as it is set."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters


# All four, whichever head was saved: a language model is also loaded as a classifier, and vLLM asks for AutoModel.
AUTO_MAP = {
    "AutoConfig": "configuration_minigpt.MiniGPTConfig",
    "AutoModel": "modeling_minigpt.MiniGPTModel",
    "AutoModelForCausalLM": "modeling_minigpt.MiniGPTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_minigpt.MiniGPTForSequenceClassification",
}


# What each type of rotary positions reads besides `rope_theta` and `partial_rotary_factor`: needed, and optional keys.
ROPE_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": ({"factor"}, {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    "longrope": ({"short_factor", "long_factor"}, {"factor", "attention_factor"}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, set()),
    "proportional": (set(), {"factor"}),
}
# The least value of each number, inclusive, and in words.
ROPE_NUMBERS = {
    "rope_theta": (1, "a number of at least 1, that of the training; usually 10000.0"),
    "factor": (1, "a number of at least 1: how many times the context is stretched"),
    "original_max_position_embeddings": (2, "the context length before it was stretched, at least 2"),
    "attention_factor": (1e-6, "a number above 0; left out, it follows from factor"),
    "beta_fast": (1e-6, "a number above 0, usually 32"),
    "beta_slow": (1e-6, "a number above 0, usually 1"),
    "mscale": (1e-6, "a number above 0"),
    "mscale_all_dim": (1e-6, "a number above 0"),
    "low_freq_factor": (1e-6, "a number above 0, usually 1"),
    "high_freq_factor": (1e-6, "a number above 0, usually 4"),
}


def is_number(value: Any, least: float) -> bool:
    is_numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_numeric and math.isfinite(value) and value >= least


def check_rope_parameters(parameters: Mapping[str, Any], head_dim: int) -> None:
    """
    Refuse rotary parameters that the model would ignore, or from which no frequencies can be computed.

    Raises:
        ValueError: with key, value and remedy.
    """
    rope_type = parameters.get("rope_type", "default")
    types = {*ROPE_KEYS, *ROPE_INIT_FUNCTIONS}
    if not isinstance(rope_type, str) or rope_type not in types:
        raise ValueError(
            f"rope_parameters has rope_type={rope_type!r}, which is unknown: choose one of {', '.join(sorted(types))}."
        )
    if rope_type in ROPE_KEYS:
        needed, optional = ROPE_KEYS[rope_type]
        known = set().union(*(keys for pair in ROPE_KEYS.values() for keys in pair))
        for name, value in parameters.items():
            # a name that is new to all types is transformers' to warn of, which may know more of them one day
            if name in known - needed - optional or isinstance(value, dict):
                raise ValueError(
                    f"rope_parameters has {name}={value!r}, which rope_type={rope_type!r} does not read: leave it "
                    "out, or choose the rope_type that it belongs to. All layers have the same."
                )
        missing = sorted(needed - parameters.keys())
        if missing:
            raise ValueError(
                f"rope_parameters={dict(parameters)} with rope_type={rope_type!r} lacks {', '.join(missing)}: add it."
            )
    # A new config has rope_theta; one that is changed may have lost it, and the default need not be what was trained.
    parameters = {"rope_theta": None, **parameters}
    for name, (least, wanted) in ROPE_NUMBERS.items():
        if name in parameters and not is_number(parameters[name], least):
            raise ValueError(f"rope_parameters has {name}={parameters[name]!r}: choose {wanted}.")
    if rope_type == "yarn" and parameters["rope_theta"] == 1:
        raise ValueError(
            "rope_parameters has rope_theta=1, which with rope_type='yarn' must be more, usually 10000.0."
        )
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        defaults = {"beta_slow": 1, "beta_fast": 32}
        values = [parameters.get(name, defaults.get(name)) for name in (low, high)]
        if None not in values and values[0] >= values[1]:
            raise ValueError(f"rope_parameters has {low}={values[0]} and {high}={values[1]}: {high} must be larger.")
    if not isinstance(parameters.get("truncate", True), bool):
        raise ValueError(f"rope_parameters has truncate={parameters['truncate']!r}: choose true or false.")

    share = parameters.get("partial_rotary_factor", 1.0)
    if not is_number(share, 0) or not 0 < share <= 1:
        raise ValueError(
            f"rope_parameters has partial_rotary_factor={share!r}, the share of a head's dimensions that is turned: "
            "choose one above 0 and up to 1, or leave it out."
        )
    num_turned = head_dim if rope_type == "proportional" else int(head_dim * share)
    # the base of `dynamic` is raised to the power of n / (n - 2)
    least = 4 if rope_type == "dynamic" else 2
    if num_turned % 2 or num_turned < least:
        raise ValueError(
            f"head_dim={head_dim} with partial_rotary_factor={share} has {num_turned} dimensions to turn: rotary "
            f"positions turn pairs, choose an even number, at least {least}."
        )
    for name in ("short_factor", "long_factor"):
        factors = parameters.get(name, [1] * (num_turned // 2))
        if not isinstance(factors, (list, tuple)) or not all(is_number(factor, 1e-6) for factor in factors):
            raise ValueError(f"rope_parameters has {name}={factors!r}: it must be a list of numbers above 0.")
        if len(factors) != num_turned // 2:
            raise ValueError(
                f"rope_parameters has {len(factors)} numbers in {name}={factors!r}: {num_turned} dimensions of each "
                f"head are turned, give {num_turned // 2}."
            )


@strict
class MiniGPTConfig(PreTrainedConfig):
    r"""
    Configuration of a MiniGPT. The defaults are GPT-2 small (124M); `hf_minigpt.presets` has the named ones.

    GPT-2's names (`n_embd`, `n_layer`, `n_head`, `n_positions`, `n_inner`, `activation_function`) are accepted for the
    fields they stand for.

    Args:
        vocab_size (`int`): rows of the embedding table.
        unpadded_vocab_size (`int`, *optional*): size of the tokenizer where `vocab_size` is padded for the GPU's sake.
            Ids from there on are masked in the logits and in the loss. None: the table is not padded.
        hidden_size (`int`): width of the residual stream.
        intermediate_size (`int`, *optional*): width inside the MLP. None: `4 * hidden_size`; 0: no MLP.
        num_hidden_layers (`int`): number of blocks; 0 is a bigram model.
        num_attention_heads (`int`): heads per block.
        head_dim (`int`, *optional*): width of a head. None: `hidden_size / num_attention_heads`.
        max_position_embeddings (`int`): context length; rows of the table where positions are learned.
        hidden_act (`str`): a key of transformers' `ACT2FN`. `gelu_new` is computed by the fused tanh GELU.
        norm_type (`str`): `layernorm`, `rmsnorm` or `none`.
        norm_affine (`bool`): whether the norms have parameters.
        norm_placement (`str`): `pre` (GPT-2: before each branch, and once at the end) or `post` (GPT-1 and the
            original Transformer: after each residual sum).
        layer_norm_epsilon (`float`): added to the variance in every norm.
        embedding_norm (`bool`): also norm the embedding (NanoChat).
        residual (`bool`): whether each branch is added to its input.
        position_embedding_type (`str`): `learned`, `sinusoidal`, `rope` or `none`.
        rope_parameters (`dict`, *optional*): transformers' rotary parameters: `rope_type` (`default`, `linear`,
            `dynamic`, `yarn`, `longrope`, `llama3`, `proportional` or one registered in `ROPE_INIT_FUNCTIONS`), its
            `rope_theta`, what the type reads besides, and `partial_rotary_factor`, the share of each head's dimensions
            that is turned, the first ones. None: all of them, base 10000, if rotary.
        qk_norm (`bool`): RMS-normalise queries and keys, without parameters, after the rotation (NanoChat).
        attention_scaling (`float`, *optional*): factor of the attention scores. None: `head_dim ** -0.5`.
        qkv_bias, attention_out_bias, mlp_bias, lm_head_bias (`bool`): which projections have a bias.
        tie_word_embeddings (`bool`): whether the output head is the embedding table.
        final_logit_softcapping (`float`, *optional*): `cap * tanh(logits / cap)` on the logits.
        skip_logits (`bool`): whether training with labels computes the loss without the logits, which saves their
            memory where the vocabulary is large. The output then has `loss` only. The `skip_logits` argument of the
            forward pass goes first.
        residual_init (`str`): the projections that end a branch start at `initializer_range / sqrt(2 * layers)`
            (`gpt2`), at `initializer_range` (`normal`), or at zero together with an untied output head (`zero`).
        initializer_range (`float`): standard deviation of the normal initialisation.
        embd_pdrop, attn_pdrop, resid_pdrop (`float`): dropout of the embedding, the attention weights, each branch.
        head_mask (`list[list[float]]`, *optional*): factor of each head's output, by layer and head; 0 prunes it.
        pooling (`str`): what the classifier reads: the `last` non-pad token, the `mean` over non-pad tokens, or a mean
            with learned weights (`attention`).
        auxiliary_lm_weight (`float`): weight of the language-model loss added to the classifier's (GPT-1's lambda).
            Above 0 the classifier has a language-model head too.
        truncation_length (`int`, *optional*): the classifier reads this many tokens of a longer text. None: all.
        truncation (`str`): which tokens: those at its `head`, at its `tail`, or `head_tail`, a quarter of them at the
            head. The first and the last token are always kept, since they frame the text.

    Raises:
        An error naming field, value and remedy where the fields contradict each other.
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
        # A GPT-2 config.json would make this instance call itself "gpt2".
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)
        # Only now: the aliases arrive in kwargs and are set by the line above.
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.head_dim is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not divisible by num_attention_heads="
                    f"{self.num_attention_heads}: choose a width that is, or set head_dim."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.rope_parameters = self.complete_rope_parameters() if self.position_embedding_type == "rope" else None

    def complete_rope_parameters(self) -> dict[str, Any]:
        """`rope_parameters` without the keys that are None, and with the defaults of those that have one."""
        given: Mapping[str, Any] = self.rope_parameters or {}
        parameters = {name: value for name, value in given.items() if value is not None}
        parameters = {"rope_type": "default", "rope_theta": self.default_theta} | parameters
        original: Any = parameters.get("original_max_position_embeddings")
        if parameters["rope_type"] == "yarn" and is_number(original, 1) and original < self.max_position_embeddings:
            parameters.setdefault("factor", self.max_position_embeddings / original)
        return parameters

    def validate_rope(self):
        """Part of `@strict`, as `validate_architecture`. transformers' own only warns of values that are wrong."""
        # a head_dim that is wrong is validate_architecture's to refuse
        if self.position_embedding_type == "rope" and is_number(self.head_dim, least=1):
            check_rope_parameters(self.rope_parameters or {}, self.head_dim)
            super().validate_rope()

    def to_dict(self):
        # Files saved from a model that came from the Hub point at their own copy of the code, not at that repository.
        return super().to_dict() | {"auto_map": dict(AUTO_MAP)}

    def validate_architecture(self):
        """Part of `@strict`: runs when the config is built and before it is saved."""
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings", "head_dim"):
            value = getattr(self, name)
            if value is None or value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        for name in ("num_hidden_layers", "intermediate_size", "auxiliary_lm_weight", "initializer_range"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is a probability: choose one in [0, 1).")
        for name in ("layer_norm_epsilon", "attention_scaling", "final_logit_softcapping"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive (or None, where that is allowed).")
        if self.truncation_length is not None and self.truncation_length < 4:
            raise ValueError(f"truncation_length={self.truncation_length} leaves no room for text: choose at least 4.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown: choose one of {', '.join(sorted(ACT2FN))}.")
        if self.unpadded_vocab_size is not None and not 1 <= self.unpadded_vocab_size <= self.vocab_size:
            raise ValueError(
                f"unpadded_vocab_size={self.unpadded_vocab_size} must lie between 1 and vocab_size={self.vocab_size}: "
                "it is the size of the tokenizer, vocab_size that of the padded table."
            )
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} is odd: sinusoidal positions fill it with pairs of sine and cosine, "
                "choose an even hidden_size."
            )
        if self.num_hidden_layers == 0 and self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings=True with num_hidden_layers=0: the score of b after a would equal that of a "
                "after b. Set tie_word_embeddings=False."
            )
        if self.norm_type == "none" and (self.qk_norm or self.embedding_norm):
            raise ValueError(
                f"norm_type='none' with qk_norm={self.qk_norm}, embedding_norm={self.embedding_norm}: set those to "
                "False, or norm_type to 'rmsnorm'."
            )
        if self.head_mask is not None:
            shape = (self.num_hidden_layers, self.num_attention_heads)
            if len(self.head_mask) != shape[0] or any(len(heads) != shape[1] for heads in self.head_mask):
                raise ValueError(
                    f"head_mask={self.head_mask} must have num_hidden_layers={shape[0]} lists of "
                    f"num_attention_heads={shape[1]} factors."
                )


__all__ = ["MiniGPTConfig"]
