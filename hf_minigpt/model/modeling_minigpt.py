"""
MiniGPT: one decoder block, whose switches (configuration_minigpt.py) make it GPT-1, GPT-2 or a modern GPT.

Read it from the top: norms, rotary positions, attention, MLP, block, model, the two heads. Shapes: B batch, T query
length, S key length, C hidden size, H heads, D head_dim, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_minigpt import MiniGPTConfig
from .functional_minigpt import (
    apply_rotary,
    attend_by_document,
    auxiliary_lm_loss,
    build_mask,
    causal_lm_loss,
    causal_lm_loss_without_logits,
    check_positions,
    classification_loss,
    count_hits,
    divide,
    find_text,
    finish_logits,
    infer_problem_type,
    sinusoidal_embedding,
    slice_logits_to_keep,
    truncate_texts,
)
from .generation_minigpt import (
    CACHE_FIELD,
    MODEL_UPDATES_PAGED_CACHE,
    Decoding,
    check_empty,
    check_kwargs,
    grow_in_place,
    single_token_inputs,
    take_cache,
    take_paged_cache,
)
from .products_minigpt import is_plain_linear, project


class MiniGPTRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), with or without a gain (Zhang and Sennrich, 2019)."""

    def __init__(self, hidden_size: int, eps: float, affine: bool):
        super().__init__()
        self.normalized_shape = (hidden_size,)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size)) if affine else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.normalized_shape, self.weight, self.eps)


def build_norm(config: MiniGPTConfig) -> nn.Module:
    if config.norm_type == "layernorm":
        return nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon, elementwise_affine=config.norm_affine)
    if config.norm_type == "rmsnorm":
        return MiniGPTRMSNorm(config.hidden_size, config.layer_norm_epsilon, config.norm_affine)
    return nn.Identity()


def build_linear(in_features: int, out_features: int, bias: bool, initial_std: float) -> nn.Linear:
    """A linear layer that `_init_weights` starts at a standard deviation of its own."""
    linear = nn.Linear(in_features, out_features, bias=bias)
    linear.initial_std = initial_std  # type: ignore[assignment]
    return linear


def branch_std(config: MiniGPTConfig) -> float:
    """Initial standard deviation of the projections that end a branch: by `config.residual_init`."""
    depth_scale = {"gpt2": 1 / math.sqrt(2 * max(config.num_hidden_layers, 1)), "normal": 1.0, "zero": 0.0}
    return config.initializer_range * depth_scale[config.residual_init]


class MiniGPTRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions, in the form that transformers re-creates after loading."""

    def __init__(self, config: MiniGPTConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        # Again, because a config may be changed after it was built.
        config.validate_rope()
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MiniGPTConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies (R / 2,) of Su et al. (2021), and the factor of cosine and sine, 1."""
        num_turned = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, num_turned, 2, dtype=torch.float) / num_turned
        return 1.0 / config.rope_parameters["rope_theta"] ** exponent, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.float()  # (B or 1, T, R / 2)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # (B, H, T, D)
    key: torch.Tensor,  # (B, H, S, D)
    value: torch.Tensor,  # (B, H, S, D)
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)  # (B, H, T, S)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MiniGPTAttention(nn.Module):
    def __init__(self, config: MiniGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = config.head_dim**-0.5 if config.attention_scaling is None else config.attention_scaling
        self.is_causal = True
        # Reading a config costs microseconds, which a small model's decoding would notice.
        self.dropout = config.attn_pdrop
        self.norm_eps = config.layer_norm_epsilon if config.qk_norm else None
        self.head_mask = config.head_mask[layer_idx] if config.head_mask is not None else None

        inner_size = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, inner_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, inner_size, bias=config.qkv_bias)
        self.o_proj = build_linear(inner_size, config.hidden_size, config.attention_out_bias, branch_std(config))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = project(self.q_proj, hidden_states).view(head_shape).transpose(1, 2)  # (B, H, T, D)
        key = project(self.k_proj, hidden_states).view(head_shape).transpose(1, 2)
        value = project(self.v_proj, hidden_states).view(head_shape).transpose(1, 2)

        if position_embeddings is not None:
            query, key = apply_rotary(query, *position_embeddings), apply_rotary(key, *position_embeddings)
        if self.norm_eps is not None:
            query = F.rms_norm(query, (self.head_dim,), eps=self.norm_eps)
            key = F.rms_norm(key, (self.head_dim,), eps=self.norm_eps)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        implementation = self.config._attn_implementation
        if MODEL_UPDATES_PAGED_CACHE and ("cache" in kwargs or implementation.startswith("paged|")):
            # It also changes kwargs, for the attention function.
            key, value = take_paged_cache(kwargs).update(key, value, self.layer_idx, kwargs=kwargs)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        attend = partial(attention_interface, self, dropout=dropout, scaling=self.scaling, **kwargs)
        if isinstance(attention_mask, list):
            output, weights = attend_by_document(attend, query, key, value, attention_mask), None
        else:
            output, weights = attend(query, key, value, attention_mask)  # (B, T, H, D)
        if self.head_mask is not None:
            output = output * output.new_tensor(self.head_mask)[:, None]
        return project(self.o_proj, output.reshape(*input_shape, -1)), weights


class MiniGPTMLP(nn.Module):
    def __init__(self, config: MiniGPTConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = build_linear(
            config.intermediate_size, config.hidden_size, config.mlp_bias, branch_std(config)
        )
        # The same function, but one kernel instead of eight and one saved tensor instead of four.
        self.act_fn = ACT2FN["gelu_pytorch_tanh" if config.hidden_act == "gelu_new" else config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return project(self.down_proj, self.act_fn(project(self.up_proj, hidden_states)))


class MiniGPTBlock(GradientCheckpointingLayer):
    def __init__(self, config: MiniGPTConfig, layer_idx: int):
        super().__init__()
        self.pre_norm = config.norm_placement == "pre"
        self.residual = config.residual
        self.input_layernorm = build_norm(config)
        self.self_attn = MiniGPTAttention(config, layer_idx)
        self.mlp = MiniGPTMLP(config) if config.intermediate_size else None
        self.post_attention_layernorm = build_norm(config) if self.mlp is not None else None
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        inputs = self.input_layernorm(hidden_states) if self.pre_norm else hidden_states
        branch, _ = self.self_attn(inputs, attention_mask, position_embeddings, past_key_values, **kwargs)
        hidden_states = self.join(hidden_states, branch, self.input_layernorm)
        if self.mlp is None:
            return hidden_states
        inputs = self.post_attention_layernorm(hidden_states) if self.pre_norm else hidden_states
        return self.join(hidden_states, self.mlp(inputs), self.post_attention_layernorm)

    def join(self, hidden_states: torch.Tensor, branch: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        branch = self.dropout(branch)
        if self.residual:
            branch = hidden_states + branch
        return branch if self.pre_norm else norm(branch)


class MiniGPTPreTrainedModel(PreTrainedModel):
    config: MiniGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniGPTBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": MiniGPTBlock, "attentions": MiniGPTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # By leaf: transformers never initialises a parameterless container of code that is not its own.
        if isinstance(module, nn.Linear) and hasattr(module, "initial_std"):
            init.normal_(module.weight, mean=0.0, std=module.initial_std)  # type: ignore[arg-type]

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers; `new_num_tokens` becomes the number of real ids, rows that padding adds are masked."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens is not None:
            is_padded = self.config.vocab_size > new_num_tokens
            self.config.unpadded_vocab_size = new_num_tokens if is_padded else None
        return embeddings


class MiniGPTModel(MiniGPTPreTrainedModel):
    """The decoder without a head: token ids (B, T) or embeddings (B, T, C) to hidden states (B, T, C)."""

    def __init__(self, config: MiniGPTConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding_type = config.position_embedding_type
        self.max_position_embeddings = config.max_position_embeddings
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        elif config.position_embedding_type == "rope":
            self.rotary_emb = MiniGPTRotaryEmbedding(config)
        self.embedding_norm = build_norm(config) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList([MiniGPTBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        pre_norm = config.norm_placement == "pre" and config.num_hidden_layers > 0
        self.norm = build_norm(config) if pre_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: (B, T).
            attention_mask: (B, S) with 0 on padding, on either side, or (B, 1, T, S) used as it is.
            position_ids: (B, T); derived from the mask where absent. Where they do not count on by one, a new document
                begins, and attention does not cross into it.
            inputs_embeds: (B, T, C) instead of `input_ids`.
            token_type_ids: (B, T) ids whose token embeddings are added (GPT-1, GPT-2).

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`, a position beyond a learned table, or, in
                training with gradient checkpointing, a cache that holds tokens.
            TypeError: an argument that neither the model nor the attention reads. A `Cache` is found under any name.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        past_key_values = take_cache(past_key_values, kwargs)
        check_kwargs(kwargs, self.config._attn_implementation, position_ids)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # The backward pass runs each block again, which would add its keys and values to the cache again.
            check_empty(past_key_values)
            past_key_values, use_cache = None, False
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            grow_in_place(past_key_values)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0

        mask = build_mask(self.config, inputs_embeds, attention_mask, position_ids, past_key_values, past_length)
        if position_ids is not None:
            # Attention kernels that pack by themselves (flash, vLLM's) look for it.
            kwargs["position_ids"] = position_ids
        elif attention_mask is not None and attention_mask.ndim == 2:
            # Padding on the left must not shift the positions of the text.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        else:
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length)[None]

        if token_type_ids is not None:
            inputs_embeds = inputs_embeds + self.embed_tokens(token_type_ids)
        position_embeddings = None
        if self.position_embedding_type == "learned":
            check_positions(position_ids, self.max_position_embeddings, past_length, given="position_ids" in kwargs)
            inputs_embeds = inputs_embeds + self.embed_positions(position_ids)
        elif self.position_embedding_type == "sinusoidal":
            inputs_embeds = inputs_embeds + sinusoidal_embedding(position_ids, like=inputs_embeds)
        elif self.position_embedding_type == "rope":
            position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        if self.embedding_norm is not None:
            inputs_embeds = self.embedding_norm(inputs_embeds)

        hidden_states = self.dropout(inputs_embeds)
        # A changed config leaves out the last ones (`assistant_early_exit`).
        for block in self.layers[: self.config.num_hidden_layers]:
            # By position: by keyword, transformers before 5.24 takes the cache out in training mode even without
            # gradients, and `generate` would read each token without a past.
            hidden_states = block(hidden_states, mask, position_embeddings, past_key_values, **kwargs)
        cache: dict[str, Any] = {CACHE_FIELD: past_key_values}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **cache)


@dataclass
class MiniGPTCausalLMOutput(CausalLMOutputWithPast):
    """`num_correct` (int64, 0-dim), with `count_correct=True`: how many labels are the most likely token."""

    num_correct: torch.Tensor | None = None


class MiniGPTForCausalLM(MiniGPTPreTrainedModel, GenerationMixin):
    """The language model: logits (B, T, V) of the token that follows each position."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MiniGPTConfig):
        super().__init__(config)
        self.model = MiniGPTModel(config)
        self.lm_head = build_lm_head(config)
        self.loss_function = causal_lm_loss
        self.decoding = Decoding()
        self.post_init()

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, **kwargs):  # type: ignore[override]
        inputs = single_token_inputs(self, input_ids, **kwargs) if next_sequence_length == 1 else None
        prepare = super().prepare_inputs_for_generation  # type: ignore[misc]
        return inputs or prepare(input_ids, next_sequence_length, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        count_correct: bool = False,
        **kwargs,
    ) -> MiniGPTCausalLMOutput:
        """
        Args:
            labels: (B, T), usually `input_ids`: position t is scored against label t + 1; -100 is ignored.
            logits_to_keep: logits of the last so many positions only (0: all), or of the positions it lists.
            skip_logits: compute the loss without the logits, which saves their memory; the output then has none. None:
                `config.skip_logits` in training, False in evaluation. It has no effect without labels or with
                `logits_to_keep`.
            count_correct: also count the labels that are the most likely token.
            kwargs: `shift_labels` (B, T) are labels that are already shifted; `num_items_in_batch` divides the summed
                loss instead of the number of labels; `ignore_index` replaces -100. The rest goes to `MiniGPTModel`.
        """
        past_key_values = take_cache(past_key_values, kwargs)
        if past_key_values is not None and input_ids is not None and input_ids.shape[1] == 1:
            others = (inputs_embeds, token_type_ids, labels, skip_logits, *kwargs.values())
            if all(other is None or other is False for other in others) and not count_correct:
                logits = self.decoding.step(self, input_ids, attention_mask, position_ids, past_key_values)
                if logits is not None:
                    cache: dict[str, Any] = {CACHE_FIELD: past_key_values}
                    return MiniGPTCausalLMOutput(logits=logits, **cache)

        loss_kwargs = {
            name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels", "ignore_index") if name in kwargs
        }
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        has_labels = labels is not None or loss_kwargs.get("shift_labels") is not None
        if skip_logits is None:
            skip_logits = self.training and self.config.skip_logits
        skip_logits = skip_logits and has_labels and isinstance(logits_to_keep, int) and logits_to_keep == 0

        loss = logits = num_correct = None
        if skip_logits and self.loss_function is causal_lm_loss and is_plain_linear(self.lm_head):
            loss, num_correct = causal_lm_loss_without_logits(
                self.lm_head,
                hidden_states,
                labels,
                softcap=self.config.final_logit_softcapping,
                num_ids=self.config.unpadded_vocab_size,
                count_correct=count_correct,
                **loss_kwargs,
            )
        else:
            if not has_labels:
                hidden_states = slice_logits_to_keep(hidden_states, logits_to_keep)
            logits = project(self.lm_head, hidden_states)
            num_ids = self.config.unpadded_vocab_size
            loss_elsewhere = not has_labels and (self.training or "num_items_in_batch" in loss_kwargs)
            if loss_elsewhere and num_ids is not None:
                # For example the Trainer's smoothed loss, in training and in evaluation, which sums over all ids.
                logits = logits[..., :num_ids]
            logits = finish_logits(logits, self.config.final_logit_softcapping, num_ids)
            if has_labels:
                loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs
                )
                if count_correct:
                    num_correct = count_hits(logits, labels, **loss_kwargs)
            if skip_logits:
                logits = None
            elif has_labels:
                # Only now: the loss is that of all positions.
                logits = slice_logits_to_keep(logits, logits_to_keep)

        return MiniGPTCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_FIELD: getattr(outputs, CACHE_FIELD)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            num_correct=num_correct if count_correct else None,
        )


class MiniGPTForSequenceClassification(MiniGPTPreTrainedModel):
    """
    A classifier on one vector per row, by `config.pooling`: the last non-pad token's, the mean, or a weighted mean
    whose weights are a softmax over the tokens' products with one learned vector (Yang et al., 2016). That vector
    starts at zero, hence at the mean.

    With `config.auxiliary_lm_weight` above 0 it also has a language-model head, whose loss is added (Radford et al.,
    2018): the mean over rows of each row's mean over tokens.

    With `config.truncation_length` it cuts longer texts itself, so that a pipeline reads what the training read.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: MiniGPTConfig):
        super().__init__(config)
        self.model = MiniGPTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.pool_query = build_linear(config.hidden_size, 1, False, 0.0) if config.pooling == "attention" else None
        self.lm_head = None
        if config.auxiliary_lm_weight > 0:
            self._tied_weights_keys = MiniGPTForCausalLM._tied_weights_keys
            self._tp_plan = MiniGPTForCausalLM._tp_plan
            self.lm_head = build_lm_head(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """
        Args:
            attention_mask: (B, T); where absent the padding is told by `config.pad_token_id`.
            labels: (B,) class numbers, of which -100 is ignored, or (B, num_labels) floats: regression with one label
                (then also (B,)), else multi-label. `config.problem_type`, where it is None, becomes what the first
                labels are.
            num_items_in_batch: number of label entries that the summed loss is divided by; None: those of this batch.

        Returns:
            Logits (B, num_labels).

        Raises:
            ValueError: the batch has several rows and nothing tells their padding, or the labels do not fit.
        """
        length = self.config.truncation_length
        others = (position_ids, past_key_values, token_type_ids)
        if length is not None and input_ids is not None and input_ids.shape[1] > length and others == (None,) * 3:
            is_text = find_text(input_ids, input_ids, attention_mask, self.config.pad_token_id)
            input_ids, attention_mask = truncate_texts(input_ids, is_text, self.config.truncation, length)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        is_text = find_text(hidden_states, input_ids, attention_mask, self.config.pad_token_id)
        if self.pool_query is not None:
            scores = project(self.pool_query, hidden_states).squeeze(-1).float()
            weights = scores.masked_fill(~is_text, torch.finfo(scores.dtype).min).softmax(-1).to(hidden_states.dtype)
            pooled = torch.einsum("bt,btc->bc", weights, hidden_states)
        elif self.config.pooling == "mean":
            weights = is_text.to(hidden_states.dtype)
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
            pooled = torch.einsum("bt,btc->bc", weights, hidden_states)
        else:
            positions = torch.arange(is_text.shape[1], device=is_text.device)
            last = (positions * is_text).argmax(-1)
            pooled = hidden_states[torch.arange(hidden_states.shape[0], device=last.device), last]
        logits = self.score(pooled)

        loss = None
        if labels is not None:
            labels = labels.to(logits.device)
            problem_type = self.config.problem_type or infer_problem_type(labels, self.config.num_labels)
            loss = classification_loss(logits, labels, problem_type)
            if self.config.problem_type is None:
                # Kept, as in transformers' own models: the saved model's pipeline chooses its function by it.
                self.config.problem_type = problem_type
            if num_items_in_batch is None:
                is_class = problem_type == "single_label_classification"
                num_items_in_batch = (labels != -100).sum() if is_class else labels.numel()
            loss = divide(loss, num_items_in_batch, labels, -100)
            if self.lm_head is not None:
                labels_per_row = max(labels.numel() // logits.shape[0], 1)
                auxiliary_loss = auxiliary_lm_loss(
                    self.lm_head,
                    hidden_states,
                    input_ids,
                    is_text,
                    softcap=self.config.final_logit_softcapping,
                    num_ids=self.config.unpadded_vocab_size,
                )
                auxiliary_loss = divide(auxiliary_loss * labels_per_row, num_items_in_batch, labels, -100)
                loss = loss + self.config.auxiliary_lm_weight * auxiliary_loss

        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_FIELD: getattr(outputs, CACHE_FIELD)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def build_lm_head(config: MiniGPTConfig) -> nn.Linear:
    starts_at_zero = config.residual_init == "zero" and not config.tie_word_embeddings
    initial_std = 0.0 if starts_at_zero else config.initializer_range
    return build_linear(config.hidden_size, config.vocab_size, config.lm_head_bias, initial_std)


__all__ = ["MiniGPTForCausalLM", "MiniGPTForSequenceClassification", "MiniGPTModel", "MiniGPTPreTrainedModel"]
