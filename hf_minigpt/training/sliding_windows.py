"""How well any causal language model predicts texts: each byte scored once, in windows that slide over long texts."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..tokenization import plain_text_encoder


# Windows are sorted by length within so many batches, which saves padding.
SORTED_BATCHES = 32


def cut_windows(ids: Sequence[int], context: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Cut a document, its first token the one that is given, so that each later token is predicted once.

    Returns:
        Pairs of at most `context` + 1 ids, and how many of them, at the end, to score.
    """
    scored = 1
    for start in itertools.count(0, stride):
        end = min(start + context + 1, len(ids))
        if end > scored:
            yield list(ids[start:end]), end - scored
            scored = end
        if end == len(ids):
            return


@torch.inference_mode()
def _nats(model: PreTrainedModel, batch: Sequence[tuple[list[int], int]]) -> float:
    """Minus the log-probability of all the tokens that a batch of windows scores, summed in float64."""
    longest = max(len(ids) for ids, _ in batch) - 1
    # padding follows the text, which a causal model reads without it
    inputs, labels = torch.zeros(len(batch), longest, dtype=torch.long), torch.full((len(batch), longest), -100)
    for row, (ids, num_scored) in enumerate(batch):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels[row, len(ids) - 1 - num_scored : len(ids) - 1] = torch.tensor(ids[-num_scored:])
    logits = model(inputs.to(model.device), use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten().to(model.device), reduction="none")
    return losses.cpu().double().sum().item()


def window_sizes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    context: int | None = None,
    stride: int | None = None,
    name: str = "",
) -> tuple[int, int, int]:
    """The context, the stride and the id of the token to begin with; arguments and errors as of `score_texts`."""
    limit = getattr(model.config, "max_position_embeddings", None)
    context = context or limit
    if context is None or (limit is not None and context > limit):
        raise ValueError(
            f"--context_length {context}: {name or 'the model'} has a context of {limit}; choose one in it."
        )
    stride = stride or max(context // 2, 1)
    if not 1 <= stride <= context:
        raise ValueError(f"--stride {stride} must lie between 1 and the context, {context}: tokens would be left out.")
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise ValueError(f"the tokenizer of {name or 'the model'} has neither a beginning- nor an end-of-text token.")
    return context, stride, begin


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    tokens_per_batch: int = 4096,
    name: str = "",
) -> dict[str, float]:
    """Score texts.

    Args:
        context: tokens that the model sees at a time; default: all that it can.
        stride: tokens that a window advances; default: half the context.
        tokens_per_batch: what a batch of windows may hold, but for a single window that is longer.

    Returns:
        bits_per_byte: over the UTF-8 bytes of the texts.
        perplexity: the exponential of the nats per token, of this tokenizer's tokens.
        tokens, bytes: scored.
        changed_texts: how many texts the tokenizer does not give back; bits per byte are then not of these bytes.

    Raises:
        ValueError: a tokenizer without a token to begin with, a context that the model does not have, or a stride that
            leaves tokens out.
    """
    context, stride, begin = window_sizes(model, tokenizer, context=context, stride=stride, name=name)
    encoder = plain_text_encoder(tokenizer)
    totals = {"nats": 0.0, "tokens": 0, "bytes": 0, "changed_texts": 0}

    def all_windows(texts: Iterable[str]) -> Iterator[tuple[list[int], int]]:
        for text in tqdm(texts, desc=name, unit=" documents", disable=None):
            ids = encoder.encode(text, add_special_tokens=False).ids
            totals["bytes"] += len(text.encode())
            totals["tokens"] += len(ids)
            totals["changed_texts"] += encoder.decode(ids, skip_special_tokens=False) != text
            yield from cut_windows([begin, *ids], context, stride)

    batch_size = max(tokens_per_batch // context, 1)
    pending = all_windows(texts)
    while chunk := list(itertools.islice(pending, SORTED_BATCHES * batch_size)):
        chunk.sort(key=lambda window: len(window[0]), reverse=True)
        while chunk:
            size = max(tokens_per_batch // len(chunk[0][0]), 1)
            totals["nats"] += _nats(model, chunk[:size])
            del chunk[:size]
    return {
        "bits_per_byte": totals["nats"] / math.log(2) / totals["bytes"],
        "perplexity": math.exp(min(totals["nats"] / totals["tokens"], 700.0)),
    } | {key: totals[key] for key in ("tokens", "bytes", "changed_texts")}
