"""Checkpoints survive crashes, signals, full disks and damage, and resumed runs end like uninterrupted ones."""

import builtins
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.data.collators import LanguageModelCollator
from hf_minigpt.data.rows import ShuffledDocumentRows
from hf_minigpt.training.checkpoints import sealing
from hf_minigpt.training.checkpoints.divergence import LossGuard, TrainingDiverged
from hf_minigpt.training.checkpoints.fingerprints import check_same_run, dataset_fingerprint
from hf_minigpt.training.checkpoints.sealing import (
    BrokenCheckpoint,
    CheckpointSealer,
    check_resume,
    find_checkpoint,
    newest_sealed,
    read_manifest,
    resolve_resume,
    rotate_checkpoints,
    run_lock,
    seal_checkpoint,
    verify_checkpoint,
)
from hf_minigpt.training.checkpoints.signals import StopSignals
from hf_minigpt.training.checkpoints.train_safely import train_safely
from tests.programs.interrupted_training import (
    STEPS,
    STEPS_PER_EPOCH,
    At,
    Muon,
    assert_same_weights,
    make_trainer,
    weights,
    write_store,
)
from tests.tiny import tiny_config


ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("corpus") / "store")


def history(trainer):
    """The log without timings, and without the mean over the steps of the last call."""
    return [
        {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
        for entry in trainer.state.log_history
        if "train_loss" not in entry
    ]


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    """An uninterrupted run with all its checkpoints: trainer, weights."""
    trainer = make_trainer(store, tmp_path_factory.mktemp("finished"))
    train_safely(trainer)
    return trainer, weights(trainer)


@pytest.fixture
def run_folder(finished, tmp_path):
    """A copy of the finished run's first two checkpoints."""
    folder = tmp_path / "run"
    for name in ("checkpoint-7", "checkpoint-14"):
        shutil.copytree(Path(finished[0].args.output_dir, name), folder / name)
    return folder


# Exact resume


@pytest.mark.smoke
@pytest.mark.parametrize(
    "step", [7, 21, 28, 49, STEPS], ids=["early", "epoch_end", "second_epoch", "late", "finished"]
)
def test_resume_is_exact(finished, store, tmp_path, step):
    uninterrupted, expected = finished
    checkpoint = Path(uninterrupted.args.output_dir, f"checkpoint-{step}")
    trainer = make_trainer(store, tmp_path, resume_from_checkpoint=str(checkpoint))
    train_safely(trainer)
    assert trainer.state.global_step == STEPS
    assert_same_weights(trainer, expected)
    assert history(trainer) == history(uninterrupted)


@pytest.mark.parametrize(
    "arguments",
    [
        {"trainer_class": Muon},
        {"optim": "adafactor", "lr_scheduler_type": "cosine", "warmup_steps": 5},
        {
            "gradient_accumulation_steps": 1,
            "dataloader_num_workers": 1,
            "max_steps": 25,
            "train_sampling_strategy": "sequential",
        },
        {"dataloader_drop_last": True, "max_grad_norm": 0.1, "data_seed": 5, "num_train_epochs": 2, "max_steps": -1},
    ],
    ids=["muon", "adafactor", "workers", "epochs"],
)
def test_resume_is_exact_with_other_arguments(store, tmp_path, arguments):
    uninterrupted = make_trainer(store, tmp_path / "uninterrupted", **arguments)
    train_safely(uninterrupted)
    checkpoint = newest_sealed(tmp_path / "uninterrupted")
    last = int(checkpoint.rpartition("-")[2])
    shutil.copytree(tmp_path / "uninterrupted" / f"checkpoint-{last // 7 * 7 - 7}", tmp_path / "run" / "checkpoint-1")
    trainer = make_trainer(store, tmp_path / "run", resume_from_checkpoint="auto", **arguments)
    train_safely(trainer)
    assert_same_weights(trainer, weights(uninterrupted))
    assert history(trainer) == history(uninterrupted)


def test_a_finished_run_resumes_without_training(finished, store, tmp_path, capsys):
    shutil.copytree(Path(finished[0].args.output_dir, f"checkpoint-{STEPS}"), tmp_path / f"checkpoint-{STEPS}")
    trainer = make_trainer(store, tmp_path, resume_from_checkpoint="auto")
    output = train_safely(trainer)
    assert output.global_step == STEPS
    assert output.metrics["train_loss"] == history(trainer)[-1]["loss"]
    # it can be trained further
    trainer.args.max_steps = STEPS + 3
    assert train_safely(trainer, allow_changed_run=True).global_step == STEPS + 3
    assert capsys.readouterr().out.count(" in the checkpoint, ") == 1


def test_rotation_keeps_the_best_model(store, tmp_path):
    # the best model is the first: the learning rate ruins it
    arguments = {
        "learning_rate": 0.3,
        "eval_strategy": "steps",
        "eval_steps": 7,
        "load_best_model_at_end": True,
        "save_total_limit": 2,
        "evaluates": True,
        "max_steps": 35,
    }
    trainer = make_trainer(store, tmp_path, **arguments)
    train_safely(trainer)
    best = trainer.state.best_model_checkpoint
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert best == str(tmp_path / f"checkpoint-{min(losses, key=losses.get)}") != str(tmp_path / "checkpoint-35")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {Path(best).name, "checkpoint-35"}
    assert trainer.args.save_total_limit == 2

    finished = make_trainer(store, tmp_path, resume_from_checkpoint="auto", **arguments)
    train_safely(finished)
    assert_same_weights(finished, weights(trainer))


# Signals


EPOCHS = {"save_strategy": "epoch", "eval_strategy": "epoch", "evaluates": True, "logging_steps": 1}


@pytest.mark.parametrize(
    ("number", "step", "arguments"),
    [
        (signal.SIGTERM, 10, {}),
        (signal.SIGINT, 14, {}),
        (signal.SIGTERM, 31, {"save_strategy": "no", "logging_strategy": "no"}),
        (signal.SIGTERM, STEPS_PER_EPOCH, EPOCHS),
        (signal.SIGTERM, 30, EPOCHS),
        (signal.SIGINT, STEPS, {}),
    ],
    ids=["between_saves", "at_a_save", "no_saves", "epoch_end", "within_epoch", "last_step"],
)
def test_signal_saves_and_resume_is_exact(store, tmp_path, finished, number, step, arguments):
    uninterrupted, expected = finished
    if arguments:
        uninterrupted = make_trainer(store, tmp_path / "uninterrupted", **arguments)
        train_safely(uninterrupted)
        expected = weights(uninterrupted)
    handler = signal.getsignal(number)
    stopped = make_trainer(
        store, tmp_path / "run", callbacks=[At(step, lambda model: os.kill(os.getpid(), number))], **arguments
    )
    with pytest.raises(SystemExit) as exit_info:
        train_safely(stopped)
    assert exit_info.value.code == 75
    assert signal.getsignal(number) == handler
    assert newest_sealed(tmp_path / "run") == str(tmp_path / "run" / f"checkpoint-{step}")
    verify_checkpoint(tmp_path / "run" / f"checkpoint-{step}")

    resumed = make_trainer(store, tmp_path / "run", resume_from_checkpoint="auto", **arguments)
    train_safely(resumed)
    assert_same_weights(resumed, expected)
    if arguments.get("logging_steps") == 1:
        assert history(resumed) == history(uninterrupted)


@pytest.fixture
def default_sigint():
    # a shell starts what it puts in the background with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signal_after_the_last_check_is_not_lost(default_sigint):
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        assert not signals.requested()
        os.kill(os.getpid(), signal.SIGINT)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        # forwarded by a launcher
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested()
    with pytest.raises(SystemExit, match="75"):
        signals.exit_if_requested()


def test_signals_outside_the_main_thread_are_not_handled():
    answers = []

    def ask():
        with StopSignals() as signals:
            answers.append(signals.requested())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert answers == [False]


# Broken checkpoints


def damages(path):
    """Yield ways to damage a file: name, function."""
    content = path.read_bytes()

    def flip(place):
        return lambda: path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])

    yield "shorter by a byte", lambda: path.write_bytes(content[:-1])
    yield "empty", lambda: path.write_bytes(b"")
    yield "missing", path.unlink
    for place in (0, len(content) // 2, len(content) - 1):
        yield f"flipped byte {place}", flip(place)


def test_any_damage_to_any_file_is_detected(run_folder, capsys):
    newest = run_folder / "checkpoint-14"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} < {
        path.name for path in files
    }
    shutil.copytree(newest, run_folder.parent / "whole")
    for path in files:
        for name, damage in damages(path):
            damage()
            with pytest.raises(BrokenCheckpoint, match=path.name):
                verify_checkpoint(newest)
            with pytest.raises(ValueError, match=path.name):
                resolve_resume(str(newest), run_folder)
            assert resolve_resume("auto", run_folder) == str(run_folder / "checkpoint-7"), (path.name, name)
            printed = capsys.readouterr().out
            assert "_aside-checkpoint-14" in printed and path.name in printed
            assert not newest.exists()
            shutil.rmtree(run_folder / "_aside-checkpoint-14")
            shutil.copytree(run_folder.parent / "whole", newest)
    assert find_checkpoint(run_folder) == str(newest)


def test_checkpoints_set_aside_are_never_overwritten(run_folder):
    for text in ("first", "second"):
        broken = run_folder / "checkpoint-20"
        broken.mkdir()
        (broken / "model.safetensors").write_text(text)
        find_checkpoint(run_folder)
    assert (run_folder / "_aside-checkpoint-20" / "model.safetensors").read_text() == "first"
    assert (run_folder / "_aside-checkpoint-20-2" / "model.safetensors").read_text() == "second"


def test_resume_finds_the_right_checkpoint_or_refuses(run_folder, tmp_path):
    assert resolve_resume(None, tmp_path / "new") is None
    assert resolve_resume("auto", tmp_path / "new") is None
    with pytest.raises(ValueError, match="checkpoint-14 of an earlier run"):
        resolve_resume(None, run_folder)
    with pytest.raises(ValueError, match="is not a folder"):
        resolve_resume(str(tmp_path / "nothing"), run_folder)
    elsewhere = shutil.copytree(run_folder / "checkpoint-7", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="checkpoint-14 of an earlier run"):
        resolve_resume(str(elsewhere), run_folder)
    assert resolve_resume(str(elsewhere), tmp_path / "new") == str(elsewhere)

    # check_resume changes nothing
    older = str(run_folder / "checkpoint-7")
    for good in (older, "auto"):
        check_resume(good, run_folder)
    with pytest.raises(ValueError, match="--resume_from_checkpoint auto, or choose another --output_dir"):
        check_resume(None, run_folder)
    assert (run_folder / "checkpoint-14").is_dir()
    assert resolve_resume(older, run_folder) == older
    assert (run_folder / "_aside-checkpoint-14").is_dir()

    unfinished = tmp_path / "unfinished" / "checkpoint-5"
    unfinished.mkdir(parents=True)
    assert resolve_resume(None, unfinished.parent) is None
    assert not unfinished.exists()


def sealed_folders(output_dir, *steps):
    for step in steps:
        folder = output_dir / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "file").write_text(str(step))
        seal_checkpoint(folder)


def test_rotation_deletes_the_oldest_checkpoints(tmp_path):
    sealed_folders(tmp_path, 5, 10, 15, 20, 100)
    unfinished = tmp_path / "checkpoint-110"
    unfinished.mkdir()
    left = tmp_path / "_deleted-checkpoint-2"
    left.mkdir()

    def steps():
        return sorted(int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*"))

    rotate_checkpoints(tmp_path, keep=None)
    assert steps() == [5, 10, 15, 20, 100, 110]
    assert not left.exists()
    # as in the Trainer, a protected checkpoint counts among those kept
    rotate_checkpoints(tmp_path, keep=3, protected=[f"{tmp_path}/./checkpoint-5"])
    assert steps() == [5, 20, 100, 110]
    rotate_checkpoints(tmp_path, keep=1, protected=[tmp_path / "checkpoint-5"])
    assert steps() == [5, 100, 110]
    rotate_checkpoints(tmp_path, keep=1)
    assert steps() == [100, 110]


# A disk that fails


class Disk:
    """Fails every write from the n-th on, like a full disk."""

    def __init__(self, monkeypatch, fails_at=None):
        self.fails_at = fails_at
        self.writes = 0
        self.writing = False
        for module, name in [(torch, "save"), (transformers.modeling_utils, "safe_save_file"), (os, "fsync")]:
            monkeypatch.setattr(module, name, self.wrap(getattr(module, name)))
        for module, name in [(os, "makedirs"), (os, "replace"), (Path, "rename"), (Path, "open"), (builtins, "open")]:
            monkeypatch.setattr(module, name, self.wrap(getattr(module, name)))

    def wrap(self, function):
        def write(*args, **kwargs):
            is_read = function.__name__ == "open" and "r" in [*args[1:2], kwargs.get("mode", "r")][0]
            if self.writing and not is_read:
                self.writes += 1
                if self.fails_at is not None and self.writes >= self.fails_at:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return write

    def watch(self, model):
        self.writing = True


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_disk_full_at_every_nth_write(store, finished, run_folder, monkeypatch, tmp_path, every):
    """The disk fills up while checkpoint 15 is written: at every nth write, and at the last ones."""
    whole = run_folder.rename(tmp_path / "whole")
    arguments = {"resume_from_checkpoint": "auto", "max_steps": 15, "save_total_limit": 2}

    def train(fails_at, output_dir):
        shutil.copytree(whole, output_dir)
        with monkeypatch.context() as patch:
            disk = Disk(patch, fails_at)
            trainer = make_trainer(store, output_dir, callbacks=[At(15, disk.watch)], **arguments)
            try:
                train_safely(trainer, allow_changed_run=True)
            finally:
                disk.writing = False
        return disk.writes

    num_writes = train(None, tmp_path / "healthy")
    assert num_writes > 20
    found = []
    tried = sorted({*range(1, num_writes + 1, every), *range(num_writes - 4, num_writes + 1)})
    for fails_at in tried:
        output_dir = tmp_path / "full"
        with pytest.raises(OSError, match=r"Last valid checkpoint: .*checkpoint-1[45]$") as error_info:
            train(fails_at, output_dir)
        assert error_info.value.errno == errno.ENOSPC
        assert "MB free" in str(error_info.value)
        checkpoint = find_checkpoint(output_dir)
        assert str(error_info.value).endswith(checkpoint)
        found.append(Path(checkpoint).name)
        shutil.rmtree(output_dir)
    # after the manifest there are two folders to flush, and one checkpoint to delete
    assert found == ["checkpoint-14"] * (len(tried) - 3) + ["checkpoint-15"] * 3


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_file_that_cannot_grow_leaves_the_last_valid_checkpoint(store, finished, run_folder, share):
    """The kernel limits files to this fraction of the largest."""
    largest = max(path.stat().st_size for path in (run_folder / "checkpoint-14").iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(model):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * largest), hard))

    trainer = make_trainer(store, run_folder, callbacks=[At(20, limit)], resume_from_checkpoint="auto")
    try:
        with pytest.raises(OSError, match=r"checkpoint-21 could not .*Last valid checkpoint: .*checkpoint-14"):
            train_safely(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resumed = make_trainer(store, run_folder, resume_from_checkpoint="auto")
    train_safely(resumed)
    assert_same_weights(resumed, finished[1])


# The lock


def test_second_run_in_a_folder_is_refused(store, tmp_path):
    with run_lock(tmp_path):
        with pytest.raises(ValueError, match=f"in use by another run .process {os.getpid()}"):
            train_safely(make_trainer(store, tmp_path))
        with run_lock(tmp_path / "another"):
            pass
    with run_lock(tmp_path):
        pass


def test_a_worker_that_outlives_the_run_does_not_keep_its_lock(tmp_path):
    ready, done = os.pipe()
    run = os.fork()
    if run == 0:
        with run_lock(tmp_path):
            worker = os.fork()
            if worker == 0:
                os.write(done, b"%d" % os.getpid())
            time.sleep(60)
            os._exit(0)
    worker = int(os.read(ready, 100))
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    try:
        with run_lock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


# Changed runs


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size: 2 in the checkpoint, 4 now"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: 2 in the checkpoint, 1 now"),
        ({"max_steps": 60}, "max_steps: 50 in the checkpoint, 60 now"),
        ({"seed": 1}, "arguments.seed: 42 in the checkpoint, 1 now"),
        ({"rows_seed": 4}, "dataset: "),
        ({"trainer_class": Muon, "optim": "sgd"}, "arguments.optim: "),
    ],
)
def test_changed_run_is_refused(store, run_folder, change, field):
    trainer = make_trainer(store, run_folder, resume_from_checkpoint="auto", **change)
    with pytest.raises(ValueError, match=field):
        train_safely(trainer)


def test_changed_run_resumes_if_allowed(store, run_folder, capsys):
    # settings that do not affect the weights may change
    arguments = {"resume_from_checkpoint": "auto", "save_steps": 5, "logging_steps": 3, "max_steps": 16}
    trainer = make_trainer(store, run_folder, per_device_train_batch_size=4, **arguments)
    train_safely(trainer, allow_changed_run=True)
    assert "per_device_train_batch_size: 2 in the checkpoint, 4 now" in capsys.readouterr().out
    run = read_manifest(run_folder / "checkpoint-16")["run"]
    assert run["arguments"]["per_device_train_batch_size"] == 4
    assert run["config"]["hidden_size"] == 24


def test_check_same_run_names_all_differences(tmp_path):
    sealed_folders(tmp_path, 1)
    run = {"batch": 2, "config": {"width": 8, "depth": 2}}
    seal_checkpoint(tmp_path / "checkpoint-1", run)
    check_same_run(tmp_path / "checkpoint-1", run)
    with pytest.raises(ValueError) as error_info:
        check_same_run(tmp_path / "checkpoint-1", {"batch": 4, "config": {"width": 8}, "seed": 0})
    for part in (
        "batch: 2 in the checkpoint, 4 now",
        "config.depth: 2 in the checkpoint, (absent) now",
        "seed: (absent) in the checkpoint, 0 now",
    ):
        assert part in str(error_info.value)
    assert "width" not in str(error_info.value)


def test_manifests_with_old_field_names_are_read(tmp_path):
    sealed_folders(tmp_path, 1)
    seal_checkpoint(tmp_path / "checkpoint-1", {"arguments": {"adversarial_share": 0.1}})
    check_same_run(tmp_path / "checkpoint-1", {"arguments": {"adversarial_epsilon": 0.1}})
    with pytest.raises(ValueError, match=r"adversarial_epsilon: 0\.1 in the checkpoint, 0\.2 now"):
        check_same_run(tmp_path / "checkpoint-1", {"arguments": {"adversarial_epsilon": 0.2}})


def test_different_datasets_have_different_fingerprints(store):
    import datasets

    data = datasets.Dataset.from_dict({"input_ids": [[i, i + 1] for i in range(500)]})
    fingerprints = {
        dataset_fingerprint(data),
        dataset_fingerprint(data.select(range(499))),
        dataset_fingerprint(data.map(lambda item: {"input_ids": item["input_ids"][::-1]})),
        dataset_fingerprint(ShuffledDocumentRows(store, 16, seed=0)),
        dataset_fingerprint(ShuffledDocumentRows(store, 15, seed=0)),
    }
    assert len(fingerprints) == 5
    assert dataset_fingerprint(data) == dataset_fingerprint(data.map(dict, load_from_cache_file=False))
    assert dataset_fingerprint(data.to_iterable_dataset()) is None


def test_unusable_arguments_are_refused(store, run_folder):
    with pytest.raises(ValueError, match="enable_jit_checkpoint"):
        train_safely(make_trainer(store, run_folder, enable_jit_checkpoint=True))
    with pytest.raises(ValueError, match="save_only_model"):
        train_safely(make_trainer(store, run_folder, save_only_model=True, resume_from_checkpoint="auto"))


# Divergence


class RecordingCollator(LanguageModelCollator):
    """Records the rows of each batch."""

    def __call__(self, rows):
        batches.append([row["input_ids"].tolist() for row in rows])
        return super().__call__(rows)


batches: list = []


@pytest.mark.parametrize("save_strategy", ["steps", "epoch"])
@pytest.mark.parametrize(("factor", "what"), [(float("nan"), "The loss is nan"), (1e4, "The loss is")])
def test_divergence_names_step_rows_and_checkpoint(store, tmp_path, factor, what, save_strategy):
    @torch.no_grad()
    def ruin(model):
        model.model.norm.weight *= factor

    trainer = make_trainer(store, tmp_path, callbacks=[At(25, ruin)], save_strategy=save_strategy, logging_steps=40)
    trainer.data_collator = RecordingCollator(pad_token_id=1)
    batches.clear()
    with pytest.raises(TrainingDiverged, match=what) as error_info:
        train_safely(trainer)
    error = error_info.value
    assert error.step == 25
    assert error.checkpoint == newest_sealed(tmp_path) == str(tmp_path / "checkpoint-21")
    # 41 batches in the first epoch, then step 25 is the fourth of the second
    expected = batches[41 + 6] + batches[41 + 7]
    rows = ShuffledDocumentRows(store, 16, seed=3)
    rows.set_epoch(1)
    assert [rows[i]["input_ids"].tolist() for i in error.rows] == expected
    assert f"step 25 in rows {error.rows}" in str(error) and "checkpoint-21" in str(error)


def test_exploding_gradient_stops_the_run(store, tmp_path):
    @torch.no_grad()
    def ruin(model):
        # the loss stays what it is, but the gradient of this weight is NaN
        model.model.embed_tokens.weight.register_hook(lambda grad: grad * 1e9)

    trainer = make_trainer(store, tmp_path, callbacks=[At(14, ruin)])
    with pytest.raises(TrainingDiverged, match="norm of the gradient") as error_info:
        train_safely(trainer)
    assert error_info.value.step == 14
    assert error_info.value.checkpoint == str(tmp_path / "checkpoint-7")


def test_loss_guard_stops_at_a_high_loss(tmp_path):
    sealed_folders(tmp_path, 3)
    guard = LossGuard(tmp_path)
    for step, loss in enumerate([5.0, 4.0, 14.9], start=1):
        guard.record(step, torch.tensor(loss))
    guard.check()
    guard.record(4, torch.tensor(3.0))
    guard.record(5, torch.tensor(15.1))
    guard.record(6, torch.tensor(float("nan")))
    with pytest.raises(TrainingDiverged, match=r"15.1 at step 5 .*checkpoint-3"):
        guard.check()


# A custom loop


def train_in_a_loop(store, output_dir, signal_at=None, num_steps=30):
    """Train as in the docstring of train_safely, with torch only, and return the weights."""
    torch.manual_seed(0)
    rows = ShuffledDocumentRows(store, 16, seed=3)
    model = MiniGPTForCausalLM(tiny_config("gpt2", resid_pdrop=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    collator = LanguageModelCollator(pad_token_id=1)
    run = {"config": model.config.to_dict(), "dataset": dataset_fingerprint(rows)}
    guard = LossGuard(output_dir)
    with run_lock(output_dir), StopSignals() as stop, CheckpointSealer(output_dir, keep=2, run=run) as sealer:
        first = 0
        checkpoint = resolve_resume("auto", output_dir)
        if checkpoint is not None:
            check_same_run(checkpoint, run)
            state = torch.load(Path(checkpoint, "state.pt"), weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            first = state["step"]
        model.train()
        for step in range(first + 1, num_steps + 1):
            batch = collator([rows[i] for i in range(2 * step, 2 * step + 2)])
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.record(step, loss)
            if step == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            stopping = stop.requested()
            if stopping or step % 8 == 0:
                guard.check()
                with sealer.saving(step) as folder:
                    rng = torch.get_rng_state()
                    state = {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "rng": rng,
                        "step": step,
                    }
                    torch.save(state, folder / "state.pt")
            if stopping:
                break
    stop.exit_if_requested()
    return model.state_dict()


def test_custom_loop_resumes_exactly(store, tmp_path):
    expected = train_in_a_loop(store, tmp_path / "uninterrupted")
    assert {path.name for path in (tmp_path / "uninterrupted").glob("checkpoint-*")} == {
        "checkpoint-16",
        "checkpoint-24",
    }
    with pytest.raises(SystemExit, match="75"):
        train_in_a_loop(store, tmp_path / "run", signal_at=19)
    assert newest_sealed(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-19")
    found = train_in_a_loop(store, tmp_path / "run")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_custom_loop_reports_a_full_disk(tmp_path):
    sealed_folders(tmp_path, 3)
    with (
        CheckpointSealer(tmp_path) as sealer,
        pytest.raises(OSError, match=r"checkpoint-4 could not be written .*No space left.*checkpoint-3"),
        sealer.saving(4) as folder,
    ):
        (folder / "file").write_text("part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_failure_to_seal_is_raised_at_the_next_step(tmp_path, monkeypatch):
    def fail(folder, run):
        raise OSError(errno.EIO, "the disk is gone")

    sealer = CheckpointSealer(tmp_path)
    monkeypatch.setattr(sealing, "seal_checkpoint", fail)
    with sealer.saving(1):
        pass
    sealer._pending.exception()
    with pytest.raises(OSError, match=r"checkpoint-1 could not be written .*the disk is gone"):
        sealer.check()
    sealer.check()


# Streams


def test_resume_of_a_stream_is_exact(tmp_path):
    import datasets

    items = [{"input_ids": torch.randint(67, (16,)).tolist()} for _ in range(300)]
    for item in items:
        item["labels"] = item["input_ids"]

    def make(output_dir, **arguments):
        stream = datasets.Dataset.from_list(items).to_iterable_dataset(num_shards=3).shuffle(seed=1, buffer_size=20)
        torch.manual_seed(0)
        model = MiniGPTForCausalLM(tiny_config("gpt2", resid_pdrop=0.1))
        args = TrainingArguments(
            str(output_dir),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=40,
            save_steps=10,
            logging_steps=10,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **arguments,
        )
        return Trainer(model, args, train_dataset=stream)

    uninterrupted = make(tmp_path / "uninterrupted")
    train_safely(uninterrupted, dataset="the stream")
    shutil.copytree(tmp_path / "uninterrupted" / "checkpoint-20", tmp_path / "run" / "checkpoint-20")
    trainer = make(tmp_path / "run", resume_from_checkpoint="auto")
    train_safely(trainer, dataset="the stream")
    assert_same_weights(trainer, weights(uninterrupted))
    assert history(trainer) == history(uninterrupted)


# TRL


@pytest.mark.slow
def test_trl_trainer_resumes_exactly(tmp_path):
    import datasets
    from trl import SFTConfig, SFTTrainer

    from hf_minigpt.data.tales.grammar import tales
    from hf_minigpt.tokenization import train_tokenizer

    texts = list(tales(60))
    tokenizer = train_tokenizer(texts, 512, model_max_length=64)

    def make(output_dir, callbacks=(), **arguments):
        torch.manual_seed(0)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        model = MiniGPTForCausalLM(tiny_config("gpt2", vocab_size=512, resid_pdrop=0.1, **ids))
        args = SFTConfig(
            str(output_dir),
            max_length=64,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=20,
            save_steps=6,
            save_total_limit=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            **arguments,
        )
        data = datasets.Dataset.from_dict({"text": texts})
        return SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=list(callbacks))

    uninterrupted = make(tmp_path / "uninterrupted")
    train_safely(uninterrupted)
    with pytest.raises(SystemExit, match="75"):
        train_safely(make(tmp_path / "run", [At(10, lambda model: os.kill(os.getpid(), signal.SIGTERM))]))
    resumed = make(tmp_path / "run", resume_from_checkpoint="auto")
    train_safely(resumed)
    assert_same_weights(resumed, weights(uninterrupted))
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-18", "checkpoint-20"}


# Other processes


def start(store, output_dir, seconds_per_step):
    arguments = map(str, (store.folder, output_dir, seconds_per_step))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.programs.interrupted_training", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)


def test_a_killed_run_resumes_exactly(store, finished, tmp_path):
    """A process killed at a random moment after its second checkpoint is resumed by another."""
    output_dir = tmp_path / "run"
    child = start(store, output_dir, 0.03)
    wait_for(lambda: (output_dir / "checkpoint-14" / sealing.MANIFEST).exists(), child)
    with pytest.raises(ValueError, match="in use by another run"), run_lock(output_dir):
        pass
    time.sleep(np.random.default_rng().uniform(0, 0.5))
    child.kill()
    child.communicate()
    with run_lock(output_dir):
        pass
    trainer = make_trainer(store, output_dir, resume_from_checkpoint="auto")
    train_safely(trainer)
    assert_same_weights(trainer, finished[1])


def test_second_signal_ends_the_process():
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        with StopSignals() as signals:
            os.write(done, b"ready")
            while True:
                time.sleep(0.01)
                if signals.requested():
                    os.write(done, b"asked")
    assert os.read(ready, 5) == b"ready"
    os.kill(child, signal.SIGTERM)
    assert os.read(ready, 5) == b"asked"
    time.sleep(1.1)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT
