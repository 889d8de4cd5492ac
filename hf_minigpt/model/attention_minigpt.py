"""Attention: positions, the mask of padding and packed documents, and the call of the configured implementation."""

import math
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    create_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_tracing

from .configuration_minigpt import MiniGPTConfig
from .products_minigpt import fast_paths_enabled, in_function_transform


# Keyword arguments that transformers passes to every model. Other names that no attention reads are refused.
KNOWN_KWARGS = frozenset(
    {
        *("num_items_in_batch", "output_hidden_states", "output_attentions", "output_router_logits", "return_dict"),
        *("position_ids", "is_causal"),
        # `generate` passes these on.
        *("tokenizer", "assistant_tokenizer"),
    }
)
# Document boundaries. Flash attention reads these arguments; all other attention reads position_ids.
DOCUMENT_BOUNDARIES = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})
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
        kwargs: passed to the attention function.

    Returns:
        The output (B, T, H, D), and the attention weights (B, H, T, S) where the function returns them.
    """
    is_paged = "cache" in kwargs or module.config._attn_implementation.startswith("paged|")
    if MODEL_UPDATES_PAGED_CACHE and is_paged:
        # The update also changes kwargs, for the attention function.
        key, value = pop_paged_cache(kwargs).update(key, value, module.layer_idx, kwargs=kwargs)
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
    """
    past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
    mask, lengths = build_mask(model.config, inputs_embeds, attention_mask, position_ids, past_key_values, past_length)
    kwargs = {**kwargs, "document_lengths": lengths}
    is_given = position_ids is not None
    if is_given:
        # Attention kernels that find documents themselves (flash, vLLM's) read them.
        kwargs["position_ids"] = position_ids
    else:
        position_ids = default_position_ids(attention_mask, inputs_embeds, past_length)
    if model.num_learned_positions is not None:
        check_positions(position_ids, model.num_learned_positions, past_length, is_given)
    return mask, position_ids, kwargs


def build_mask(
    config, inputs_embeds, attention_mask, position_ids, past_key_values, past_length
) -> tuple[Any, list[int] | None]:
    """
    Return the mask of causality, padding and documents from transformers' `create_causal_mask`, and None; or None, and
    the lengths of the documents, if attention is called once per document.
    """
    document_ids = None
    starts_empty = not torch.is_tensor(past_length) and past_length == 0
    is_2d = attention_mask is None or attention_mask.ndim == 2
    if position_ids is not None and is_2d and starts_empty and inputs_embeds.shape[1] > 1:
        document_ids = find_documents(position_ids.expand(inputs_embeds.shape[0], -1))
    if document_ids is None:
        # Without position_ids `create_causal_mask` spends no time searching for documents.
        return create_causal_mask(config, inputs_embeds, attention_mask, past_key_values), None
    if can_attend_per_document(config, inputs_embeds, attention_mask, past_key_values):
        return None, document_lengths(document_ids)
    # `create_causal_mask` finds documents only without a cache and without a mask, so they are passed explicitly.
    if past_key_values is not None:
        # A static cache has a key for every position that it can hold.
        num_keys, _ = past_key_values.get_mask_sizes(document_ids.shape[1], 0)
        document_ids = F.pad(document_ids, (0, num_keys - document_ids.shape[1]), value=-1)
    same_document = packed_sequence_mask_function(document_ids)
    mask = create_causal_mask(config, inputs_embeds, attention_mask, past_key_values, and_mask_function=same_document)
    return mask, None


def find_documents(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Return the document of each position (B, T), numbered within its row; None if each row is one document."""
    if in_function_transform():
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
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


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
        if position_ids is None and not is_paged and not implementation.startswith("flash_attention"):
            raise ValueError(
                f"{name} is given without position_ids, from which attention {implementation!r} finds the documents. "
                "Give position_ids that start at 0 in each document."
            )
    if kwargs.get("is_causal") is False and not is_paged:
        raise ValueError("is_causal=False is not supported: MiniGPT is a causal model. Omit it.")
