"""A tiny run that tests interrupt, for tests/training/checkpoints and tests/training/test_distributed.py.

Started from the repository's root: `python -m tests.programs.interrupted_training STORE OUTPUT_DIR SECONDS_PER_STEP`
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.data.collators import LanguageModelCollator
from hf_minigpt.data.rows import ShuffledDocumentRows
from hf_minigpt.data.token_store import TokenStore, TokenStoreWriter
from hf_minigpt.training.checkpoints.train_safely import train_safely
from hf_minigpt.training.optimizers import muon_adamw
from tests.tiny import tiny_config


STEPS = 50
# 82 rows, two at a time, two times a step: an epoch's last step is smaller, and checkpoint 21 is at its end
STEPS_PER_EPOCH = 21


def write_store(folder):
    if not folder.is_dir():
        writer = TokenStoreWriter(folder, eos_token_id=0, vocab_size=67)
        rng = np.random.default_rng(0)
        for length in rng.integers(3, 40, 60):
            writer.add(rng.integers(1, 67, length), num_bytes=int(length))
        writer.close()
    return TokenStore.open(folder)


class Muon(Trainer):
    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = muon_adamw(self.model, learning_rate=1e-2, matrix_learning_rate=2e-2, weight_decay=0.1)
        return self.optimizer


class At(TrainerCallback):
    """Does something at one moment of training."""

    def __init__(self, step, act, event="on_step_begin"):
        self.step, self.act = step, act
        setattr(self, event, self._on_event)

    def _on_event(self, args, state, control, model=None, **kwargs):
        # global_step still counts the previous steps when a step begins
        if state.global_step + 1 == self.step:
            self.act(model)


def make_trainer(store, output_dir, *, callbacks=(), trainer_class=Trainer, evaluates=False, rows_seed=3, **arguments):
    torch.manual_seed(0)
    model = MiniGPTForCausalLM(tiny_config("gpt2", embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1))
    rows = ShuffledDocumentRows(store, 16, seed=rows_seed)
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_steps": 7,
        "logging_steps": 7,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": True,
        "label_names": ["shift_labels"],
        "prediction_loss_only": True,
    }
    args = TrainingArguments(str(output_dir), **{**defaults, **arguments})
    return trainer_class(
        model,
        args,
        train_dataset=rows,
        eval_dataset=torch.utils.data.Subset(rows, range(4)) if evaluates else None,
        data_collator=LanguageModelCollator(pad_token_id=1),
        callbacks=list(callbacks),
    )


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same_weights(trainer, expected):
    found = trainer.model.state_dict()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


class Slow(TrainerCallback):
    """Waits before each step."""

    def __init__(self, seconds_per_step: float):
        self.seconds_per_step = seconds_per_step

    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(self.seconds_per_step)


if __name__ == "__main__":
    torch.set_num_threads(1)
    store_folder, output_dir, seconds_per_step = sys.argv[1:]
    slow = Slow(float(seconds_per_step))
    train_safely(make_trainer(TokenStore.open(store_folder), Path(output_dir), callbacks=[slow]))
