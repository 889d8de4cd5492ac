"""Adapters as whole models: what reads a model's folder and knows no PEFT takes them merged."""

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


FILE = "adapter_config.json"
# as the finetuning recipes pad a table that grows
MULTIPLE = 64


def is_adapter(name_or_path: str | PathLike[str]) -> bool:
    """Whether this is the folder of an adapter, as `sft.py --lora_rank` leaves it."""
    return Path(name_or_path, FILE).is_file()


def load_causal_lm(name_or_path: str | PathLike[str], **options: Any) -> Any:
    """A language model from a folder or the Hub; an adapter's folder gives its base model with the adapter merged.

    Args:
        options: of `from_pretrained`.

    Raises:
        ValueError: PEFT is not installed, or the adapter's base model is not where it was.
    """
    if not is_adapter(name_or_path):
        return AutoModelForCausalLM.from_pretrained(name_or_path, **options)
    return _load_merged(name_or_path, **options)


@contextlib.contextmanager
def merged(name_or_path: str | PathLike[str], **options: Any) -> Iterator[str]:
    """The folder or Hub name of a whole model: `name_or_path`, or for an adapter a temporary folder with the merge."""
    if not is_adapter(name_or_path):
        yield str(name_or_path)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_merged(name_or_path, folder, **options)
        yield folder


def save_merged(adapter: str | PathLike[str], folder: str | PathLike[str], **options: Any) -> None:
    """Write the model and the tokenizer of an adapter's folder into `folder`."""
    model: PreTrainedModel = _load_merged(adapter, **options)
    model.save_pretrained(folder)
    remote = {name: value for name, value in options.items() if name == "trust_remote_code"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(adapter), **remote)
    except (OSError, ValueError):
        # adapters saved without one have their base model's
        tokenizer = AutoTokenizer.from_pretrained(_fields(adapter)["base_model_name_or_path"], **remote)
    tokenizer.save_pretrained(folder)


def _fields(adapter: str | PathLike[str]) -> dict[str, Any]:
    return json.loads(Path(adapter, FILE).read_text(encoding="utf-8"))


def _load_merged(adapter: str | PathLike[str], **options: Any) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f'model={str(adapter)!r} is an adapter: pip install "hf_minigpt[lora]".') from error
    fields = _fields(adapter)
    base = fields["base_model_name_or_path"]
    try:
        if fields.get("task_type") == "SEQ_CLS":
            # the labels are in the config that the recipe saves beside the adapter
            config = {"config": _config(adapter, options)} if Path(adapter, "config.json").is_file() else {}
            whole = AutoModelForSequenceClassification.from_pretrained(base, **config, **options)
            model: Any = peft.PeftModel.from_pretrained(whole, str(adapter))
        else:
            whole = AutoModelForCausalLM.from_pretrained(base, **options)
            _make_room(whole, adapter, options.get("trust_remote_code", False))
            model = peft.PeftModel.from_pretrained(whole, str(adapter))
    except OSError as error:
        raise ValueError(
            f"model={str(adapter)!r} is an adapter of base_model_name_or_path={base!r}, which cannot be loaded: put "
            f"it back there, or write where it is now into {FILE}."
        ) from error
    model = model.merge_and_unload().eval()
    if Path(adapter, "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(adapter)
    return model


def _make_room(model: Any, adapter: str | PathLike[str], trust_remote_code: bool) -> None:
    """The table grows as in training, where the adapter's tokenizer has more tokens than the base model."""
    if not Path(adapter, "tokenizer_config.json").is_file():
        return
    num_tokens = num_ids(AutoTokenizer.from_pretrained(str(adapter), trust_remote_code=trust_remote_code))
    if num_tokens > (getattr(model.config, "unpadded_vocab_size", None) or model.config.vocab_size):
        model.resize_token_embeddings(num_tokens, pad_to_multiple_of=MULTIPLE, mean_resizing=False)


def _config(adapter: str | PathLike[str], options: dict[str, Any]) -> Any:
    return AutoConfig.from_pretrained(adapter, trust_remote_code=options.get("trust_remote_code", False))
