"""The word tokenizers and sliding-window rows of a GPT-2 course, kept for comparison.

They follow chapter 2 of Raschka's *Build a Large Language Model (From Scratch)*. The recipes use neither.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES

from ..tokenization import END_OF_TEXT, PAD, UNKNOWN, Text, apply_conventions, text_pieces
from .rows import WindowRows
from .token_store import TokenStore


# Python's \s also matches the four ASCII separators.
WHITE_SPACE = r"[\s\x1c-\x1f]"
PUNCTUATION = r"--|[,.:;?_!\"()']"
# Punctuation that loses the space before it in decoding, by whether the tokenizer has an unknown token.
REJOINED = {False: ",.?!\"()'", True: ",.:;?!\"()'"}


class SlidingWindowRows(WindowRows):
    """Windows of `max_length` tokens every `stride` tokens, which overlap if the stride is smaller than the length."""

    def __init__(self, store: TokenStore, max_length: int, stride: int):
        super().__init__(store, max_length)
        if stride < 1:
            raise ValueError(f"stride={stride} must be at least 1.")
        self.stride = stride

    def __len__(self) -> int:
        return len(range(0, self.store.num_tokens - self.context_length, self.stride))

    def _starts(self, indices: np.ndarray) -> np.ndarray:
        return indices * self.stride


def train_word_tokenizer(
    texts: Iterable[Text], *, model_max_length: int, unknown_token: bool = True
) -> PreTrainedTokenizerFast:
    """Train a word tokenizer of the book, with the same ids.

    Text is split at white space and around ``, . : ; ? _ ! " ( ) '`` and `--`. The ids are those of the words of
    `texts` in sorted order, then `<|endoftext|>`, `<|unk|>` and `<|pad|>`. Decoding joins tokens with spaces and
    removes the space before a punctuation mark. As in the book, an `<|endoftext|>` between spaces in a text is that
    token, and no token is added in front of a text.

    Args:
        texts: documents, read once.
        model_max_length: context length of the model, in words.
        unknown_token: True gives `SimpleTokenizerV2`, which maps unknown words to `<|unk|>` and also rejoins `:` and
            `;`. False gives `SimpleTokenizerV1`, which raises a ValueError that names the unknown words.
    """
    tokenizer = Tokenizer(models.WordLevel(vocab={}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WHITE_SPACE), "removed"),
            pre_tokenizers.Split(Regex(PUNCTUATION), "isolated"),
        ]
    )
    words: set[str] = set()
    for piece in text_pieces(texts):
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(piece))
    special = [END_OF_TEXT, UNKNOWN] if unknown_token else [END_OF_TEXT]
    tokens = [*sorted(words - {END_OF_TEXT, UNKNOWN, PAD}), *special]
    tokenizer.model = models.WordLevel(vocab={token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN)
    tokenizer.decoder = decoders.Sequence(
        [
            # adds a space before each token that does not begin with one: no token does
            decoders.WordPiece(prefix=" ", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(f" (?=[{REJOINED[unknown_token]}])"), ""),
        ]
    )
    tokenizer_class = PreTrainedTokenizerFast if unknown_token else StrictWordTokenizer
    names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": PAD}
    if unknown_token:
        names["unk_token"] = UNKNOWN
    return apply_conventions(tokenizer_class(tokenizer_object=tokenizer, **names), model_max_length)


class StrictWordTokenizer(PreTrainedTokenizerFast):
    """A word tokenizer without an unknown token, whose error names the unknown words."""

    def _encode_plus(self, text, *args, **kwargs):
        try:
            return super()._encode_plus(text, *args, **kwargs)
        except Exception as error:
            # the tokenizers library raises no narrower class
            if "Missing [UNK] token" not in str(error):
                raise
            raise ValueError(
                f"the tokenizer has no token for {', '.join(map(repr, self._unknown_words(text)))}, and no unknown "
                "token. Remove these words, or use a tokenizer with unknown_token=True."
            ) from error

    def _unknown_words(self, text: Any) -> list[str]:
        if not isinstance(text, str):
            return list(dict.fromkeys(word for part in text for word in self._unknown_words(part)))
        for token in self.all_special_tokens:
            text = text.replace(token, " ")
        vocabulary = self.get_vocab()
        words = self.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        return list(dict.fromkeys(word for word, _ in words if word not in vocabulary))


# AutoTokenizer finds the class of a saved tokenizer by this name, once this module is imported.
REGISTERED_TOKENIZER_CLASSES[StrictWordTokenizer.__name__] = StrictWordTokenizer
