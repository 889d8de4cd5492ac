"""The functions without parameters: positions, padding, and the losses. It travels with a checkpoint."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers.masking_utils import (
    create_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.utils.import_utils import is_tracing

from .products_minigpt import (
    aligned,
    is_plain_linear,
    is_transformed,
    linear,
    onednn_product,
    outer_product,
    project,
    takes_onednn,
)


# Logits held at one time, and the least rows, below which matrix products slow down.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
MIN_CHUNK_ROWS = 512


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Turn each pair (x[d], x[d + R/2]) of the first R dimensions of x (B, H, T, D) by its position's angle, in Llama's
    direction. Cosines and sines are (B, T, R), R at most D.
    """
    num_turned = cos.shape[-1]
    if num_turned < x.shape[-1]:
        return torch.cat((apply_rotary(x[..., :num_turned], cos, sin), x[..., num_turned:]), dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (B, T, D) -> (B, 1, T, D)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def sinusoidal_embedding(position_ids: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sines (even) and cosines (odd dimensions) of positions (B, T), of Vaswani et al. (2017): (B, T, C)."""
    width = like.shape[-1]
    exponent = torch.arange(0, width, 2, device=like.device, dtype=torch.float) / width
    angles = position_ids[..., None].float() * torch.exp(-math.log(10000.0) * exponent)  # (B, T, C / 2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(like.dtype)


def build_mask(config, inputs_embeds, attention_mask, position_ids, past_key_values, past_length):
    """What attention wants besides causality: nothing, a mask of padding and documents, or the documents' lengths."""
    starts_empty = not torch.is_tensor(past_length) and past_length == 0
    if position_ids is None or inputs_embeds.shape[1] == 1 or not starts_empty:
        # Nothing packed: without position_ids create_causal_mask spends no time on looking for documents.
        return create_causal_mask(config, inputs_embeds, attention_mask, past_key_values)
    document_ids = None
    if is_transformed() and (attention_mask is None or attention_mask.ndim == 2):
        # as `find_packed_sequence_indices`, without a look at whether there are several
        rows = position_ids.expand(inputs_embeds.shape[0], -1)
        document_ids = F.pad(rows.diff(dim=-1) != 1, (1, 0)).cumsum(-1)
    elif attention_mask is None or attention_mask.ndim == 2:
        document_ids = find_packed_sequence_indices(position_ids.expand(inputs_embeds.shape[0], -1))
    if document_ids is None:
        return create_causal_mask(config, inputs_embeds, attention_mask, past_key_values)
    if can_attend_by_document(config, inputs_embeds, attention_mask, past_key_values):
        return document_lengths(document_ids)
    # create_causal_mask looks for documents only without a cache and without a mask: it has to be told of them.
    if past_key_values is not None:
        # The keys of a static cache are as many as it can hold.
        num_keys, _ = past_key_values.get_mask_sizes(document_ids.shape[1], 0)
        document_ids = F.pad(document_ids, (0, num_keys - document_ids.shape[1]), value=-1)
    return create_causal_mask(
        config,
        inputs_embeds,
        attention_mask,
        past_key_values,
        and_mask_function=packed_sequence_mask_function(document_ids),
    )


def can_attend_by_document(config, inputs_embeds, attention_mask, past_key_values) -> bool:
    """On a CPU, where SDPA with a mask does the work of all the keys that it hides; on a GPU a call costs more."""
    is_plain = attention_mask is None and past_key_values is None and config._attn_implementation == "sdpa"
    return is_plain and inputs_embeds.device.type == "cpu" and not is_tracing(inputs_embeds) and not is_transformed()


def document_lengths(document_ids: torch.Tensor) -> list[int]:
    """Lengths of the documents in rows (B, T), the rows one after the other, from each position's document."""
    is_first = F.pad(document_ids.diff(dim=-1) != 0, (1, 0), value=True).flatten()
    starts = F.pad(is_first.nonzero()[:, 0], (0, 1), value=is_first.numel())
    return starts.diff().tolist()


def attend_by_document(attend: Callable, query, key, value, lengths: list[int]) -> torch.Tensor:
    """Causal attention within documents.

    Args:
        attend: the attention interface, from query, key and value (1, H, length, D), without a mask.
        query, key, value: (B, H, T, D).
        lengths: of the documents, in sum B * T.

    Returns:
        (B, T, H, D)
    """
    batch_size, num_heads, length, head_dim = query.shape
    # (B, T, H, D) is how they, and their gradients, lie in memory: taken apart and put together without strides.
    rows = (x.transpose(1, 2).reshape(1, -1, num_heads, head_dim).split(lengths, dim=1) for x in (query, key, value))
    documents = ((x.transpose(1, 2) for x in document) for document in zip(*rows, strict=True))
    outputs = torch.cat([attend(*document, None)[0] for document in documents], dim=1)
    return outputs.view(batch_size, length, num_heads, head_dim)


def check_positions(position_ids: torch.Tensor, limit: int, past_length: int | torch.Tensor, given: bool) -> None:
    """
    Refuse positions (B, T) beyond a table of `limit` rows: on a GPU they would be an obscure assertion.

    Args:
        past_length: number of cached positions.
        given: whether the caller chose the positions; the model's own fit wherever their number does.
    """
    if is_tracing(position_ids) or is_transformed() or position_ids.numel() == 0:
        return
    fits = not torch.is_tensor(past_length) and position_ids.shape[-1] + past_length <= limit
    # Given ids are looked at on the CPU only, where that waits for no kernel; others if their number is too large.
    if fits and not (given and position_ids.device.type == "cpu"):
        return
    first, last = (int(position) for position in position_ids.aminmax())
    if first < 0 or last >= limit:
        raise ValueError(
            f"Position {last if last >= limit else first} is not in the learned table of "
            f"max_position_embeddings={limit} rows. Shorten the input (or the generation), or use a model with rotary "
            "or sinusoidal positions."
        )


def find_text(
    hidden_states: torch.Tensor,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    pad_token_id: int | None,
) -> torch.Tensor:
    """
    Which positions (B, T) of a batch are no padding: told by the mask, else by the pad id, else there is one row.

    Raises:
        ValueError: several rows, and neither.
    """
    batch_size, length = hidden_states.shape[:2]
    if attention_mask is not None and attention_mask.ndim == 2:
        return attention_mask[:, -length:] != 0
    if input_ids is not None and pad_token_id is not None:
        is_pad = input_ids == pad_token_id
        # Only what leads or trails is padding: a pad id inside the text is a token of it.
        return ~(is_pad.cumprod(-1) + is_pad.flip(-1).cumprod(-1).flip(-1)).bool()
    if batch_size == 1:
        return torch.ones((1, length), dtype=torch.bool, device=hidden_states.device)
    raise ValueError(
        f"Cannot tell the padding of a batch of {batch_size} rows: pass attention_mask, or input_ids with "
        f"config.pad_token_id set (now {pad_token_id})."
    )


def num_head_tokens(truncation: str, length: int) -> int:
    """How many of the `length` tokens that are kept of a longer text come from its beginning.

    A text has one token before it and one after it, which are kept. `head_tail` takes a quarter of the others from the
    head, as Sun et al. (2019), "How to Fine-Tune BERT for Text Classification?".
    """
    return {"head": length - 1, "tail": 1, "head_tail": 1 + round(0.25 * (length - 2))}[truncation]


def truncate_texts(
    input_ids: torch.Tensor, is_text: torch.Tensor, truncation: str, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Keep `length` tokens of each longer text of a batch and move the padding to the right.

    Args:
        input_ids: (B, T), padded on either side.
        is_text: (B, T) bool, where there is no padding.
        truncation: `head`, `tail` or `head_tail`.

    Returns:
        Ids (B, length) and their attention mask (B, length) int64. A text of at most `length` tokens is kept whole.
    """
    num_head = num_head_tokens(truncation, length)
    rank = is_text.cumsum(-1) - 1
    num_tail = length - num_head
    is_kept = is_text & ((rank < num_head) | (rank >= is_text.sum(-1, keepdim=True) - num_tail))
    order = (~is_kept).to(torch.uint8).argsort(dim=-1, stable=True)[:, :length]
    return input_ids.gather(1, order), is_kept.gather(1, order).long()


def masked_logit(dtype: torch.dtype) -> float:
    """
    The logit of an id that does not exist: its probability is 0. It is not the lowest finite value, which divided by
    a temperature below 1 would be infinite, and an entropy of infinite logits NaN.
    """
    return -(torch.finfo(dtype).max ** 0.8)


def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """
    The positions of `hidden_states` (B, T, C) that `logits_to_keep` names, as in transformers since 5.21: the last so
    many (0: all), positions (N,) of every row, positions (B, N) of each row, or a boolean mask (B, T), which flattens.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.ndim < 2:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


def finish_logits(logits: torch.Tensor, softcap: float | None, num_ids: int | None) -> torch.Tensor:
    """
    What follows the head's matrix product: the soft cap, then the mask over ids beyond the tokenizer's.

    Args:
        logits: (..., vocab_size).
        softcap: `cap * tanh(logits / cap)`; None for no cap.
        num_ids: ids from here on get `masked_logit`; None where the table is not padded.
    """
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if num_ids is not None and num_ids < logits.shape[-1]:
        padding = torch.arange(logits.shape[-1], device=logits.device) >= num_ids
        logits = logits.masked_fill(padding, masked_logit(logits.dtype))
    return logits


def check_labels(labels: torch.Tensor, num_ids: int, ignore_index: int = -100) -> None:
    """Refuse labels outside [0, num_ids), `ignore_index` apart; on the CPU only, where looking waits for no kernel."""
    if is_tracing(labels) or is_transformed() or labels.device.type != "cpu" or labels.numel() == 0:
        return
    wrong = labels[((labels < 0) | (labels >= num_ids)) & (labels != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"Label {int(wrong[0])} is out of range: there are {num_ids} ids or classes, 0 to {num_ids - 1}, and "
            f"{ignore_index} is ignored. Check the tokenizer or the label column against the model's config."
        )


def shift(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Labels (B, T) aligned with the position that predicts them: each moves one to the left."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    Transformers' `ForCausalLMLoss`, except that a batch with nothing to learn gives 0 instead of NaN.

    Args:
        logits: (B, T, vocab_size).
        labels: (B, T) token ids; position t is scored against label t + 1.
        num_items_in_batch: what the sum is divided by; None: the number of labels that are not ignored.
        shift_labels: (B, T) labels that are already shifted; `labels` is then not read.
    """
    if shift_labels is None:
        shift_labels = shift(labels, ignore_index)
    targets = shift_labels.reshape(-1).to(logits.device)
    check_labels(targets, vocab_size, ignore_index)
    total = F.cross_entropy(
        logits.reshape(-1, vocab_size).float(), targets, ignore_index=ignore_index, reduction="sum"
    )
    return divide(total, num_items_in_batch, targets, ignore_index)


def count_hits(logits, labels, shift_labels=None, ignore_index: int = -100, **kwargs) -> torch.Tensor:
    """How many of the labels are the most likely token (int64, 0-dim); arguments as in `causal_lm_loss`."""
    targets = shift(labels, ignore_index) if shift_labels is None else shift_labels
    return (logits.argmax(-1) == targets).sum()


def count_items(num_items: torch.Tensor | int | None, targets: torch.Tensor, ignore_index: int) -> torch.Tensor | int:
    """What a sum of losses is divided by: at least 1, so that nothing to learn is a loss of 0, not NaN."""
    if num_items is None:
        num_items = (targets != ignore_index).sum()
    if torch.is_tensor(num_items):
        return num_items.to(targets.device).clamp(min=1)
    return max(num_items, 1)


def divide(total, num_items: torch.Tensor | int | None, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """The sum of the losses over `count_items`."""
    return total / count_items(num_items, targets, ignore_index)


ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


def infer_problem_type(labels: torch.Tensor, num_labels: int) -> ProblemType:
    """What transformers' models take labels for: regression with one label, else told by the dtype."""
    if num_labels == 1:
        return "regression"
    is_class = labels.dtype in (torch.long, torch.int)
    return "single_label_classification" if is_class else "multi_label_classification"


LABEL_REMEDIES: dict[ProblemType, str] = {
    "regression": "give floats (B, num_labels), or (B,) with one label; classes need num_labels of 2 or more",
    "single_label_classification": (
        "give class numbers (B,) as int64; for several labels a row give floats (B, num_labels) and set "
        "config.problem_type='multi_label_classification'"
    ),
    "multi_label_classification": (
        "give floats (B, num_labels), 1 for each label that applies; for one class a row give class numbers (B,) as "
        "int64 and set config.problem_type='single_label_classification'"
    ),
}


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, problem_type: ProblemType) -> torch.Tensor:
    """
    Loss of a classifier, summed over the label entries, in float32.

    Args:
        logits: (B, num_labels).
        labels: (B,) classes, or (B, num_labels) numbers, which with one label may also be (B,).
        problem_type: one of transformers' three.

    Raises:
        ValueError: the labels are of another shape or, where they are class numbers, no integers.
    """
    is_class = problem_type == "single_label_classification"
    fits = labels.shape == logits.shape
    if is_class or logits.shape[1] == 1:
        fits = labels.numel() == logits.shape[0]
    if not fits or (is_class and labels.is_floating_point()):
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} and {labels.dtype} do not fit problem_type={problem_type!r} with "
            f"logits (B, num_labels) = {tuple(logits.shape)}: {LABEL_REMEDIES[problem_type]}."
        )
    logits = logits.float()
    if is_class:
        check_labels(labels, logits.shape[-1])
        return F.cross_entropy(logits, labels.view(-1).long(), reduction="sum")
    labels = labels.reshape(logits.shape).float()
    if problem_type == "regression":
        return F.mse_loss(logits, labels, reduction="sum")
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    """
    Sum of weighted cross entropies of a linear head, a chunk of rows at a time.

    The gradients are computed in the forward pass, while a chunk's logits are at hand (as in Liger Kernel and Apple's
    Cut Cross-Entropy): the same three matrix products as the plain way, and never more than one chunk of logits.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, row_weights, softcap, num_ids, count_correct, chunk_rows, compute_dtype
    ):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        need_grad = need_hidden or need_weight or need_bias
        head = weight.to(compute_dtype)
        chunk_rows = max(min(chunk_rows, hidden.shape[0]), 1)
        by_onednn = compute_dtype == hidden.dtype and takes_onednn(hidden[:chunk_rows], head)
        # Sums run in float32 at least, whatever the products run in.
        sum_dtype = torch.promote_types(compute_dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if need_weight and not by_onednn else None
        grad_bias = torch.zeros_like(bias, dtype=sum_dtype) if need_bias else None
        total = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        num_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        padding = None
        if num_ids is not None and num_ids < weight.shape[0]:
            padding = slice(num_ids, None)

        # Two buffers for all chunks: fresh ones would cost the system's zeroing of their pages each time. A compiler
        # plans its memory itself, and would copy a buffer whenever a part of it is written to.
        plans_memory = torch.compiler.is_compiling()
        shape = (chunk_rows, weight.shape[0])
        buffer = capped = None
        if not plans_memory and not by_onednn:
            buffer = torch.empty(shape, dtype=sum_dtype, device=hidden.device)
        if not plans_memory and softcap is not None:
            capped = torch.empty(shape, dtype=sum_dtype, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            inputs = hidden[rows].to(compute_dtype)
            target = targets[rows, None].clamp(min=0)
            logits = None if plans_memory or by_onednn else buffer[: len(inputs)]
            if by_onednn:
                logits = onednn_product(inputs, head)
            elif compute_dtype == sum_dtype:
                logits = torch.mm(inputs, head.t(), out=logits)  # (R, V)
            elif plans_memory:
                logits = (inputs @ head.t()).to(sum_dtype)
            else:
                logits.copy_(inputs @ head.t())
            if bias is not None:
                logits += bias
            if softcap is not None:
                tanh = torch.tanh(logits.div_(softcap), out=None if plans_memory else capped[: len(inputs)])
                logits = torch.mul(tanh, softcap, out=None if plans_memory else logits)
            if padding is not None:
                logits[:, padding] = masked_logit(logits.dtype)
            if count_correct:
                num_correct += (logits.argmax(1, keepdim=True) == targets[rows, None]).sum()
            if not need_grad:
                losses = logits.logsumexp(1, keepdim=True) - logits.gather(1, target)  # (R, 1)
                total += (losses if row_weights is None else losses * row_weights[rows, None]).sum()
                continue

            # In place, and row by row while a row is in the cache: the logits are read from memory twice.
            log_probabilities = torch.log_softmax(logits, 1, out=None if plans_memory else logits)
            losses = -log_probabilities.gather(1, target)
            grad = log_probabilities.exp_()
            grad.scatter_add_(1, target, torch.full_like(losses, -1.0))
            if softcap is not None:
                # d(cap * tanh(x / cap)) / dx
                grad.addcmul_(grad, tanh.square_(), value=-1)
            if row_weights is not None:
                # A row's weight goes to its (D,), not to its (V,).
                row_weight = row_weights[rows, None]
                losses = losses * row_weight
                inputs = inputs * row_weight.to(compute_dtype)
            total += losses.sum()
            if need_bias:
                grad_bias += grad.sum(0) if row_weights is None else (row_weight.to(sum_dtype) * grad).sum(0)
            grad = grad.to(compute_dtype)
            if need_hidden:
                chunk = onednn_product(grad, head.t()) if by_onednn else grad @ head
                grad_hidden[rows] = chunk if row_weights is None else chunk * row_weight
            if need_weight:
                if by_onednn:
                    # the sum keeps the strides of the first, which the others have too
                    product = outer_product(grad, inputs)
                    grad_weight = product if start == 0 else grad_weight.add_(product)
                elif compute_dtype == sum_dtype:
                    grad_weight.addmm_(grad.t(), inputs, beta=float(start > 0))
                else:
                    grad_weight += grad.t() @ inputs
        if grad_weight is not None:
            # once here rather than wherever it is added to another
            grad_weight = grad_weight.contiguous()
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.options = (softcap, num_ids, compute_dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, hidden, weight, bias, targets, row_weights)
        ctx.mark_non_differentiable(num_correct)
        return total, num_correct

    @staticmethod
    def backward(ctx, grad_total, _):
        *saved, hidden, weight, bias, targets, row_weights = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # To be differentiated again (create_graph=True): of what was computed in advance there is no graph.
            # Views, so that a gradient is not also that by way of another input: hidden states of a tied head.
            inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in (hidden, weight, bias)]
            total, _ = plain_cross_entropy(inputs[0], inputs[1], inputs[2], targets, row_weights, *ctx.options)
            needed = [i for i in range(3) if ctx.needs_input_grad[i]]
            recomputed = torch.autograd.grad(total, [inputs[i] for i in needed], grad_total, create_graph=True)
            found = dict(zip(needed, recomputed, strict=True))
            return *(found.get(i) for i in range(3)), None, None, None, None, None, None, None
        # Looking is free on a CPU, where a table's product with 1 takes as long as its sum over a chunk.
        is_one = grad_total.device.type == "cpu" and not is_tracing(grad_total) and grad_total.item() == 1
        grads = []
        for grad, dtype in zip(saved, ctx.dtypes, strict=True):
            grads.append(grad if grad is None else (grad if is_one else grad * grad_total).to(dtype))
        return *grads, None, None, None, None, None, None, None


def plain_cross_entropy(
    hidden, weight, bias, targets, row_weights, softcap, num_ids, compute_dtype, count_correct=False
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `_LinearCrossEntropy` returns, by autograd's own functions and with all the logits at once."""
    sum_dtype = torch.promote_types(compute_dtype, torch.float32)
    logits = linear(hidden.to(compute_dtype), weight.to(compute_dtype)).to(sum_dtype)
    logits = finish_logits(logits if bias is None else logits + bias, softcap, num_ids)
    losses = F.cross_entropy(logits, targets.clamp(min=0), reduction="none")
    total = (losses if row_weights is None else losses * row_weights).sum()
    num_correct = (logits.argmax(1) == targets).sum() if count_correct else targets.new_zeros((), dtype=torch.int64)
    return total, num_correct


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    row_weights: torch.Tensor | None = None,
    divisor: torch.Tensor | float = 1.0,
    softcap: float | None = None,
    num_ids: int | None = None,
    ignore_index: int = -100,
    count_correct: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cross entropy of `finish_logits(hidden @ weight.T + bias)`, summed, without ever holding all the logits.

    Args:
        hidden: (N, D) in any floating dtype; under autocast the products are computed in autocast's.
        weight: (V, D).
        bias: (V,) or None.
        targets: (N,) token ids; rows whose target is `ignore_index` cost no work.
        row_weights: (N,) factor of each row's loss; None for 1.
        divisor: of the sum.
        softcap, num_ids: as in `finish_logits`.

    Returns:
        The sum over the divisor (float32, 0-dim) and, if `count_correct`, the number of targets that are the most
        likely id (else 0; int64, 0-dim).
    """
    transformed = is_transformed()
    if not torch.compiler.is_compiling() and not transformed:
        rows = (targets != ignore_index).nonzero().squeeze(1)
        if rows.numel() < targets.numel():
            hidden, targets = hidden[rows], targets[rows]
            row_weights = None if row_weights is None else row_weights[rows]
    else:
        # No shape may depend on the data here, nor under `torch.func`: an ignored row is scored with weight 0.
        keep = targets != ignore_index
        row_weights = keep.to(torch.float32) if row_weights is None else row_weights * keep
        targets = targets.where(keep, -1)
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    compute_dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    chunk_rows = max(CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cuda"]) // weight.shape[0], MIN_CHUNK_ROWS)
    # Within the sum it costs nothing; but in half precision the gradients might vanish before they are summed.
    divides_rows = compute_dtype in (torch.float32, torch.float64)
    if divides_rows:
        row_weights = (torch.ones((), device=hidden.device) if row_weights is None else row_weights) / divisor
        row_weights = row_weights.expand(hidden.shape[0])
        num_more = aligned(hidden.shape[0]) - hidden.shape[0] if takes_onednn(hidden, weight) else 0
        if num_more:
            # Rows of weight 0: there are too many numbers of labels to compile for each.
            hidden = F.pad(hidden, (0, 0, 0, num_more))
            targets, row_weights = F.pad(targets, (0, num_more), value=-1), F.pad(row_weights, (0, num_more))
    with torch.autocast(device, enabled=False):
        if transformed:
            total, num_correct = plain_cross_entropy(
                hidden, weight, bias, targets, row_weights, softcap, num_ids, compute_dtype, count_correct
            )
        else:
            total, num_correct = _LinearCrossEntropy.apply(
                hidden, weight, bias, targets, row_weights, softcap, num_ids, count_correct, chunk_rows, compute_dtype
            )
    return total if divides_rows else total / divisor, num_correct


def causal_lm_loss_without_logits(
    lm_head: nn.Linear,
    hidden_states: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    softcap: float | None = None,
    num_ids: int | None = None,
    count_correct: bool = False,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`causal_lm_loss` of a plain linear head on hidden states (B, T, D), and the hits of `linear_cross_entropy`."""
    targets = (shift(labels, ignore_index) if shift_labels is None else shift_labels).flatten()
    targets = targets.to(hidden_states.device)
    check_labels(targets, lm_head.out_features if num_ids is None else num_ids, ignore_index)
    return linear_cross_entropy(
        hidden_states.flatten(0, 1),
        lm_head.weight,
        lm_head.bias,
        targets,
        divisor=count_items(num_items_in_batch, targets, ignore_index),
        softcap=softcap,
        num_ids=num_ids,
        ignore_index=ignore_index,
        count_correct=count_correct,
    )


def auxiliary_lm_loss(
    lm_head: nn.Linear,
    hidden_states: torch.Tensor,
    input_ids: torch.Tensor | None,
    is_text: torch.Tensor,
    *,
    softcap: float | None = None,
    num_ids: int | None = None,
) -> torch.Tensor:
    """
    The language-model loss beside a classifier's (Radford et al., 2018): for each row its mean over tokens, summed
    over the rows, float32.

    Args:
        hidden_states: (B, T, D).
        input_ids: (B, T), the labels before the shift.
        is_text: (B, T), False on padding.
        softcap, num_ids: as in `finish_logits`.

    Raises:
        ValueError: the batch came as embeddings.
    """
    if input_ids is None:
        raise ValueError(
            "auxiliary_lm_weight above 0 needs input_ids, the language model's labels: with inputs_embeds set it to 0."
        )
    targets = shift(input_ids.masked_fill(~is_text, -100), -100).masked_fill(~is_text, -100)
    lengths = (targets != -100).sum(-1, keepdim=True).clamp(min=1)
    row_weights = (1 / lengths).expand_as(targets).flatten()
    hidden_states, targets = hidden_states.flatten(0, 1), targets.flatten()
    if is_plain_linear(lm_head):
        total, _ = linear_cross_entropy(
            hidden_states,
            lm_head.weight,
            lm_head.bias,
            targets,
            row_weights=row_weights,
            softcap=softcap,
            num_ids=num_ids,
        )
        return total
    logits = finish_logits(project(lm_head, hidden_states), softcap, num_ids).float()
    return (F.cross_entropy(logits, targets, reduction="none") * row_weights).sum()
