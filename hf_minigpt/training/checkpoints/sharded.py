"""Checkpoints of FSDP2: written by each process or as whole tensors, resumed from with or without FSDP.

With `fsdp_state_dict_type: SHARDED_STATE_DICT`, each process writes its part of the weights and of the optimizer state
with `torch.distributed.checkpoint`. Any number of processes can read them, and `merge_checkpoint` makes a model folder
of them. Unlike safetensors these files hold pickles, so they are read only if they match the manifest of the
checkpoint, and are not meant to be shared.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME, SCHEDULER_NAME
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import StateDictType
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from ...model.modeling_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification
from ..settings import save_settings
from .sealing import CHECKPOINT_NAME, verify_checkpoint


SHARDED_WEIGHTS = f"{FSDP_MODEL_NAME}_0"
SHARDED_OPTIMIZER = f"{OPTIMIZER_NAME}_0"
WHOLE_WEIGHTS = f"{FSDP_MODEL_NAME}.bin"
WHOLE_OPTIMIZER = f"{OPTIMIZER_NAME}.bin"


def is_sharded(checkpoint: str | Path) -> bool:
    """Return whether each process of FSDP2 wrote its own part of a checkpoint."""
    return Path(checkpoint, SHARDED_WEIGHTS).is_dir()


def is_of_fsdp(checkpoint: str | Path) -> bool:
    """Return whether a checkpoint was written under FSDP."""
    return is_sharded(checkpoint) or Path(checkpoint, WHOLE_WEIGHTS).is_file()


def load_weights(checkpoint: str | Path, model: nn.Module) -> None:
    """Load the weights of an FSDP checkpoint into a model without FSDP. The checkpoint must have been verified."""
    if is_sharded(checkpoint):
        content = {"model": get_model_state_dict(model)}
        dcp.load(content, checkpoint_id=str(Path(checkpoint, SHARDED_WEIGHTS)), no_dist=True)
        weights = content["model"]
    else:
        weights = torch.load(Path(checkpoint, WHOLE_WEIGHTS), map_location="cpu", weights_only=True)
    set_model_state_dict(model, weights)


def load_optimizer(checkpoint: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer state of an FSDP checkpoint without FSDP. The checkpoint must have been verified."""
    if is_sharded(checkpoint):
        # creates the state, so that there are tensors to read into
        content = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(content, checkpoint_id=str(Path(checkpoint, SHARDED_OPTIMIZER)), no_dist=True)
        states = content["optimizer"]
    else:
        states = torch.load(Path(checkpoint, WHOLE_OPTIMIZER), map_location="cpu", weights_only=True)
    set_optimizer_state_dict(model, optimizer, states, options=StateDictOptions(full_state_dict=True))


def merge_checkpoint(checkpoint: str | Path, output_dir: str | Path) -> PreTrainedModel:
    """Write the model of a sharded checkpoint as a folder that `from_pretrained` loads, and return it.

    Memory holds the weights once; no process group is needed.

    Args:
        checkpoint: a sealed `checkpoint-N` folder. Its tokenizer and settings are copied.
        output_dir: folder for the model.

    Raises:
        BrokenCheckpoint: a file does not match the manifest. Nothing was read from it.
        ValueError: the checkpoint has no sharded model, or one that is no MiniGPT.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    if not is_sharded(checkpoint) or not Path(checkpoint, "config.json").is_file():
        raise ValueError(
            f"{checkpoint} is not a sharded checkpoint with a configuration: it has no {SHARDED_WEIGHTS} and "
            "config.json. Give a checkpoint-N folder of a run with recipes/launch/fsdp2_sharded.yaml."
        )
    verify_checkpoint(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint)
    classes = {each.__name__: each for each in (MiniGPTForCausalLM, MiniGPTForSequenceClassification)}
    if config.architectures[0] not in classes:
        raise ValueError(f"{checkpoint} has a {config.architectures[0]}; only {' and '.join(classes)} can be merged.")
    model = classes[config.architectures[0]](config)
    load_weights(checkpoint, model)
    model.save_pretrained(output_dir)
    for path in checkpoint.iterdir():
        if path.is_file() and path.name.startswith(("tokenizer", "chat_template", "special_tokens", "training_set")):
            shutil.copy(path, output_dir)
    return model


class FsdpCheckpointsMixin(Trainer):
    """
    Saves and resumes FSDP checkpoints where the Trainer does not.

    - `save_model` writes the whole model also if the checkpoints are sharded. These get the configuration, the
      tokenizer and the settings in addition.
    - A checkpoint of FSDP, sharded or whole, is resumed from by a run with FSDP of either kind, or by one without.
    """

    @property
    def _writes_shards(self) -> bool:
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        return plugin is not None and plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self._writes_shards:
            super().save_model(output_dir, _internal_call)
        elif output_dir is not None and CHECKPOINT_NAME.fullmatch(Path(output_dir).name):
            # the Trainer writes the shards with the optimizer's state
            if self.args.should_save:
                self._save_description(output_dir)
        else:
            with self._state_dict_type(StateDictType.FULL_STATE_DICT):
                super().save_model(output_dir, _internal_call)

    def _save_description(self, output_dir: str) -> None:
        model: Any = self.accelerator.unwrap_model(self.model)
        # FSDP2 replaces the class by one of this name
        model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
        model.config.save_pretrained(output_dir)
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            self.processing_class.save_pretrained(output_dir)
        save_settings(self.args, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            with self._state_dict_type_of(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif is_of_fsdp(resume_from_checkpoint):
            plain_model: Any = model or self.model
            load_weights(resume_from_checkpoint, plain_model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_of_fsdp(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        elif self.is_fsdp_enabled:
            with self._state_dict_type_of(checkpoint):
                super()._load_optimizer_and_scheduler(checkpoint)
        else:
            model: Any = self.model
            # accelerate's wrapper
            optimizer: Any = self.optimizer
            scheduler: Any = self.lr_scheduler
            load_optimizer(checkpoint, model, optimizer.optimizer)
            path = Path(checkpoint, f"{SCHEDULER_NAME}.pt")
            scheduler.load_state_dict(torch.load(path, weights_only=True))

    def _state_dict_type_of(self, checkpoint: str) -> contextlib.AbstractContextManager[None]:
        if not is_of_fsdp(checkpoint):
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} was written without FSDP. Resume it without FSDP, or start "
                "from its weights with --model in another output_dir."
            )
        sharded = is_sharded(checkpoint)
        return self._state_dict_type(StateDictType.SHARDED_STATE_DICT if sharded else StateDictType.FULL_STATE_DICT)

    @contextlib.contextmanager
    def _state_dict_type(self, state_dict_type: StateDictType) -> Iterator[None]:
        plugin = self.accelerator.state.fsdp_plugin
        names = ("state_dict_type", "state_dict_config", "optim_state_dict_config")
        before = {name: getattr(plugin, name) for name in names}
        # accelerate keeps the configurations of another type
        plugin.state_dict_config = plugin.optim_state_dict_config = None
        plugin.set_state_dict_type(state_dict_type)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(plugin, name, value)
