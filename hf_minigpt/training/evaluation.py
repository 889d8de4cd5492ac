"""How well a language model predicts held-out text, on rows of a token store or on texts; and samples from it.

All figures are sums over all tokens, not means of batch means.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..data.rows import Rows
from ..data.token_store import TokenStore
from ..tokenization import encode_prompt, plain_text_encoder


Collator = Callable[[list[dict[str, torch.Tensor]]], dict[str, torch.Tensor]]

# `score_texts` sorts this many batches of windows by length, which saves padding.
SORTED_BATCHES = 32


def perplexity(loss: float) -> float:
    """Return the exponential of a loss in nats per token. A loss that would overflow is cut off."""
    return math.exp(min(loss, 700.0))


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Convert nats for `num_bytes` bytes of UTF-8 text into bits per byte."""
    return nats / math.log(2) / num_bytes


# On rows of a token store


def evaluate_language_model(
    model: nn.Module,
    dataset: Rows,
    collator: Collator,
    batch_size: int,
    accelerator: Accelerator | None = None,
    max_rows: int | None = None,
) -> dict[str, float]:
    """Score every row of `dataset`, split over the processes of `accelerator`.

    With `DocumentRows` every token of the store is predicted exactly once, including the end-of-text of each document.
    `bits_per_byte` is then the length of the coded held-out documents and compares across tokenizers.

    Args:
        model: a MiniGPTForCausalLM, on the accelerator's device.
        batch_size: rows in a batch, on each process.
        max_rows: score at most this many rows, evenly spaced. `bits_per_byte` then uses the bytes per token of the
            whole store.

    Returns:
        loss: nats per token.
        perplexity: its exponential.
        bits_per_byte: bits for all tokens over the UTF-8 bytes of the store's documents.
        accuracy: fraction of the tokens that the model ranks first.
        tokens: number of predicted tokens.
    """
    nats, num_correct, tokens = score_rows(model, dataset, collator, batch_size, accelerator, max_rows)
    loss = nats / tokens
    bytes_per_token = dataset.store.num_bytes / (dataset.store.num_tokens - 1)
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": bits_per_byte(loss, bytes_per_token),
        "accuracy": num_correct / tokens,
        "tokens": int(tokens),
    }


@torch.no_grad()
def score_rows(
    model: nn.Module,
    dataset: Any,
    collator: Collator,
    batch_size: int,
    accelerator: Accelerator | None = None,
    max_rows: int | None = None,
) -> tuple[float, float, float]:
    """Return nats, correct predictions and number of all targets. Arguments as in `evaluate_language_model`."""
    accelerator = accelerator or Accelerator()
    was_training = model.training
    model.eval()
    # (nats, correct, tokens); float64 counts exactly up to 2 ** 53
    sums = torch.zeros(3, dtype=torch.float64)
    num_rows = min(len(dataset), max_rows or len(dataset))
    selected = [i * len(dataset) // num_rows for i in range(num_rows)]
    for start in range(0, num_rows, batch_size * accelerator.num_processes):
        first = start + batch_size * accelerator.process_index
        rows = selected[first : first + batch_size]
        # a sharded model needs all processes in every forward pass: a process without rows left scores an empty one
        batch = collator(dataset.__getitems__(rows or [0]))
        if not rows:
            batch["shift_labels"].fill_(-100)
        num_tokens = (batch["shift_labels"] != -100).sum()
        batch = send_to_device(batch, accelerator.device)
        with accelerator.autocast():
            # divided by one item, the loss is the sum
            output = model(**batch, num_items_in_batch=1, skip_logits=True, count_correct=True, use_cache=False)
        sums += torch.tensor([output.loss.item(), output.num_correct.item(), num_tokens.item()], dtype=torch.float64)
    model.train(was_training)
    # gathered as objects: not every accelerator has float64, and float32 would lose counts
    nats, num_correct, tokens = torch.tensor(gather_object([sums.tolist()]), dtype=torch.float64).sum(0).tolist()
    return nats, num_correct, tokens


# On texts, for any causal model of transformers


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
    """Score each token of each text once. Texts longer than the context are read in sliding windows.

    Args:
        context: tokens that the model sees at a time. Default: its `max_position_embeddings`.
        stride: tokens by which the window advances. Default: half the context.
        tokens_per_batch: size of a batch of windows. A single longer window is a batch of its own.
        name: of the model, for the progress bar and for messages.

    Returns:
        bits_per_byte: over the UTF-8 bytes of the texts.
        perplexity: the exponential of the nats per token of this tokenizer.
        tokens, bytes: scored.
        changed_texts: number of texts that do not survive encoding and decoding. If there are any, bits per byte do
            not refer to the given bytes.

    Raises:
        ValueError: the tokenizer has no token to begin a text with, the context exceeds the model's, or the stride
            would leave tokens out.
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
    windows = all_windows(texts)
    while chunk := list(itertools.islice(windows, SORTED_BATCHES * batch_size)):
        chunk.sort(key=lambda window: len(window[0]), reverse=True)
        while chunk:
            size = max(tokens_per_batch // len(chunk[0][0]), 1)
            totals["nats"] += _score_windows(model, chunk[:size])
            del chunk[:size]
    return {
        "bits_per_byte": bits_per_byte(totals["nats"], totals["bytes"]),
        "perplexity": perplexity(totals["nats"] / totals["tokens"]),
    } | {key: totals[key] for key in ("tokens", "bytes", "changed_texts")}


def window_sizes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    context: int | None = None,
    stride: int | None = None,
    name: str = "",
) -> tuple[int, int, int]:
    """Return context, stride and the id of the token that begins a text. Arguments and errors as in `score_texts`."""
    limit = getattr(model.config, "max_position_embeddings", None)
    context = context or limit
    if context is None or (limit is not None and context > limit):
        raise ValueError(
            f"context_length={context}: {name or 'the model'} has a context of {limit}. "
            + ("Set --context_length." if limit is None else f"Set it to at most {limit}.")
        )
    stride = stride or max(context // 2, 1)
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} must be between 1 and the context, {context}: tokens would be left out.")
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise ValueError(
            f"The tokenizer of {name or 'the model'} has neither a beginning- nor an end-of-text token. Set one."
        )
    return context, stride, begin


def cut_windows(ids: Sequence[int], context: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Cut a document into windows so that each token but the first is predicted once.

    Yields:
        At most `context` + 1 ids, and how many of them, at the end, to score.
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
def _score_windows(model: PreTrainedModel, batch: Sequence[tuple[list[int], int]]) -> float:
    """Return the negative log-likelihood of all scored tokens of a batch of windows, summed in float64."""
    longest = max(len(ids) for ids, _ in batch) - 1
    # padding follows the text, so a causal model needs no mask
    inputs, labels = torch.zeros(len(batch), longest, dtype=torch.long), torch.full((len(batch), longest), -100)
    for row, (ids, num_scored) in enumerate(batch):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels[row, len(ids) - 1 - num_scored : len(ids) - 1] = torch.tensor(ids[-num_scored:])
    logits = model(inputs.to(model.device), use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten().to(model.device), reduction="none")
    return losses.cpu().double().sum().item()


# Samples


def decode_documents(store: TokenStore, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the documents of a store as text."""
    return tokenizer.batch_decode(
        [store.tokens[begin : end - 1].tolist() for begin, end in itertools.pairwise(store.offsets)]
    )


@torch.no_grad()
def sample_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    num: int,
    *,
    prompt: str = "",
    max_new_tokens: int,
    seed: int = 0,
    **generate_kwargs: Any,
) -> list[str]:
    """Sample texts in one batch. Each follows an end-of-text token, as documents do in training.

    Args:
        model: a transformers model with `generate`.
        num: number of texts.
        prompt: the beginning of each text.
        seed: for sampling. The caller's random state is unchanged.
        generate_kwargs: for `generate`. The default samples from the model's own distribution, at temperature 1.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    input_ids = torch.tensor([prompt_ids] * num, device=model.device)
    kwargs = {"do_sample": True, "top_k": 0, "use_cache": True} | generate_kwargs
    was_training = model.training
    model.eval()
    cuda_devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda_devices):
        torch.manual_seed(seed)
        ids = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **kwargs,
        )
    model.train(was_training)
    return tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True)


def tale_metrics(model_bits_per_byte: float, held_out: Sequence[str], samples: Sequence[str]) -> dict[str, float]:
    """Compare a model with the grammar that generates the embedded corpus.

    Args:
        model_bits_per_byte: of the model on `held_out`.
        held_out: tales.
        samples: texts sampled from the model.

    Returns:
        entropy_bits_per_byte: of the grammar on `held_out`. No model does better in the long run.
        bits_per_byte_over_entropy: 1 is perfect.
        sentences_parsed, claims_true: fractions over all samples.
    """
    from ..data.tales import grammar as tales

    entropy = -sum(map(tales.log2_probability, held_out)) / sum(len(text.encode()) for text in held_out)
    reports = [tales.parse(text) for text in samples]
    return {
        "entropy_bits_per_byte": entropy,
        "bits_per_byte_over_entropy": model_bits_per_byte / entropy,
        "sentences_parsed": _fraction([report.num_parsed for report in reports], [r.num_sentences for r in reports]),
        "claims_true": _fraction([report.num_true for report in reports], [r.num_claims for r in reports]),
    }


def _fraction(parts: list[int], wholes: list[int]) -> float:
    return sum(parts) / max(sum(wholes), 1)
