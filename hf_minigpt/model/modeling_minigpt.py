"""
MiniGPT: one decoder block, whose switches (configuration_minigpt.py) make it GPT-1, GPT-2 or a modern GPT.

Read it from the top: norms, attention, MLP, block, model, language model, classifier. Shapes: B batch, T query length,
S key length, C hidden size, H heads, D head_dim, R rotated dimensions of a head, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, SequenceClassifierOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_minigpt import (
    MiniGPTRotaryEmbedding,
    apply_rotary,
    attention,
    check_arguments,
    eager_attention_forward,
    prepare_attention,
    sinusoidal_embedding,
)
from .configuration_minigpt import MiniGPTConfig
from .generation_minigpt import (
    CACHE_FIELD,
    FastGenerationMixin,
    MiniGPTCausalLMOutput,
    SingleTokenDecoder,
    prepare_cache,
    single_token_fast_path,
)
from .loss_minigpt import (
    auxiliary_lm_loss,
    can_skip_logits,
    causal_lm_loss,
    causal_lm_loss_without_logits,
    classifier_loss,
    compute_logits,
    count_correct_labels,
    pop_loss_kwargs,
    select_positions,
)
from .pooling_minigpt import non_padding_mask, pool_last, pool_mean, pool_weighted, truncate_rows
from .products_minigpt import project


def build_norm(config: MiniGPTConfig) -> nn.Module:
    if config.norm_type == "layernorm":
        return nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon, elementwise_affine=config.norm_affine)
    if config.norm_type == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, config.layer_norm_epsilon, elementwise_affine=config.norm_affine)
    return nn.Identity()


def build_linear(in_features: int, out_features: int, bias: bool, initial_std: float) -> nn.Linear:
    """Build a linear layer that `_init_weights` initializes with its own standard deviation."""
    linear = nn.Linear(in_features, out_features, bias=bias)
    linear.initial_std = initial_std  # type: ignore[assignment]
    return linear


def build_lm_head(config: MiniGPTConfig) -> nn.Linear:
    starts_at_zero = config.residual_init == "zero" and not config.tie_word_embeddings
    initial_std = 0.0 if starts_at_zero else config.initializer_range
    return build_linear(config.hidden_size, config.vocab_size, config.lm_head_bias, initial_std)


def branch_std(config: MiniGPTConfig) -> float:
    """Return the initial standard deviation of the projections that end a branch, by `config.residual_init`."""
    depth_scale = {"gpt2": 1 / math.sqrt(2 * max(config.num_hidden_layers, 1)), "normal": 1.0, "zero": 0.0}
    return config.initializer_range * depth_scale[config.residual_init]


class MiniGPTAttention(nn.Module):
    head_mask: torch.Tensor | None  # (H, 1)

    def __init__(self, config: MiniGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = config.head_dim**-0.5 if config.attention_scaling is None else config.attention_scaling
        self.is_causal = True
        # Copied, because reading a config takes microseconds, which matter when a small model decodes.
        self.dropout = config.attn_pdrop
        self.norm_eps = config.layer_norm_epsilon if config.qk_norm else None
        head_mask = None if config.head_mask is None else torch.tensor(config.head_mask[layer_idx]).float()[:, None]
        self.register_buffer("head_mask", head_mask, persistent=False)

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
        key = project(self.k_proj, hidden_states).view(head_shape).transpose(1, 2)  # (B, H, T, D)
        value = project(self.v_proj, hidden_states).view(head_shape).transpose(1, 2)  # (B, H, T, D)
        query, key = self.rotate_and_norm(query, key, position_embeddings)
        query, key = query.type_as(value), key.type_as(value)  # Autocast normalizes in float32.
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, H, S, D)

        # transformers searches this file for the next line, to learn that attention can be replaced.
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        output, weights = attention(
            attend, self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )  # (B, T, H, D), (B, H, T, S)
        output = self.scale_heads(output).reshape(*input_shape, -1)  # (B, T, H * D)
        return project(self.o_proj, output), weights  # (B, T, C)

    def rotate_and_norm(self, query, key, position_embeddings):
        if position_embeddings is not None:
            query, key = apply_rotary(query, *position_embeddings), apply_rotary(key, *position_embeddings)
        if self.norm_eps is not None:
            query = F.rms_norm(query, (self.head_dim,), eps=self.norm_eps)
            key = F.rms_norm(key, (self.head_dim,), eps=self.norm_eps)
        return query, key

    def scale_heads(self, output: torch.Tensor) -> torch.Tensor:
        return output if self.head_mask is None else output * self.head_mask.type_as(output)


class MiniGPTMLP(nn.Module):
    def __init__(self, config: MiniGPTConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = build_linear(
            config.intermediate_size, config.hidden_size, config.mlp_bias, branch_std(config)
        )
        # The same function, with one kernel instead of eight and one saved tensor instead of four.
        self.act_fn = ACT2FN["gelu_pytorch_tanh" if config.hidden_act == "gelu_new" else config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return project(self.down_proj, self.act_fn(project(self.up_proj, hidden_states)))  # (B, T, C)


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
        inputs = self.branch_input(hidden_states, self.input_layernorm)
        branch, _ = self.self_attn(inputs, attention_mask, position_embeddings, past_key_values, **kwargs)
        hidden_states = self.add_branch(hidden_states, self.dropout(branch), self.input_layernorm)
        if self.mlp is not None:
            branch = self.mlp(self.branch_input(hidden_states, self.post_attention_layernorm))
            hidden_states = self.add_branch(hidden_states, self.dropout(branch), self.post_attention_layernorm)
        return hidden_states

    def branch_input(self, hidden_states, norm):
        return norm(hidden_states) if self.pre_norm else hidden_states

    def add_branch(self, hidden_states, branch, norm):
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
    # Every process computes them, and dynamic ones may differ, so that DDP must not broadcast them in each step.
    _ddp_params_and_buffers_to_ignore = [
        *("model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"),
        *("rotary_emb.inv_freq", "rotary_emb.original_inv_freq"),
    ]
    _can_record_outputs = {"hidden_states": MiniGPTBlock, "attentions": MiniGPTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # Per linear layer: transformers never initializes a container without parameters in custom code.
        if isinstance(module, nn.Linear) and hasattr(module, "initial_std"):
            init.normal_(module.weight, mean=0.0, std=module.initial_std)  # type: ignore[arg-type]
        elif isinstance(module, MiniGPTAttention) and module.head_mask is not None:
            init.copy_(module.head_mask, torch.tensor(module.config.head_mask[module.layer_idx])[:, None])

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens is not None:
            # Mask the ids that padding adds.
            is_padded = self.config.vocab_size > new_num_tokens
            self.config.unpadded_vocab_size = new_num_tokens if is_padded else None
        return embeddings


class MiniGPTModel(MiniGPTPreTrainedModel):
    """The decoder without a head: token ids (B, T) or embeddings (B, T, C) to hidden states (B, T, C)."""

    def __init__(self, config: MiniGPTConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding_type = config.position_embedding_type
        self.num_learned_positions = None
        if config.position_embedding_type == "learned":
            self.num_learned_positions = config.max_position_embeddings
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        elif config.position_embedding_type == "rope":
            self.rotary_emb = MiniGPTRotaryEmbedding(config)
        self.embedding_norm = build_norm(config) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList([MiniGPTBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        has_final_norm = config.norm_placement == "pre" and config.num_hidden_layers > 0
        self.norm = build_norm(config) if has_final_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def embed(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor):
        """Add positions (B or 1, T) to embeddings (B, T, C). Also return cosines and sines if they are rotary."""
        position_embeddings = None
        if self.position_embedding_type == "learned":
            inputs_embeds = inputs_embeds + self.embed_positions(position_ids)  # (B, T, C)
        elif self.position_embedding_type == "sinusoidal":
            inputs_embeds = inputs_embeds + sinusoidal_embedding(position_ids, like=inputs_embeds)  # (B, T, C)
        elif self.position_embedding_type == "rope":
            position_embeddings = self.rotary_emb(inputs_embeds, position_ids)  # (B or 1, T, R) each
        if self.embedding_norm is not None:
            inputs_embeds = self.embedding_norm(inputs_embeds)
        return inputs_embeds, position_embeddings

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
            attention_mask: (B, S) with 0 on padding, on either side, or (B, 1, T, S), used as it is.
            position_ids: (B, T); by default they follow from the mask. Where they do not increase by one, a new
                document begins, and attention does not cross into it.
            token_type_ids: (B, T) ids whose token embeddings are added (GPT-1, GPT-2).
            past_key_values: a cache, which may have any name.
            kwargs: arguments of the attention function. Any other argument is a TypeError. With `cu_seq_lens_q` and
                `_k`, `max_length_q` and `_k`, a GPU need not search `position_ids` for documents.
        """
        past_key_values = prepare_cache(self, past_key_values, use_cache, kwargs)
        check_arguments(self.config, input_ids, inputs_embeds, position_ids, kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (B, T, C)
        if token_type_ids is not None:
            inputs_embeds = inputs_embeds + self.embed_tokens(token_type_ids)  # (B, T, C)
        mask, position_ids, kwargs = prepare_attention(
            self, inputs_embeds, attention_mask, position_ids, past_key_values, kwargs
        )
        hidden_states, position_embeddings = self.embed(inputs_embeds, position_ids)
        hidden_states = self.dropout(hidden_states)
        # `assistant_early_exit` changes the config to skip the last blocks.
        for block in self.layers[: self.config.num_hidden_layers]:
            # The cache is passed by position: before 5.24, transformers drops a keyword `past_key_values` under
            # gradient checkpointing in training mode, even when `generate` runs without gradients.
            hidden_states = block(hidden_states, mask, position_embeddings, past_key_values, **kwargs)  # (B, T, C)
        cache: dict[str, Any] = {CACHE_FIELD: past_key_values}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **cache)


class MiniGPTForCausalLM(MiniGPTPreTrainedModel, FastGenerationMixin):
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
        self.fast_decoder = SingleTokenDecoder()
        self.post_init()

    @can_return_tuple
    @single_token_fast_path
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
            logits_to_keep: return the logits of the last N positions (0: all), or of the positions that it lists.
            skip_logits: compute the loss without the logits, which saves their memory; the output then has none. None:
                `config.skip_logits` in training, False in evaluation. No effect without labels or with
                `logits_to_keep`.
            count_correct: also count the labels that are the most likely token.
            kwargs: `shift_labels` (B, T), labels that are already shifted; `num_items_in_batch`, the divisor of the
                summed loss; `ignore_index`, instead of -100. The rest goes to `MiniGPTModel`.
        """
        loss_kwargs = pop_loss_kwargs(kwargs)
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
        hidden_states = outputs.last_hidden_state  # (B, T, C)
        has_labels = labels is not None or loss_kwargs.get("shift_labels") is not None
        if skip_logits is None:
            skip_logits = self.training and self.config.skip_logits
        skip_logits = skip_logits and has_labels and isinstance(logits_to_keep, int) and logits_to_keep == 0

        loss = logits = num_correct = None
        if skip_logits and self.loss_function is causal_lm_loss and can_skip_logits(self.lm_head):
            loss, num_correct = causal_lm_loss_without_logits(
                self.lm_head, hidden_states, labels, self.config, count_correct=count_correct, **loss_kwargs
            )
        elif has_labels:
            logits = compute_logits(self.lm_head, hidden_states, self.config)  # (B, T, V)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs)
            num_correct = count_correct_labels(logits, labels, **loss_kwargs) if count_correct else None
            logits = None if skip_logits else select_positions(logits, logits_to_keep)
        else:
            # The Trainer may compute the loss from these logits. With label smoothing it sums over all ids.
            crop = self.training or "num_items_in_batch" in loss_kwargs
            logits = compute_logits(self.lm_head, select_positions(hidden_states, logits_to_keep), self.config, crop)

        return MiniGPTCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_FIELD: getattr(outputs, CACHE_FIELD)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            num_correct=num_correct,
        )


class MiniGPTForSequenceClassification(MiniGPTPreTrainedModel):
    """
    A classifier on one vector per row.

    The vector is, by `config.pooling`, the last non-padding token's hidden state, the mean, or a mean weighted by the
    softmax of the hidden states' products with a learned vector (Yang et al., 2016), which starts at zero.

    With `config.auxiliary_lm_weight` above 0 the classifier also has a language-model head, whose loss is added
    (Radford et al., 2018): the mean over rows of each row's mean over tokens. With `config.truncation_length` it
    truncates longer texts itself, so that a pipeline truncates as the training did.
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
            attention_mask: (B, T); by default padding is found by `config.pad_token_id`.
            labels: (B,) class numbers, of which -100 is ignored, or (B, num_labels) floats: regression with one label
                (then also (B,)), else multi-label. The first labels set `config.problem_type` where it is None.
            num_items_in_batch: divisor of the summed loss; None: the number of label entries in this batch.

        Raises:
            ValueError: the padding of several rows is unknown, or the labels do not fit.
        """
        config = self.config
        is_plain = (
            input_ids is not None and position_ids is None and past_key_values is None and token_type_ids is None
        )
        if config.truncation_length is not None and is_plain and input_ids.shape[1] > config.truncation_length:
            is_text = non_padding_mask(input_ids, input_ids, attention_mask, config.pad_token_id)
            input_ids, attention_mask = truncate_rows(input_ids, is_text, config.truncation, config.truncation_length)
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
        hidden_states = outputs.last_hidden_state  # (B, T, C)
        is_text = non_padding_mask(hidden_states, input_ids, attention_mask, config.pad_token_id)  # (B, T)
        if self.pool_query is not None:
            scores = project(self.pool_query, hidden_states).squeeze(-1)  # (B, T)
            pooled = pool_weighted(hidden_states, is_text, scores)  # (B, C)
        elif config.pooling == "mean":
            pooled = pool_mean(hidden_states, is_text)  # (B, C)
        else:
            pooled = pool_last(hidden_states, is_text)  # (B, C)
        logits = self.score(pooled)  # (B, num_labels)

        loss = None
        if labels is not None:
            auxiliary_loss = None
            if self.lm_head is not None:
                auxiliary_loss = auxiliary_lm_loss(self.lm_head, hidden_states, input_ids, is_text, config)
            loss = classifier_loss(logits, labels.to(logits.device), config, num_items_in_batch, auxiliary_loss)

        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_FIELD: getattr(outputs, CACHE_FIELD)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["MiniGPTForCausalLM", "MiniGPTForSequenceClassification", "MiniGPTModel", "MiniGPTPreTrainedModel"]
