"""A tiny chat model, and records and rows for it."""

import random

from hf_minigpt.instructions.model import prepare_for_chat
from hf_minigpt.instructions.records import to_conversations
from hf_minigpt.instructions.rows import TokenizedConversations, tokenize_conversations
from hf_minigpt.tokenization import train_tokenizer
from tests.tiny import tiny_model


WORDS = ["the box", "answer", "is", "here", "it", "to", "what"]
TEXTS = [
    "what is the answer to it? the answer is in the box, and the box is here.",
    # so that Alpaca's headers take few tokens
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nwhat\n\n### Response:\nhere",
] * 9


def byte_tokenizer():
    """A small byte-level BPE without a chat template."""
    return train_tokenizer(TEXTS, 384, model_max_length=64, show_progress=False)


def chat_model(name="modern", chat_format="roles", **options):
    """A model, its tokenizer with a chat template, and the ids that the template added."""
    tokenizer = byte_tokenizer()
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(
        name,
        vocab_size=len(tokenizer),
        unpadded_vocab_size=None,
        pad_token_id=tokenizer.pad_token_id,
        **special,
        **options,
    )
    model.generation_config.update(**special, pad_token_id=tokenizer.pad_token_id)
    return model, tokenizer, prepare_for_chat(model, tokenizer, chat_format)


def some_conversations(num=32):
    rng = random.Random(0)
    records = []
    for _ in range(num):
        prompt, completion = (" ".join(rng.choices(WORDS, k=rng.randint(1, 5))) for _ in range(2))
        records.append({"prompt": prompt, "completion": completion})
    return to_conversations(records)[0]


def tokenized(tokenizer) -> TokenizedConversations:
    return tokenize_conversations(tokenizer, some_conversations(), 64)
