"""Failures of optional steps do not end a run."""

import io
import logging
import sys

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_minigpt.training import callbacks
from hf_minigpt.training.arguments import ModelArguments
from hf_minigpt.training.parsing import parse
from hf_minigpt.training.safeguards import allow_any_output, optional, printable


def ascii_output(monkeypatch) -> io.BytesIO:
    """Make standard output ASCII, and return its bytes."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    return written


def test_a_failed_optional_step_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING), optional("drawing loss.png"):
        raise RuntimeError("no font")
    assert "Drawing loss.png failed" in caplog.text and "RuntimeError: no font" in caplog.text
    with pytest.raises(KeyboardInterrupt), optional("drawing loss.png"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("prepare", [allow_any_output, lambda: parse((ModelArguments,), [])])
def test_any_character_can_be_printed(prepare, monkeypatch):
    written = ascii_output(monkeypatch)
    with pytest.raises(UnicodeEncodeError):
        print("caf\xe9")
    prepare()
    print("caf\xe9 \ufffd")
    assert written.getvalue().endswith(b"caf\\xe9 \\ufffd\n")


def test_output_without_an_encoding_is_left_unchanged(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    allow_any_output()
    assert printable("caf\xe9") == "caf\xe9"


def sampled(monkeypatch, tmp_path, sample_texts):
    class Model:
        class config:
            max_position_embeddings = 8

    monkeypatch.setattr(callbacks, "sample_texts", sample_texts)
    callback = callbacks.PrintSample(lambda text: {"input_ids": []})
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    state, control = TrainerState(global_step=3, is_world_process_zero=True), TrainerControl()
    callback.on_train_begin(args, state, control)
    callback.on_evaluate(args, state, control, model=Model)


def test_a_sample_is_printed_in_any_encoding(monkeypatch, tmp_path):
    written = ascii_output(monkeypatch)
    sampled(monkeypatch, tmp_path, lambda *args, **kwargs: ["caf\xe9 \ufffd"])
    assert written.getvalue() == b"sample: caf\\xe9 \\ufffd\n"


def test_a_failed_sample_does_not_end_the_training(monkeypatch, tmp_path, caplog):
    sampled(monkeypatch, tmp_path, lambda *args, **kwargs: 1 / 0)
    assert "Printing a sample failed" in caplog.text
