"""How good a language model is, exactly: sums over all held-out tokens, not means of batch means."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.rows import Rows
from ..data.token_store import TokenStore
from ..tokenization import encode_prompt


Collator = Callable[[list[dict[str, torch.Tensor]]], dict[str, torch.Tensor]]


def evaluate_language_model(
    model: nn.Module,
    dataset: Rows,
    collator: Collator,
    batch_size: int,
    accelerator: Accelerator | None = None,
    max_rows: int | None = None,
) -> dict[str, float]:
    """Score every row of `dataset`, shared out over the processes of `accelerator`.

    With `DocumentRows` every token of the store is predicted exactly once, each document's end-of-text among them, so
    that `bits_per_byte` is what it takes to code the held-out documents and compares across tokenizers.

    Args:
        model: a MiniGPTForCausalLM, on the accelerator's device.
        batch_size: rows at a time, on each process.
        max_rows: look at no more rows than that, evenly spaced; `bits_per_byte` then takes the whole store's bytes per
            token.

    Returns:
        loss: nats per token.
        perplexity: its exponential.
        bits_per_byte: bits for all the tokens over the UTF-8 bytes of the store's documents.
        accuracy: share of the tokens that are the model's first choice.
        tokens: tokens predicted.
    """
    nats, hits, tokens = score_rows(model, dataset, collator, batch_size, accelerator, max_rows)
    loss = nats / tokens
    bytes_per_token = dataset.store.num_bytes / (dataset.store.num_tokens - 1)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "accuracy": hits / tokens,
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
    """Nats, hits and number of all targets in the rows of `dataset`; arguments as in `evaluate_language_model`."""
    accelerator = accelerator or Accelerator()
    was_training = model.training
    model.eval()
    # (nats, hits, tokens); float64 counts exactly up to 2 ** 53
    sums = torch.zeros(3, dtype=torch.float64)
    num_rows = min(len(dataset), max_rows or len(dataset))
    selected = [i * len(dataset) // num_rows for i in range(num_rows)]
    for start in range(0, num_rows, batch_size * accelerator.num_processes):
        first = start + batch_size * accelerator.process_index
        rows = selected[first : first + batch_size]
        # a sharded model needs all processes in every forward pass: where rows have run out, one counts for nothing
        batch = collator(dataset.__getitems__(rows or [0]))
        if not rows:
            batch["shift_labels"].fill_(-100)
        num_tokens = (batch["shift_labels"] != -100).sum()
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        with accelerator.autocast():
            # divided by one item, the loss is the sum
            output = model(**batch, num_items_in_batch=1, skip_logits=True, count_correct=True, use_cache=False)
        sums += torch.tensor([output.loss.item(), output.num_correct.item(), num_tokens.item()], dtype=torch.float64)
    model.train(was_training)
    # as objects: not every accelerator has float64, and float32 would lose counts
    nats, hits, tokens = torch.tensor(gather_object([sums.tolist()]), dtype=torch.float64).sum(0).tolist()
    return nats, hits, tokens


def decode_documents(store: TokenStore, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The documents of a store, as text."""
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
    """Texts drawn from the model in one batch; each begins with end-of-text, as documents do in training.

    Args:
        model: a transformers model with `generate`.
        prompt: what each text begins with.
        seed: of the draw; the caller's random state stays as it was.
        generate_kwargs: of `generate`; by default the model's own distribution is sampled, at temperature 1.
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


def tale_metrics(bits_per_byte: float, held_out: Sequence[str], samples: Sequence[str]) -> dict[str, float]:
    """What the grammar of the embedded corpus knows of a model trained on it.

    Args:
        bits_per_byte: of the model, on `held_out`.
        held_out: tales.
        samples: texts drawn from the model.

    Returns:
        entropy_bits_per_byte: of the source, on `held_out`: no model does better in the long run.
        bits_per_byte_over_entropy: 1 is perfect.
        sentences_parsed, claims_true: shares over all samples.
    """
    from ..data.tales import grammar as tales

    entropy = -sum(map(tales.log2_probability, held_out)) / sum(len(text.encode()) for text in held_out)
    reports = [tales.parse(text) for text in samples]
    return {
        "entropy_bits_per_byte": entropy,
        "bits_per_byte_over_entropy": bits_per_byte / entropy,
        "sentences_parsed": _share([report.num_parsed for report in reports], [r.num_sentences for r in reports]),
        "claims_true": _share([report.num_true for report in reports], [r.num_claims for r in reports]),
    }


def _share(parts: list[int], wholes: list[int]) -> float:
    return sum(parts) / max(sum(wholes), 1)
