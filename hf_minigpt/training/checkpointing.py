"""Checkpoints that survive a crash at any moment, and resumed runs that end bit for bit like uninterrupted ones.

The Trainer writes a checkpoint in place and resumes from the highest number, whatever is in it. Here a checkpoint
counts only once it is sealed: its files are on the disk, and a manifest with their sizes and checksums was written
after them, atomically. Only then is an older one deleted.

With a Trainer, TRL's among them, one call replaces `trainer.train`:

    train_safely(trainer)

A loop of one's own uses the parts, here with Accelerate:

    with run_lock(output_dir), StopSignals() as stop, CheckpointSealer(output_dir, run=run) as sealer:
        checkpoint = resolve_resume("auto", output_dir)
        if checkpoint is not None:
            check_same_run(checkpoint, run)
            accelerator.load_state(checkpoint)
        for step in ...:
            losses.record(step, loss)
            stopping = stop.requested()
            if stopping or step % save_steps == 0:
                losses.check()
                with sealer.saving(step) as folder:
                    accelerator.save_state(folder)
            if stopping:
                break
    stop.exit_if_requested()
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import SeedableRandomSampler
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput, has_length

from ..data.rows import Rows
from .callbacks import SetEpoch


MANIFEST = "manifest.json"
FORMAT_VERSION = 1

# The Trainer leaves names that begin with an underscore out of what it pushes to the Hub.
LOCK = "_run.lock"
ASIDE = "_aside-"
DELETED = "_deleted-"

# sysexits.h: EX_TEMPFAIL, "try again later"
EXIT_STOPPED = 75

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
BLOCK_SIZE = 1 << 20
SAMPLED_ITEMS = 64
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


class BrokenCheckpoint(ValueError):
    """A checkpoint that is not what was sealed; the message names the file."""


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is not a number, or is far too large.

    Attributes:
        step: the optimizer step, counted from 1.
        rows: indices into the training set of this process's rows in that step; None where the order is not known.
        checkpoint: the last sealed checkpoint, or None.
    """

    def __init__(self, step: int, what: str, output_dir: str | Path, rows: list[int] | None = None):
        self.step = step
        self.rows = rows
        self.checkpoint = newest_sealed(output_dir)
        where = f"in its rows {rows}" if rows else "(its rows are not known)"
        super().__init__(
            f"{what} at step {step} {where}. Last good checkpoint: {self.checkpoint}. Look at these rows, lower the "
            "learning rate or clip gradients harder (max_grad_norm)."
        )


# Processes


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _say(message: str) -> None:
    if _rank() == 0:
        print(message, flush=True)


# Manifests


def _digest_of(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_SIZE):
            digest.update(block)
    return digest.hexdigest()


def _dumps(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal_checkpoint(folder: str | Path, run: Mapping[str, Any] | None = None) -> None:
    """Bring all files of a folder to the disk, then write its manifest, atomically.

    Args:
        folder: to which all processes have finished writing.
        run: what determines the run, for `check_same_run`; JSON.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    files = {}
    for path in paths:
        _fsync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "blake2b": _digest_of(path)}
    for parent in sorted({path.parent for path in paths}):
        _fsync(parent)
    content = {"format_version": FORMAT_VERSION, "files": files, "run": run}
    checksum = hashlib.blake2b(_dumps(content).encode(), digest_size=16).hexdigest()

    work = folder / f".{MANIFEST}"
    with work.open("w", encoding="utf-8") as file:
        file.write(_dumps({**content, "checksum": checksum}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(work, folder / MANIFEST)
    _fsync(folder)
    _fsync(folder.parent)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a sealed checkpoint.

    Raises:
        BrokenCheckpoint: there is none, or not a single byte of it may have changed and one has.
    """
    path = Path(folder, MANIFEST)
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        checksum = manifest.pop("checksum")
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{path} is missing: the checkpoint was never finished, or never sealed") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise BrokenCheckpoint(f"{path} is unreadable: {error}") from error
    if checksum != hashlib.blake2b(_dumps(manifest).encode(), digest_size=16).hexdigest() or text != _dumps(
        {**manifest, "checksum": checksum}
    ):
        raise BrokenCheckpoint(f"{path} is not what was written: its checksum differs")
    if manifest["format_version"] != FORMAT_VERSION:
        raise BrokenCheckpoint(f"{path} has format {manifest['format_version']}; this code reads {FORMAT_VERSION}")
    return manifest


def verify_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Compare every file with the manifest, which is returned.

    Raises:
        BrokenCheckpoint: a file is missing, or differs in size or checksum.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = Path(folder, name)
        if not path.is_file():
            raise BrokenCheckpoint(f"{path} is missing")
        size = path.stat().st_size
        if size != expected["size"]:
            raise BrokenCheckpoint(f"{path} has {size} bytes instead of {expected['size']}")
        if _digest_of(path) != expected["blake2b"]:
            raise BrokenCheckpoint(f"{path} is not what was written: its checksum differs")
    return manifest


# The run's folder


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """All `checkpoint-N` folders, sealed or not, oldest first."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = CHECKPOINT_NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def _is_sealed(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def newest_sealed(output_dir: str | Path) -> str | None:
    """The newest checkpoint that has a manifest; its files are not read."""
    return next((str(folder) for folder in reversed(_checkpoints(output_dir)) if _is_sealed(folder)), None)


def _set_aside(folder: Path, reason: str) -> None:
    target = folder.with_name(ASIDE + folder.name)
    number = 2
    while target.exists():
        target = folder.with_name(f"{ASIDE}{folder.name}-{number}")
        number += 1
    folder.rename(target)
    print(f"{folder} is set aside as {target.name}: {reason}", flush=True)


def find_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that verifies, or None.

    Broken ones that are newer, and all unfinished ones, are renamed to `_aside-checkpoint-N`, never deleted; the
    reason is printed.
    """
    good = None
    for folder in reversed(_checkpoints(output_dir)):
        try:
            if good is None:
                verify_checkpoint(folder)
                good = str(folder)
            elif not _is_sealed(folder):
                read_manifest(folder)
        except BrokenCheckpoint as error:
            _set_aside(folder, str(error))
    return good


def resolve_resume(resume_from_checkpoint: str | None, output_dir: str | Path) -> str | None:
    """The checkpoint to resume from.

    Args:
        resume_from_checkpoint: `"auto"` for the newest in `output_dir` that verifies, or None where there is none; a
            path, which must verify, and if it lies in `output_dir` what is newer there is set aside; None to start
            afresh.
        output_dir: of the run. Where the run is distributed all processes call; the first one looks, all get its
            answer.

    Raises:
        ValueError: the path is broken (the message names the file), or `output_dir` holds checkpoints that the run
            would neither go on from nor be safe beside.
    """
    if _world_size() == 1:
        return _resolve(resume_from_checkpoint, Path(output_dir))
    answer: list[Any] = [None, None]
    if _rank() == 0:
        try:
            answer = [_resolve(resume_from_checkpoint, Path(output_dir)), None]
        except ValueError as error:
            answer = [None, str(error)]
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]


def _resolve(resume_from_checkpoint: str | None, output_dir: Path) -> str | None:
    if resume_from_checkpoint == "auto":
        return find_checkpoint(output_dir)
    earlier = _checkpoints(output_dir)
    if resume_from_checkpoint is not None:
        checkpoint = Path(resume_from_checkpoint)
        if not checkpoint.is_dir():
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r} is no folder: give a checkpoint-N folder, or auto."
            )
        try:
            verify_checkpoint(checkpoint)
        except BrokenCheckpoint as error:
            raise BrokenCheckpoint(
                f"resume_from_checkpoint={resume_from_checkpoint!r} is broken: {error}. Give another, or auto for the "
                "newest good one. (hf_minigpt.training.checkpointing.seal_checkpoint accepts the files as they are.)"
            ) from error
        resolved = [folder.resolve() for folder in earlier]
        if checkpoint.resolve() in resolved:
            for folder in earlier[resolved.index(checkpoint.resolve()) + 1 :]:
                _set_aside(folder, f"the run goes on from {checkpoint.name}, which is older")
            return resume_from_checkpoint
    # a run that starts at step 0 beside them would lose its first checkpoints to rotation and resume from theirs
    sealed = newest_sealed(output_dir)
    if sealed is not None:
        raise ValueError(
            f"output_dir={output_dir} holds {Path(sealed).name} of an earlier run. Go on from it with "
            "--resume_from_checkpoint auto, or choose another output_dir, or delete it."
        )
    for folder in earlier:
        _set_aside(folder, "it was never finished")
    return resume_from_checkpoint


def rotate_checkpoints(output_dir: str | Path, keep: int | None, protected: Iterable[str | Path] = ()) -> None:
    """Delete the oldest sealed checkpoints until `keep` are left; never the newest, nor a protected one.

    Args:
        keep: None or 0 for all.
        protected: folders, for instance that of the best model.
    """
    # a crash may have come in the middle of a deletion
    for remains in Path(output_dir).glob(f"{DELETED}*"):
        shutil.rmtree(remains, ignore_errors=True)
    if not keep or keep < 0:
        return
    sealed = [folder for folder in _checkpoints(output_dir) if _is_sealed(folder)]
    kept = {Path(folder).resolve() for folder in protected}
    candidates = [folder for folder in sealed[:-1] if folder.resolve() not in kept]
    for folder in candidates[: max(0, len(sealed) - keep)]:
        # no half-deleted folder is ever called a checkpoint
        remains = folder.with_name(DELETED + folder.name)
        folder.rename(remains)
        shutil.rmtree(remains, ignore_errors=True)


_lock_descriptors: set[int] = set()


def _close_inherited_locks() -> None:
    for descriptor in _lock_descriptors:
        os.close(descriptor)
    _lock_descriptors.clear()


# a worker of a data loader that outlives the run for a moment would hold its lock
os.register_at_fork(after_in_child=_close_inherited_locks)


@contextlib.contextmanager
def run_lock(output_dir: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder for the length of the block, however it ends: a SIGKILL releases the lock too.

    Raises:
        ValueError: another process holds it.
    """
    if _rank() != 0:
        yield
        return
    path = Path(output_dir, LOCK)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 1000).decode(errors="replace")
            raise ValueError(
                f"output_dir={output_dir} is in use by another run ({owner}): wait for its end, or choose another."
            ) from error
        _lock_descriptors.add(descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        _lock_descriptors.discard(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


# Writing


class CheckpointSealer:
    """Seals checkpoints in a thread of its own, and after each deletes those that are too old.

    Used as a context it waits for the last one at the end.

    Args:
        output_dir: the run's folder.
        keep: as in `rotate_checkpoints`.
        run: as in `seal_checkpoint`.
    """

    def __init__(self, output_dir: str | Path, keep: int | None = None, run: Mapping[str, Any] | None = None):
        self.output_dir = Path(output_dir)
        self.keep = keep
        self.run = run
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="seal")
        self._pending: Future | None = None

    def __enter__(self) -> "CheckpointSealer":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        try:
            self.wait()
        except OSError:
            # an error on its way out is likely to be the cause of this one
            if error is None:
                raise
        finally:
            self._pool.shutdown()

    def seal(self, folder: str | Path, protected: Iterable[str | Path] = ()) -> None:
        """Seal a folder; all processes call once they have written their part.

        Args:
            protected: folders that rotation spares.

        Raises:
            OSError: the checkpoint before could not be sealed.
        """
        self.wait()
        if _world_size() > 1:
            dist.barrier()
        if _rank() == 0:
            self._pending = self._pool.submit(self._seal, Path(folder), list(protected))

    def _seal(self, folder: Path, protected: list[str | Path]) -> None:
        seal_checkpoint(folder, self.run)
        rotate_checkpoints(self.output_dir, self.keep, protected)

    def wait(self) -> None:
        """Wait until the latest checkpoint is sealed.

        Raises:
            OSError: it could not be.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except OSError as error:
                raise self.write_error(error) from error

    def check(self) -> None:
        """Raise what `wait` would, without waiting."""
        if self._pending is not None and self._pending.done():
            self.wait()

    @contextlib.contextmanager
    def saving(self, step: int, protected: Iterable[str | Path] = ()) -> Iterator[Path]:
        """Write a checkpoint's files into the folder that this gives; it is sealed at the end of the block.

        Raises:
            OSError: the disk is full, or fails otherwise; the message names the last good checkpoint.
        """
        self.wait()
        folder = self.output_dir / f"checkpoint-{step}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
        except (OSError, RuntimeError, SafetensorError) as error:
            raise self.write_error(error) from error
        self.seal(folder, protected)

    def unfinished(self) -> Path | None:
        """A checkpoint that was begun and not sealed."""
        return next((folder for folder in reversed(_checkpoints(self.output_dir)) if not _is_sealed(folder)), None)

    def write_error(self, error: Exception) -> OSError:
        """What to tell the user where `error` came while writing: torch says only "unexpected pos 576 vs 534"."""
        folder = self.unfinished() or self.output_dir
        free = shutil.disk_usage(self.output_dir).free
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        return OSError(
            number,
            f"{folder} could not be written ({error}); the disk has {free / 1e6:,.0f} MB free. Free space, or lower "
            f"save_total_limit, then resume. Last good checkpoint: {newest_sealed(self.output_dir)}",
        )


# What determines a run

RUN_FIELDS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "max_steps", "num_train_epochs"),
    *("optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last", "ignore_data_skip"),
    *("bf16", "fp16", "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices"),
)
# fields of subclasses of TrainingArguments that change no weight
HARMLESS_FIELDS = {"allow_changed_run", "cpu_threads", "precision", "dataset_num_proc"}
HARMLESS_CONFIG = {"_name_or_path", "architectures", "transformers_version", "use_cache"}


def dataset_fingerprint(dataset: Any) -> str | None:
    """A digest of a training set: of our rows what they are made from, of others the length and some of the items.

    None for a dataset that only iterates: its fingerprint must come from elsewhere.
    """
    if isinstance(dataset, IterableDataset) or not has_length(dataset):
        return None
    items: Any = dataset
    content: list[Any] = [len(items)]
    if isinstance(dataset, Rows):
        # which rows they are in the current epoch says nothing about the run
        settings = {k: v for k, v in vars(dataset).items() if isinstance(v, int) and k != "epoch"}
        content += [type(dataset).__name__, settings, dataset.store.manifest]
    else:
        content += [items[i] for i in range(0, len(items), max(1, len(items) // SAMPLED_ITEMS))]
    text = json.dumps(content, default=lambda item: item.tolist() if hasattr(item, "tolist") else type(item).__name__)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def run_fingerprint(trainer: Trainer, dataset: str | None = None) -> dict[str, Any]:
    """What a Trainer's run follows from: batches, data, seed, configuration, optimizer, schedule.

    Args:
        dataset: fingerprint of the training set; default `dataset_fingerprint` of it.

    Returns:
        Values that JSON holds, by field.
    """
    args: Any = trainer.args
    model: Any = trainer.model
    own = {field.name for field in dataclasses.fields(args)}
    own -= {field.name for field in dataclasses.fields(TrainingArguments)} | HARMLESS_FIELDS
    run = {
        "arguments": {name: getattr(args, name) for name in [*RUN_FIELDS, *sorted(own)]},
        "config": {k: v for k, v in model.config.to_dict().items() if k not in HARMLESS_CONFIG},
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "optimizer": _optimizer_name(trainer),
        "dataset": dataset or dataset_fingerprint(trainer.train_dataset),
    }
    return _as_json(run)


def _optimizer_name(trainer: Trainer) -> str:
    optimizer: Any = trainer.optimizer
    model: Any = trainer.model
    if trainer.optimizer_cls_and_kwargs:
        return trainer.optimizer_cls_and_kwargs[0].__name__
    if optimizer is None:
        return trainer.get_optimizer_cls_and_kwargs(trainer.args, model)[0].__name__
    # a trainer that has trained before has it wrapped
    return type(optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer).__name__


def _as_json(run: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(run, sort_keys=True, default=str))


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {key: leaf for k, v in value.items() for key, leaf in _flat(v, f"{name}.{k}" if name else k).items()}
    return {name: value}


def check_same_run(checkpoint: str | Path, run: Mapping[str, Any], allow_changed_run: bool = False) -> None:
    """Compare what determines a run with what its checkpoint was sealed with.

    Args:
        run: the same mapping that `seal_checkpoint` got.
        allow_changed_run: say what differs and go on.

    Raises:
        ValueError: something differs; all fields are named.
    """
    then, now = _flat(read_manifest(checkpoint)["run"] or {}), _flat(_as_json(run))
    absent = "(absent)"
    changes = [
        f"{name}: {then.get(name, absent)} there, {now.get(name, absent)} now"
        for name in sorted({*then, *now} - {""})
        if then.get(name, absent) != now.get(name, absent)
    ]
    if not changes:
        return
    text = "; ".join(changes)
    if not allow_changed_run:
        raise ValueError(
            f"{checkpoint} is of another run: {text}. Set these as they were, choose another output_dir, or go on "
            "with the change by --allow_changed_run."
        )
    _say(f"Resuming a changed run from {checkpoint}: {text}")


# Signals


class StopSignals:
    """Makes SIGTERM and SIGINT a request to stop after the current step, for the length of a block.

    A second signal ends the process at once, as if nobody had handled it (a shell shows 128 + its number). Signals
    within a second of the first are the same request: a launcher passes on what its process group has got already.

    In threads other than the main one, where Python allows no handlers, signals do what they did.

    Attributes:
        agreed: the latest answer of `requested`.
    """

    def __init__(self) -> None:
        self.agreed = False
        self._signal: int | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}
        self._group: Any = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        if _world_size() > 1:
            # on the CPU, so that asking does not wait for the GPU
            self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._signal is not None and not self.agreed and error is None:
            # it came too late for a step to notice
            signal.raise_signal(self._signal)

    def _handle(self, number: int, frame: Any) -> None:
        if self._signal is None:
            self._signal, self._since = number, time.monotonic()
            name = signal.Signals(number).name
            text = f"\n{name}: stopping after this step with a checkpoint; a second signal stops at once.\n"
            # print is not reentrant
            os.write(2, text.encode())
        elif time.monotonic() - self._since > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def requested(self) -> bool:
        """Whether to stop now. All processes get the same answer, hence all ask after each step."""
        if self._group is None:
            self.agreed = self._signal is not None
        else:
            flag = torch.tensor(int(self._signal is not None))
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
            self.agreed = bool(flag)
        return self.agreed

    def exit_if_requested(self) -> None:
        """End the process with exit code 75 where `requested` was last answered with yes."""
        if self.agreed:
            _say("Stopped by a signal. To go on: --resume_from_checkpoint auto")
            raise SystemExit(EXIT_STOPPED)


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint when `signals` ask for it."""

    def __init__(self, signals: StopSignals):
        self.signals = signals
        self._saved_step: int | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if self.signals.requested():
            control.should_training_stop = True
            # what is due at the end of an epoch comes before the checkpoint, as in a run that is not stopped
            control.should_save = control.should_save or not float(state.epoch).is_integer()

    def on_epoch_end(self, args, state, control, **kwargs):
        if not self.signals.agreed:
            return
        if float(state.epoch).is_integer() or state.global_step >= state.max_steps:
            control.should_save = self._saved_step != state.global_step
        else:
            # the epoch has not ended
            control.should_log = control.should_evaluate = control.should_save = False

    def on_save(self, args, state, control, **kwargs):
        self._saved_step = state.global_step


# Divergence


class LossGuard:
    """Finds the first step whose loss is not a number or far above where the run began.

    Recording a loss does not wait for its device, looking does.

    Args:
        output_dir: where the last good checkpoint is looked for.
        max_loss: default: three times the first loss, and at least 10 (a uniform guess among 22,000 words).
    """

    def __init__(self, output_dir: str | Path, max_loss: float | None = None):
        self.output_dir = output_dir
        self.max_loss = max_loss
        self._losses: list[tuple[int, torch.Tensor]] = []

    def record(self, step: int, loss: torch.Tensor) -> None:
        """Remember the mean loss of a step, 0-dim."""
        self._losses.append((step, loss.detach().clone()))

    def first_bad(self) -> tuple[int, float] | None:
        """Step and loss of the first bad step since the last look."""
        if not self._losses:
            return None
        steps, tensors = zip(*self._losses, strict=True)
        self._losses.clear()
        losses = torch.stack(tensors).tolist()
        if self.max_loss is None and math.isfinite(losses[0]):
            self.max_loss = max(3 * losses[0], 10.0)
        for step, loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss) or (self.max_loss is not None and loss > self.max_loss):
                return step, loss
        return None

    def check(self) -> None:
        """Raise TrainingDiverged where `first_bad` finds something."""
        bad = self.first_bad()
        if bad is not None:
            raise TrainingDiverged(bad[0], f"The loss is {bad[1]:.6g}", self.output_dir)


def rows_of_step(dataloader: Any, step: int, gradient_accumulation_steps: int) -> list[int] | None:
    """Indices into the training set of this process's rows in an optimizer step of the Trainer, counted from 1.

    None where the order cannot be had again.
    """
    batch_sampler = dataloader.batch_sampler
    if batch_sampler is None:
        return None
    sharded = batch_sampler.batch_sampler if hasattr(batch_sampler, "batch_sampler") else batch_sampler
    if not isinstance(getattr(sharded, "sampler", None), (SeedableRandomSampler, SequentialSampler)):
        return None
    steps_per_epoch = -(-len(dataloader) // gradient_accumulation_steps)
    epoch, step_in_epoch = divmod(step - 1, steps_per_epoch)
    if isinstance(sharded.sampler, SeedableRandomSampler):
        sharded.sampler.set_epoch(epoch)
    first = step_in_epoch * gradient_accumulation_steps
    batches = islice(batch_sampler, first, first + gradient_accumulation_steps)
    return [row for batch in batches for row in batch]


class StopOnDivergence(TrainerCallback):
    """Raises TrainingDiverged before a diverged model is logged, evaluated or saved.

    Args:
        trainer: whose loss is watched.
        sealer: of its checkpoints.
        max_loss: as in `LossGuard`.
        max_grad_norm: a larger norm of the gradient, before clipping, is an explosion.
    """

    LOOK_EVERY = 100

    def __init__(
        self,
        trainer: Trainer,
        sealer: CheckpointSealer,
        max_loss: float | None = None,
        max_grad_norm: float = 1e5,
    ):
        self.trainer = trainer
        self.sealer = sealer
        self.losses = LossGuard(sealer.output_dir, max_loss)
        self.max_grad_norm = max_grad_norm

    def on_train_begin(self, args, state, control, **kwargs):
        # the filter would hide a NaN from the log
        args.logging_nan_inf_filter = False
        logged = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if logged and self.losses.max_loss is None:
            self.losses.max_loss = max(3 * logged[0], 10.0)

    def on_step_begin(self, args, state, control, **kwargs):
        self._sum_before = self.trainer._tr_loss.clone()

    def on_step_end(self, args, state, control, train_dataloader: Any = None, **kwargs):
        self.losses.record(state.global_step, self.trainer._tr_loss - self._sum_before)
        due = control.should_log or control.should_evaluate or control.should_save
        if due or state.global_step % self.LOOK_EVERY == 0:
            self._look(args, train_dataloader)

    def on_epoch_end(self, args, state, control, train_dataloader: Any = None, **kwargs):
        self._look(args, train_dataloader)

    def on_log(self, args, state, control, logs: Any = None, train_dataloader: Any = None, **kwargs):
        norm = logs.get("grad_norm", 0.0)
        # a loss scaler finds its scale by overflowing, and skips such steps
        skipped = args.fp16 and not math.isfinite(norm)
        if not norm <= self.max_grad_norm and not skipped:
            self._stop(args, state.global_step, f"The norm of the gradient is {norm:.6g}", train_dataloader)

    def _look(self, args: TrainingArguments, train_dataloader: Any) -> None:
        bad = self.losses.first_bad()
        if bad is not None:
            self._stop(args, bad[0], f"The loss is {bad[1]:.6g}", train_dataloader)

    def _stop(self, args: TrainingArguments, step: int, what: str, train_dataloader: Any) -> None:
        self.sealer.wait()
        rows = rows_of_step(train_dataloader, step, args.gradient_accumulation_steps)
        raise TrainingDiverged(step, what, self.sealer.output_dir, rows)


# The Trainer


class SealedCheckpoints(TrainerCallback):
    """Seals what the Trainer has saved, and takes the deletion of old checkpoints over from it."""

    def __init__(self, sealer: CheckpointSealer):
        self.sealer = sealer

    def on_train_begin(self, args, state, control, **kwargs):
        if args.save_total_limit is not None:
            self.sealer.keep, args.save_total_limit = args.save_total_limit, None

    def on_step_end(self, args, state, control, **kwargs):
        self.sealer.check()
        if control.should_save:
            self.sealer.wait()

    def on_save(self, args, state, control, **kwargs):
        best = [state.best_model_checkpoint] if state.best_model_checkpoint else []
        self.sealer.seal(self.sealer.output_dir / f"checkpoint-{state.global_step}", protected=best)

    def on_train_end(self, args, state, control, **kwargs):
        self.sealer.wait()


class _NoStepTooMany(TrainerCallback):
    """Resumed after its last step, in the middle of an epoch, the Trainer would train one step more."""

    def __init__(self, trainer: Trainer):
        self.trainer: Any = trainer
        self._is_finished = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._is_finished = state.global_step >= state.max_steps
        if self._is_finished:
            self.trainer._run_epoch = self._stop

    def _stop(self, **kwargs):
        self.trainer.control.should_training_stop = True

    def on_log(self, args, state, control, logs: Any = None, **kwargs):
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if self._is_finished and "train_loss" in logs and losses:
            # the mean over no steps would be 0
            logs["train_loss"] = state.log_history[-1]["train_loss"] = losses[-1]

    def on_train_end(self, args, state, control, **kwargs):
        if self._is_finished:
            del self.trainer._run_epoch


def train_safely(trainer: Trainer, *, dataset: str | None = None, allow_changed_run: bool = False) -> TrainOutput:
    """`trainer.train`, of any Trainer, with all that this module has.

    - Resumes as `args.resume_from_checkpoint` says (`resolve_resume`), if nothing that determines the run has changed.
    - Locks the output folder, seals checkpoints, and keeps `args.save_total_limit` of them.
    - On SIGTERM or SIGINT saves after the step and ends the process with exit code 75.

    Args:
        dataset: fingerprint of the training set, needed where it only iterates.
        allow_changed_run: resume even so; what has changed is printed.

    Raises:
        ValueError: nothing safe to resume from, a changed run, a folder in use, an argument that contradicts this.
        OSError: a checkpoint could not be written.
        TrainingDiverged: the loss or the gradient exploded.
    """
    args = trainer.args
    for name in ("enable_jit_checkpoint", "save_on_each_node"):
        if getattr(args, name):
            raise ValueError(f"{name}=True does not go with sealed checkpoints, which do that job: leave it out.")
    output_dir = str(args.output_dir)
    with run_lock(output_dir):
        checkpoint = resolve_resume(args.resume_from_checkpoint, output_dir)
        run = run_fingerprint(trainer, dataset)
        if checkpoint is not None:
            if args.save_only_model:
                raise ValueError(
                    f"save_only_model=True: {checkpoint} has no state of the optimizer to resume from. Start from its "
                    "weights with --model in another output_dir."
                )
            check_same_run(checkpoint, run, allow_changed_run)
            _say(f"Resuming from {checkpoint}")
        with StopSignals() as signals, CheckpointSealer(output_dir, args.save_total_limit, run) as sealer:
            # what asks for a checkpoint, what may forbid it, what completes it
            callbacks: list[TrainerCallback] = [StopOnSignal(signals), StopOnDivergence(trainer, sealer)]
            callbacks += [SealedCheckpoints(sealer), _NoStepTooMany(trainer)]
            if hasattr(trainer.train_dataset, "set_epoch"):
                callbacks.append(SetEpoch())
            with _added(trainer, callbacks):
                try:
                    output = trainer.train(resume_from_checkpoint=checkpoint)
                except TrainingDiverged:
                    raise
                except (OSError, RuntimeError, SafetensorError) as error:
                    sealer.wait()
                    if sealer.unfinished() is None and getattr(error, "errno", None) not in DISK_ERRORS:
                        raise
                    raise sealer.write_error(error) from error
            signals.exit_if_requested()
    return output


@contextlib.contextmanager
def _added(trainer: Trainer, callbacks: list[TrainerCallback]) -> Iterator[None]:
    keep = trainer.args.save_total_limit
    for callback in callbacks:
        trainer.add_callback(callback)
    try:
        yield
    finally:
        for callback in callbacks:
            trainer.remove_callback(callback)
        trainer.args.save_total_limit = keep
