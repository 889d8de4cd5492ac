"""Experiment trackers record the losses, accuracies and rates of a run, and its settings."""

import json
import shlex
import sqlite3
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_minigpt.recipes import pretrain


SMALL = shlex.split(
    "--context_length 32 --vocab_size 320 --per_device_train_batch_size 4 --cpu_threads 1 --disable_tqdm true "
    "--config_overrides hidden_size=32 num_attention_heads=2 num_hidden_layers=1 --max_steps 6 --logging_steps 2 "
    "--eval_steps 3"
)
SERIES = {"loss", "accuracy", "tokens_per_second", "learning_rate", "num_input_tokens_seen"}


@pytest.fixture
def run(tmp_path):
    def run(tracker: str) -> Path:
        words = [f"In the town {i} a cat met {i % 7} mice and said to the {i % 3}rd: run!" for i in range(200)]
        (tmp_path / "town.jsonl").write_text("\n".join(json.dumps({"text": word * 3}) for word in words))
        output = tmp_path / "output"
        flags = ["--dataset", str(tmp_path / "town.jsonl"), "--output_dir", str(output), "--report_to", tracker]
        pretrain.main([*SMALL, *flags, "--cache_dir", str(tmp_path / "cache"), "--run_name", "a-run"])
        return output

    return run


def logged(output: Path) -> list[dict[str, float]]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def test_tensorboard_records_the_run(run):
    output = run("tensorboard")
    scalars: dict[str, dict[int, float]] = {}
    texts = ""
    for path in output.glob("runs/**/events.*"):
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
        for tag in events.Tags()["tensors"]:
            texts += str(events.Tensors(tag)[0].tensor_proto.string_val)
    for name in SERIES:
        expected = {entry["step"]: entry[name] for entry in logged(output)}
        assert len(expected) == 4
        found = {step: value for step, value in scalars[f"train/{name}"].items() if step in expected}
        assert found == pytest.approx(expected, rel=1e-5)
    assert set(scalars["eval/bits_per_byte"]) == {3, 6}
    assert "hidden_size" in texts and "matrix_learning_rate" in texts


def test_trackio_records_the_run_locally(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    output = run("trackio")
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
        configs = connection.execute("SELECT config FROM configs").fetchall()
    assert {name for name, _, _ in rows} == {"a-run"}
    metrics = [json.loads(text) for _, _, text in rows]
    for name in SERIES:
        series = [entry[f"train/{name}"] for entry in metrics if "train/loss" in entry]
        assert series == pytest.approx([entry[name] for entry in logged(output)])
    assert any("eval/bits_per_byte" in entry for entry in metrics)
    assert json.loads(configs[0][0])["hidden_size"] == 32
