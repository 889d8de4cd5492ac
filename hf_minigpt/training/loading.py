"""The model that a finetuning recipe starts from, with its tokenizer: ours, or one that converts."""

from collections.abc import Container
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ..adapters import is_adapter, merged
from ..deploy import conversion
from ..model.configuration_minigpt import MiniGPTConfig
from ..model.modeling_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification, MiniGPTPreTrainedModel
from ..presets import preset
from ..tokenization import check_tokenizer_fits, load_tokenizer, num_ids, padded_vocab_size
from .arguments import DataArguments, ModelArguments
from .checkpoints.sealing import MANIFEST, verify_checkpoint


Model = TypeVar("Model", bound=MiniGPTPreTrainedModel)

# Entries of a tokenizer trained by default. The tales have some 300 words; for real text a small model on a CPU spends
# most of its time in a large vocabulary's head, and the benchmark counts bits per byte, which compare across sizes.
TALES_VOCAB_SIZE = 1024
DEFAULT_VOCAB_SIZE = 4096
# A table grows to a multiple of this, which matrix products on a GPU want.
MULTIPLE = 64
NEW_WITH_A_HEAD: dict[type, set[str]] = {
    MiniGPTForSequenceClassification: {
        "score.weight",
        "pool_query.weight",
        "lm_head.weight",
        "lm_head.bias",
    }
}
# What a config takes from PreTrainedConfig rather than from MiniGPTConfig
LABELS = ("num_labels", "id2label", "label2id")


def check_base_exists(name_or_path: str | None, tokenizer: str | None = None, trust_remote_code: bool = False) -> None:
    """Raise ValueError where a base model or a tokenizer cannot be found, before data are read; None is no name."""
    try:
        if name_or_path is not None and not is_adapter(name_or_path):
            conversion.detect_layout(name_or_path)
    except OSError as error:
        raise ValueError(f"model={name_or_path!r} is neither a model's folder nor one on the Hub: {error}") from error
    try:
        if tokenizer is not None:
            load_tokenizer(tokenizer, trust_remote_code=trust_remote_code, add_end_of_text=True)
    except OSError as error:
        raise ValueError(f"tokenizer={tokenizer!r} is neither a folder with one nor on the Hub: {error}") from error


def load_base_model(
    model_class: type[Model],
    name_or_path: str,
    *,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    **config_overrides: Any,
) -> tuple[Model, PreTrainedTokenizerFast]:
    """
    Load a checkpoint for finetuning, in float32.

    A GPT-2, GPT-1, nanoGPT or NanoChat checkpoint is converted. A tokenizer without `<|endoftext|>` or `<|pad|>` gets
    them, and the token table grows where it has no rows for them; the config's special ids are then the tokenizer's.
    An adapter's folder gives its base model with the adapter merged.

    Args:
        model_class: the head that is wanted. Another head's trunk is taken, and what is missing starts afresh.
        name_or_path: a folder, a name on the Hub, or nanoGPT's ckpt.pt.
        tokenizer: folder or Hub name; default: `name_or_path`.
        config_overrides: fields of `MiniGPTConfig` that may differ from the checkpoint's (dropout, `num_labels`, ...).

    Returns:
        The model, and the tokenizer whose `model_max_length` is the model's context.

    Raises:
        ValueError: a checkpoint that does not convert or is damaged, or a tokenizer that is not the model's.
    """
    if is_adapter(name_or_path):
        with merged(name_or_path, trust_remote_code=trust_remote_code) as folder:
            return load_base_model(
                model_class,
                folder,
                tokenizer=tokenizer,
                trust_remote_code=trust_remote_code,
                attn_implementation=attn_implementation,
                **config_overrides,
            )
    layout = conversion.detect_layout(name_or_path)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if layout == "minigpt":
        may_be_new = NEW_WITH_A_HEAD.get(model_class, set())
        model: Any = load_checkpoint(
            model_class, name_or_path, may_be_new, trust_remote_code=trust_remote_code, **options, **config_overrides
        )
    else:
        model = _convert(model_class, layout, name_or_path, config_overrides)
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
    assert isinstance(model, model_class)
    tokenizer_source = tokenizer or _folder(name_or_path)
    loaded_tokenizer = load_tokenizer(
        tokenizer_source,
        model_max_length=model.config.max_position_embeddings,
        trust_remote_code=trust_remote_code,
        add_end_of_text=True,
    )
    _fit(model, loaded_tokenizer, converted=layout != "minigpt")
    return model, loaded_tokenizer


def _folder(name_or_path: str) -> str:
    path = Path(name_or_path)
    return str(path.parent) if path.suffix == ".pt" else name_or_path


def _convert(model_class: type[Model], layout: str, name_or_path: str, overrides: dict[str, Any]) -> Model:
    labels = {name: overrides.pop(name) for name in LABELS if name in overrides}
    source = conversion.FROM[layout](name_or_path, **overrides).float()
    for name, value in labels.items():
        setattr(source.config, name, value)
    if isinstance(source, model_class):
        return source
    model = model_class(source.config)
    info = model.load_state_dict(source.state_dict(), strict=False)
    missing = set(info.missing_keys) - NEW_WITH_A_HEAD.get(model_class, set())
    if missing:
        raise ValueError(f"model={name_or_path!r} has no {', '.join(sorted(missing))}: give a language model.")
    return model.eval()


def _fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, converted: bool) -> None:
    config = model.config
    assert isinstance(config, MiniGPTConfig)
    real_ids = config.vocab_size if config.unpadded_vocab_size is None else config.unpadded_vocab_size
    ids = num_ids(tokenizer)
    num_new = ids - real_ids
    if converted and -num_new in range(1, MULTIPLE):
        # a table padded by a project that does not say so
        config.unpadded_vocab_size = ids
    elif 0 < num_new <= 2:
        model.resize_token_embeddings(ids, pad_to_multiple_of=MULTIPLE)
    if converted or num_new > 0:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
            if isinstance(model, GenerationMixin):
                setattr(model.generation_config, name, getattr(tokenizer, name))
    check_tokenizer_fits(tokenizer, config)


def context_length(args: ModelArguments) -> int:
    """Tokens in a row: the flag, else the model's own.

    Raises:
        ValueError: longer than the table of learned positions of the checkpoint to go on from.
    """
    if args.model is None:
        overrides = args.overrides()
        own = preset(args.preset, **overrides).max_position_embeddings
        return args.context_length or own
    config = checkpoint_config(args)
    own = config.max_position_embeddings
    if args.context_length is not None and args.context_length > own and config.position_embedding_type == "learned":
        raise ValueError(
            f"context_length={args.context_length} is beyond the {own} learned positions of {args.model}: choose at "
            f"most {own}."
        )
    return args.context_length or own


def checkpoint_config(args: ModelArguments) -> MiniGPTConfig:
    assert args.model is not None
    config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    if not isinstance(config, MiniGPTConfig):
        raise ValueError(
            f"model={args.model!r} is a {config.model_type}, not a MiniGPT: convert it first with recipes/convert.py."
        )
    return config


def trained_vocab_size(args: ModelArguments, data_args: DataArguments) -> int:
    """Entries of the tokenizer that would be trained."""
    return args.vocab_size or (TALES_VOCAB_SIZE if data_args.dataset is None else DEFAULT_VOCAB_SIZE)


def build_config(args: ModelArguments, tokenizer: PreTrainedTokenizerFast) -> MiniGPTConfig:
    """The configuration of a model for this tokenizer."""
    if args.model is not None:
        return checkpoint_config(args)
    table, ids = padded_vocab_size(tokenizer), num_ids(tokenizer)
    fields = {
        "vocab_size": table,
        "unpadded_vocab_size": ids if ids < table else None,
        "max_position_embeddings": context_length(args),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return preset(args.preset, **(args.overrides() | fields))


def build_model(args: ModelArguments, tokenizer: PreTrainedTokenizerFast) -> MiniGPTForCausalLM:
    """The model to train, in float32: the checkpoint to go on from, else a fresh one; it samples when it generates."""
    attention = {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}
    if args.model is not None:
        model = load_checkpoint(
            AutoModelForCausalLM, args.model, trust_remote_code=args.trust_remote_code, **attention
        )
    else:
        config = build_config(args, tokenizer)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention)
    assert isinstance(model, MiniGPTForCausalLM)
    model.generation_config = GenerationConfig(
        do_sample=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def load_checkpoint(
    model_class: type, name_or_path: str, may_be_new: Container[str] = (), **options: Any
) -> MiniGPTForCausalLM:
    """A checkpoint of ours in float32; nothing of it may be missing or of another shape, unless listed.

    Args:
        model_class: an Auto class or a class of ours.
        may_be_new: parameters that may be missing in the checkpoint, and then start afresh.
        options: of `from_pretrained`; fields of the config among them.

    Raises:
        ValueError: a damaged or incomplete checkpoint.
    """
    if Path(name_or_path, MANIFEST).is_file():
        verify_checkpoint(name_or_path)
    remedy = "Its files are damaged or incomplete, or belong to another config.json: get them again."
    try:
        # mismatched ones would be an error that does not name them
        loaded: Any = model_class.from_pretrained(  # type: ignore[attr-defined]
            name_or_path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (SafetensorError, RuntimeError, UnpicklingError) as error:
        raise ValueError(f"model={name_or_path!r} cannot be loaded: {str(error).splitlines()[0]} {remedy}") from error
    model, info = loaded
    # transformers starts these afresh
    missing = [name for name in sorted(info["missing_keys"]) if name not in may_be_new]
    if missing:
        raise ValueError(f"model={name_or_path!r} has no {', '.join(missing)}. {remedy}")
    mismatched = [keys for keys in sorted(info["mismatched_keys"]) if keys[0] not in may_be_new]
    if mismatched:
        name, found, expected = mismatched[0]
        raise ValueError(
            f"model={name_or_path!r} has {name} of shape {tuple(found)} where its config.json wants "
            f"{tuple(expected)}. {remedy}"
        )
    return model
