"""The model that a finetuning recipe starts from, with its tokenizer: ours, or one that converts."""

from pathlib import Path
from typing import Any, TypeVar

from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast

from .. import conversion
from ..adapters import is_adapter, merged
from ..configuration_minigpt import MiniGPTConfig
from ..modeling_minigpt import MiniGPTForSequenceClassification, MiniGPTPreTrainedModel
from ..tokenization import check_tokenizer_fits, load_tokenizer, num_ids
from .setup import load_checkpoint


Model = TypeVar("Model", bound=MiniGPTPreTrainedModel)

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
