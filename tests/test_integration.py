"""Trainer, accelerate, PEFT and TRL train a tiny MiniGPT without special cases."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification
from tests.model.test_generation import tiny_tokenizer
from tests.tiny import random_ids, tiny_config, tiny_model


@pytest.fixture(autouse=True)
def reset_accelerate():
    """Accelerate keeps its precision and processes until the interpreter exits."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def sentences(count=32, length=12, vocab_size=67):
    """Return rows in which each token is followed by the next number."""
    starts = random_ids(count, 1, vocab_size=vocab_size)
    return (starts + torch.arange(length)) % vocab_size


def examples(kind):
    ids = sentences()
    if kind == "classifier":
        return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[-1] % 2} for row in ids]
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def fresh_model(kind, name="modern"):
    torch.manual_seed(0)
    if kind == "classifier":
        return MiniGPTForSequenceClassification(tiny_config(name, num_labels=2, pad_token_id=0))
    return MiniGPTForCausalLM(tiny_config(name))


@pytest.mark.parametrize("kind", ["language_model", "classifier"])
def test_the_trainer_learns_and_resumes(kind, tmp_path):
    def trainer(model, **changes):
        arguments = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "max_steps": 30,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 8,
            "eval_strategy": "steps",
            "eval_steps": 15,
            "save_steps": 15,
            "load_best_model_at_end": True,
            "report_to": "none",
            "disable_tqdm": True,
        }
        data = examples(kind)
        return Trainer(
            model=model,
            args=TrainingArguments(**{**arguments, **changes}),
            train_dataset=data,
            eval_dataset=data,
            compute_metrics=lambda p: {"rows": len(p.label_ids), "width": p.predictions.shape[-1]},
        )

    learner = trainer(fresh_model(kind))
    start = learner.evaluate()
    assert start["eval_rows"] == 32
    assert start["eval_width"] == (2 if kind == "classifier" else 72)
    learner.train()
    losses = [entry["eval_loss"] for entry in learner.state.log_history if "eval_loss" in entry]
    assert losses[-1] < 0.6 * start["eval_loss"]
    # The best checkpoint is loaded into the model, and saved.
    assert learner.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    loaded = type(learner.model).from_pretrained(learner.state.best_model_checkpoint)
    assert trainer(loaded).evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    # A run resumed from the middle ends as the whole run.
    resumed = trainer(fresh_model(kind), load_best_model_at_end=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    last = type(loaded).from_pretrained(tmp_path / "checkpoint-30")
    for key, tensor in last.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[key], tensor)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_plain_accelerate_loop_learns(precision, tmp_path):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    model = fresh_model("language_model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = torch.utils.data.DataLoader(examples("language_model"), batch_size=8, shuffle=True)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    model.train()
    losses = []
    for _ in range(10):
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    accelerator.unwrap_model(model).save_pretrained(tmp_path, save_function=accelerator.save)
    ids = sentences(2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.eval()
    with torch.no_grad():
        plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        torch.testing.assert_close(loaded(ids).logits, plain(ids).logits)


# Two steps over all data, so that the order of the examples does not matter. Each example has another label count.
TWO_PROCESSES = """
import sys

import torch
from transformers import Trainer, TrainingArguments

import hf_minigpt
from hf_minigpt.training.processes import end_training

folder, kind = sys.argv[1:3]
size, accumulation, world = map(int, sys.argv[3:])
model_class = {
    "language_model": hf_minigpt.MiniGPTForCausalLM,
    "classifier": hf_minigpt.MiniGPTForSequenceClassification,
}[kind]
arguments = TrainingArguments(
    output_dir=folder,
    use_cpu=True,
    ddp_backend="gloo" if world > 1 else None,
    per_device_train_batch_size=size,
    gradient_accumulation_steps=accumulation,
    max_steps=2,
    optim="sgd",
    learning_rate=0.5,
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
assert arguments.world_size == world, arguments.world_size
model = model_class.from_pretrained(f"{folder}/start")
data = torch.load(f"{folder}/data.pt")
trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
trainer.train()
print("eval", trainer.evaluate()["eval_loss"])
trainer.save_model(f"{folder}/end_{world}")
# Without this, a process sometimes aborts on exit.
end_training(trainer.accelerator, trainer)
"""


@pytest.mark.parametrize("kind", ["language_model", "classifier"])
def test_two_processes_learn_what_one_does(kind, tmp_path):
    options = {"auxiliary_lm_weight": 0.5, "num_labels": 3, "pad_token_id": 66} if kind == "classifier" else {}
    model_class = MiniGPTForSequenceClassification if kind == "classifier" else MiniGPTForCausalLM
    tiny_model("gpt2", model_class=model_class, **options).save_pretrained(tmp_path / "start")
    ids = random_ids(8, 10, vocab_size=66)
    data = []
    for row in range(8):
        if kind == "classifier":
            mask = (torch.arange(10) < 10 - row).long()
            data.append({"input_ids": ids[row], "attention_mask": mask, "labels": torch.tensor(row % 3)})
        else:
            data.append({"input_ids": ids[row], "labels": ids[row].masked_fill(torch.arange(10) < row, -100)})
    torch.save(data, tmp_path / "data.pt")
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), str(script)]
    for world, command, shape in ((1, [str(script)], ["8", "1"]), (2, launch, ["2", "2"])):
        result = subprocess.run(
            [sys.executable, *command, str(tmp_path), kind, *shape, str(world)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr
    start, one, two = (model_class.from_pretrained(tmp_path / name) for name in ("start", "end_1", "end_2"))
    for key, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)
    assert any((tensor - start.state_dict()[key]).abs().max() > 1e-2 for key, tensor in one.state_dict().items())


def test_lora_trains_saves_and_merges(tmp_path):
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    base = tiny_model("modern")
    ids = sentences()
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=64)
    model = get_peft_model(base, config)
    untouched = {key: p.clone() for key, p in model.named_parameters() if not p.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        max_steps=30,
        learning_rate=2e-2,
        per_device_train_batch_size=8,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples("language_model"))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2
    for key, tensor in untouched.items():
        assert torch.equal(tensor, dict(model.named_parameters())[key]), key
    model.eval()
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    tiny_model("modern").save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(ids).logits, expected)
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["lora", "modules_to_save", "all_linear"])
def test_an_adapted_head_takes_part_in_the_loss(how):
    from peft import LoraConfig, get_peft_model

    options = {
        "lora": {"target_modules": ["lm_head"]},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "all_linear": {"target_modules": "all-linear"},
    }[how]
    model = get_peft_model(tiny_model("modern"), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))
    ids = sentences(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head" in name and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    expected = model.eval()(ids, labels=ids).loss
    for skip_logits in (None, True):
        loss = model.train()(ids, labels=ids, skip_logits=skip_logits).loss
        torch.testing.assert_close(loss, expected)
    loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in trained.values())
    if how != "all_linear":
        assert any("lm_head" in name and gradient.any() for name, gradient in trained.items())


@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_trl_with_packing(name, tmp_path):
    """The first loss is the mean over the tokens of all documents, scored separately; then it decreases."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = tiny_tokenizer()
    texts = [("abcdefghijklmnopqrstuvwxyz " * 2)[i : i + 5 + i % 9] for i in range(24)]
    # An unpadded embedding: TRL computes the loss itself, from the head's weight, over all ids.
    model = tiny_model(name, vocab_size=28, unpadded_vocab_size=None, eos_token_id=0, pad_token_id=0)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        max_steps=30,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=100,
        packing=True,
        max_length=32,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["position_ids"].diff().min() < 0
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(total / count, rel=1e-4)
    assert losses[-1] < 0.7 * losses[0]
