"""Builds the model of a run, or loads the checkpoint that it starts from, with its tokenizer."""

from collections.abc import Container
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ..adapters import is_adapter, load_causal_lm, merged
from ..deploy import conversion
from ..model.configuration_minigpt import MiniGPTConfig
from ..model.modeling_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification, MiniGPTPreTrainedModel
from ..presets import preset
from ..tokenization import check_tokenizer_fits, load_tokenizer, num_ids, padded_vocab_size
from .arguments import DataArguments, ModelArguments
from .checkpoints.sealing import MANIFEST, verify_checkpoint
from .console import without_progress_bars
from .processes import class_before_sharding


Model = TypeVar("Model", bound=MiniGPTPreTrainedModel)

# Default vocabulary sizes of a trained tokenizer. The tales have about 300 words. On other text, a small model on a
# CPU would spend most of its time in the output head of a larger vocabulary.
TALES_VOCAB_SIZE = 1024
DEFAULT_VOCAB_SIZE = 4096
# Embedding tables are padded to a multiple of this, for fast matrix products on a GPU.
MULTIPLE = 64
# Weights that a checkpoint with another head may lack, by the class of the model
NEW_HEAD_WEIGHTS: dict[type, set[str]] = {
    MiniGPTForSequenceClassification: {"score.weight", "pool_query.weight", "lm_head.weight", "lm_head.bias"}
}
# Fields of PreTrainedConfig that MiniGPTConfig does not declare
LABELS = ("num_labels", "id2label", "label2id")


def check_base_exists(name_or_path: str | None, tokenizer: str | None = None, trust_remote_code: bool = False) -> None:
    """Check that a base model and a tokenizer can be found, before the data are read. None is not checked.

    Raises:
        ValueError: if one of them is neither a folder nor on the Hub.
    """
    try:
        if name_or_path is not None and not is_adapter(name_or_path):
            conversion.detect_layout(name_or_path)
    except OSError as error:
        raise ValueError(
            f"model={name_or_path!r} is neither a folder with a model nor a name on the Hub: {error}"
        ) from error
    try:
        if tokenizer is not None:
            load_tokenizer(tokenizer, trust_remote_code=trust_remote_code, add_end_of_text=True)
    except OSError as error:
        raise ValueError(
            f"tokenizer={tokenizer!r} is neither a folder with a tokenizer nor a name on the Hub: {error}"
        ) from error


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

    GPT-2, GPT-1, nanoGPT and NanoChat checkpoints are converted. `<|endoftext|>` and `<|pad|>` are added to a
    tokenizer that lacks them. If the embedding table has no rows for them, it is extended, and the special ids of the
    config are set to those of the tokenizer. From the folder of an adapter, the base model is loaded with the adapter
    merged.

    Args:
        model_class: class of the model. Weights of its head that the checkpoint lacks are newly initialized.
        name_or_path: a folder, a name on the Hub, or a ckpt.pt of nanoGPT.
        tokenizer: folder or Hub name of the tokenizer. Default: `name_or_path`.
        trust_remote_code: whether to run code from the repository of the checkpoint.
        attn_implementation: attention implementation. Default: that of transformers.
        config_overrides: fields of `MiniGPTConfig` that replace those of the checkpoint (dropout, `num_labels`, ...).

    Returns:
        The model, and its tokenizer with `model_max_length` set to the model's context length.

    Raises:
        ValueError: if the checkpoint is damaged or cannot be converted, or the tokenizer does not fit the model.
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
        model: Any = load_checkpoint(
            model_class,
            name_or_path,
            NEW_HEAD_WEIGHTS.get(model_class, set()),
            trust_remote_code=trust_remote_code,
            **options,
            **config_overrides,
        )
    else:
        model = _convert_checkpoint(model_class, layout, name_or_path, config_overrides)
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
    assert isinstance(model, model_class)
    path = Path(name_or_path)
    loaded_tokenizer = load_tokenizer(
        tokenizer or (str(path.parent) if path.suffix == ".pt" else name_or_path),
        model_max_length=model.config.max_position_embeddings,
        trust_remote_code=trust_remote_code,
        add_end_of_text=True,
    )
    _fit_to_tokenizer(model, loaded_tokenizer, converted=layout != "minigpt")
    return model, loaded_tokenizer


def _convert_checkpoint(model_class: type[Model], layout: str, name_or_path: str, overrides: dict[str, Any]) -> Model:
    labels = {name: overrides.pop(name) for name in LABELS if name in overrides}
    source = conversion.FROM[layout](name_or_path, **overrides).float()
    for name, value in labels.items():
        setattr(source.config, name, value)
    if isinstance(source, model_class):
        return source
    model = model_class(source.config)
    info = model.load_state_dict(source.state_dict(), strict=False)
    missing = set(info.missing_keys) - NEW_HEAD_WEIGHTS.get(model_class, set())
    if missing:
        raise ValueError(f"model={name_or_path!r} has no {', '.join(sorted(missing))}. Choose a language model.")
    return model.eval()


def _fit_to_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, converted: bool) -> None:
    config = model.config
    assert isinstance(config, MiniGPTConfig)
    real_ids = config.vocab_size if config.unpadded_vocab_size is None else config.unpadded_vocab_size
    ids = num_ids(tokenizer)
    num_new = ids - real_ids
    if converted and -num_new in range(1, MULTIPLE):
        # the source project padded its table without recording it
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
    """Return the number of tokens in a row: `--context_length`, or else that of the model.

    Raises:
        ValueError: if it exceeds the learned positions of the checkpoint.
    """
    if args.model is None:
        overrides = args.overrides()
        own = preset(args.preset, **overrides).max_position_embeddings
        return args.context_length or own
    config = checkpoint_config(args)
    own = config.max_position_embeddings
    if args.context_length is not None and args.context_length > own and config.position_embedding_type == "learned":
        raise ValueError(
            f"context_length={args.context_length} exceeds the {own} learned positions of {args.model}. Set it to at "
            f"most {own}."
        )
    return args.context_length or own


def checkpoint_config(args: ModelArguments) -> MiniGPTConfig:
    """Load the configuration of `--model`.

    Raises:
        ValueError: if it is not a MiniGPT.
    """
    assert args.model is not None
    config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    if not isinstance(config, MiniGPTConfig):
        raise ValueError(
            f"model={args.model!r} is a {config.model_type}, not a MiniGPT. Convert it with recipes/convert.py."
        )
    return config


def trained_vocab_size(args: ModelArguments, data_args: DataArguments) -> int:
    """Return the vocabulary size of a tokenizer trained on the dataset."""
    return args.vocab_size or (TALES_VOCAB_SIZE if data_args.dataset is None else DEFAULT_VOCAB_SIZE)


def build_config(args: ModelArguments, tokenizer: PreTrainedTokenizerFast) -> MiniGPTConfig:
    """Return the configuration of `--model`, or else of a new model for this tokenizer."""
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
    """Load `--model`, or else build a new model, in float32. Its generation config is set to sample."""
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
    model_class: type, name_or_path: str, allow_missing: Container[str] = (), **options: Any
) -> MiniGPTForCausalLM:
    """Load a MiniGPT checkpoint in float32, and check that it is complete.

    Args:
        model_class: an Auto class or a MiniGPT class.
        name_or_path: a folder or a name on the Hub.
        allow_missing: names of weights that the checkpoint may lack. They are newly initialized.
        options: options of `from_pretrained`, including fields of the config.

    Raises:
        ValueError: if the checkpoint is damaged, or another weight is missing or has the wrong shape.
    """
    if Path(name_or_path, MANIFEST).is_file():
        verify_checkpoint(name_or_path)
    remedy = "Its files are damaged, incomplete, or do not match its config.json. Download or save them again."
    try:
        # otherwise from_pretrained raises an error that does not name the mismatched weights
        loaded: Any = model_class.from_pretrained(  # type: ignore[attr-defined]
            name_or_path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (SafetensorError, RuntimeError, UnpicklingError) as error:
        raise ValueError(f"model={name_or_path!r} cannot be loaded: {str(error).splitlines()[0]} {remedy}") from error
    model, info = loaded
    # transformers initializes these without an error
    missing = [name for name in sorted(info["missing_keys"]) if name not in allow_missing]
    if missing:
        raise ValueError(f"model={name_or_path!r} has no {', '.join(missing)}. {remedy}")
    mismatched = [keys for keys in sorted(info["mismatched_keys"]) if keys[0] not in allow_missing]
    if mismatched:
        name, found, expected = mismatched[0]
        raise ValueError(
            f"model={name_or_path!r} has {name} of shape {tuple(found)}, but its config.json requires "
            f"{tuple(expected)}. {remedy}"
        )
    return model


def whole_model(model: Any, folder: str | Path) -> Any:
    """Return a model that one process can run alone: a sharded one, whose layers wait for all processes, is loaded
    from where it was saved.

    Args:
        model: a model after training.
        folder: where its whole weights or its adapter are saved.

    Returns:
        `model` if it is not sharded, else a copy on its device. An adapter is merged.

    Raises:
        ValueError: if DeepSpeed's ZeRO-3 shards the model. It also shards models while they are loaded.
    """
    parameters = list(model.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        raise ValueError("zero_stage=3: a sharded model cannot run in one process. Set zero_stage to 2, or use FSDP2.")
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return model
    load = load_causal_lm if is_adapter(folder) else class_before_sharding(model).from_pretrained
    with without_progress_bars():
        return load(folder).to(parameters[0].device)
