"""Preparing a base model for chat, and the settings it hands down."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import pipeline

from hf_minigpt.instructions.arguments import SFTArguments
from hf_minigpt.instructions.model import inherited_settings, prepare_for_chat
from hf_minigpt.instructions.rows import ConversationRows, InstructionCollator
from hf_minigpt.instructions.trainer import InstructionTrainer
from hf_minigpt.tokenization import load_tokenizer
from hf_minigpt.training.settings import save_settings
from tests.instructions.tiny_chat import chat_model, tokenized


# Written by the recipes of version 0.1, when the argument classes were in other modules. The sft run started from the
# pretraining run's model, with --optimizer adamw --adam_beta2 0.9.
HERE = Path(__file__).parent
PRETRAINING_SETTINGS = {
    "optimizer": "muon",
    "learning_rate": 0.008,
    "matrix_learning_rate": 0.02,
    "embedding_learning_rate": 0.1,
    "muon_scaling": "moonlight",
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-10,
    "max_grad_norm": 1.0,
}
SFT_SETTINGS = PRETRAINING_SETTINGS | {
    "optimizer": "adamw",
    "learning_rate": 0.004,
    "matrix_learning_rate": 0.01,
    "embedding_learning_rate": 0.05,
    "adam_beta2": 0.9,
}


@pytest.mark.parametrize("name", ["modern", "gpt2"])
def test_the_template_s_tokens_get_embeddings(name, tmp_path):
    model, tokenizer, new_ids = chat_model(name)
    assert tokenizer.convert_ids_to_tokens(new_ids) == ["<|system|>", "<|user|>", "<|assistant|>"]
    assert model.config.vocab_size % 64 == 0 and model.config.unpadded_vocab_size == len(tokenizer)
    embeddings = model.get_input_embeddings().weight
    torch.testing.assert_close(embeddings[new_ids[0]], embeddings[: new_ids[0]].mean(0))
    # any program that loads the checkpoint gets a chat model that stops by itself
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    chat = pipeline("text-generation", model=str(tmp_path))
    assert chat.model.generation_config.eos_token_id == tokenizer.eos_token_id
    turns = chat([{"role": "user", "content": "what is it?"}], max_new_tokens=3)[0]["generated_text"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    # preparing it again adds nothing
    assert prepare_for_chat(model, load_tokenizer(tmp_path)) == []


def test_settings_are_inherited(tmp_path, recwarn):
    args = SFTArguments(str(tmp_path), learning_rate=1e-2, weight_decay=0.3, adam_beta2=0.9)
    save_settings(args, tmp_path)
    # not read if there is a newer file
    (tmp_path / "training_args.bin").write_bytes(b"damaged")
    model, _, _ = chat_model(initializer_range=0.1)
    model.save_pretrained(tmp_path)
    settings = inherited_settings(str(tmp_path), 0.5)
    assert settings["optimizer"] == "muon" and settings["weight_decay"] == 0.3 and settings["adam_beta2"] == 0.9
    assert settings["learning_rate"] == pytest.approx(5e-3)
    assert settings["matrix_learning_rate"] == pytest.approx(0.5 * args.matrix_learning_rate)
    assert settings["embedding_learning_rate"] == pytest.approx(0.5 * 0.3 * 0.1)
    assert inherited_settings(str(tmp_path), 0.5, adapter=True)["optimizer"] == "adamw"
    assert not [warning for warning in recwarn.list if "cannot be read" in str(warning.message)]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("training_args_of_version_0.1.bin", PRETRAINING_SETTINGS),
        ("sft_training_args_of_version_0.1.bin", SFT_SETTINGS),
    ],
)
def test_settings_of_version_0_1_are_inherited(file, expected, tmp_path, recwarn):
    shutil.copy(HERE / file, tmp_path / "training_args.bin")
    assert inherited_settings(str(tmp_path), 1.0) == expected
    halved = inherited_settings(str(tmp_path), 0.5)
    assert halved["learning_rate"] == expected["learning_rate"] / 2 and halved["weight_decay"] == 0.1
    assert not recwarn.list


def test_the_trainer_saves_the_settings(tmp_path):
    model, tokenizer, _ = chat_model()
    args = SFTArguments(str(tmp_path / "run"), optimizer="adamw", learning_rate=3e-4, adam_beta2=0.9, use_cpu=True)
    rows = ConversationRows(tokenized(tokenizer))
    collator = InstructionCollator(tokenizer.pad_token_id)
    trainer = InstructionTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=collator)
    for folder in (tmp_path / "run", tmp_path / "elsewhere"):
        trainer.save_model(None if folder.name == "run" else str(folder))
        (folder / "training_args.bin").unlink()
        settings = inherited_settings(str(folder), 0.5)
        assert settings["optimizer"] == "adamw" and settings["learning_rate"] == pytest.approx(1.5e-4)
        assert settings["adam_beta2"] == 0.9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "training_settings.json cannot be read"),
        ("[]", "is not a JSON object"),
        ('{"optimizer": "lion"}', "optimizer='lion' must be one of muon, adamw, trainer. Repair the file, or remove"),
        ('{"optimizer": ["muon"]}', r"optimizer=\['muon'\] must"),
        ('{"learning_rate": "1e-3"}', "learning_rate='1e-3' must be a finite number of at least 0"),
        ('{"learning_rate": null}', "learning_rate=None must"),
        ('{"weight_decay": NaN}', "weight_decay=nan must"),
        ('{"adam_beta1": true}', "adam_beta1=True must"),
    ],
)
def test_damaged_settings_are_refused(text, message, tmp_path):
    (tmp_path / "training_settings.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        inherited_settings(str(tmp_path), 0.5)


def test_unknown_settings_of_a_later_version_are_ignored(tmp_path):
    (tmp_path / "training_settings.json").write_text('{"optimizer": "adamw", "learning_rate": 1, "new": [2]}')
    assert inherited_settings(str(tmp_path), 0.5) == {"optimizer": "adamw", "learning_rate": 0.5}


def test_a_model_without_settings_gets_defaults_without_a_warning(tmp_path, recwarn):
    assert inherited_settings(str(tmp_path), 0.5) == {"optimizer": "adamw", "learning_rate": 5e-5}
    assert not recwarn.list


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["PAYLOAD"]),))


def test_an_unknown_class_in_the_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "ran"))
    torch.save(Payload(), tmp_path / "training_args.bin")
    with pytest.warns(
        UserWarning, match=r"training_args.bin cannot be read.*no training_settings.json.*AdamW at 5e-5"
    ):
        assert inherited_settings(str(tmp_path), 0.5) == {"optimizer": "adamw", "learning_rate": 5e-5}
    assert not (tmp_path / "ran").exists()
