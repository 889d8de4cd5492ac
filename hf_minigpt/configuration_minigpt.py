"""The configuration of MiniGPT: every architectural switch, checked as soon as it is set."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters


# All four, whichever head was saved: a language model is also loaded as a classifier, and vLLM asks for AutoModel.
AUTO_MAP = {
    "AutoConfig": "configuration_minigpt.MiniGPTConfig",
    "AutoModel": "modeling_minigpt.MiniGPTModel",
    "AutoModelForCausalLM": "modeling_minigpt.MiniGPTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_minigpt.MiniGPTForSequenceClassification",
}


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
        rope_parameters (`dict`, *optional*): transformers' rotary parameters; None: base 10000, if rotary.
        qk_norm (`bool`): RMS-normalise queries and keys, without parameters, after the rotation (NanoChat).
        attention_scaling (`float`, *optional*): factor of the attention scores. None: `head_dim ** -0.5`.
        qkv_bias, attention_out_bias, mlp_bias, lm_head_bias (`bool`): which projections have a bias.
        tie_word_embeddings (`bool`): whether the output head is the embedding table.
        final_logit_softcapping (`float`, *optional*): `cap * tanh(logits / cap)` on the logits.
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
        if self.position_embedding_type == "rope":
            if self.rope_parameters is None:
                self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        else:
            self.rope_parameters = None

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
        if self.position_embedding_type == "rope" and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd: rotary positions turn pairs of dimensions, choose an even head_dim."
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
