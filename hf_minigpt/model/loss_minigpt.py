"""Logits and losses: of the language model, with and without holding the logits, and of the classifier."""

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils.import_utils import is_tracing

from .products_minigpt import (
    fast_paths_enabled,
    in_function_transform,
    is_fsdp_linear,
    is_plain_linear,
    linear,
    onednn_product,
    project,
    round_up_rows,
    uses_onednn,
    weight_gradient,
)


# Logits held at one time, and the fewest rows of a chunk, below which matrix products slow down.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
MIN_CHUNK_ROWS = 512
# Where the passes over a chunk are compiled, and the multiple of elements at which rows of logits begin there.
COMPILED_DEVICES = {"cuda"}
ROW_ALIGNMENT = 64


def masked_logit(dtype: torch.dtype) -> float:
    """
    Return the logit of an id that does not exist, whose probability is 0.

    The lowest finite value would become infinite when divided by a temperature below 1, and an entropy NaN.
    """
    return -(torch.finfo(dtype).max ** 0.8)


def finish_logits(logits: torch.Tensor, softcap: float | None, num_ids: int | None) -> torch.Tensor:
    """
    Apply the soft cap, then mask the ids beyond the tokenizer's.

    Args:
        logits: (..., V), from the head's matrix product.
        softcap: `cap * tanh(logits / cap)`; None for no cap.
        num_ids: ids from here on get `masked_logit`; None if the embedding table is not padded.
    """
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if num_ids is not None and num_ids < logits.shape[-1]:
        padding = torch.arange(logits.shape[-1], device=logits.device) >= num_ids
        logits = logits.masked_fill(padding, masked_logit(logits.dtype))
    return logits


def compute_logits(lm_head: nn.Module, hidden_states: torch.Tensor, config, crop: bool = False) -> torch.Tensor:
    """
    Compute the logits (..., V) of hidden states (..., C).

    Args:
        crop: leave out the ids beyond the tokenizer's instead of masking them, for losses that sum over all ids.
    """
    logits = project(lm_head, hidden_states)
    if crop and config.unpadded_vocab_size is not None:
        logits = logits[..., : config.unpadded_vocab_size]
    return finish_logits(logits, config.final_logit_softcapping, config.unpadded_vocab_size)


def select_positions(states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """
    Select the positions of `states` (B, T, C) that `logits_to_keep` names, as transformers does since 5.21.

    Args:
        logits_to_keep: the last N positions (0: all), positions (N,) of every row, positions (B, N) of each row, or a
            boolean mask (B, T), which flattens.
    """
    if isinstance(logits_to_keep, int):
        return states[:, -logits_to_keep:] if logits_to_keep else states
    if logits_to_keep.ndim < 2:
        return states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return states[logits_to_keep]
    return torch.take_along_dim(states, logits_to_keep[..., None], dim=1)


def pop_loss_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of `causal_lm_loss` out of `kwargs`."""
    return {
        name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels", "ignore_index") if name in kwargs
    }


def check_labels(labels: torch.Tensor, num_ids: int, ignore_index: int = -100) -> None:
    """
    Refuse labels outside [0, num_ids) other than `ignore_index`. Only on the CPU: reading values waits for a GPU.

    Raises:
        ValueError: a label is out of range.
    """
    if is_tracing(labels) or in_function_transform() or labels.device.type != "cpu" or labels.numel() == 0:
        return
    wrong = labels[((labels < 0) | (labels >= num_ids)) & (labels != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"Label {int(wrong[0])} is out of range: there are {num_ids} ids or classes, 0 to {num_ids - 1}, and "
            f"{ignore_index} is ignored. Check the tokenizer or the label column against the model's config."
        )


def next_token_labels(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Shift labels (B, T) to the position that predicts them, one to the left."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def loss_divisor(num_items: torch.Tensor | int | None, targets: torch.Tensor, ignore_index: int = -100):
    """Return the divisor of a summed loss, at least 1: a batch without targets has a loss of 0 instead of NaN."""
    if num_items is None:
        num_items = (targets != ignore_index).sum()
    if torch.is_tensor(num_items):
        # A GPU takes a scalar from the CPU as it is, and would be waited for to copy it.
        is_scalar = num_items.device.type == "cpu" and num_items.ndim == 0
        return (num_items if is_scalar else num_items.to(targets.device)).clamp(min=1)
    return max(num_items, 1)


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
    Compute transformers' `ForCausalLMLoss`, except that a batch without targets has a loss of 0 instead of NaN.

    Args:
        logits: (B, T, vocab_size).
        labels: (B, T) token ids; position t is scored against label t + 1.
        num_items_in_batch: divisor of the summed loss; None: the number of labels that are not ignored.
        shift_labels: (B, T) labels that are already shifted, used instead of `labels`.
    """
    if shift_labels is None:
        shift_labels = next_token_labels(labels, ignore_index)
    targets = shift_labels.reshape(-1).to(logits.device)  # (B * T,)
    check_labels(targets, vocab_size, ignore_index)
    total = F.cross_entropy(
        logits.reshape(-1, vocab_size).float(), targets, ignore_index=ignore_index, reduction="sum"
    )
    return total / loss_divisor(num_items_in_batch, targets, ignore_index)


def count_correct_labels(logits, labels, shift_labels=None, ignore_index: int = -100, **kwargs) -> torch.Tensor:
    """Count the labels that are the most likely token (int64, 0-dim); arguments as in `causal_lm_loss`."""
    targets = next_token_labels(labels, ignore_index) if shift_labels is None else shift_labels
    return (logits.argmax(-1) == targets).sum()


def can_skip_logits(lm_head: nn.Module) -> bool:
    """Return whether the loss may be computed from the head's weight: a plain linear layer, also sharded by FSDP2."""
    return is_plain_linear(lm_head) or is_fsdp_linear(lm_head)


def apply_to_weight(lm_head: nn.Module, hidden_states: torch.Tensor, function: Callable):
    """Return `function(hidden_states, weight, bias)` of a head that `can_skip_logits`, with its whole weight."""
    if is_plain_linear(lm_head):
        return function(hidden_states, lm_head.weight, lm_head.bias)
    return _apply_to_gathered_weight(lm_head, hidden_states, function)


@torch.compiler.disable
def _apply_to_gathered_weight(lm_head, hidden_states, function):
    # The function takes the place of `forward`, so that FSDP2's own hooks gather the weight before it and shard it
    # after it, and gather and reduce in the backward pass, whichever modules share the weight or its group.
    lm_head.forward = lambda hidden_states: function(hidden_states, lm_head.weight, lm_head.bias)
    try:
        return lm_head(hidden_states)
    finally:
        del lm_head.forward


def causal_lm_loss_without_logits(
    lm_head: nn.Linear,
    hidden_states: torch.Tensor,
    labels: torch.Tensor | None,
    config,
    *,
    count_correct: bool = False,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Compute `causal_lm_loss` of a head that `can_skip_logits` on hidden states (B, T, C), without holding all logits.

    Returns:
        The loss, and with `count_correct` the number of labels that are the most likely token (else None).
    """
    targets = (next_token_labels(labels, ignore_index) if shift_labels is None else shift_labels).flatten()
    targets = targets.to(hidden_states.device)  # (B * T,)
    num_ids = config.unpadded_vocab_size
    check_labels(targets, lm_head.out_features if num_ids is None else num_ids, ignore_index)
    divisor = loss_divisor(num_items_in_batch, targets, ignore_index)

    def compute_loss(hidden_states, weight, bias):
        return linear_cross_entropy(
            hidden_states,
            weight,
            bias,
            targets,
            divisor=divisor,
            softcap=config.final_logit_softcapping,
            num_ids=num_ids,
            ignore_index=ignore_index,
            count_correct=count_correct,
        )

    loss, num_correct = apply_to_weight(lm_head, hidden_states.flatten(0, 1), compute_loss)
    return loss, num_correct if count_correct else None


def auxiliary_lm_loss(
    lm_head: nn.Linear, hidden_states: torch.Tensor, input_ids: torch.Tensor | None, is_text: torch.Tensor, config
) -> torch.Tensor:
    """
    Compute the language-model loss that is added to a classifier's (Radford et al., 2018).

    Args:
        hidden_states: (B, T, C).
        input_ids: (B, T), the labels before the shift.
        is_text: bool (B, T), False on padding.

    Returns:
        Each row's mean over its tokens, summed over the rows (float32, 0-dim).

    Raises:
        ValueError: the batch has embeddings instead of ids.
    """
    if input_ids is None:
        raise ValueError(
            f"auxiliary_lm_weight={config.auxiliary_lm_weight} requires input_ids, the labels of the language model. "
            "Give input_ids instead of inputs_embeds, or set auxiliary_lm_weight to 0."
        )
    targets = next_token_labels(input_ids.masked_fill(~is_text, -100), -100).masked_fill(~is_text, -100)  # (B, T)
    lengths = (targets != -100).sum(-1, keepdim=True).clamp(min=1)
    row_weights = (1 / lengths).expand_as(targets).flatten()
    hidden_states, targets = hidden_states.flatten(0, 1), targets.flatten()
    if can_skip_logits(lm_head):

        def compute_loss(hidden_states, weight, bias):
            softcap, num_ids = config.final_logit_softcapping, config.unpadded_vocab_size
            return linear_cross_entropy(
                hidden_states, weight, bias, targets, row_weights=row_weights, softcap=softcap, num_ids=num_ids
            )

        return apply_to_weight(lm_head, hidden_states, compute_loss)[0]
    logits = compute_logits(lm_head, hidden_states, config).float()
    return (F.cross_entropy(logits, targets, reduction="none") * row_weights).sum()


ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


def infer_problem_type(labels: torch.Tensor, num_labels: int) -> ProblemType:
    """Infer the problem type as transformers' models do: regression with one label, else by the labels' dtype."""
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
    Compute the loss of a classifier, summed over the label entries, in float32.

    Args:
        logits: (B, num_labels).
        labels: class numbers (B,), or floats (B, num_labels), with one label also (B,).
        problem_type: one of transformers' three.

    Raises:
        ValueError: the labels have another shape, or class numbers are not integers.
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


def classifier_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    config,
    num_items_in_batch: torch.Tensor | int | None,
    auxiliary_loss: torch.Tensor | None,
) -> torch.Tensor:
    """
    Compute the loss of a classifier (0-dim), and set `config.problem_type` where it is None.

    Args:
        logits: (B, num_labels).
        labels: as in `classification_loss`.
        num_items_in_batch: divisor of the summed loss; None: the number of label entries in this batch.
        auxiliary_loss: the language-model loss, summed over the rows; None without one.
    """
    problem_type = config.problem_type or infer_problem_type(labels, config.num_labels)
    loss = classification_loss(logits, labels, problem_type)
    if config.problem_type is None:
        # As in transformers' own models: a pipeline chooses its output function by it.
        config.problem_type = problem_type
    if num_items_in_batch is None:
        is_class = problem_type == "single_label_classification"
        num_items_in_batch = (labels != -100).sum() if is_class else labels.numel()
    divisor = loss_divisor(num_items_in_batch, labels)
    loss = loss / divisor
    if auxiliary_loss is not None:
        labels_per_row = max(labels.numel() // logits.shape[0], 1)
        loss = loss + config.auxiliary_lm_weight * (auxiliary_loss * labels_per_row / divisor)
    return loss


def choose_chunk_rows(num_rows: int, num_ids: int, device: str, bytes_each: int = 4) -> int:
    """
    Choose how many rows of logits (num_rows, num_ids) to hold at one time.

    Args:
        bytes_each: of the largest buffer's elements.
    """
    num_elements = CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cuda"]) * 4 // bytes_each
    most = max(num_elements // num_ids, MIN_CHUNK_ROWS)
    if device == "cpu" or num_rows <= most:
        return max(min(most, num_rows), 1)
    # Chunks of one shape, if at most twice as many make it, so that a compiler sees one shape.
    fewest = -(-num_rows // most)
    num_chunks = next((n for n in range(fewest, 2 * fewest + 1) if num_rows % n == 0), fewest)
    return -(-num_rows // num_chunks)


def empty_logits(num_rows: int, num_ids: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocate (num_rows, num_ids). Off the CPU each row begins aligned, which fast kernels of a GPU require."""
    width = num_ids if device.type == "cpu" else -(-num_ids // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return torch.empty(num_rows, width, dtype=dtype, device=device)[:, :num_ids]


def chunk_losses(logits, bias, targets, row_weights, softcap, num_ids, count_correct, need_grad, need_bias):
    """
    Compute the losses of a chunk and, in place, their gradients.

    Written for a compiler, which fuses it into one pass that reads the logits and one that replaces them.

    Args:
        logits: (R, V), the head's product. With `need_grad` the gradients of the losses, without the rows' weights,
            replace it.
        targets: (R, 1).
        row_weights: (R, 1) or None.

    Returns:
        The weighted sum of the losses, the number of correct targets (or None), the bias's gradient (V,) (or None).
    """
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        values = values + bias
    if softcap is not None:
        tanh = torch.tanh(values / softcap)
        values = tanh * softcap
    columns = torch.arange(values.shape[1], device=values.device)
    if num_ids is not None and num_ids < values.shape[1]:
        values = values.masked_fill(columns >= num_ids, masked_logit(values.dtype))
    is_target = columns == targets
    log_sums = values.logsumexp(1, keepdim=True)
    losses = log_sums - values.masked_fill(~is_target, 0).sum(1, keepdim=True)
    total = (losses if row_weights is None else losses * row_weights).sum()
    num_correct = (values.argmax(1, keepdim=True) == targets).sum() if count_correct else None
    grad_bias = None
    if need_grad:
        grad = (values - log_sums).exp() - is_target.to(values.dtype)
        if softcap is not None:
            # d(cap * tanh(x / cap)) / dx
            grad = grad * (1 - tanh * tanh)
        if need_bias:
            grad_bias = (grad if row_weights is None else grad * row_weights).sum(0)
        logits.copy_(grad)
    return total, num_correct, grad_bias


def chunk_losses_in_place(
    logits, bias, targets, row_weights, softcap, num_ids, count_correct, need_grad, need_bias, scratch
):
    """
    Compute `chunk_losses` in eager mode, in few passes and few buffers.

    Args:
        scratch: returns, for each name, a buffer of float32 or more for the logits.
    """
    product, num_rows = logits, len(logits)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = scratch("logits")[:num_rows].copy_(logits)
    if bias is not None:
        logits += bias
    if softcap is not None:
        tanh = torch.tanh(logits.div_(softcap), out=scratch("tanh")[:num_rows])
        logits = torch.mul(tanh, softcap, out=logits)
    if num_ids is not None and num_ids < logits.shape[1]:
        logits[:, num_ids:] = masked_logit(logits.dtype)
    num_correct = (logits.argmax(1, keepdim=True) == targets).sum() if count_correct else None
    target = targets.clamp(min=0)
    if not need_grad:
        losses = logits.logsumexp(1, keepdim=True) - logits.gather(1, target)  # (R, 1)
        return (losses if row_weights is None else losses * row_weights).sum(), num_correct, None

    # In place, so that the logits are read from memory only twice.
    log_probabilities = torch.log_softmax(logits, 1, out=logits)
    losses = -log_probabilities.gather(1, target)
    grad = log_probabilities.exp_()
    grad.scatter_add_(1, target, torch.full_like(losses, -1.0))
    if softcap is not None:
        grad.addcmul_(grad, tanh.square_(), value=-1)
    grad_bias = None
    if need_bias:
        grad_bias = grad.sum(0) if row_weights is None else (row_weights.to(grad.dtype) * grad).sum(0)
    if grad.dtype != product.dtype:
        product.copy_(grad)
    return (losses if row_weights is None else losses * row_weights).sum(), num_correct, grad_bias


@functools.cache
def compiled_chunk_losses() -> Callable:
    # A run has few combinations of shapes and flags. Many vocabularies, one after the other, have more than 8.
    return torch.compile(chunk_losses, fullgraph=True, recompile_limit=64)  # type: ignore[call-overload]


_compilation_failed = False


def compiles_chunks(hidden: torch.Tensor) -> bool:
    """Return whether `chunk_losses` is compiled: on a GPU, where it takes a fraction of the passes of eager mode."""
    return (
        hidden.device.type in COMPILED_DEVICES
        and not _compilation_failed
        and type(hidden) in (torch.Tensor, nn.Parameter)
        and not torch.jit.is_tracing()
        and not torch._dynamo.config.disable
    )


def run_compiled_chunk(*args):
    """Return the result of `chunk_losses`, compiled; None, and a warning once, if it does not compile."""
    global _compilation_failed
    try:
        return compiled_chunk_losses()(*args)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _compilation_failed = True
        warnings.warn(
            f"The loss of the language model does not compile ({type(error).__name__}: {error}) and runs in eager "
            "mode, several times slower. Install Triton and a C compiler.",
            stacklevel=2,
        )
        return None


@torch.no_grad()
def sum_over_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    row_weights: torch.Tensor | None,
    softcap: float | None,
    num_ids: int | None,
    count_correct: bool,
    needs: list[bool],
    compute_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """
    Compute the sum of the losses, the number of correct targets, and the gradients of hidden, weight and bias.

    Args:
        needs: which of the three gradients to compute; the others are None.
    """
    need_hidden, need_weight, need_bias = needs
    need_grad = any(needs)
    head = weight.to(compute_dtype)
    device, num_columns = hidden.device, weight.shape[0]
    is_compiled = compiles_chunks(hidden)
    # The compiled passes need no buffer in float32.
    bytes_each = compute_dtype.itemsize if is_compiled else 4
    chunk_rows = choose_chunk_rows(hidden.shape[0], num_columns, device.type, bytes_each)
    use_onednn = not is_compiled and compute_dtype == hidden.dtype and uses_onednn(hidden[:chunk_rows], head)
    # Sums use float32 or more, also after products in half precision.
    sum_dtype = torch.promote_types(compute_dtype, torch.float32)
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if need_weight and not use_onednn else None
    grad_bias = torch.zeros_like(bias, dtype=sum_dtype) if need_bias else None
    total = torch.zeros((), dtype=sum_dtype, device=device)
    num_correct = torch.zeros((), dtype=torch.int64, device=device)
    # Reuse buffers: new pages must be zeroed.
    buffer = None if use_onednn else empty_logits(chunk_rows, num_columns, compute_dtype, device)
    scratch = functools.cache(lambda _: empty_logits(chunk_rows, num_columns, sum_dtype, device))
    for start in range(0, hidden.shape[0], chunk_rows):
        rows = slice(start, start + chunk_rows)
        inputs = hidden[rows].to(compute_dtype)
        row_weight = None if row_weights is None else row_weights[rows, None]
        if buffer is None:
            logits = onednn_product(inputs, head)
        else:
            logits = torch.mm(inputs, head.t(), out=buffer[: len(inputs)])  # (R, V)
        arguments = (
            logits,
            bias,
            targets[rows, None],
            row_weight,
            softcap,
            num_ids,
            count_correct,
            need_grad,
            need_bias,
        )
        results = run_compiled_chunk(*arguments) if compiles_chunks(hidden) else None
        loss, correct, chunk_grad_bias = results or chunk_losses_in_place(*arguments, scratch)
        total += loss
        if count_correct:
            num_correct += correct
        if need_bias:
            grad_bias += chunk_grad_bias
        if not need_grad:
            continue
        grad = logits  # (R, V), in place
        if row_weights is not None:
            # Scale a row's inputs (D,), which are smaller than its gradient (V,).
            inputs = inputs * row_weight.to(compute_dtype)
        if need_hidden:
            chunk = onednn_product(grad, head.t()) if use_onednn else grad @ head
            grad_hidden[rows] = chunk if row_weights is None else chunk * row_weight
        if need_weight:
            if use_onednn:
                product = weight_gradient(grad, inputs)
                grad_weight = product if start == 0 else grad_weight.add_(product)
            elif compute_dtype == sum_dtype:
                grad_weight.addmm_(grad.t(), inputs, beta=float(start > 0))
            else:
                grad_weight += grad.t() @ inputs
    if grad_weight is not None:
        # Once here, instead of at every accumulation into another gradient.
        grad_weight = grad_weight.contiguous()
    return total, num_correct, grad_hidden, grad_weight, grad_bias


# The file exists twice where the package and a checkpoint's own code are loaded, but an operator's name once.
@torch.library.custom_op("minigpt::sum_over_chunks_" + re.sub(r"\W", "_", __name__), mutates_args=())
def sum_over_chunks_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    row_weights: torch.Tensor | None,
    softcap: float | None,
    num_ids: int | None,
    count_correct: bool,
    needs: list[bool],
    compute_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Compute `sum_over_chunks` as one operator of a compiled model: its graph does not depend on the number of chunks.
    Gradients that are not needed are empty.
    """
    # A compiled model runs under its caller's autocast.
    with torch.autocast(hidden.device.type, enabled=False):
        total, num_correct, *grads = sum_over_chunks(
            hidden, weight, bias, targets, row_weights, softcap, num_ids, count_correct, needs, compute_dtype
        )
    first, second, third = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return total, num_correct, first, second, third


@sum_over_chunks_op.register_fake
def _(hidden, weight, bias, targets, row_weights, softcap, num_ids, count_correct, needs, compute_dtype):
    sum_dtype = torch.promote_types(compute_dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=sum_dtype),
        hidden.new_empty((), dtype=torch.int64),
        torch.empty_like(hidden) if needs[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape, dtype=sum_dtype) if needs[1] else hidden.new_empty(0),
        bias.new_empty(bias.shape, dtype=sum_dtype) if needs[2] else hidden.new_empty(0),
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """
    Sum of weighted cross entropies of a linear head, computed one chunk of rows at a time.

    The gradients are computed in the forward pass, from each chunk's logits (as in Liger Kernel and Apple's Cut
    Cross-Entropy). This takes the same three matrix products as the plain computation, and holds one chunk of logits.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, row_weights, softcap, num_ids, count_correct, compute_dtype):
        needs = list(ctx.needs_input_grad[:3])
        compute = sum_over_chunks_op if torch.compiler.is_compiling() else sum_over_chunks
        total, num_correct, *grads = compute(
            hidden, weight, bias, targets, row_weights, softcap, num_ids, count_correct, needs, compute_dtype
        )
        grads = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.options = (softcap, num_ids, compute_dtype)
        ctx.save_for_backward(*grads, hidden, weight, bias, targets, row_weights)
        ctx.mark_non_differentiable(num_correct)
        return total, num_correct

    @staticmethod
    def backward(ctx, grad_total, _):
        *saved, hidden, weight, bias, targets, row_weights = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Second derivatives (create_graph=True) need a graph, so recompute the loss with autograd's functions.
            # Views separate the inputs: with a tied head, hidden states depend on the same weight.
            inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in (hidden, weight, bias)]
            total, _ = plain_cross_entropy(inputs[0], inputs[1], inputs[2], targets, row_weights, *ctx.options)
            needed = [i for i in range(3) if ctx.needs_input_grad[i]]
            recomputed = torch.autograd.grad(total, [inputs[i] for i in needed], grad_total, create_graph=True)
            found = dict(zip(needed, recomputed, strict=True))
            return *(found.get(i) for i in range(3)), None, None, None, None, None, None
        # Reading the value is free on a CPU, where multiplying the weight's gradient by 1 is not.
        is_one = grad_total.device.type == "cpu" and not is_tracing(grad_total) and grad_total.item() == 1
        grads = []
        for grad, dtype in zip(saved, ctx.dtypes, strict=True):
            grads.append(grad if grad is None else (grad if is_one else grad * grad_total).to(dtype))
        return *grads, None, None, None, None, None, None


def plain_cross_entropy(
    hidden, weight, bias, targets, row_weights, softcap, num_ids, compute_dtype, count_correct=False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the result of `_LinearCrossEntropy` with autograd's own functions and all logits at once."""
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
    Sum the cross entropies of `finish_logits(hidden @ weight.T + bias)`, without holding all logits.

    Args:
        hidden: (N, D), any floating dtype. Under autocast the products use autocast's dtype.
        weight: (V, D).
        bias: (V,) or None.
        targets: (N,) token ids. Rows whose target is `ignore_index` are skipped.
        row_weights: (N,) factor of each row's loss; None for 1.
        divisor: divisor of the sum.
        softcap, num_ids: as in `finish_logits`.

    Returns:
        The sum divided by the divisor (float32, 0-dim), and the number of targets that are the most likely id (int64,
        0-dim; 0 without `count_correct`).
    """
    in_transform = in_function_transform()
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling() and not in_transform:
        rows = (targets != ignore_index).nonzero().squeeze(1)
        if rows.numel() < targets.numel():
            hidden, targets = hidden[rows], targets[rows]
            row_weights = None if row_weights is None else row_weights[rows]
    else:
        # Shapes must not depend on values when compiling or under `torch.func`, and on a GPU the CPU would wait for
        # them. So ignored rows get weight 0.
        keep = targets != ignore_index
        row_weights = keep.to(torch.float32) if row_weights is None else row_weights * keep
        targets = targets.where(keep, -1)
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    compute_dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    # Dividing each row is free, but in half precision the gradients could underflow before they are summed.
    divide_rows = compute_dtype in (torch.float32, torch.float64)
    if divide_rows:
        row_weights = (torch.ones((), device=hidden.device) if row_weights is None else row_weights) / divisor
        row_weights = row_weights.expand(hidden.shape[0])
        num_padding = round_up_rows(hidden.shape[0]) - hidden.shape[0] if uses_onednn(hidden, weight) else 0
        if num_padding:
            # Pad with rows of weight 0, because oneDNN compiles per shape.
            hidden = F.pad(hidden, (0, 0, 0, num_padding))
            targets, row_weights = F.pad(targets, (0, num_padding), value=-1), F.pad(row_weights, (0, num_padding))
    with torch.autocast(device, enabled=False):
        if in_transform or not fast_paths_enabled():
            total, num_correct = plain_cross_entropy(
                hidden, weight, bias, targets, row_weights, softcap, num_ids, compute_dtype, count_correct
            )
        else:
            total, num_correct = _LinearCrossEntropy.apply(
                hidden, weight, bias, targets, row_weights, softcap, num_ids, count_correct, compute_dtype
            )
    return total if divide_rows else total / divisor, num_correct
