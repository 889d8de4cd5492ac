"""The inputs of a classifier: the padding mask, truncated rows, and one pooled vector per row."""

import torch


def non_padding_mask(
    inputs: torch.Tensor,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    pad_token_id: int | None,
) -> torch.Tensor:
    """
    Return which positions of inputs (B, T, ...) are not padding, as bool (B, T).

    It follows from the attention mask, else from leading and trailing pad tokens. A single row without either has no
    padding.

    Raises:
        ValueError: several rows, with neither a mask nor a pad token.
    """
    batch_size, length = inputs.shape[:2]
    if attention_mask is not None and attention_mask.ndim == 2:
        return attention_mask[:, -length:] != 0
    if input_ids is not None and pad_token_id is not None:
        is_pad = input_ids == pad_token_id
        # A pad token inside the text is part of the text.
        return ~(is_pad.cumprod(-1) + is_pad.flip(-1).cumprod(-1).flip(-1)).bool()
    if batch_size == 1:
        return torch.ones((1, length), dtype=torch.bool, device=inputs.device)
    raise ValueError(
        f"Cannot find the padding in a batch of {batch_size} rows. Pass attention_mask, or pass input_ids and set "
        f"config.pad_token_id (now {pad_token_id})."
    )


def num_head_tokens(truncation: str, length: int) -> int:
    """
    Return how many of the `length` tokens kept of a longer text come from its beginning.

    The first and the last token of a text are always kept. `head_tail` takes a quarter of the others from the head, as
    in Sun et al. (2019), "How to Fine-Tune BERT for Text Classification?".
    """
    return {"head": length - 1, "tail": 1, "head_tail": 1 + round(0.25 * (length - 2))}[truncation]


def truncate_rows(
    input_ids: torch.Tensor, is_text: torch.Tensor, truncation: str, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Keep `length` tokens of each longer row, and move the padding to the right.

    Args:
        input_ids: (B, T), padded on either side.
        is_text: bool (B, T), False on padding.
        truncation: `head`, `tail` or `head_tail`.
        length: number of tokens to keep. Shorter texts are kept whole.

    Returns:
        Ids (B, length), and their attention mask (B, length) as int64.
    """
    num_head = num_head_tokens(truncation, length)
    num_tail = length - num_head
    rank = is_text.cumsum(-1) - 1  # (B, T)
    is_kept = is_text & ((rank < num_head) | (rank >= is_text.sum(-1, keepdim=True) - num_tail))
    order = (~is_kept).to(torch.uint8).argsort(dim=-1, stable=True)[:, :length]
    return input_ids.gather(1, order), is_kept.gather(1, order).long()


def pool_last(hidden_states: torch.Tensor, is_text: torch.Tensor) -> torch.Tensor:
    """Return the hidden state (B, C) of the last position in text, from (B, T, C) and (B, T)."""
    positions = torch.arange(is_text.shape[1], device=is_text.device)
    last = (positions * is_text).argmax(-1)  # (B,)
    return hidden_states[torch.arange(hidden_states.shape[0], device=last.device), last]


def pool_mean(hidden_states: torch.Tensor, is_text: torch.Tensor) -> torch.Tensor:
    """Return the mean (B, C) over the positions in text, from (B, T, C) and (B, T)."""
    weights = is_text.to(hidden_states.dtype)  # (B, T)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    return torch.einsum("bt,btc->bc", weights, hidden_states)


def pool_weighted(hidden_states: torch.Tensor, is_text: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """
    Return the mean (B, C) of (B, T, C), weighted by the softmax of the scores (B, T) over the positions in text (Yang
    et al., 2016).
    """
    scores = scores.float()
    weights = scores.masked_fill(~is_text, torch.finfo(scores.dtype).min).softmax(-1).to(hidden_states.dtype)
    return torch.einsum("bt,btc->bc", weights, hidden_states)
