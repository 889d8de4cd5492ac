"""Attention: positions, the mask of padding and packed documents, and the call of the configured implementation."""

import math
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    create_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from .configuration_minigpt import MiniGPTConfig
from .products_minigpt import fast_paths_enabled, in_function_transform


logger = logging.get_logger(__name__)

# Keyword arguments that transformers passes to every model. Other names that no attention reads are refused.
KNOWN_KWARGS = frozenset(
    {
        *("num_items_in_batch", "output_hidden_states", "output_attentions", "output_router_logits", "return_dict"),
        *("position_ids", "is_causal"),
        # `generate` passes these on.
        *("tokenizer", "assistant_tokenizer"),
    }
)
# Lengths of the documents in the concatenated rows, as flash attention reads them.
FLASH_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# Document boundaries. All attention but flash attention finds them from position_ids.
DOCUMENT_BOUNDARIES = frozenset({*FLASH_LENGTHS, "seq_idx"})
READ_BY_FLASH = frozenset({"sliding_window", "softcap", "s_aux", "deterministic", "target_dtype"})
READ_BY_ATTENTION = {
    "flash_attention": READ_BY_FLASH,
    "flex_attention": frozenset({"softcap", "s_aux", "position_bias", "kernel_options"}),
    "sdpa": frozenset({"position_bias"}),
    "paged|": READ_BY_FLASH,
    "eager": frozenset[str](),
}
# Continuous batching passes these together with its paged cache.
READ_WITH_PAGED_CACHE = frozenset(
    {"cache", "block_table", "read_index", "write_index", "logits_indices", "logits_processor_args"}
)
# Since transformers 5.24 the model updates the paged cache; before, the attention function does.
MODEL_UPDATES_PAGED_CACHE = "cache" not in signature(ALL_ATTENTION_FUNCTIONS["sdpa"]).parameters


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
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)  # (B, H, T, S)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights  # (B, T, H, D), (B, H, T, S)


def attention(
    attention_function: Callable,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    document_lengths: list[int] | None = None,
    packed_attention: Callable | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Call an attention function, once or once per document.

    Args:
        attention_function: a function of transformers' `ALL_ATTENTION_FUNCTIONS`, or `eager_attention_forward`.
        module: the attention layer.
        query, key, value: (B, H, T, D), (B, H, S, D), (B, H, S, D).
        attention_mask: what `create_causal_mask` returns for the implementation; None for causal attention only.
        document_lengths: lengths of packed documents, in sum B * T, each of which attends to itself only.
        packed_attention: called instead of `attention_function`.
        kwargs: passed to the attention function.

    Returns:
        The output (B, T, H, D), and the attention weights (B, H, T, S) where the function returns them.
    """
    is_paged = "cache" in kwargs or module.config._attn_implementation.startswith("paged|")
    if MODEL_UPDATES_PAGED_CACHE and is_paged:
        # The update also changes kwargs, for the attention function.
        key, value = pop_paged_cache(kwargs).update(key, value, module.layer_idx, kwargs=kwargs)
    if packed_attention is not None:
        attention_function = packed_attention
    attend = partial(attention_function, module, **kwargs)
    if document_lengths is not None:
        return attend_per_document(attend, query, key, value, document_lengths), None
    return attend(query, key, value, attention_mask)


def attend_per_document(attend: Callable, query, key, value, lengths: list[int]) -> torch.Tensor:
    """
    Compute causal attention within each document.

    Args:
        attend: the attention function, from query, key and value (1, H, length, D) and no mask.
        query, key, value: (B, H, T, D).
        lengths: lengths of the documents, in sum B * T.

    Returns:
        (B, T, H, D)
    """
    batch_size, num_heads, length, head_dim = query.shape
    # (B, T, H, D) matches the memory layout: split and cat, and their gradients, stay contiguous.
    rows = (x.transpose(1, 2).reshape(1, -1, num_heads, head_dim).split(lengths, dim=1) for x in (query, key, value))
    documents = ((x.transpose(1, 2) for x in document) for document in zip(*rows, strict=True))
    outputs = torch.cat([attend(*document, None)[0] for document in documents], dim=1)
    return outputs.view(batch_size, length, num_heads, head_dim)


def varlen_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor,
    max_length_q: int,
    max_length_k: int,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """An attention function for packed documents: torch's variable-length attention, which has no dropout."""
    # Imported late, because it takes seconds.
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, T, H, D)
    output: Any = varlen_attn(
        query.flatten(0, 1),
        key.flatten(0, 1),
        value.flatten(0, 1),
        cu_seq_q=cu_seq_lens_q,
        cu_seq_k=cu_seq_lens_k,
        max_q=max_length_q,
        max_k=max_length_k,
        scale=scaling,
        window_size=(-1, 0),  # causal
    )
    return output.view_as(query), None


def prepare_attention(
    model: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    kwargs: dict[str, Any],
) -> tuple[Any, torch.Tensor, dict[str, Any]]:
    """
    Build the mask, and complete the positions.

    Args:
        inputs_embeds: (B, T, C).
        attention_mask: (B, S), or (B, 1, T, S).
        position_ids: (B, T). Where they do not increase by one, a new document begins.

    Returns:
        The mask, the positions (B or 1, T), and the keyword arguments of `attention`.

    Raises:
        ValueError: attention dropout with flex attention, which has none.
    """
    config = model.config
    if config._attn_implementation == "flex_attention" and model.training and config.attn_pdrop > 0:
        raise ValueError(
            f"attn_pdrop={config.attn_pdrop}: flex attention has no dropout. Set attn_pdrop=0.0, or use "
            "attn_implementation='sdpa'."
        )
    past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
    mask, packing = build_mask(
        model, inputs_embeds, attention_mask, position_ids, past_key_values, past_length, kwargs
    )
    kwargs = {**kwargs, **packing}
    is_given = position_ids is not None
    if is_given:
        # Attention kernels that find documents themselves (vLLM's) read them. Transformers' flash attention would
        # search them in every layer, and only at a batch size of 1, so it gets the lengths of the documents instead.
        if not is_flash_attention(config):
            kwargs["position_ids"] = position_ids
    else:
        position_ids = default_position_ids(attention_mask, inputs_embeds, past_length)
    if model.num_learned_positions is not None:
        check_positions(position_ids, model.num_learned_positions, past_length, is_given)
    return mask, position_ids, kwargs


def build_mask(
    model, inputs_embeds, attention_mask, position_ids, past_key_values, past_length, kwargs
) -> tuple[Any, dict[str, Any]]:
    """
    Return the mask of causality, padding and documents from transformers' `create_causal_mask`, and no arguments; or
    None, and the keyword arguments with which `attention` keeps the documents apart without it.
    """
    config = model.config
    document_ids = None
    starts_empty = not torch.is_tensor(past_length) and past_length == 0
    is_2d = attention_mask is None or attention_mask.ndim == 2
    if is_2d and starts_empty and inputs_embeds.shape[1] > 1:
        if reads_lengths(model, inputs_embeds, attention_mask, position_ids, past_key_values, kwargs):
            lengths = document_boundaries(inputs_embeds, attention_mask, position_ids, kwargs)
            if lengths is not None:
                if config._attn_implementation == "sdpa" and lengths["cu_seq_lens_q"] is not None:
                    lengths["packed_attention"] = varlen_attention
                return None, lengths
        elif position_ids is not None and not is_flash_attention(config):
            positions = position_ids.expand(inputs_embeds.shape[0], -1)
            document_ids = find_documents(positions, lengths_are_given(kwargs))
    if document_ids is None:
        options: dict[str, Any] = {}
        is_prompt = attention_mask is not None and is_2d and starts_empty and inputs_embeds.shape[1] > 1
        if is_prompt and waits_for_mask(config, attention_mask):
            # Read here once whether there is padding, which `create_causal_mask` reads twice without these options.
            if attention_mask.all():
                attention_mask = None
            else:
                options["and_mask_function"] = causal_mask_function
        # Without position_ids `create_causal_mask` spends no time searching for documents.
        return create_causal_mask(config, inputs_embeds, attention_mask, past_key_values, **options), {}
    if can_attend_per_document(config, inputs_embeds, attention_mask, past_key_values):
        return None, {"document_lengths": document_lengths(document_ids)}
    if attention_mask is None and past_key_values is None and "flex" in kernels_for_packed_rows(model, inputs_embeds):
        return flex_mask(document_ids), {"packed_attention": ALL_ATTENTION_FUNCTIONS["flex_attention"]}
    # `create_causal_mask` finds documents only without a cache and without a mask, so they are passed explicitly.
    if past_key_values is not None:
        # A static cache has a key for every position that it can hold.
        num_keys, _ = past_key_values.get_mask_sizes(document_ids.shape[1], 0)
        document_ids = F.pad(document_ids, (0, num_keys - document_ids.shape[1]), value=-1)
    same_document = packed_sequence_mask_function(document_ids)
    mask = create_causal_mask(config, inputs_embeds, attention_mask, past_key_values, and_mask_function=same_document)
    return mask, {}


def waits_for_mask(config, attention_mask: torch.Tensor) -> bool:
    """Return whether to read the values of a mask (B, S) means to wait for a GPU, and SDPA may read them."""
    may_read = not is_tracing(attention_mask) and not in_function_transform()
    return may_read and config._attn_implementation == "sdpa" and attention_mask.device.type == "cuda"


def is_flash_attention(config) -> bool:
    """Return whether attention is transformers' function for flash kernels, which reads `FLASH_LENGTHS`."""
    implementation = config._attn_implementation
    if implementation in ("sdpa", "eager"):
        return False
    return ALL_ATTENTION_FUNCTIONS.get(implementation) is ALL_ATTENTION_FUNCTIONS["flash_attention_2"]


def reads_lengths(model, inputs_embeds, attention_mask, position_ids, past_key_values, kwargs) -> bool:
    """Return whether attention to a prompt (B, T, C) takes the lengths of documents and of padding, and no mask."""
    length = inputs_embeds.shape[1]
    # Attention reads other keys than those of the prompt with a static cache, and with that of continuous batching.
    if past_key_values is not None and past_key_values.get_mask_sizes(length, 0)[0] != length:
        return False
    if is_flash_attention(model.config):
        is_paged = hasattr(kwargs.get("cache"), "update")
        return not is_paged and (attention_mask is None or attention_mask.shape[1] == length)
    if position_ids is None or attention_mask is not None or in_function_transform():
        return False
    # Finding the lengths reads values, which a graph cannot.
    is_known = lengths_are_given(kwargs) or not is_tracing(inputs_embeds)
    return is_known and "varlen" in kernels_for_packed_rows(model, inputs_embeds)


def lengths_are_given(kwargs: dict[str, Any]) -> bool:
    return all(kwargs.get(name) is not None for name in FLASH_LENGTHS)


def document_boundaries(inputs_embeds, attention_mask, position_ids, kwargs) -> dict[str, Any] | None:
    """
    Return `FLASH_LENGTHS`: the given ones, or those of the documents and the padding in rows (B, T), or None each if
    every row is one document without padding. Return None if it takes a mask to separate padding from text.

    Raises:
        ValueError: a mask and lengths are given, but no positions.
    """
    if lengths_are_given(kwargs) and attention_mask is None:
        return {name: kwargs[name] for name in FLASH_LENGTHS}
    if attention_mask is None and position_ids is None:
        return dict.fromkeys(FLASH_LENGTHS)
    if position_ids is None and lengths_are_given(kwargs):
        raise ValueError(
            "attention_mask and cu_seq_lens_q are given without position_ids, so it is unknown whether the lengths "
            "include the padding. Omit attention_mask, or give position_ids that start at 0 in each document."
        )
    if position_ids is not None:
        position_ids = position_ids.expand(inputs_embeds.shape[0], -1)
    if attention_mask is not None:
        attention_mask = attention_mask.to(inputs_embeds.device, torch.bool)
    return find_lengths(attention_mask, position_ids)


@torch.compiler.disable(reason="The lengths of documents depend on values. Give cu_seq_lens_q, cu_seq_lens_k, ...")
def find_lengths(attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> dict[str, Any] | None:
    """
    As `document_boundaries`, from a boolean mask (B, T), positions (B, T), or both. It waits for the GPU once.

    Raises:
        ValueError: padding interrupts a document of a packed row.
    """
    like = position_ids if attention_mask is None else attention_mask
    starts = torch.zeros_like(like, dtype=torch.bool)
    if position_ids is not None:
        starts[:, 1:] = position_ids.diff(dim=-1) != 1
    if attention_mask is None:
        starts = starts.cpu()
    else:
        # The last text before each position, from which a document may go on after padding.
        index = torch.arange(attention_mask.shape[1], device=attention_mask.device).where(attention_mask, -1)
        last = F.pad(index.cummax(-1).values[:, :-1], (1, 0), value=-1)
        follows_text = attention_mask & (last >= 0)
        starts &= follows_text
        if position_ids is not None:
            starts &= position_ids != position_ids.gather(-1, last.clamp(min=0)) + 1
        alternates = F.pad(attention_mask.diff(dim=-1), (1, 0))
        resumes = alternates & follows_text & ~starts
        starts, alternates, resumes = torch.stack((starts, alternates, resumes)).cpu()
        if resumes.any():
            if starts.any():
                raise ValueError(
                    "attention_mask has padding within a document of a packed row, which flash attention cannot "
                    "skip. Remove it, or use attn_implementation='sdpa'."
                )
            return None
        # Padding is a document too.
        starts |= alternates
    starts[:, 0] = True
    first = starts.flatten().nonzero()[:, 0]
    if len(first) == len(starts):
        return dict.fromkeys(FLASH_LENGTHS)
    ends = F.pad(first, (0, 1), value=starts.numel()).int()
    max_length = int(ends.diff().max())
    ends = ends.to(like.device, non_blocking=True)
    return dict(zip(FLASH_LENGTHS, (ends, ends, max_length, max_length), strict=True))


def kernels_for_packed_rows(model, inputs_embeds: torch.Tensor) -> list[str]:
    """Return torch's kernels, of "varlen" and "flex", that can keep documents apart where the model's SDPA runs."""
    config = model.config
    if inputs_embeds.device.type != "cuda" or config._attn_implementation != "sdpa" or in_function_transform():
        return []
    kernels = installed_kernels(inputs_embeds.device.index)
    if model.training and config.attn_pdrop > 0:
        if kernels:
            warn_of_dense_mask(config.attn_pdrop)
        return []
    is_half = product_dtype(inputs_embeds) in (torch.float16, torch.bfloat16)
    fits = {"varlen": is_half and config.head_dim % 8 == 0 and config.head_dim <= 256, "flex": config.head_dim >= 16}
    return [kernel for kernel in kernels if fits[kernel]]


@torch.compiler.assume_constant_result
@cache
def installed_kernels(device_index: int) -> tuple[str, ...]:
    has_flash = torch.backends.cuda.is_flash_attention_available() and torch.version.hip is None
    has_varlen = has_flash and torch.cuda.get_device_capability(device_index) >= (8, 0)
    return ("varlen",) * has_varlen + ("flex",) * (find_spec("triton") is not None)


# A graph cannot warn, but the function is called when it is traced.
@torch.compiler.assume_constant_result
def warn_of_dense_mask(attn_pdrop: float) -> None:
    logger.warning_once(
        f"attn_pdrop={attn_pdrop}: packed rows use a dense mask, of T * T numbers a row, because torch's faster "
        "kernels for them have no dropout. Set attn_pdrop=0.0, or use attn_implementation='flash_attention_2'."
    )


def flex_mask(document_ids: torch.Tensor) -> Any:
    """Return the mask with which flex attention is causal within documents (B, T)."""
    batch_size, length = document_ids.shape
    is_visible = and_masks(causal_mask_function, packed_sequence_mask_function(document_ids))
    # Compiled, it needs no tensor of T * T numbers a row. Transformers' own call of it breaks a graph.
    build = torch.compile(create_block_mask)
    return build(is_visible, batch_size, None, length, length, device=document_ids.device)


def find_documents(position_ids: torch.Tensor, is_packed: bool = False) -> torch.Tensor | None:
    """Return the document of each position (B, T), numbered within its row; None if each row is one document.

    Args:
        is_packed: whether the caller knows that rows hold several documents, so that a GPU need not be waited for.
    """
    if in_function_transform() or (is_packed and position_ids.device.type != "cpu"):
        # As `find_packed_sequence_indices`, but without reading values.
        return F.pad(position_ids.diff(dim=-1) != 1, (1, 0)).cumsum(-1)
    return find_packed_sequence_indices(position_ids)


def can_attend_per_document(config, inputs_embeds, attention_mask, past_key_values) -> bool:
    """
    Return whether to call attention once per document: on a CPU, where SDPA with a mask also computes the masked
    scores. On a GPU the calls cost more than they save.
    """
    is_plain = attention_mask is None and past_key_values is None and config._attn_implementation == "sdpa"
    is_eager_cpu = inputs_embeds.device.type == "cpu" and not is_tracing(inputs_embeds) and not in_function_transform()
    return is_plain and is_eager_cpu and fast_paths_enabled()


def document_lengths(document_ids: torch.Tensor) -> list[int]:
    """Return the lengths of the documents in rows (B, T), in the order of the concatenated rows."""
    is_first = F.pad(document_ids.diff(dim=-1) != 0, (1, 0), value=True).flatten()
    starts = F.pad(is_first.nonzero()[:, 0], (0, 1), value=is_first.numel())
    return starts.diff().tolist()


def default_position_ids(attention_mask, inputs: torch.Tensor, past_length: int | torch.Tensor) -> torch.Tensor:
    """Return positions (B or 1, T) of inputs (B, T, ...) that follow `past_length` cached ones."""
    length = inputs.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        # Padding on the left must not shift the positions of the text.
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return (torch.arange(length, device=inputs.device) + past_length)[None]


def check_positions(position_ids: torch.Tensor, limit: int, past_length: int | torch.Tensor, is_given: bool) -> None:
    """
    Refuse positions (B, T) beyond the learned ones, which would be an obscure assertion on a GPU.

    Args:
        limit: number of learned positions.
        past_length: number of cached positions.
        is_given: whether the caller chose the positions. Default positions fit if their count does.

    Raises:
        ValueError: a position is negative, or at least `limit`.
    """
    if is_tracing(position_ids) or in_function_transform() or position_ids.numel() == 0:
        return
    count_fits = not torch.is_tensor(past_length) and position_ids.shape[-1] + past_length <= limit
    # Reading values waits for the GPU, so given positions of a fitting count are checked on the CPU only.
    if count_fits and not (is_given and position_ids.device.type == "cpu"):
        return
    first, last = (int(position) for position in position_ids.aminmax())
    if first < 0 or last >= limit:
        raise ValueError(
            f"Position {last if last >= limit else first} is not one of the max_position_embeddings={limit} learned "
            "positions. Shorten the input (or the generation), or use a model with rotary or sinusoidal positions."
        )


def product_dtype(inputs: torch.Tensor) -> torch.dtype:
    """Return the dtype of a linear layer's output, which autocast lowers."""
    device_type = inputs.device.type
    # Autocast leaves float64 alone, and does not know the meta device.
    if inputs.dtype == torch.float64 or device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return inputs.dtype
    return torch.get_autocast_dtype(device_type)


def sinusoidal_embedding(position_ids: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """
    Compute the sinusoidal embedding (B, T, C) of positions (B, T): sines in even, cosines in odd dimensions (Vaswani
    et al., 2017). `like` (..., C) gives width, dtype and device.
    """
    width = like.shape[-1]
    exponent = torch.arange(0, width, 2, device=like.device, dtype=torch.float) / width
    angles = position_ids[..., None].float() * torch.exp(-math.log(10000.0) * exponent)  # (B, T, C / 2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(like.dtype)


class MiniGPTRotaryEmbedding(nn.Module):
    """
    Cosines and sines (B or 1, T, R) of rotary positions (Su et al., 2021), R of D dimensions rotated.

    The names of its attributes are those that transformers needs to recompute the frequencies after loading.
    """

    def __init__(self, config: MiniGPTConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        # Validate again, because a config may change after it was built.
        config.validate_rope()
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    def _apply(self, fn, recurse=True):
        """Keep the frequencies in float32: in bfloat16, angles beyond a few hundred positions are off by radians."""
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer.dtype != exact[name].dtype:
                self._buffers[name] = exact[name].to(buffer.device)
        return self

    @staticmethod
    def compute_default_rope_parameters(config: MiniGPTConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Compute the inverse frequencies (R / 2,), and the factor of cosine and sine, which is 1."""
        num_rotated = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, num_rotated, 2, dtype=torch.float) / num_rotated
        return 1.0 / config.rope_parameters["rope_theta"] ** exponent, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.float()  # (B or 1, T, R / 2)
        angles = torch.cat((angles, angles), dim=-1)  # (B or 1, T, R)
        # In float32, they would make query and key float32 under autocast, and rule out flash kernels.
        dtype = product_dtype(x)
        return (angles.cos() * self.attention_scaling).to(dtype), (angles.sin() * self.attention_scaling).to(dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotate each pair (x[d], x[d + R/2]) of the first R dimensions of x (B, H, T, D) by its position's angle, in Llama's
    direction. Cosines and sines are (B, T, R), R at most D.
    """
    num_rotated = cos.shape[-1]
    if num_rotated < x.shape[-1]:
        return torch.cat((apply_rotary(x[..., :num_rotated], cos, sin), x[..., num_rotated:]), dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (B, T, D) -> (B, 1, T, D)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def pop_paged_cache(kwargs: dict[str, Any]) -> Any:
    """Take the cache of continuous batching, which is not a `Cache`, out of `kwargs`."""
    if kwargs.get("cache") is None:
        raise TypeError(
            "cache is missing from the arguments of continuous batching. Install a version of transformers that "
            "hf_minigpt supports."
        )
    return kwargs.pop("cache")


def check_arguments(config, input_ids, inputs_embeds, position_ids, kwargs: dict[str, Any]) -> None:
    """
    Refuse contradicting inputs, and arguments that nothing reads. A custom attention function may read any name.

    Raises:
        ValueError: both or neither of `input_ids` and `inputs_embeds`; document boundaries without `position_ids`;
            `is_causal=False`.
        TypeError: an argument that neither the model nor its attention reads.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    implementation = config._attn_implementation
    read = next((names for prefix, names in READ_BY_ATTENTION.items() if implementation.startswith(prefix)), None)
    if read is None:
        return
    is_paged = hasattr(kwargs.get("cache"), "update") and implementation != "eager"
    for name in [name for name, value in kwargs.items() if value is not None]:
        if name in KNOWN_KWARGS or name in read or (is_paged and name in READ_WITH_PAGED_CACHE):
            continue
        if name not in DOCUMENT_BOUNDARIES:
            raise TypeError(
                f"{name}={type(kwargs[name]).__name__} is not an argument of MiniGPT's forward, and attention "
                f"{implementation!r} does not read it. Check the spelling, or omit it."
            )
        has_lengths = implementation.startswith("flash_attention") and lengths_are_given(kwargs)
        if position_ids is None and not is_paged and not has_lengths:
            raise ValueError(
                f"{name} is given without position_ids, from which attention {implementation!r} finds the documents. "
                "Give position_ids that start at 0 in each document."
            )
    if kwargs.get("is_causal") is False and not is_paged:
        raise ValueError("is_causal=False is not supported: MiniGPT is a causal model. Omit it.")
