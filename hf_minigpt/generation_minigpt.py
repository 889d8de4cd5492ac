"""
Writing a token at a time, faster: a cache that grows in place, and the model's step for one token without the detours
that only longer inputs need. It travels with a checkpoint.

At batch 1 a token costs the time of reading all weights, if the matrix products run at the memory's speed. A row-major
`F.linear` of one row takes twice that on most CPUs, so `Decoding` knows two other kernels; nothing else differs from
`MiniGPTForCausalLM.forward`, which remains the definition and does all that `Decoding` declines.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.utils.import_utils import is_tracing

from .functional_minigpt import apply_rotary, check_positions, finish_logits, is_plain_linear, sinusoidal_embedding


DECODING_KERNELS = ("transposed", "compiled", "none")

# Models with more bytes of weights are not copied: they would take as much memory again.
MAX_COPIED_BYTES = 2**30

Product = Callable[[torch.Tensor], torch.Tensor]
# Modules of modeling_minigpt.py, which imports this file.
Module = Any


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


@functools.cache
def compiled_products() -> Callable:
    """Matrices (O, I) times one row (1, I), side by side: loops that inductor fuses into one pass over the weights."""

    def products(
        row: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor] | None
    ) -> torch.Tensor:  # (1, sum of O)
        outputs = [(weight * row).sum(-1) for weight in weights]
        if biases is not None:
            outputs = [output + bias for output, bias in zip(outputs, biases, strict=True)]
        return torch.cat(outputs)[None]

    return torch.compile(products, dynamic=True)


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
    whatever they do is done. See `MiniGPTForCausalLM.set_decoding` for the kernels.
    """

    def __init__(self, kernel: str = "transposed"):
        if kernel not in DECODING_KERNELS:
            raise ValueError(f"kernel={kernel!r} is not known: choose one of {', '.join(DECODING_KERNELS)}.")
        self.kernel = kernel
        self.forget()

    def forget(self) -> None:
        self.blocks: list[DecodingBlock] = []
        # A weight that was copied, where it was, how often it had been written to.
        self.copied: list[tuple[nn.Parameter, int, int]] = []
        self.verified_for: Callable[[], Cache | None] = lambda: None
        self.snapshot: list[Any] = []

    def __getstate__(self) -> dict[str, str]:
        # Neither a copy nor a pickle of the model takes the copied weights along.
        return {"kernel": self.kernel}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(**state)  # type: ignore[misc]

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
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()

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
        logits = self.head(self.final_norm(hidden_states))
        return finish_logits(logits, self.softcap, self.num_ids)[:, None]

    def applies(self, lm, input_ids, attention_mask, position_ids, cache) -> bool:
        if self.kernel == "none" or lm.training or not isinstance(cache, DynamicCache):
            return False
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_tracing(input_ids):
            return False
        if attention_mask is not None:
            expected = (input_ids.shape[0], cache.get_seq_length() + 1)
            if attention_mask.shape != expected:
                return False
        if position_ids is not None and position_ids.ndim != 2:
            return False
        # Modules are looked at once a text, weights at every step: looking costs time, too.
        if self.verified_for() is not cache:
            if not self.is_ordinary(lm, input_ids):
                return False
            self.prepare(lm)
            self.verified_for = weakref.ref(cache)
        elif not self.is_fresh():
            self.prepare(lm)
        return True

    def is_ordinary(self, lm: Module, input_ids: torch.Tensor) -> bool:
        """Whether the model is one whose blocks can be walked through from here."""
        model, config = lm.model, lm.config
        containers = [model, *model.layers]
        for block in model.layers:
            containers += [block.self_attn] if block.mlp is None else [block.self_attn, block.mlp]
        return (
            len(model.layers) > 0
            and input_ids.device.type == "cpu"
            and model.embed_tokens.weight.device.type == "cpu"
            and config._attn_implementation == "sdpa"
            and not config.output_attentions
            and not config.output_hidden_states
            and all(is_bare(module) for module in containers)
        )

    def is_fresh(self) -> bool:
        return all(
            weight._version == version and weight.data_ptr() == address for weight, address, version in self.copied
        )

    def prepare(self, lm: Module) -> None:
        """Take up the model's matrices, anew where any of them has changed since."""
        matrices = [lm.lm_head, *(module for block in lm.model.layers for module in linear_layers(block))]
        snapshot = [(module, id(module.weight) if is_plain_matrix(module) else None) for module in matrices]
        for block in lm.model.layers:
            snapshot += [block, block.mlp, *norm_parts(block.input_layernorm)]
            snapshot += norm_parts(block.post_attention_layernorm)
        snapshot += norm_parts(lm.model.norm)
        if snapshot == self.snapshot and self.is_fresh():
            return
        self.forget()
        self.snapshot = snapshot
        plain = [module for module in matrices if is_plain_matrix(module)]
        copies = self.kernel == "transposed" and 4 * sum(m.weight.numel() for m in plain) <= MAX_COPIED_BYTES
        for module in plain if copies else []:
            for parameter in module.parameters():
                self.copied.append((parameter, parameter.data_ptr(), parameter._version))
        build = transposed_product if copies else compiled_product if self.kernel == "compiled" else called_product
        self.blocks = [DecodingBlock(block, build) for block in lm.model.layers]
        self.final_norm = direct_norm(lm.model.norm)
        self.head = product_of([lm.lm_head], build)
        self.softcap = lm.config.final_logit_softcapping
        self.num_ids = lm.config.unpadded_vocab_size


class DecodingBlock:
    """`MiniGPTBlock` for one token a row: hidden states are (B, C)."""

    def __init__(self, block: Module, build: Callable[[list[Module]], Product]):
        attention = block.self_attn
        self.block, self.attention, self.mlp = block, attention, block.mlp
        self.input_norm = direct_norm(block.input_layernorm)
        self.mlp_norm = direct_norm(block.post_attention_layernorm)
        self.project_inputs = product_of([attention.q_proj, attention.k_proj, attention.v_proj], build)
        self.project_output = product_of([attention.o_proj], build)
        self.head_mask = None if attention.head_mask is None else torch.tensor(attention.head_mask)[:, None, None]
        self.pre_norm, self.residual = block.pre_norm, block.residual
        self.layer_idx, self.head_dim = attention.layer_idx, attention.head_dim
        self.scaling, self.norm_eps = attention.scaling, attention.norm_eps
        if self.mlp is not None:
            self.act_fn = block.mlp.act_fn
            self.up, self.down = product_of([block.mlp.up_proj], build), product_of([block.mlp.down_proj], build)

    def step(self, hidden_states, rotation, mask, cache: Cache) -> torch.Tensor:
        inputs = self.input_norm(hidden_states) if self.pre_norm else hidden_states
        hidden_states = self.join(hidden_states, self.attend(inputs, rotation, mask, cache), self.input_norm)
        if self.mlp is None:
            return hidden_states
        inputs = self.mlp_norm(hidden_states) if self.pre_norm else hidden_states
        return self.join(hidden_states, self.down(self.act_fn(self.up(inputs))), self.mlp_norm)

    def attend(self, inputs, rotation, mask, cache: Cache) -> torch.Tensor:
        projected = self.project_inputs(inputs).view(inputs.shape[0], 3, -1, 1, self.head_dim)
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


def linear_layers(block: Module) -> list[Module]:
    attention, mlp = block.self_attn, block.mlp
    layers = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return layers if mlp is None else [*layers, mlp.up_proj, mlp.down_proj]


def norm_parts(norm: Module) -> list[Any]:
    """What `direct_norm` depends on, to be compared by identity."""
    return [norm] if norm is None else [norm, is_bare(norm), *map(id, norm.parameters())]


def direct_norm(norm: Module) -> Any:
    """A layer norm without the module around it, whose calls add up in a small model."""
    if type(norm) is not nn.LayerNorm or not is_bare(norm):
        return norm
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda inputs: torch.layer_norm(inputs, shape, weight, bias, eps)


def product_of(modules: list[Module], build: Callable[[list[Module]], Product]) -> Product:
    """One function from (B, C) to the outputs of `modules` side by side."""
    return build(modules) if all(is_plain_matrix(module) for module in modules) else called_product(modules)


def called_product(modules: list[Module]) -> Product:
    def product(inputs: torch.Tensor) -> torch.Tensor:
        # An adapter expects the dimension of positions.
        inputs = inputs[:, None]
        return torch.cat([module(inputs) for module in modules], dim=-1)[:, 0]

    def one_product(inputs: torch.Tensor) -> torch.Tensor:
        return modules[0](inputs[:, None])[:, 0]

    return one_product if len(modules) == 1 else product


def transposed_product(modules: list[Module]) -> Product:
    """On a copy (I, O) of the weights side by side, which few rows multiply at close to the memory's speed."""
    weight = torch.cat([module.weight for module in modules]).detach().t().contiguous()
    if any(module.bias is None for module in modules):
        assert all(module.bias is None for module in modules)
        return lambda inputs: torch.mm(inputs, weight)
    bias = torch.cat([module.bias for module in modules]).detach()
    return lambda inputs: torch.addmm(bias, inputs, weight)


def compiled_product(modules: list[Module]) -> Product:
    """On the weights as they are, by a compiled kernel for one row; more rows go the ordinary way."""
    several_rows = called_product(modules)
    products = compiled_products()

    def product(inputs: torch.Tensor) -> torch.Tensor:
        if inputs.shape[0] > 1:
            return several_rows(inputs)
        has_bias = modules[0].bias is not None
        biases = [module.bias for module in modules] if has_bias else None
        return products(inputs, [module.weight for module in modules], biases)

    return product
