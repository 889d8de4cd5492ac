"""Training a chat model: normalization of the loss, adapters, and TRL's trainers."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.instructions.rows import InstructionCollator, PackedRows, tokenize_conversations
from hf_minigpt.training.lora import LoraArguments, add_lora
from tests.instructions.tiny_chat import WORDS, chat_model, some_conversations, tokenized
from tests.programs.train_instructions import train


ROOT = Path(__file__).parents[2]


def test_accumulation_and_processes_give_the_loss_of_one_batch(tmp_path):
    """Batches differ in their number of answer tokens, so a mean of batch means would differ."""
    train(tmp_path, "whole", 8, 1)
    train(tmp_path, "accumulated", 2, 4)
    result = subprocess.run(
        [sys.executable, "-m", "tests.programs.train_instructions", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    expected, expected_loss, tokens = json.loads((tmp_path / "whole.json").read_text())

    # the first loss, computed from the logits
    model, tokenizer, _ = chat_model()
    data = tokenized(tokenizer)
    rows = InstructionCollator(tokenizer.pad_token_id)([data.row(i) for i in range(8)])
    logits = model(rows["input_ids"]).logits
    targets = rows["shift_labels"].flatten()
    reference = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100)
    assert expected[0] == pytest.approx(reference.item(), rel=1e-4) and expected[1] < expected[0]
    assert tokens == data.num_trained

    weights = torch.load(tmp_path / "whole.pt")
    for name in ("accumulated", "processes"):
        losses, loss, found_tokens = json.loads((tmp_path / f"{name}.json").read_text())
        assert losses == pytest.approx(expected, rel=1e-4), name
        assert loss == pytest.approx(expected_loss, rel=1e-4) and found_tokens == tokens
        for key, tensor in torch.load(tmp_path / f"{name}.pt").items():
            torch.testing.assert_close(tensor, weights[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["modern", "gpt2"])
def test_an_adapter_trains_the_new_tokens_and_loads_again(name, tmp_path):
    from peft import AutoPeftModelForCausalLM

    base, tokenizer, new_ids = chat_model(name)
    for part in (base, tokenizer):
        part.save_pretrained(tmp_path / "base")
    base = MiniGPTForCausalLM.from_pretrained(tmp_path / "base")
    model = add_lora(base, LoraArguments(lora_rank=4), new_ids)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert len([key for key in trained if "lora_" in key]) == 2 * 2 * 6 and any(
        "trainable_tokens" in k for k in trained
    )
    rows = InstructionCollator(1)([tokenized(tokenizer).row(i) for i in range(8)])
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


def trl_arguments(config_class, folder, **options):
    return config_class(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=10,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )


@pytest.mark.parametrize(("chat_format", "packing"), [("roles", False), ("roles", True), ("alpaca", True)])
def test_trl_trains_on_the_assistant_s_tokens_only(chat_format, packing, tmp_path):
    from trl import SFTConfig, SFTTrainer

    model, tokenizer, _ = chat_model("modern", chat_format, max_position_embeddings=512)
    # TRL computes the loss from the head's weight, padded ids included
    model.resize_token_embeddings(len(tokenizer))
    conversations = some_conversations(24)
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


def test_trl_s_dpo_learns_the_preference(tmp_path):
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
        ref_model=copy.deepcopy(model),
        args=trl_arguments(DPOConfig, tmp_path),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[0] == pytest.approx(0.0, abs=1e-3) and margins[-1] > 0.5
