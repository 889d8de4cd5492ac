"""Tokenizers: train one (byte-level BPE, words or characters), load one, and tell whether it fits a model.

`<|endoftext|>` begins, ends and separates documents, as in GPT-2. A trained tokenizer puts it in front of a text by
itself (a post-processor in tokenizer.json), so that every program that tokenizes a prompt gives the model what it was
trained on. `<|pad|>` is a token of its own, because a padding token that equals the end token teaches a model never to
stop.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES


if TYPE_CHECKING:
    from .model.configuration_minigpt import MiniGPTConfig


END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
UNKNOWN = "<|unk|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# GPT-2's vocabulary and merges: as transformers names the files, and as OpenAI released them
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
GPT2_MAX_LENGTH = 1024

# Where Raschka's first tokenizers split (Build a Large Language Model From Scratch, chapter 2). Python's \s also has
# the four separators of ASCII.
WORD_BORDERS = r"[\s\x1c-\x1f]"
PUNCTUATION = r"--|[,.:;?_!\"()']"
# The signs that lose the space before them in decoding: in the tokenizer without an unknown token, and with one
REJOINED = {False: ",.?!\"()'", True: ",.:;?!\"()'"}

# A document: its text, or the pieces that this is made of.
Text = str | Iterable[str]

# Characters of a piece that a long document is handed on in: memory stays bounded however long a book is.
PIECE_LENGTH = 1 << 16
# Python's \s holds a few control characters more than the tokenizers': both agree on the two sides of this
_CUT = re.compile(r"(?<=\S)(?=[ \t\r\n])")


def cut_before_spaces(text: Text, length: int) -> Iterator[str]:
    """Cut a long text where GPT-2's pre-tokenization separates words anyway (`splits_before_spaces`).

    Args:
        text: whole or in pieces, cut anywhere.
        length: of the pieces, about, in characters; a text without spaces stays whole.

    Returns:
        One piece or more.
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


def _pieces(texts: Iterable[Text]) -> Iterator[str]:
    """All the text of a corpus in pieces. Pre-tokenization takes some 85 times the memory of what it is given."""
    # `Documents` read a long file piece by piece, if asked
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
    """Train a byte-level BPE with GPT-2's pre-tokenization: every string encodes, and decodes to itself.

    Args:
        texts: documents, each whole or in pieces; read once, only word counts are kept in memory.
        vocab_size: entries, special tokens included. A text too small to yield that many merges gives a smaller
            tokenizer: size the model's table with `padded_vocab_size`.
        model_max_length: the model's context, in tokens.
        min_frequency: a pair seen less often is not merged.

    Raises:
        ValueError: `vocab_size` is not a multiple of 64 or has no room for the 256 bytes and the special tokens.
    """
    smallest = 320
    if vocab_size % 64 != 0 or vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} must be a multiple of 64, which matrix products on a GPU want, and at least "
            f"{smallest}, to hold the 256 bytes and the special tokens"
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
    tokenizer.train_from_iterator(_pieces(texts), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    return begin_with_end_of_text(_with_our_conventions(fast, model_max_length))


def train_character_tokenizer(texts: Iterable[Text], *, model_max_length: int) -> PreTrainedTokenizerFast:
    """One token for each character (Unicode code point) of `texts`, in their order, after the special tokens.

    Text of these characters decodes to itself. Any other character is `<|unk|>`, so that a prompt is never refused.

    Args:
        texts: documents; read once.
        model_max_length: the model's context, in characters.
    """
    alphabet: set[str] = set()
    for piece in _pieces(texts):
        alphabet.update(piece)
    vocabulary = {token: i for i, token in enumerate([END_OF_TEXT, PAD, UNKNOWN, *sorted(alphabet)])}
    # a BPE without merges: its tokens stay single characters
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, fuse_unk=False))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=UNKNOWN, pad_token=PAD
    )
    return begin_with_end_of_text(_with_our_conventions(fast, model_max_length))


def train_word_tokenizer(
    texts: Iterable[Text], *, model_max_length: int, unknown_token: bool = True
) -> PreTrainedTokenizerFast:
    """The word-level tokenizers of Raschka's *Build a Large Language Model (From Scratch)*, chapter 2, with his ids.

    Text is split at white space and around ``, . : ; ? _ ! " ( ) '`` and `--`. The ids are the words of `texts` in
    sorted order, then `<|endoftext|>`, `<|unk|>` and `<|pad|>`. Decoding joins by spaces and takes away the one before
    a punctuation mark. A text's own `<|endoftext|>` between spaces is that token, as it is there, also in a corpus. As
    in the book, no token is put in front of a text.

    Args:
        texts: documents; read once.
        model_max_length: the model's context, in words.
        unknown_token: True for `SimpleTokenizerV2`: other words are `<|unk|>`, and `:` and `;` are rejoined too. False
            for `SimpleTokenizerV1`: another word is a ValueError that names it.
    """
    tokenizer = Tokenizer(models.WordLevel(vocab={}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_BORDERS), "removed"),
            pre_tokenizers.Split(Regex(PUNCTUATION), "isolated"),
        ]
    )
    words: set[str] = set()
    for piece in _pieces(texts):
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(piece))
    special = [END_OF_TEXT, UNKNOWN] if unknown_token else [END_OF_TEXT]
    tokens = [*sorted(words - {END_OF_TEXT, UNKNOWN, PAD}), *special]
    tokenizer.model = models.WordLevel(vocab={token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN)
    tokenizer.decoder = decoders.Sequence(
        [
            # a space before every token that does not begin with one, and none does
            decoders.WordPiece(prefix=" ", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(f" (?=[{REJOINED[unknown_token]}])"), ""),
        ]
    )
    tokenizer_class = PreTrainedTokenizerFast if unknown_token else StrictWordTokenizer
    names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": PAD}
    if unknown_token:
        names["unk_token"] = UNKNOWN
    return _with_our_conventions(tokenizer_class(tokenizer_object=tokenizer, **names), model_max_length)


class StrictWordTokenizer(PreTrainedTokenizerFast):
    """A word-level tokenizer without an unknown token, whose error names the words that it does not know."""

    def _encode_plus(self, text, *args, **kwargs):
        try:
            return super()._encode_plus(text, *args, **kwargs)
        except Exception as error:
            # the tokenizers library raises no narrower class
            if "Missing [UNK] token" not in str(error):
                raise
            raise ValueError(
                f"the tokenizer has no token for {', '.join(map(repr, self._unknown_words(text)))}, and no unknown "
                "token: leave these words out, or use a tokenizer with unknown_token=True"
            ) from error

    def _unknown_words(self, text: Any) -> list[str]:
        if not isinstance(text, str):
            return list(dict.fromkeys(word for part in text for word in self._unknown_words(part)))
        for token in self.all_special_tokens:
            text = text.replace(token, " ")
        vocabulary = self.get_vocab()
        words = self.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        return list(dict.fromkeys(word for word, _ in words if word not in vocabulary))


# By this name AutoTokenizer finds the class of a saved tokenizer.
REGISTERED_TOKENIZER_CLASSES[StrictWordTokenizer.__name__] = StrictWordTokenizer


def _quoted(tokens: Iterable[str]) -> str:
    """Jinja filters that break up special tokens which a message quotes: `<|user|>` becomes `< |user|>`."""
    return "".join(f" | replace('{token}', '{token[0]} {token[1:]}')" for token in tokens)


# Jinja, in one line each: a message's text, from a string or from the text parts of a list; and an assistant's turn,
# whose end token is generated, hence trained, and stops generation.
_TEXT = (
    "{%- set parts = message['content'] if message['content'] is not string else [{'text': message['content']}] -%}"
    "{%- set text = parts | map(attribute='text') | join('') | trim | replace(eos_token, ' ')__QUOTED__ -%}"
)
_ANSWER = "{%- generation -%}{{- text + eos_token -}}{%- endgeneration -%}"
_WRONG_ROLE = "{{- raise_exception('the chat template has no role ' + message['role']) -}}"

# A conversation begins like a document, with the end-of-text token.
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
    # Stanford Alpaca's two headers; a system message takes their place
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
    """Give a tokenizer a chat template that marks what the assistant says; its turns end with the end-of-text token.

    `roles` begins a turn with `<|system|>`, `<|user|>` or `<|assistant|>`, tokens of their own. `alpaca` writes
    Stanford Alpaca's headers, with no new token. Neither lets a message act by quoting a special token.

    Args:
        chat_format: a key of `CHAT_TEMPLATES`; None keeps the tokenizer's own template if it has one with
            `{% generation %}` marks, else takes `roles`.

    Returns:
        The number of tokens that are new: the model's table has to grow by them.
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
    """`tokenizer.add_special_tokens`, but never with an id that another token has.

    The tokenizers library gives a new token the number of tokens as its id, which is taken where there are holes.
    """
    vocabulary = tokenizer.get_vocab()
    names = [name for value in tokens.values() for name in ([value] if isinstance(value, str) else value)]
    new = [name for name in dict.fromkeys(names) if name not in vocabulary]
    if new and len(set(vocabulary.values())) < num_ids(tokenizer):
        backend = tokenizer.backend_tokenizer
        description = json.loads(backend.to_str())
        # a token that the model itself has keeps the id that it has there
        description["model"]["vocab"] |= {name: i for i, name in enumerate(new, num_ids(tokenizer))}
        backend.model = Tokenizer.from_str(json.dumps(description)).model
    tokenizer.add_special_tokens(tokens, **options)


def begin_with_end_of_text(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Make a tokenizer put its end-of-text token in front of every text, once before a pair of texts.

    `add_special_tokens=False` leaves it out, as chat templates need: they write it themselves.
    """
    token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B:1", special_tokens=[(token, tokenizer.eos_token_id)]
    )
    return tokenizer


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text to write on from, with exactly one beginning-of-text token in front.

    A tokenizer that puts none there (GPT-2's, or one that this package saved before its tokenizers did) gets its
    end-of-text token, which separates documents in training.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids if ids[:1] == [begin] else [begin, *ids]


def _with_our_conventions(tokenizer: Any, model_max_length: int | None) -> PreTrainedTokenizerFast:
    """What every tokenizer of this package has, trained or loaded: the one place for it."""
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        _add_special_tokens(tokenizer, {"pad_token": PAD})
    # transformers 4 turns it on where the saved file says nothing: decoding then eats spaces before punctuation
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
    """Load a tokenizer from the Hub or a folder and give it a padding token of its own where it has none.

    Args:
        name_or_path: a name on the Hub, a folder with a saved tokenizer, or a folder with only GPT-2's `vocab.json`
            and `merges.txt` (`encoder.json` and `vocab.bpe` in OpenAI's release).
        model_max_length: the model's context in tokens; None keeps what was saved.
        add_end_of_text: give a tokenizer without an end-of-text token (GPT-1's) `<|endoftext|>`, for a model that is
            to be finetuned: the id is new to it.

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
            f"tokenizer {name_or_path} has no fast implementation; convert it to a tokenizer.json of the tokenizers "
            "library first"
        )
    if tokenizer.eos_token is None and add_end_of_text:
        _add_special_tokens(tokenizer, {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT})
    if tokenizer.eos_token is None:
        raise ValueError(
            f"tokenizer {name_or_path} has no eos_token, which separates documents; set one and save it again"
        )
    return _with_our_conventions(tokenizer, model_max_length)


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id + 1: what a model's token table needs.

    `len(tokenizer)` counts tokens, which are fewer where ids are reserved or left out.
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def padded_vocab_size(tokenizer: PreTrainedTokenizerBase, multiple: int = 64) -> int:
    """The rows of a model's token table for this tokenizer: `num_ids` rounded up to a multiple."""
    return -(-num_ids(tokenizer) // multiple) * multiple


def check_tokenizer_fits(tokenizer: PreTrainedTokenizerFast, config: "MiniGPTConfig") -> None:
    """Refuse a tokenizer whose ids do not mean to the model what they meant in its training.

    Raises:
        ValueError: an id outside the model's table, another number of real ids, or other special tokens.
    """
    ids = num_ids(tokenizer)
    if ids > config.vocab_size:
        raise ValueError(
            f"the tokenizer's ids reach {ids - 1}, the model's vocab_size is {config.vocab_size}; load the "
            "tokenizer saved with the model, or call "
            f"model.resize_token_embeddings({padded_vocab_size(tokenizer)})"
        )
    real_ids = config.vocab_size if config.unpadded_vocab_size is None else config.unpadded_vocab_size
    if real_ids != ids:
        reach = "" if len(tokenizer) == ids else f" with ids up to {ids - 1}"
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens{reach}, the model was made for {real_ids} "
            f"(unpadded_vocab_size of {config.vocab_size}); load the tokenizer saved with the model, or set "
            f"config.unpadded_vocab_size={ids} before training"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        in_config, in_tokenizer = getattr(config, name), getattr(tokenizer, name)
        # generation may stop at several tokens
        if in_tokenizer not in (in_config if isinstance(in_config, list) else [in_config]):
            raise ValueError(
                f"{name} is {in_config} in the model's config and {in_tokenizer} in the tokenizer; set "
                f"config.{name}={in_tokenizer}, or load the tokenizer saved with the model"
            )


def plain_text_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer's backend that takes every text for plain text.

    A document that quotes `<|endoftext|>` gets the ids of those characters, not the special token, and no token is put
    in front of it. The copy neither truncates nor pads, whatever earlier calls of `tokenizer` left switched on.
    """
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.encode_special_tokens = True
    encoder.post_processor = None
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def splits_before_spaces(encoder: Tokenizer) -> bool:
    """Whether text may be cut before a space that follows a non-space without changing a single id.

    True of GPT-2's pre-tokenization: its pattern never joins a non-space with a space after it, and looks no further
    ahead than the next non-space.
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
    """A digest that changes when the ids of some text, or the end-of-text id, change."""
    content = plain_text_encoder(tokenizer).to_str() + str(tokenizer.eos_token_id)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
