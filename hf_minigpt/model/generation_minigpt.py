"""
Generation: caches, and a faster path for a single token, with the same output.

At batch 1 a token takes at least the time to read all weights. In a small model Python takes as long again. Single
tokens on a CPU therefore skip the modules around each matrix product. `MiniGPTForCausalLM.forward` remains the
definition, and handles everything that `SingleTokenDecoder` declines.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.import_utils import is_tracing

from .attention_minigpt import check_positions, default_position_ids
from .loss_minigpt import finish_logits
from .products_minigpt import FEW_ROWS, SMALL_MATRIX, fast_paths_enabled, few_rows_linear, is_plain_linear


LinearFunction = Callable[[torch.Tensor], torch.Tensor]
# Modules of modeling_minigpt.py, which imports this file.
Module = Any

# The name of the cache in a model's output: `past_key_values`, and since transformers 5.24 `cache`.
CACHE_FIELD = fields(BaseModelOutputWithPast)[1].name


@dataclass
class MiniGPTCausalLMOutput(CausalLMOutputWithPast):
    """`num_correct` (int64, 0-dim), with `count_correct=True`: how many labels are the most likely token."""

    num_correct: torch.Tensor | None = None


def pop_cache(cache: Cache | None, kwargs: dict[str, Any]) -> Cache | None:
    """
    Return `cache`, or take the cache out of `kwargs`, where it may have any name.

    Raises:
        TypeError: `cache` is not a cache, or there are two.
    """
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise TypeError(f"past_key_values={type(cache).__name__} is not a cache. Give a transformers.DynamicCache.")
    for name in [name for name, value in kwargs.items() if isinstance(value, Cache)]:
        found = kwargs.pop(name)
        if cache is not None and found is not cache:
            raise TypeError(f"{name} is a second cache in addition to past_key_values. Give only one of them.")
        cache = found
    return cache


def prepare_cache(model: Module, cache: Cache | None, use_cache: bool | None, kwargs: dict[str, Any]) -> Cache | None:
    """
    Return the cache to read and update: the given one, under any name, or with `use_cache` a new one.

    Raises:
        TypeError: as in `pop_cache`.
        ValueError: the cache holds tokens, in training with gradient checkpointing.
    """
    cache = pop_cache(cache, kwargs)
    if model.gradient_checkpointing and model.training and torch.is_grad_enabled():
        # The backward pass runs each block again, which would add its keys and values to the cache again.
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                f"past_key_values holds {cache.get_seq_length()} tokens, but gradient checkpointing in training reads "
                "no cache. Give all tokens in input_ids, or call model.gradient_checkpointing_disable()."
            )
        return None
    if use_cache and cache is None:
        cache = DynamicCache(config=model.config)
    if cache is not None:
        use_growing_layers(cache)
    return cache


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` with spare room: its keys and values (B, H, S, D) are views of larger buffers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.buffers: list[torch.Tensor] = []
        self.views: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values as `DynamicLayer` does; in place, unless gradients flow or a graph is traced."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        length = key_states.shape[2]
        if not self.has_room(key_states, begin + length):
            self.reserve(key_states, value_states, begin, begin + length)
        key_buffer, value_buffer = self.buffers
        key_buffer.narrow(2, begin, length).copy_(key_states)
        value_buffer.narrow(2, begin, length).copy_(value_states)
        self.keys, self.values = key_buffer.narrow(2, 0, begin + length), value_buffer.narrow(2, 0, begin + length)
        self.views = (self.keys, self.values)
        return self.views

    def has_room(self, states: torch.Tensor, end: int) -> bool:
        # Reordering, selecting or repeating rows replaces the views by other tensors.
        if self.views is None or self.keys is not self.views[0] or self.values is not self.views[1]:
            return False
        buffer = self.buffers[0]
        return (
            end <= buffer.shape[2]
            and buffer.shape[0] == states.shape[0]
            and buffer.dtype == states.dtype
            and (not buffer.is_inference() or torch.is_inference_mode_enabled())
        )

    def reserve(self, key_states: torch.Tensor, value_states: torch.Tensor, begin: int, end: int) -> None:
        capacity = end + max(end // 2, 64)
        assert self.keys is not None and self.values is not None
        old, self.buffers = (self.keys, self.values), []
        for kept, states in zip(old, (key_states, value_states), strict=True):
            rows, heads, _, width = states.shape
            # A mismatch of rows is an error, as in `DynamicLayer`.
            rows = kept.shape[0] if begin else rows
            self.buffers.append(states.new_empty(rows, heads, capacity, width))
            if begin:
                self.buffers[-1].narrow(2, 0, begin).copy_(kept)

    def crop(self, tokens_to_remove: int) -> None:
        keeps_buffers = self.views is not None and self.keys is self.views[0] and self.values is self.views[1]
        super().crop(tokens_to_remove)
        if keeps_buffers:
            self.views = (self.keys, self.values)  # type: ignore[assignment]

    def reset(self) -> None:
        super().reset()
        self.buffers, self.views = [], None


def use_growing_layers(cache: Cache) -> None:
    """Give an empty `DynamicCache` layers with spare room. Any other cache is left unchanged."""
    if type(cache) is not DynamicCache or cache.offloading or not fast_paths_enabled():
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[i] = GrowingLayer()


class FastGenerationMixin(GenerationMixin):
    """`GenerationMixin`, with a faster preparation of single tokens."""

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids, next_sequence_length=None, **kwargs
    ):
        inputs = single_token_inputs(self, input_ids, **kwargs) if next_sequence_length == 1 else None
        prepare = super().prepare_inputs_for_generation  # type: ignore[misc]
        return inputs or prepare(input_ids, next_sequence_length, **kwargs)


def single_token_fast_path(forward: Callable) -> Callable:
    """Decorate a language model's forward: `model.fast_decoder` computes the logits of single tokens if it can."""

    @wraps(forward)
    def forward_with_fast_path(
        model, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, *args, **kwargs
    ):
        past_key_values = pop_cache(past_key_values, kwargs)
        is_single_token = past_key_values is not None and input_ids is not None and input_ids.shape[1] == 1
        if is_single_token and not args and wants_only_logits(kwargs):
            logits = model.fast_decoder.step(model, input_ids, attention_mask, position_ids, past_key_values)
            if logits is not None:
                return MiniGPTCausalLMOutput(logits=logits, **{CACHE_FIELD: past_key_values})
        return forward(model, input_ids, attention_mask, position_ids, past_key_values, *args, **kwargs)

    return forward_with_fast_path


def wants_only_logits(kwargs: dict[str, Any]) -> bool:
    """Return whether every argument is one that does not change a single token's logits, or is not set."""
    neutral = ("use_cache", "logits_to_keep")
    return all(value is None or value is False for name, value in kwargs.items() if name not in neutral)


def single_token_inputs(
    lm: Module,
    input_ids: torch.Tensor,
    past_key_values: Cache | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    is_first_iteration: bool = False,
    **kwargs,
) -> dict[str, Any] | None:
    """
    Return what transformers' `prepare_inputs_for_generation` returns for `input_ids` (B, S) of which only the last is
    new, without its many checks. None where one of these checks matters.
    """
    past_key_values = pop_cache(past_key_values, kwargs)
    if (
        is_first_iteration
        or not fast_paths_enabled()
        or type(past_key_values) is not DynamicCache
        or not kwargs.keys() <= {"use_cache", "logits_to_keep"}
        or input_ids.device != lm.model.embed_tokens.weight.device
    ):
        return None
    inputs = {name: ids for name, ids in (("input_ids", input_ids), ("position_ids", position_ids)) if ids is not None}
    # Clone, so that a compiled model sees the same strides each time.
    inputs = {name: ids[..., -1:].clone(memory_format=torch.contiguous_format) for name, ids in inputs.items()}
    return {**inputs, "past_key_values": past_key_values, "attention_mask": attention_mask, **kwargs}


def has_plain_forward(module: nn.Module) -> bool:
    """Return whether the module's forward has no hooks and is not replaced, so that callers may skip it."""
    return not ("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


def is_plain_float32_linear(module: Module) -> bool:
    """Return whether `module` is a plain float32 linear layer: no adapter, no shard, no hook."""
    if not is_plain_linear(module):
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and not weight.is_inference()


class SingleTokenDecoder:
    """
    `MiniGPTForCausalLM` for one token per row, on a CPU and without gradients.

    Linear layers that are not plain float32 matrices (adapters, int8, shards, hooks) are called as modules.
    """

    def __init__(self) -> None:
        self.blocks: list[SingleTokenBlock] = []
        self.num_layers = 0
        self.checked_for: Callable[[], Cache | None] = lambda: None

    def __reduce__(self) -> tuple:
        # A copy of the model must not share weights with the original.
        return SingleTokenDecoder, ()

    def step(
        self,
        lm: Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache,
    ) -> torch.Tensor | None:
        """
        Return the logits (B, 1, V) after `input_ids` (B, 1), and add its keys and values to the cache. None, without
        any effect, where the model's forward must run.
        """
        if not self.applies(lm, input_ids, attention_mask, position_ids, cache):
            return None
        model = lm.model
        past_length = cache.get_seq_length()
        is_given = position_ids is not None
        if position_ids is None:
            position_ids = default_position_ids(attention_mask, input_ids, past_length)
        mask = None
        if attention_mask is not None and not attention_mask.all():
            mask = attention_mask[:, None, None, :].bool()  # (B, 1, 1, S)

        try:
            hidden_states, rotation = model.embed(model.embed_tokens(input_ids), position_ids)  # (B, 1, C)
        except IndexError:
            # Checking the positions first would take longer than the lookup.
            if model.num_learned_positions is not None:
                check_positions(position_ids, model.num_learned_positions, past_length, is_given)
            raise
        hidden_states = hidden_states[:, 0]  # (B, C)
        for block in self.blocks:
            hidden_states = block.step(hidden_states, rotation, mask, cache)
        logits = self.head(self.final_norm(hidden_states)).contiguous()
        return finish_logits(logits, self.softcap, self.num_ids)[:, None]

    def applies(self, lm, input_ids, attention_mask, position_ids, cache) -> bool:
        if lm.training or not isinstance(cache, DynamicCache) or input_ids.shape[0] > FEW_ROWS:
            return False
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_tracing(input_ids):
            return False
        if attention_mask is not None:
            expected = (input_ids.shape[0], cache.get_seq_length() + 1)
            if attention_mask.shape != expected:
                return False
        if position_ids is not None and position_ids.ndim != 2:
            return False
        if not fast_paths_enabled():
            return False
        # Modules are checked once per cache, weights at each use: checking takes time, too.
        num_layers = lm.config.num_hidden_layers
        if self.checked_for() is not cache or self.num_layers != num_layers:
            if not self.is_supported(lm, input_ids):
                return False
            self.blocks = [SingleTokenBlock(block) for block in lm.model.layers[:num_layers]]
            self.num_layers = num_layers
            self.final_norm = norm_function(lm.model.norm)
            self.head = linear_function(lm.lm_head)
            self.softcap = lm.config.final_logit_softcapping
            self.num_ids = lm.config.unpadded_vocab_size
            self.checked_for = weakref.ref(cache)
        return True

    def is_supported(self, lm: Module, input_ids: torch.Tensor) -> bool:
        """Return whether the forward of the model and its blocks may be skipped."""
        model, config = lm.model, lm.config
        containers = [model, *model.layers]
        for block in model.layers:
            containers += [block.self_attn] if block.mlp is None else [block.self_attn, block.mlp]
        return (
            len(model.layers[: config.num_hidden_layers]) > 0
            and input_ids.device.type == "cpu"
            and model.embed_tokens.weight.device.type == "cpu"
            and config._attn_implementation == "sdpa"
            and not config.output_attentions
            and not config.output_hidden_states
            and all(has_plain_forward(module) for module in containers)
        )


class SingleTokenBlock:
    """`MiniGPTBlock` for one token per row, with hidden states (B, C)."""

    def __init__(self, block: Module):
        self.attention = attention = block.self_attn
        self.branch_input, self.add_branch = block.branch_input, block.add_branch
        self.input_norm = norm_function(block.input_layernorm)
        self.mlp_norm = norm_function(block.post_attention_layernorm)
        self.project_qkv = joint_linear_function([attention.q_proj, attention.k_proj, attention.v_proj])
        self.project_output = linear_function(attention.o_proj)
        self.layer_idx, self.head_dim, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        self.has_head_mask, self.has_mlp = attention.head_mask is not None, block.mlp is not None
        if self.has_mlp:
            self.act_fn = block.mlp.act_fn
            self.up, self.down = linear_function(block.mlp.up_proj), linear_function(block.mlp.down_proj)

    def step(self, hidden_states, rotation, mask, cache: Cache) -> torch.Tensor:
        branch = self.attend(self.branch_input(hidden_states, self.input_norm), rotation, mask, cache)
        hidden_states = self.add_branch(hidden_states, branch, self.input_norm)
        if self.has_mlp:
            branch = self.down(self.act_fn(self.up(self.branch_input(hidden_states, self.mlp_norm))))
            hidden_states = self.add_branch(hidden_states, branch, self.mlp_norm)
        return hidden_states

    def attend(self, inputs, rotation, mask, cache: Cache) -> torch.Tensor:
        heads = self.project_qkv(inputs).reshape(inputs.shape[0], 3, -1, 1, self.head_dim)
        query, key, value = heads.unbind(1)  # (B, H, 1, D)
        query, key = self.attention.rotate_and_norm(query, key, rotation)
        key, value = cache.update(key, value, self.layer_idx)  # (B, H, S, D)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
        if self.has_head_mask:
            output = self.attention.scale_heads(output.transpose(1, 2))  # (B, 1, H, D)
        return self.project_output(output.reshape(inputs.shape[0], -1))


def norm_function(norm: Module) -> Any:
    """Return a norm as a function. A layer norm skips its module, whose overhead adds up in a small model."""
    if type(norm) is not nn.LayerNorm or not has_plain_forward(norm):
        return norm
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda inputs: torch.layer_norm(inputs, shape, weight, bias, eps)


def linear_function(module: Module) -> LinearFunction:
    """Return a linear layer as a function from (B, I) to (B, O)."""
    if not is_plain_float32_linear(module):
        # Adapters expect inputs (B, T, I).
        return lambda inputs: module(inputs[:, None])[:, 0]
    # Looked up at each call, because a weight may change; in the dict, which is twice as fast as the attribute.
    parameters = module._parameters
    linear = F.linear if module.weight.numel() < SMALL_MATRIX else few_rows_linear
    return lambda inputs: linear(inputs, parameters["weight"], parameters["bias"])


def joint_linear_function(modules: list[Module]) -> LinearFunction:
    """Return linear layers of one input as one function that concatenates their outputs; small ones as one product."""
    is_small = all(is_plain_float32_linear(module) and module.weight.numel() < SMALL_MATRIX for module in modules)
    if not is_small:
        functions = [linear_function(module) for module in modules]
        return lambda inputs: torch.cat([function(inputs) for function in functions], dim=-1)
    weights = [module.weight for module in modules]
    biases = [module.bias for module in modules if module.bias is not None]
    # The concatenated copy is rebuilt when a parameter's version changes.
    versions: list[int] = []
    copies: list[torch.Tensor | None] = []

    def joint_linear(inputs: torch.Tensor) -> torch.Tensor:
        current = [weight._version for weight in weights] + [bias._version for bias in biases]
        if current != versions:
            versions[:] = current
            bias = torch.cat(biases).detach() if biases else None
            copies[:] = [torch.cat(weights).detach(), bias]
        return F.linear(inputs, *copies)

    return joint_linear
