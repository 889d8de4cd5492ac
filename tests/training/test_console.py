"""What a run prints in a terminal of 80 columns, and in a file."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading

import pytest
import torch
from transformers import PrinterCallback, ProgressCallback

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.data.collators import LanguageModelCollator
from hf_minigpt.data.corpora import load_documents
from hf_minigpt.data.rows import DocumentRows, ShuffledDocumentRows
from hf_minigpt.data.token_store import prepare_corpus
from hf_minigpt.pretraining.arguments import PretrainArguments
from hf_minigpt.tokenization import train_tokenizer
from hf_minigpt.training.callbacks import PrintSample
from hf_minigpt.training.console import (
    ConsoleCallback,
    describe_model,
    describe_plan,
    print_header,
    print_sample,
    print_summary,
    short_number,
)
from hf_minigpt.training.optimizers import optimizer_cls_and_kwargs
from hf_minigpt.training.trainer import LanguageModelTrainer
from tests.tiny import tiny_config


WIDTH = 80


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    documents = load_documents(None, max_examples=40)
    tokenizer = train_tokenizer(documents, 320, model_max_length=32, show_progress=False)
    return tokenizer, prepare_corpus(documents, tokenizer, tmp_path_factory.mktemp("cache"))


def train(corpus, folder, **arguments) -> LanguageModelTrainer:
    """Train 12 steps with two evaluations and a final one, with header and summary."""
    tokenizer, prepared = corpus
    torch.manual_seed(0)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = MiniGPTForCausalLM(tiny_config("gpt2", vocab_size=320, **ids))
    options = {"max_steps": 12, "logging_steps": 3, "logging_first_step": False, "eval_steps": 6, "save_steps": 6}
    args = PretrainArguments(str(folder), cpu_threads=1, **(options | arguments))
    trainer = LanguageModelTrainer(
        model=model,
        args=args,
        train_dataset=ShuffledDocumentRows(prepared.train, 32, seed=0),
        eval_dataset=DocumentRows(prepared.validation, 32),
        data_collator=LanguageModelCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args),
        callbacks=[PrintSample(tokenizer)],
    )
    plan = describe_plan(args, trainer.num_steps, args.rows_per_step * 32)
    print_header("Pretraining", {"model": describe_model(model, "tiny"), "plan": plan})
    trainer.train()
    assert trainer.num_steps == trainer.state.max_steps
    trainer.evaluate()
    print_sample("A text\x13 of many words. " * 8 + "\n\n\nThe end.")
    print_summary({"Held-out loss": "1.2"}, folder, ["config.json", "nothing.png"], [f"python generate.py {folder}"])
    return trainer


def in_a_terminal(monkeypatch, run) -> str:
    """Return what a function writes to a pseudo-terminal in place of the output streams."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, WIDTH, 0, 0))
    chunks = []

    def read():
        try:
            while chunk := os.read(master, 1 << 16):
                chunks.append(chunk)
        except OSError:
            # Linux: the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        run()
    reader.join()
    os.close(master)
    return b"".join(chunks).decode()


def test_a_terminal_shows_one_bar_and_a_table_and_nothing_wraps(corpus, tmp_path, monkeypatch):
    text = in_a_terminal(monkeypatch, lambda: train(corpus, tmp_path))
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text)]
    command = f"  python generate.py {tmp_path}"
    paths = [f"Model and tokenizer: {tmp_path}", f"  {tmp_path}/config.json", command]
    assert set(paths) - {f"  {tmp_path}/config.json"} <= set(lines) and "nothing.png" not in text
    assert [line for line in lines if len(line) > WIDTH and line not in paths] == []
    # the bar carries loss and rate, and is the only one
    bars = [line for line in lines if re.match(r" *\d+%\|", line)]
    assert re.search(r"12/12 \[.*loss \d\.\d+, [\d.]+k? tokens/s\]", bars[-1])
    assert text.count("%|") == len(bars) and "it/s" not in text
    # a table: one title, and a row for each evaluation, aligned
    (title,) = [line for line in lines if "held-out loss" in line]
    assert title.split("  ")[0].strip() == "" and "bits/byte" in title and "accuracy" in title
    rows = [line for line in lines if re.match(r" +(6|12|final) +\S+ ", line)]
    assert [row.split()[0] for row in rows] == ["6", "12", "final"]
    assert {len(row) for row in rows} == {len(title)}
    assert len([line for line in lines if line.startswith("sample: ")]) == 2
    assert "\x13" not in text and "eval_" not in text


@pytest.mark.parametrize("disabled", [False, True], ids=["to_a_file", "without_tqdm"])
def test_a_file_gets_plain_lines(corpus, tmp_path, capfd, disabled):
    trainer = train(corpus, tmp_path, disable_tqdm=disabled)
    text = "".join(capfd.readouterr())
    assert "\r" not in text and "\x1b" not in text and "eval_" not in text
    lines = text.splitlines()
    logged = [
        line for line in lines if re.fullmatch(r"step \d+/12: loss [\d.]+, [\d.]+k? tokens/s, \d+:\d+ left", line)
    ]
    assert [line.split("/")[0] for line in logged] == ["step 3", "step 6", "step 9", "step 12"]
    evaluations = [line for line in lines if "held-out loss" in line]
    assert [line.split(":")[0] for line in evaluations] == ["step 6/12", "step 12/12", "final"]
    loss = trainer.state.log_history[-1]["eval_loss"]
    assert f"final: held-out loss {loss:.4g}, bits/byte" in evaluations[-1]


def test_without_tqdm_a_terminal_gets_plain_lines(corpus, tmp_path, monkeypatch):
    arguments = {"disable_tqdm": True, "max_steps": 3, "eval_strategy": "no"}
    text = in_a_terminal(monkeypatch, lambda: train(corpus, tmp_path, **arguments))
    assert "%|" not in text and "\r" not in text.replace("\r\n", "\n")
    assert re.search(r"step 3/3: loss \d", text)


def test_only_the_main_process_prints(corpus, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    print_header("Pretraining", {"model": "large"})
    print_summary({"loss": "1"}, tmp_path, [], [])
    assert capfd.readouterr() == ("", "")


def test_the_console_replaces_the_callbacks_of_transformers(corpus, tmp_path):
    trainer = train(corpus, tmp_path, max_steps=1, eval_strategy="no")
    callbacks = trainer.callback_handler.callbacks
    assert not any(isinstance(callback, (PrinterCallback, ProgressCallback)) for callback in callbacks)
    assert sum(isinstance(callback, ConsoleCallback) for callback in callbacks) == 1


@pytest.mark.parametrize(
    ("options", "num_rows"), [({}, 21), ({"dataloader_drop_last": True}, 21), ({"gradient_accumulation_steps": 3}, 50)]
)
def test_the_number_of_steps_is_that_of_the_trainer(options, num_rows, tmp_path):
    args = PretrainArguments(
        str(tmp_path), eval_strategy="no", per_device_train_batch_size=2, num_train_epochs=1.5, **options
    )
    model = MiniGPTForCausalLM(tiny_config("gpt2"))
    rows = [{"input_ids": [1, 2]}] * num_rows
    trainer = LanguageModelTrainer(
        model=model, args=args, train_dataset=rows, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args)
    )
    loader = torch.utils.data.DataLoader(rows, 2, drop_last=args.dataloader_drop_last)
    assert trainer.num_steps == trainer.set_initial_training_values(args, loader)[-1]


def test_short_numbers_have_three_digits():
    numbers = [987, 12_345, 4_560_000, 7.89e9]
    assert [short_number(number) for number in numbers] == ["987", "12.3k", "4.56M", "7.89B"]
