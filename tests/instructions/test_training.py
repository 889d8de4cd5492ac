"""What the finetuning recipe is made of: settings handed down, the loss's normalisation, answers, adapters, TRL."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, pipeline


# this file is also the program that torchrun starts
sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.instructions.data import (
    Conversation,
    ConversationRows,
    InstructionCollator,
    PackedRows,
    to_conversations,
    tokenize_conversations,
)
from hf_minigpt.instructions.trainer import (
    Answer,
    InstructionTrainer,
    SFTArguments,
    answer_all,
    answer_metrics,
    inherited_settings,
    prepare_for_chat,
)
from hf_minigpt.pretraining.arguments import PretrainArguments
from hf_minigpt.tokenization import load_tokenizer, train_tokenizer
from hf_minigpt.training.lora import LoraArguments, add_lora
from hf_minigpt.training.processes import end_training
from hf_minigpt.training.settings import save_settings
from tests.tiny import tiny_model


ROOT = Path(__file__).parents[2]
WORDS = ["the box", "answer", "is", "here", "it", "to", "what"]


def some_records(num=32):
    rng = random.Random(0)
    records = []
    for _ in range(num):
        said, answer = (" ".join(rng.choices(WORDS, k=rng.randint(1, 5))) for _ in range(2))
        records.append({"prompt": said, "completion": answer})
    return records


def chat_model(name="modern", chat_format="roles", **options):
    texts = ["what is the answer to it? the answer is in the box, and the box is here."] * 9
    tokenizer = train_tokenizer(texts, 320, model_max_length=64, show_progress=False)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(
        name,
        vocab_size=len(tokenizer),
        unpadded_vocab_size=None,
        pad_token_id=tokenizer.pad_token_id,
        **special,
        **options,
    )
    model.generation_config.update(**special, pad_token_id=tokenizer.pad_token_id)
    return model, tokenizer, prepare_for_chat(model, tokenizer, chat_format)


def tokenized(tokenizer):
    conversations, _ = to_conversations(some_records())
    return tokenize_conversations(tokenizer, conversations, 64)


@pytest.mark.parametrize("name", ["modern", "gpt2"])
def test_a_model_grows_for_the_new_tokens(name, tmp_path):
    model, tokenizer, new_ids = chat_model(name)
    assert tokenizer.convert_ids_to_tokens(new_ids) == ["<|system|>", "<|user|>", "<|assistant|>"]
    assert model.config.vocab_size % 64 == 0 and model.config.unpadded_vocab_size == len(tokenizer)
    embeddings = model.get_input_embeddings().weight
    torch.testing.assert_close(embeddings[new_ids[0]], embeddings[: new_ids[0]].mean(0))
    # what is saved is a chat model that stops by itself, to anybody
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    chat = pipeline("text-generation", model=str(tmp_path))
    assert chat.model.generation_config.eos_token_id == tokenizer.eos_token_id
    turns = chat([{"role": "user", "content": "what is it?"}], max_new_tokens=3)[0]["generated_text"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    # a second time nothing is new
    assert prepare_for_chat(model, load_tokenizer(tmp_path)) == []


# Settings


@pytest.mark.parametrize("file", ["training_settings.json", "training_args.bin"])
def test_settings_are_handed_down(file, tmp_path, recwarn):
    args = PretrainArguments(str(tmp_path), learning_rate=1e-2, weight_decay=0.3, adam_beta2=0.9)
    if file == "training_args.bin":
        torch.save(args, tmp_path / file)
    else:
        save_settings(args, tmp_path)
        # an old file beside it is not read
        (tmp_path / "training_args.bin").write_bytes(b"damaged")
    model, _, _ = chat_model(initializer_range=0.1)
    model.save_pretrained(tmp_path)
    settings = inherited_settings(str(tmp_path), 0.5)
    assert settings["optimizer"] == "muon" and settings["weight_decay"] == 0.3 and settings["adam_beta2"] == 0.9
    assert settings["learning_rate"] == pytest.approx(5e-3)
    assert settings["matrix_learning_rate"] == pytest.approx(5e-3)
    assert settings["embedding_learning_rate"] == pytest.approx(0.5 * 0.3 * 0.1)
    assert inherited_settings(str(tmp_path), 0.5, adapter=True)["optimizer"] == "adamw"
    assert not [warning for warning in recwarn.list if "cannot be read" in str(warning.message)]


def test_the_trainer_saves_what_is_handed_down(tmp_path):
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
def test_damaged_settings_are_named(text, message, tmp_path):
    (tmp_path / "training_settings.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        inherited_settings(str(tmp_path), 0.5)


def test_settings_of_another_version(tmp_path):
    (tmp_path / "training_settings.json").write_text('{"optimizer": "adamw", "learning_rate": 1, "new": [2]}')
    assert inherited_settings(str(tmp_path), 0.5) == {"optimizer": "adamw", "learning_rate": 0.5}


def test_nothing_known_is_no_warning(tmp_path, recwarn):
    assert inherited_settings(str(tmp_path), 0.5) == {"optimizer": "adamw", "learning_rate": 5e-5}
    assert not recwarn.list


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["PAYLOAD"]),))


def test_a_pickle_from_elsewhere_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "ran"))
    torch.save(Payload(), tmp_path / "training_args.bin")
    with pytest.warns(
        UserWarning, match=r"training_args.bin cannot be read.*no training_settings.json.*AdamW at 5e-5"
    ):
        assert inherited_settings(str(tmp_path), 0.5) == {"optimizer": "adamw", "learning_rate": 5e-5}
    assert not (tmp_path / "ran").exists()


# Normalisation


def train(folder: Path, name: str, size: int, accumulation: int) -> InstructionTrainer:
    """Two steps of plain gradient descent over the same records, however they are cut into batches."""
    model, tokenizer, _ = chat_model()
    args = SFTArguments(
        str(folder / name),
        optimizer="trainer",
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        train_sampling_strategy="sequential",
        eval_strategy="no",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    data = tokenized(tokenizer)
    trainer = InstructionTrainer(
        model,
        args,
        train_dataset=ConversationRows(data),
        eval_dataset=ConversationRows(data),
        data_collator=InstructionCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.train()
    metrics = trainer.evaluate()
    if args.process_index == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / f"{name}.json").write_text(json.dumps([losses, metrics["eval_loss"], metrics["eval_tokens"]]))
        torch.save(model.state_dict(), folder / f"{name}.pt")
    return trainer


def test_eight_is_four_times_two_is_two_processes(tmp_path):
    """Every batch has another number of trained tokens: a mean of means would differ."""
    train(tmp_path, "whole", 8, 1)
    train(tmp_path, "accumulated", 2, 4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    expected, expected_loss, tokens = json.loads((tmp_path / "whole.json").read_text())

    # the first loss, by hand
    model, tokenizer, _ = chat_model()
    data = tokenized(tokenizer)
    rows = InstructionCollator(tokenizer.pad_token_id)([data.piece(i) for i in range(8)])
    logits = model(rows["input_ids"]).logits
    targets = rows["shift_labels"].flatten()
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100)
    assert expected[0] == pytest.approx(by_hand.item(), rel=1e-4) and expected[1] < expected[0]
    assert tokens == data.num_trained

    weights = torch.load(tmp_path / "whole.pt")
    for name in ("accumulated", "processes"):
        losses, loss, found_tokens = json.loads((tmp_path / f"{name}.json").read_text())
        assert losses == pytest.approx(expected, rel=1e-4), name
        assert loss == pytest.approx(expected_loss, rel=1e-4) and found_tokens == tokens
        for key, tensor in torch.load(tmp_path / f"{name}.pt").items():
            torch.testing.assert_close(tensor, weights[key], rtol=1e-3, atol=1e-4)


# Answers


@pytest.mark.parametrize("name", ["modern", "gpt2", "transformer"])
def test_answers_in_batches_are_those_alone(name):
    model, tokenizer, _ = chat_model(name)
    conversations, _ = to_conversations(some_records())
    # some end, some do not
    model.get_output_embeddings().weight.data[tokenizer.eos_token_id] *= 1.5
    answers = answer_all(model, tokenizer, conversations, batch_size=5, max_new_tokens=12)
    assert [answer.conversation for answer in answers] == conversations
    for answer in answers[::4]:
        ids = tokenizer.apply_chat_template(answer.conversation.prompt, add_generation_prompt=True)["input_ids"]
        prompt, said = len(ids), []
        while len(said) < 12 and tokenizer.eos_token_id not in said:
            said.append(model(torch.tensor([ids + said])).logits[0, -1].argmax().item())
        assert prompt == len(ids) and answer.ended == (tokenizer.eos_token_id in said)
        assert answer.text == tokenizer.decode(said, skip_special_tokens=True)


def test_exact_matches_are_counted_by_category():
    def answer(category, text, ended=True):
        messages = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"})
        return Answer(Conversation(messages, category), text, ended)

    answers = [answer("a", " yes"), answer("a", "yes, no"), answer("b", "yes"), answer("b", "yes", False)]
    assert answer_metrics(answers) == {
        "exact_match": 0.75,
        "answers_ended": 0.75,
        "answers": 4,
        "exact_match/a": 0.5,
        "exact_match/b": 1.0,
    }


# Adapters


@pytest.mark.parametrize("name", ["modern", "gpt2"])
def test_an_adapter_trains_the_new_tokens_and_comes_back(name, tmp_path):
    from peft import AutoPeftModelForCausalLM

    base, tokenizer, _ = chat_model(name)
    plain = tiny_model(name, vocab_size=base.config.vocab_size, unpadded_vocab_size=None)
    for part in (base, tokenizer):
        part.save_pretrained(tmp_path / "base")
    del plain
    base = MiniGPTForCausalLM.from_pretrained(tmp_path / "base")
    new_ids = tokenizer.convert_tokens_to_ids(["<|system|>", "<|user|>", "<|assistant|>"])
    model = add_lora(base, LoraArguments(lora_rank=4), new_ids)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert len([key for key in trained if "lora_" in key]) == 2 * 2 * 6 and any(
        "trainable_tokens" in k for k in trained
    )
    rows = InstructionCollator(1)([tokenized(tokenizer).piece(i) for i in range(8)])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    expected = model(rows["input_ids"]).logits
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(rows["input_ids"]).logits, expected, rtol=1e-3, atol=1e-3)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(loaded(rows["input_ids"]).logits, expected, rtol=1e-3, atol=1e-3)


# TRL, unchanged


def trl_arguments(config_class, folder, **options):
    return config_class(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=20,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("chat_format", ["roles", "alpaca"])
def test_trl_trains_on_the_assistant_s_tokens_alone(chat_format, packing, tmp_path):
    from trl import SFTConfig, SFTTrainer

    model, tokenizer, _ = chat_model("modern", chat_format, max_position_embeddings=512)
    # TRL computes the loss itself, from the head's weight, and would count padded ids
    model.resize_token_embeddings(len(tokenizer))
    conversations, _ = to_conversations(some_records(24))
    data = tokenize_conversations(tokenizer, conversations, 511)
    rows = PackedRows(data, 511)
    batch = InstructionCollator(tokenizer.pad_token_id)([rows[i] for i in range(len(rows))])
    with torch.no_grad():
        expected = model(**batch).loss.item()
    arguments = trl_arguments(SFTConfig, tmp_path, assistant_only_loss=True, packing=packing, max_length=512)
    arguments.per_device_train_batch_size = 100
    messages = Dataset.from_list([{"messages": list(c.messages)} for c in conversations])
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=messages, processing_class=tokenizer)
    trained = sum(int((b["labels"] != -100).sum()) for b in trainer.get_train_dataloader())
    assert trained == data.num_trained
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, rel=1e-3) and losses[-1] < 0.8 * losses[0]


def test_trl_s_dpo_prefers_what_it_should(tmp_path):
    from trl import DPOConfig, DPOTrainer

    model, tokenizer, _ = chat_model("modern")
    model.resize_token_embeddings(len(tokenizer))
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"what is {word}"}],
            "chosen": [{"role": "assistant", "content": "the box"}],
            "rejected": [{"role": "assistant", "content": "it is here"}],
        }
        for word in WORDS * 4
    ]
    trainer = DPOTrainer(
        model=model,
        ref_model=MiniGPTForCausalLM.from_pretrained(_saved(model, tmp_path)),
        args=trl_arguments(DPOConfig, tmp_path),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[0] == pytest.approx(0.0, abs=1e-3) and margins[-1] > 0.5


def _saved(model, folder):
    model.save_pretrained(folder / "reference")
    return folder / "reference"


if __name__ == "__main__":
    finished = train(Path(sys.argv[1]), "processes", 2, 2)
    # a process that exits with its group alive is sometimes aborted
    end_training(finished.accelerator, finished)
