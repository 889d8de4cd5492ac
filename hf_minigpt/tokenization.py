"""Train, load and check tokenizers: byte-level BPE or characters, with chat templates.

`<|endoftext|>` begins, ends and separates documents, as in GPT-2. A trained tokenizer adds it in front of each text (a
post-processor in tokenizer.json), so prompts look like the training data in every program. `<|pad|>` is a separate
token, because a padding token equal to the end token teaches a model never to stop.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast


if TYPE_CHECKING:
    from .model.configuration_minigpt import MiniGPTConfig


END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
UNKNOWN = "<|unk|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# The files of GPT-2's vocabulary and merges, named as in transformers and as in OpenAI's release.
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
GPT2_MAX_LENGTH = 1024

# A document, as one string or as the pieces of its text.
Text = str | Iterable[str]

# Long documents are processed in pieces of about this many characters, to bound memory.
PIECE_LENGTH = 1 << 16
# Python's \s matches a few more control characters than the tokenizers' does. Both agree on these two sides.
_CUT = re.compile(r"(?<=\S)(?=[ \t\r\n])")


def cut_before_spaces(text: Text, length: int) -> Iterator[str]:
    """Cut a long text where GPT-2's pre-tokenization separates words (see `splits_before_spaces`).

    Args:
        text: a string, or pieces of it that may be cut anywhere.
        length: approximate length of the new pieces, in characters. A text without spaces stays whole.

    Yields:
        At least one piece.
    """
    rest, searched = "", 0
    for part in (text,) if isinstance(text, str) else text:
        rest += part
        start = 0
        while match := _CUT.search(rest, max(start + length, searched)):
            yield rest[start : match.start()]
            start = match.start()
        rest = rest[start:]
        # the next part may begin with a space
        searched = max(len(rest) - 1, 0)
    yield rest


def text_pieces(texts: Iterable[Text]) -> Iterator[str]:
    """Return all text of a corpus in pieces, since pre-tokenization needs about 85 times the memory of its input."""
    # `Documents` can read a long file piece by piece
    documents = getattr(texts, "in_pieces", texts.__iter__)()
    return (piece for text in documents for piece in cut_before_spaces(text, PIECE_LENGTH))


def train_tokenizer(
    texts: Iterable[Text],
    vocab_size: int,
    *,
    model_max_length: int,
    min_frequency: int = 2,
    show_progress: bool = True,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with GPT-2's pre-tokenization, which encodes and decodes any string without loss.

    Args:
        texts: documents, whole or in pieces, read once. Only word counts are kept in memory.
        vocab_size: number of tokens, including the special ones. Too small a corpus gives fewer, so use
            `padded_vocab_size` for the model's embedding size.
        model_max_length: context length of the model, in tokens.
        min_frequency: minimum count of a pair to be merged.
        show_progress: whether to show a progress bar.

    Raises:
        ValueError: `vocab_size` is not a multiple of 64, or is too small for the 256 bytes and the special tokens.
    """
    smallest = 320
    if vocab_size % 64 != 0 or vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} must be a multiple of 64, for fast matrix products on GPUs, and at least "
            f"{smallest}, to include the 256 bytes and the special tokens."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(text_pieces(texts), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    return begin_with_end_of_text(apply_conventions(fast, model_max_length))


def train_character_tokenizer(texts: Iterable[Text], *, model_max_length: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per character (Unicode code point) of `texts`.

    The special tokens come first, then the characters in sorted order. Other characters become `<|unk|>`.

    Args:
        texts: documents, read once.
        model_max_length: context length of the model, in characters.
    """
    alphabet: set[str] = set()
    for piece in text_pieces(texts):
        alphabet.update(piece)
    vocabulary = {token: i for i, token in enumerate([END_OF_TEXT, PAD, UNKNOWN, *sorted(alphabet)])}
    # a BPE without merges keeps single characters as tokens
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, fuse_unk=False))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=UNKNOWN, pad_token=PAD
    )
    return begin_with_end_of_text(apply_conventions(fast, model_max_length))


def _quoted(tokens: Iterable[str]) -> str:
    """Return Jinja filters that break up special tokens in a message: `<|user|>` becomes `< |user|>`."""
    return "".join(f" | replace('{token}', '{token[0]} {token[1:]}')" for token in tokens)


# Jinja. `_TEXT` sets the text of a message, given as a string or as a list of text parts. `_ANSWER` writes an
# assistant's turn: its end token is marked as generated, so it is trained and stops generation.
_TEXT = (
    "{%- set parts = message['content'] if message['content'] is not string else [{'text': message['content']}] -%}"
    "{%- set text = parts | map(attribute='text') | join('') | trim | replace(eos_token, ' ')__QUOTED__ -%}"
)
_ANSWER = "{%- generation -%}{{- text + eos_token -}}{%- endgeneration -%}"
_WRONG_ROLE = "{{- raise_exception('the chat template has no role ' + message['role']) -}}"

# A conversation begins with the end-of-text token, like a document.
CHAT_TEMPLATES = {
    "roles": (
        "{{- eos_token -}}"
        "{%- for message in messages -%}"
        + _TEXT.replace("__QUOTED__", _quoted([PAD, *ROLES]))
        + "{%- if message['role'] == 'assistant' -%}{{- '<|assistant|>' -}}"
        + _ANSWER
        + "{%- elif message['role'] in ['system', 'user'] -%}{{- '<|' + message['role'] + '|>' + text -}}"
        + "{%- else -%}"
        + _WRONG_ROLE
        + "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
    ),
    # Stanford Alpaca's two headers, which a system message replaces
    "alpaca": (
        "{{- eos_token -}}"
        "{%- set ns = namespace(header=true) -%}"
        "{%- for message in messages -%}"
        + _TEXT.replace("__QUOTED__", _quoted([PAD]))
        + "{%- if message['role'] == 'system' -%}{{- text + '\n\n' -}}{%- set ns.header = false -%}"
        "{%- elif message['role'] == 'user' -%}"
        "{%- if ns.header -%}"
        "{{- 'Below is an instruction that describes a task' -}}"
        "{%- if '\n\n### Input:\n' in text -%}"
        "{{- ', paired with an input that provides further context' -}}"
        "{%- endif -%}"
        "{{- '. Write a response that appropriately completes the request.\n\n' -}}"
        "{%- set ns.header = false -%}"
        "{%- elif not loop.first and loop.previtem['role'] == 'assistant' -%}{{- '\n\n' -}}"
        "{%- endif -%}"
        "{{- '### Instruction:\n' + text + '\n\n' -}}"
        "{%- elif message['role'] == 'assistant' -%}{{- '### Response:\n' -}}"
        + _ANSWER
        + "{%- else -%}"
        + _WRONG_ROLE
        + "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '### Response:\n' -}}{%- endif -%}"
    ),
}
CHAT_FORMATS = tuple(CHAT_TEMPLATES)
GENERATION_MARK = re.compile(r"{%-?\s*generation\s*-?%}")


def add_chat_template(tokenizer: PreTrainedTokenizerFast, chat_format: str | None = None) -> int:
    """Set a chat template that marks the assistant's turns and ends them with the end-of-text token.

    `roles` begins a turn with one of the special tokens `<|system|>`, `<|user|>` and `<|assistant|>`. `alpaca` writes
    Stanford Alpaca's headers without new tokens. Both break up special tokens that a message contains.

    Args:
        tokenizer: changed in place.
        chat_format: key of `CHAT_TEMPLATES`. None keeps the tokenizer's template if it has `{% generation %}` marks,
            and selects `roles` otherwise.

    Returns:
        The number of new tokens, by which the model's embeddings have to grow.

    Raises:
        ValueError: unknown `chat_format`.
    """
    if chat_format is None:
        if GENERATION_MARK.search(tokenizer.chat_template or ""):
            return 0
        chat_format = "roles"
    if chat_format not in CHAT_TEMPLATES:
        raise ValueError(f"chat_format={chat_format!r} is unknown: choose one of {', '.join(CHAT_TEMPLATES)}.")
    tokenizer.chat_template = CHAT_TEMPLATES[chat_format]
    if chat_format != "roles":
        return 0
    before = len(tokenizer)
    _add_special_tokens(tokenizer, {"extra_special_tokens": list(ROLES)}, replace_extra_special_tokens=False)
    return len(tokenizer) - before


def _add_special_tokens(tokenizer: Any, tokens: dict[str, Any], **options: Any) -> None:
    """Call `tokenizer.add_special_tokens` without reusing the id of another token.

    The tokenizers library uses the number of tokens as a new token's id, which may be taken if the ids have gaps.
    """
    vocabulary = tokenizer.get_vocab()
    names = [name for value in tokens.values() for name in ([value] if isinstance(value, str) else value)]
    new = [name for name in dict.fromkeys(names) if name not in vocabulary]
    if new and len(set(vocabulary.values())) < num_ids(tokenizer):
        backend = tokenizer.backend_tokenizer
        description = json.loads(backend.to_str())
        # tokens in the backend's model keep their ids there
        description["model"]["vocab"] |= {name: i for i, name in enumerate(new, num_ids(tokenizer))}
        backend.model = Tokenizer.from_str(json.dumps(description)).model
    tokenizer.add_special_tokens(tokens, **options)


def begin_with_end_of_text(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Make a tokenizer add its end-of-text token in front of every text, once for a pair of texts.

    `add_special_tokens=False` omits it, as for chat templates, which write it themselves.
    """
    token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B:1", special_tokens=[(token, tokenizer.eos_token_id)]
    )
    return tokenizer


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a prompt, with exactly one beginning-of-text token in front.

    If the tokenizer has no such token, its end-of-text token, which separates documents in training, is used.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids if ids[:1] == [begin] else [begin, *ids]


def apply_conventions(tokenizer: Any, model_max_length: int | None) -> PreTrainedTokenizerFast:
    """Set what every tokenizer of this package has: a padding token of its own, and decoding that keeps spaces."""
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        _add_special_tokens(tokenizer, {"pad_token": PAD})
    # if unset in the saved file, transformers 4 enables it, and decoding then removes spaces before punctuation
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.init_kwargs["clean_up_tokenization_spaces"] = False
    if model_max_length is not None:
        tokenizer.model_max_length = model_max_length
    return tokenizer


def load_tokenizer(
    name_or_path: str | Path,
    *,
    model_max_length: int | None = None,
    trust_remote_code: bool = False,
    add_end_of_text: bool = False,
) -> PreTrainedTokenizerFast:
    """Load a tokenizer from the Hub or a folder, and add a padding token if it has none of its own.

    Args:
        name_or_path: name on the Hub, folder of a saved tokenizer, or folder with only GPT-2's `vocab.json` and
            `merges.txt` (`encoder.json` and `vocab.bpe` in OpenAI's release).
        model_max_length: context length of the model, in tokens. None keeps the saved value.
        trust_remote_code: whether to run code that comes with the tokenizer.
        add_end_of_text: whether to add `<|endoftext|>` to a tokenizer without an end-of-text token, such as GPT-1's.
            The token is new to the model, which has to be finetuned.

    Raises:
        ValueError: the tokenizer has no end-of-text token or no fast implementation.
    """
    folder = Path(name_or_path)
    is_saved = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "config.json"))
    bare_files = [pair for pair in GPT2_FILES if all((folder / name).is_file() for name in pair)]
    tokenizer: Any
    if bare_files and not is_saved:
        vocab, merges = (str(folder / name) for name in bare_files[0])
        tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges, model_max_length=GPT2_MAX_LENGTH)
    else:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {name_or_path} has no fast implementation. Convert it to a tokenizer.json of the tokenizers "
            "library."
        )
    if tokenizer.eos_token is None and add_end_of_text:
        _add_special_tokens(tokenizer, {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT})
    if tokenizer.eos_token is None:
        raise ValueError(
            f"tokenizer {name_or_path} has no eos_token, which separates documents. Set one and save it again."
        )
    return apply_conventions(tokenizer, model_max_length)


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest id + 1, the minimum size of a model's embedding table.

    `len(tokenizer)`, the number of tokens, is less if the ids have gaps.
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def padded_vocab_size(tokenizer: PreTrainedTokenizerBase, multiple: int = 64) -> int:
    """Return the size of a model's embedding table for this tokenizer: `num_ids` rounded up to a multiple."""
    return -(-num_ids(tokenizer) // multiple) * multiple


def check_tokenizer_fits(tokenizer: PreTrainedTokenizerFast, config: "MiniGPTConfig") -> None:
    """Check that a tokenizer is the one that a model was trained with, as far as the config shows.

    Raises:
        ValueError: an id is outside the model's embedding table, or the number of ids or the special tokens differ.
    """
    ids = num_ids(tokenizer)
    if ids > config.vocab_size:
        raise ValueError(
            f"the tokenizer's largest id is {ids - 1}, and the model's vocab_size is {config.vocab_size}. Load the "
            "tokenizer saved with the model, or call "
            f"model.resize_token_embeddings({padded_vocab_size(tokenizer)})."
        )
    real_ids = config.vocab_size if config.unpadded_vocab_size is None else config.unpadded_vocab_size
    if real_ids != ids:
        largest = "" if len(tokenizer) == ids else f" with ids up to {ids - 1}"
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens{largest}, the model was made for {real_ids} "
            f"(unpadded_vocab_size of {config.vocab_size}). Load the tokenizer saved with the model, or set "
            f"config.unpadded_vocab_size={ids} before training."
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        in_config, in_tokenizer = getattr(config, name), getattr(tokenizer, name)
        # generation may have several end tokens
        if in_tokenizer not in (in_config if isinstance(in_config, list) else [in_config]):
            raise ValueError(
                f"{name} is {in_config} in the model's config and {in_tokenizer} in the tokenizer. Set "
                f"config.{name}={in_tokenizer}, or load the tokenizer saved with the model."
            )


def plain_text_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a copy of the tokenizer's backend that encodes special tokens in a text as plain text.

    It adds no token in front of a text, and neither truncates nor pads, whatever earlier calls of `tokenizer` set.
    """
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.encode_special_tokens = True
    encoder.post_processor = None
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def splits_before_spaces(encoder: Tokenizer) -> bool:
    """Return whether cutting a text before a space that follows a non-space leaves all ids unchanged.

    This holds for GPT-2's pre-tokenization: its pattern never joins a non-space with the space after it, and looks
    ahead only to the next non-space.
    """
    description = json.loads(encoder.to_str())
    pre_tokenizer = description["pre_tokenizer"] or {}
    return (
        description["normalizer"] is None
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer["use_regex"]
        and not pre_tokenizer["add_prefix_space"]
        and all(token["special"] for token in description["added_tokens"])
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a digest that changes if the ids of some text or the end-of-text id change."""
    content = plain_text_encoder(tokenizer).to_str() + str(tokenizer.eos_token_id)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
