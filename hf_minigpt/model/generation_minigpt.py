"""
Writing a token at a time, faster: a cache that grows in place, and the model's step for one token without the detours
that only longer inputs need. It travels with a checkpoint.

At batch 1 a token costs the time of reading all weights, if the matrix products run at the memory's speed, and in a
small model as much again for Python. `MiniGPTForCausalLM.forward` remains the definition and does all that `Decoding`
declines.
"""

import weakref
from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_tracing

from .functional_minigpt import apply_rotary, check_positions, finish_logits, sinusoidal_embedding
from .products_minigpt import FEW_ROWS, SMALL_MATRIX, few_rows_linear, is_plain_linear


Product = Callable[[torch.Tensor], torch.Tensor]
# Modules of modeling_minigpt.py, which imports this file.
Module = Any

# What an output calls its cache: `past_key_values`, and since transformers 5.24 `cache`.
CACHE_FIELD = fields(BaseModelOutputWithPast)[1].name
# Since 5.24 a model adds to the paged cache of continuous batching; before, the attention function did.
MODEL_UPDATES_PAGED_CACHE = "cache" not in signature(ALL_ATTENTION_FUNCTIONS["sdpa"]).parameters

# What transformers hands to every model. Attention that ignores a name would ignore a typo, too.
KNOWN_KWARGS = frozenset(
    {
        *("num_items_in_batch", "output_hidden_states", "output_attentions", "output_router_logits", "return_dict"),
        *("position_ids", "is_causal"),
        # of `generate`, which hands them on
        *("tokenizer", "assistant_tokenizer"),
    }
)
# Borders of documents, which flash attention takes from here and all other attention from the positions.
DOCUMENT_BORDERS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})
READ_BY_FLASH = frozenset({"sliding_window", "softcap", "s_aux", "deterministic", "target_dtype"})
READ_BY_ATTENTION = {
    "flash_attention": READ_BY_FLASH,
    "flex_attention": frozenset({"softcap", "s_aux", "position_bias", "kernel_options"}),
    "sdpa": frozenset({"position_bias"}),
    "paged|": READ_BY_FLASH,
    "eager": frozenset[str](),
}
# Continuous batching hands these with its cache.
READ_WITH_PAGED_CACHE = frozenset(
    {"cache", "block_table", "read_index", "write_index", "logits_indices", "logits_processor_args"}
)


def take_cache(cache: Cache | None, kwargs: dict[str, Any]) -> Cache | None:
    """`cache`, or the one that `kwargs` holds under whatever name, which is taken out of them."""
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise TypeError(f"past_key_values={type(cache).__name__} is no cache: give a transformers.DynamicCache.")
    for name in [name for name, value in kwargs.items() if isinstance(value, Cache)]:
        found = kwargs.pop(name)
        if cache is not None and found is not cache:
            raise TypeError(f"{name} is a second cache beside past_key_values: give only one of them.")
        cache = found
    return cache


def check_empty(cache: Cache | None) -> None:
    """Refuse a cache that holds tokens, where it cannot be read; an empty one is only left out."""
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"past_key_values holds {cache.get_seq_length()} tokens, and gradient checkpointing in training reads no "
            "cache: give all tokens in input_ids, or call model.gradient_checkpointing_disable()."
        )


def take_paged_cache(kwargs: dict[str, Any]) -> Any:
    """The cache of continuous batching, which is no `Cache`, taken out of `kwargs`."""
    if kwargs.get("cache") is None:
        raise TypeError(
            "cache is missing from what continuous batching hands over; install a version of transformers that "
            "hf_minigpt names as supported."
        )
    return kwargs.pop("cache")


def check_kwargs(kwargs: dict[str, Any], attention: str, position_ids: torch.Tensor | None) -> None:
    """Refuse what nobody would read; an attention function from elsewhere may want any name."""
    read = next((names for prefix, names in READ_BY_ATTENTION.items() if attention.startswith(prefix)), None)
    if read is None:
        return
    is_paged = hasattr(kwargs.get("cache"), "update") and attention != "eager"
    for name in [name for name, value in kwargs.items() if value is not None]:
        if name in KNOWN_KWARGS or name in read or (is_paged and name in READ_WITH_PAGED_CACHE):
            continue
        if name not in DOCUMENT_BORDERS:
            raise TypeError(
                f"{name}={type(kwargs[name]).__name__} is no argument of MiniGPT's forward, and attention "
                f"{attention!r} does not read it: check the spelling, or leave it out."
            )
        if position_ids is None and not is_paged and not attention.startswith("flash_attention"):
            raise ValueError(
                f"{name} is given without position_ids, from which attention {attention!r} tells the documents: give "
                "position_ids that begin at 0 in each document."
            )
    if kwargs.get("is_causal") is False and not is_paged:
        raise ValueError("is_causal is False, but MiniGPT reads from left to right only: leave it out.")


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values (B, H, S, D) are the beginning of buffers with room for more."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.buffers: list[torch.Tensor] = []
        self.views: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `DynamicLayer`. Where gradients flow or a graph is traced nothing is written in place."""
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
        # Whoever reorders, selects or repeats rows puts tensors of their own in place of the views.
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
            # Rows that do not match are an error, as they are in `DynamicLayer`.
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


def grow_in_place(cache: Cache) -> None:
    """Give an empty `DynamicCache` layers that grow in place; any other cache is left as it is."""
    if type(cache) is not DynamicCache or cache.offloading:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[i] = GrowingLayer()


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
    What transformers' `prepare_inputs_for_generation` makes of `input_ids` (B, S) when only the last is to be read,
    without its many questions; None where one of them matters.
    """
    past_key_values = take_cache(past_key_values, kwargs)
    if (
        is_first_iteration
        or type(past_key_values) is not DynamicCache
        or not kwargs.keys() <= {"use_cache", "logits_to_keep"}
        or input_ids.device != lm.model.embed_tokens.weight.device
    ):
        return None
    inputs = {name: ids for name, ids in (("input_ids", input_ids), ("position_ids", position_ids)) if ids is not None}
    # Cloned: the same strides each time, for whoever compiles the model.
    inputs = {name: ids[..., -1:].clone(memory_format=torch.contiguous_format) for name, ids in inputs.items()}
    return {**inputs, "past_key_values": past_key_values, "attention_mask": attention_mask, **kwargs}


def is_bare(module: nn.Module) -> bool:
    """Whether nothing listens to or replaces the module's forward, so that a caller may do its work instead."""
    return not ("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


def is_plain_matrix(module: Module) -> bool:
    """Whether `module` is a float32 matrix in the CPU's memory and nothing more: no adapter, no shard, no hook."""
    if not is_plain_linear(module):
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and not weight.is_inference()


class Decoding:
    """
    The step for one token of `MiniGPTForCausalLM`, on the CPU and without gradients.

    Linear layers that are not plain float32 matrices (adapters, int8, shards, hooks) are called as modules, so that
    whatever they do is done.
    """

    def __init__(self) -> None:
        self.blocks: list[DecodingBlock] = []
        self.num_layers = 0
        self.verified_for: Callable[[], Cache | None] = lambda: None

    def __reduce__(self) -> tuple:
        # A copy of the model is walked through anew.
        return Decoding, ()

    def step(
        self,
        lm: Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache,
    ) -> torch.Tensor | None:
        """
        The logits (B, 1, V) that follow `input_ids` (B, 1) after what `cache` holds, to which its keys and values are
        added; None, and nothing done, where the ordinary way has to be taken.
        """
        if not self.applies(lm, input_ids, attention_mask, position_ids, cache):
            return None
        model = lm.model
        past_length = cache.get_seq_length()
        given = position_ids is not None
        if position_ids is None and attention_mask is None:
            position_ids = torch.full((1, 1), past_length)
        elif position_ids is None:
            assert attention_mask is not None
            position_ids = (attention_mask.long().sum(-1, keepdim=True) - 1).clamp(min=0)
        mask = None
        if attention_mask is not None and not attention_mask.all():
            mask = attention_mask[:, None, None, :].bool()

        hidden_states = model.embed_tokens(input_ids)
        rotation = None
        if model.position_embedding_type == "learned":
            try:
                hidden_states = hidden_states + model.embed_positions(position_ids)
            except IndexError:
                # Looking at the positions first would cost more than the look-up itself.
                check_positions(position_ids, model.max_position_embeddings, past_length, given)
                raise
        elif model.position_embedding_type == "sinusoidal":
            hidden_states = hidden_states + sinusoidal_embedding(position_ids, like=hidden_states)
        elif model.position_embedding_type == "rope":
            rotation = model.rotary_emb(hidden_states, position_ids)
        if model.embedding_norm is not None:
            hidden_states = model.embedding_norm(hidden_states)

        hidden_states = hidden_states[:, 0]
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
        # Modules are looked at once a text, their weights wherever they are read: looking costs time, too.
        num_layers = lm.config.num_hidden_layers
        if self.verified_for() is not cache or self.num_layers != num_layers:
            if not self.is_ordinary(lm, input_ids):
                return False
            self.blocks = [DecodingBlock(block) for block in lm.model.layers[:num_layers]]
            self.num_layers = num_layers
            self.final_norm = direct_norm(lm.model.norm)
            self.head = product_of(lm.lm_head)
            self.softcap = lm.config.final_logit_softcapping
            self.num_ids = lm.config.unpadded_vocab_size
            self.verified_for = weakref.ref(cache)
        return True

    def is_ordinary(self, lm: Module, input_ids: torch.Tensor) -> bool:
        """Whether the model is one whose blocks can be walked through from here."""
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
            and all(is_bare(module) for module in containers)
        )


class DecodingBlock:
    """`MiniGPTBlock` for one token a row: hidden states are (B, C)."""

    def __init__(self, block: Module):
        attention = block.self_attn
        self.input_norm = direct_norm(block.input_layernorm)
        self.mlp_norm = direct_norm(block.post_attention_layernorm)
        self.project_inputs = joint_product_of([attention.q_proj, attention.k_proj, attention.v_proj])
        self.project_output = product_of(attention.o_proj)
        self.head_mask = None if attention.head_mask is None else torch.tensor(attention.head_mask)[:, None, None]
        self.pre_norm, self.residual = block.pre_norm, block.residual
        self.layer_idx, self.head_dim = attention.layer_idx, attention.head_dim
        self.scaling, self.norm_eps = attention.scaling, attention.norm_eps
        self.has_mlp = block.mlp is not None
        if self.has_mlp:
            self.act_fn, self.up, self.down = (
                block.mlp.act_fn,
                product_of(block.mlp.up_proj),
                product_of(block.mlp.down_proj),
            )

    def step(self, hidden_states, rotation, mask, cache: Cache) -> torch.Tensor:
        inputs = self.input_norm(hidden_states) if self.pre_norm else hidden_states
        hidden_states = self.join(hidden_states, self.attend(inputs, rotation, mask, cache), self.input_norm)
        if not self.has_mlp:
            return hidden_states
        inputs = self.mlp_norm(hidden_states) if self.pre_norm else hidden_states
        return self.join(hidden_states, self.down(self.act_fn(self.up(inputs))), self.mlp_norm)

    def attend(self, inputs, rotation, mask, cache: Cache) -> torch.Tensor:
        projected = self.project_inputs(inputs).reshape(inputs.shape[0], 3, -1, 1, self.head_dim)
        query, key, value = projected.unbind(1)  # (B, H, 1, D)
        if rotation is not None:
            query, key = apply_rotary(query, *rotation), apply_rotary(key, *rotation)
        if self.norm_eps is not None:
            query = F.rms_norm(query, (self.head_dim,), eps=self.norm_eps)
            key = F.rms_norm(key, (self.head_dim,), eps=self.norm_eps)
        key, value = cache.update(key, value, self.layer_idx)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
        if self.head_mask is not None:
            output = output * self.head_mask
        return self.project_output(output.reshape(inputs.shape[0], -1))

    def join(self, hidden_states, branch, norm) -> torch.Tensor:
        if self.residual:
            branch = hidden_states + branch
        return branch if self.pre_norm else norm(branch)


def direct_norm(norm: Module) -> Any:
    """A layer norm without the module around it, whose calls add up in a small model."""
    if type(norm) is not nn.LayerNorm or not is_bare(norm):
        return norm
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda inputs: torch.layer_norm(inputs, shape, weight, bias, eps)


def product_of(module: Module) -> Product:
    """A linear layer as a function from (B, I) to (B, O)."""
    if not is_plain_matrix(module):
        # An adapter expects the dimension of positions.
        return lambda inputs: module(inputs[:, None])[:, 0]
    # Looked up at each call, so that a weight may change; past the module, which takes twice as long to ask.
    parameters = module._parameters
    linear = F.linear if module.weight.numel() < SMALL_MATRIX else few_rows_linear
    return lambda inputs: linear(inputs, parameters["weight"], parameters["bias"])


def joint_product_of(modules: list[Module]) -> Product:
    """Several linear layers of one input, their outputs side by side: small ones as one product, on a copy."""
    is_small = all(is_plain_matrix(module) and module.weight.numel() < SMALL_MATRIX for module in modules)
    if not is_small:
        products = [product_of(module) for module in modules]
        return lambda inputs: torch.cat([product(inputs) for product in products], dim=-1)
    weights = [module.weight for module in modules]
    biases = [module.bias for module in modules if module.bias is not None]
    # Its weights as they were: a change of any shows in its version.
    versions: list[int] = []
    copies: list[torch.Tensor | None] = []

    def product(inputs: torch.Tensor) -> torch.Tensor:
        now = [weight._version for weight in weights] + [bias._version for bias in biases]
        if now != versions:
            versions[:] = now
            bias = torch.cat(biases).detach() if biases else None
            copies[:] = [torch.cat(weights).detach(), bias]
        return F.linear(inputs, *copies)

    return product
