"""Load PEFT adapters merged into their base models, for programs that cannot read adapters."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from .tokenization import num_ids


CONFIG_FILE = "adapter_config.json"
# the finetuning recipes pad grown embeddings to this multiple
PAD_MULTIPLE = 64


def is_adapter(name_or_path: str | PathLike[str]) -> bool:
    """Return whether this is the folder of an adapter, such as `sft.py --lora_rank` writes."""
    return Path(name_or_path, CONFIG_FILE).is_file()


def load_causal_lm(name_or_path: str | PathLike[str], **options: Any) -> Any:
    """Load a language model from a folder or the Hub. An adapter is merged into its base model.

    Args:
        name_or_path: folder of a model or an adapter, or name of a model on the Hub.
        options: passed to `from_pretrained`.

    Raises:
        ValueError: PEFT is not installed, or the adapter's base model cannot be loaded.
    """
    if not is_adapter(name_or_path):
        return AutoModelForCausalLM.from_pretrained(name_or_path, **options)
    return _load_merged(name_or_path, **options)


@contextlib.contextmanager
def merged(name_or_path: str | PathLike[str], **options: Any) -> Iterator[str]:
    """Yield `name_or_path`, or for an adapter a temporary folder with the merged model."""
    if not is_adapter(name_or_path):
        yield str(name_or_path)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_merged(name_or_path, folder, **options)
        yield folder


def save_merged(adapter: str | PathLike[str], folder: str | PathLike[str], **options: Any) -> None:
    """Save an adapter, merged into its base model, and its tokenizer in `folder`."""
    model: PreTrainedModel = _load_merged(adapter, **options)
    model.save_pretrained(folder)
    remote = {name: value for name, value in options.items() if name == "trust_remote_code"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(adapter), **remote)
    except (OSError, ValueError):
        # an adapter saved without a tokenizer uses that of its base model
        tokenizer = AutoTokenizer.from_pretrained(_adapter_config(adapter)["base_model_name_or_path"], **remote)
    tokenizer.save_pretrained(folder)


def _adapter_config(adapter: str | PathLike[str]) -> dict[str, Any]:
    return json.loads(Path(adapter, CONFIG_FILE).read_text(encoding="utf-8"))


def _load_merged(adapter: str | PathLike[str], **options: Any) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            f'model={str(adapter)!r} is an adapter and requires PEFT: pip install "hf_minigpt[lora]".'
        ) from error
    adapter_config = _adapter_config(adapter)
    base = adapter_config["base_model_name_or_path"]
    try:
        if adapter_config.get("task_type") == "SEQ_CLS":
            # the recipe saves a config with the labels next to the adapter
            config = {"config": _model_config(adapter, options)} if Path(adapter, "config.json").is_file() else {}
            base_model: Any = AutoModelForSequenceClassification.from_pretrained(base, **config, **options)
        else:
            base_model = AutoModelForCausalLM.from_pretrained(base, **options)
            _resize_embeddings(base_model, adapter, options.get("trust_remote_code", False))
        model: Any = peft.PeftModel.from_pretrained(base_model, str(adapter))
    except OSError as error:
        raise ValueError(
            f"model={str(adapter)!r} is an adapter of base_model_name_or_path={base!r}, which cannot be loaded. "
            f"Restore it, or set its new location in {CONFIG_FILE}."
        ) from error
    model = model.merge_and_unload().eval()
    if Path(adapter, "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(adapter)
    return model


def _resize_embeddings(model: Any, adapter: str | PathLike[str], trust_remote_code: bool) -> None:
    """Grow the embeddings as in training if the adapter's tokenizer has more tokens than the base model."""
    if not Path(adapter, "tokenizer_config.json").is_file():
        return
    num_tokens = num_ids(AutoTokenizer.from_pretrained(str(adapter), trust_remote_code=trust_remote_code))
    if num_tokens > (getattr(model.config, "unpadded_vocab_size", None) or model.config.vocab_size):
        model.resize_token_embeddings(num_tokens, pad_to_multiple_of=PAD_MULTIPLE, mean_resizing=False)


def _model_config(adapter: str | PathLike[str], options: dict[str, Any]) -> Any:
    return AutoConfig.from_pretrained(adapter, trust_remote_code=options.get("trust_remote_code", False))
