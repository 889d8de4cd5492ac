"""Generate answers to held-out prompts and compare them with the expected ones."""

import contextlib
import logging
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from ..commands import command_for
from .records import Conversation


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        conversation: the conversation whose last answer was to be generated.
        text: the generated text, without special tokens.
        ended: whether the model generated the end token within the length limit.
    """

    conversation: Conversation
    text: str
    ended: bool

    @property
    def is_exact(self) -> bool:
        """Whether the text equals the expected answer, surrounding whitespace aside."""
        return self.text.strip() == self.conversation.answer.strip()


@torch.no_grad()
@contextlib.contextmanager
def _without_length_reminder() -> Iterator[None]:
    """Hide transformers' reminder that a batch exceeds the context: a rotary model answers its longest prompts so."""
    logger = logging.getLogger("transformers.generation.stopping_criteria")

    def is_other(record: logging.LogRecord) -> bool:
        return "friendly reminder" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 128,
) -> list[Answer]:
    """Generate the last answer of each conversation by greedy decoding.

    Args:
        model: a language model, or PEFT's wrapper of one.
        batch_size: prompts per batch. Prompts of similar length share a batch.
        max_new_tokens: limit of an answer's length; shorter where the model's context requires it.

    Returns:
        The answers, in the order of `conversations`.
    """
    was_training = model.training
    model.eval()
    config = model.config
    rendered: Any = tokenizer.apply_chat_template([c.prompt for c in conversations], add_generation_prompt=True)
    prompts: list[list[int]] = rendered["input_ids"]
    answers: dict[int, Answer] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        padded = tokenizer.pad({"input_ids": [prompts[i] for i in batch]}, padding_side="left", return_tensors="pt")
        prompt_length = padded["input_ids"].shape[1]
        # models without a position table could generate more, but were not trained on that length
        num_new_tokens = min(max_new_tokens, config.max_position_embeddings)
        if config.position_embedding_type == "learned":
            # + 1: the last token is generated but not fed back
            num_new_tokens = min(num_new_tokens, config.max_position_embeddings + 1 - prompt_length)
        with _without_length_reminder():
            output = model.generate(
                **padded.to(model.device),
                max_new_tokens=num_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        for i, ids in zip(batch, output[:, prompt_length:].tolist(), strict=True):
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            answers[i] = Answer(conversations[i], text, tokenizer.eos_token_id in ids)
    model.train(was_training)
    return [answers[i] for i in range(len(conversations))]


def answer_metrics(answers: Sequence[Answer]) -> dict[str, float]:
    """Return metrics of generated answers.

    Returns:
        exact_match: share of answers that equal the expected one.
        exact_match/CATEGORY: the same for each category, if there are several.
        answers_ended: share of answers that ended with the end token.
        answers: number of answers.
    """
    by_category: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_category[answer.conversation.category].append(answer)
    metrics = {
        "exact_match": sum(answer.is_exact for answer in answers) / len(answers),
        "answers_ended": sum(answer.ended for answer in answers) / len(answers),
        "answers": len(answers),
    }
    if len(by_category) > 1:
        for category, group in sorted(by_category.items()):
            metrics[f"exact_match/{category}"] = sum(answer.is_exact for answer in group) / len(group)
    return metrics


def chat_command(output_dir: str, conversations: Sequence[Conversation]) -> str:
    """Return the command that asks the model the first single-turn question that fits on one line."""
    command = f"{command_for('chat')} {shlex.quote(output_dir)}"
    for conversation in conversations:
        question = conversation.prompt[0]["content"]
        if len(conversation.prompt) == 1 and "\n" not in question:
            return f"{command} --greedy --prompt {shlex.quote(question)}"
    return command
