"""Seals, verifies, finds and rotates the checkpoints of a run, and locks its folder.

To seal a checkpoint is to flush its files to the disk and then to write a manifest with their sizes and checksums,
atomically. A checkpoint without a valid manifest is never resumed from, and an older checkpoint is deleted only after
the newer one is sealed.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from ..processes import rank, world_size


MANIFEST = "manifest.json"
FORMAT_VERSION = 1

# The Trainer does not push names that begin with an underscore to the Hub.
LOCK = "_run.lock"
ASIDE = "_aside-"
DELETED = "_deleted-"

# seconds; an NFS server keeps the locks of a dead client for about 90
LOCK_OF_ANOTHER_MACHINE = 120.0
# seconds; a network file system may show a new file late
SHARED_WITHIN = 10.0

CHECKPOINT_NAME = re.compile(r"checkpoint-\d+")
BLOCK_SIZE = 1 << 20


class BrokenCheckpoint(ValueError):
    """A checkpoint that does not match its manifest. The message names the file."""


def _file_digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_SIZE):
            digest.update(block)
    return digest.hexdigest()


def _to_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> set[str]:
    """Return the relative names of all files in a checkpoint, except the manifest."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return names - {MANIFEST}


def _wait_for_files(folder: Path, names: set[str]) -> None:
    deadline = time.monotonic() + SHARED_WITHIN
    while missing := names - _files(folder):
        if time.monotonic() >= deadline:
            raise OSError(errno.ENOENT, f"{sorted(missing)} of other processes do not appear in {folder}")
        time.sleep(0.1)


def seal_checkpoint(folder: str | Path, run: Mapping[str, Any] | None = None) -> None:
    """Flush all files of a folder to the disk, then write its manifest, atomically.

    Args:
        folder: a checkpoint that all processes have finished writing.
        run: fingerprint of the run for `check_same_run`, as JSON values.
    """
    folder = Path(folder)
    paths = sorted(folder / name for name in _files(folder))
    files = {}
    for path in paths:
        _fsync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "blake2b": _file_digest(path)}
    for parent in sorted({path.parent for path in paths}):
        _fsync(parent)
    content = {"format_version": FORMAT_VERSION, "files": files, "run": run}
    checksum = hashlib.blake2b(_to_json(content).encode(), digest_size=16).hexdigest()

    temporary = folder / f".{MANIFEST}"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(_to_json({**content, "checksum": checksum}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)
    _fsync(folder)
    _fsync(folder.parent)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return the manifest of a sealed checkpoint.

    Raises:
        BrokenCheckpoint: it is missing, unreadable, or its own checksum does not match.
    """
    path = Path(folder, MANIFEST)
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        checksum = manifest.pop("checksum")
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{path} is missing: the checkpoint was not finished") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise BrokenCheckpoint(f"{path} is unreadable: {error}") from error
    if checksum != hashlib.blake2b(_to_json(manifest).encode(), digest_size=16).hexdigest() or text != _to_json(
        {**manifest, "checksum": checksum}
    ):
        raise BrokenCheckpoint(f"{path} has changed: checksum mismatch")
    if manifest["format_version"] != FORMAT_VERSION:
        raise BrokenCheckpoint(f"{path} has format {manifest['format_version']}, this version reads {FORMAT_VERSION}")
    return manifest


def verify_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Compare every file with the manifest, and return the manifest.

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
        if _file_digest(path) != expected["blake2b"]:
            raise BrokenCheckpoint(f"{path} has changed: checksum mismatch")
    return manifest


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """Return all `checkpoint-N` folders, sealed or not, oldest first."""
    paths = Path(output_dir).glob("checkpoint-*")
    return sorted((path for path in paths if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_sealed(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def newest_sealed(output_dir: str | Path) -> str | None:
    """Return the newest checkpoint that has a manifest. Its files are not verified."""
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
    """Return the newest checkpoint that passes `verify_checkpoint`, or None.

    Newer checkpoints that are broken, and all unfinished ones, are renamed to `_aside-checkpoint-N`, never deleted.
    The reason is printed.
    """
    newest = None
    for folder in reversed(_checkpoints(output_dir)):
        try:
            if newest is None:
                verify_checkpoint(folder)
                newest = str(folder)
            elif not _is_sealed(folder):
                read_manifest(folder)
        except BrokenCheckpoint as error:
            _set_aside(folder, str(error))
    return newest


def resolve_resume(resume_from_checkpoint: str | None, output_dir: str | Path) -> str | None:
    """Return the checkpoint to resume from, or None to start from step 0.

    In a distributed run all processes must call this. The main process decides.

    Args:
        resume_from_checkpoint: `"auto"` for the newest valid checkpoint in `output_dir`, if any; or a path, which must
            be valid; or None to start from step 0. If the path is in `output_dir`, newer checkpoints there are set
            aside.
        output_dir: of the run.

    Raises:
        ValueError: the path is broken (the message names the file), `output_dir` holds checkpoints of an earlier run
            that this run would not resume, or not all machines see the same `output_dir`.
    """
    check_shared(output_dir)
    if world_size() == 1:
        return _resolve(resume_from_checkpoint, Path(output_dir))
    # checkpoint and error
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer = [_resolve(resume_from_checkpoint, Path(output_dir)), None]
        except ValueError as error:
            answer = [None, str(error)]
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]


def _is_listed(path: Path) -> bool:
    # unlike `exists`, whose answer a network file system keeps for a while
    return path.parent.is_dir() and path.name in os.listdir(path.parent)


def check_shared(output_dir: str | Path) -> None:
    """Check that all processes, on whichever machine, see the same output folder. All of them must call this.

    Raises:
        ValueError: some do not. The message names their machines.
    """
    if world_size() == 1:
        return
    answer: list[Any] = [f".{uuid.uuid4().hex}", socket.gethostname()]
    path = Path(output_dir, answer[0])
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    dist.broadcast_object_list(answer, src=0)
    path = Path(output_dir, answer[0])
    deadline = time.monotonic() + SHARED_WITHIN
    while not (is_seen := _is_listed(path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    machines: list[Any] = [None] * world_size()
    dist.all_gather_object(machines, None if is_seen else socket.gethostname())
    if rank() == 0:
        path.unlink()
    blind = sorted({machine for machine in machines if machine is not None})
    if blind:
        raise ValueError(
            f"output_dir={output_dir} of {answer[1]} is not visible on {', '.join(blind)}: each process writes its "
            "part of a checkpoint there. Set it to a folder on a file system that all machines share, such as NFS."
        )


def check_resume(resume_from_checkpoint: str | None, output_dir: str | Path) -> None:
    """Raise the errors of `resolve_resume` without changing anything. Called before any long work starts.

    In a distributed run all processes must call this.
    """
    check_shared(output_dir)
    _check_resume(resume_from_checkpoint, output_dir)


def _check_resume(resume_from_checkpoint: str | None, output_dir: str | Path) -> None:
    if resume_from_checkpoint == "auto":
        return
    if resume_from_checkpoint is not None:
        checkpoint = Path(resume_from_checkpoint)
        if not checkpoint.is_dir():
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r} is not a folder. Set it to a checkpoint-N "
                "folder, or to auto."
            )
        try:
            verify_checkpoint(checkpoint)
        except BrokenCheckpoint as error:
            raise BrokenCheckpoint(
                f"resume_from_checkpoint={resume_from_checkpoint!r} is broken: {error}. Set another, or auto for the "
                "newest valid one. (hf_minigpt.training.checkpoints.sealing.seal_checkpoint accepts the files as they "
                "are.)"
            ) from error
        if checkpoint.resolve().parent == Path(output_dir).resolve():
            return
    # Rotation would delete the first checkpoints of a run that starts at step 0 next to them, and a resume would load
    # the old ones.
    sealed = newest_sealed(output_dir)
    if sealed is not None:
        raise ValueError(
            f"output_dir={output_dir} holds {Path(sealed).name} of an earlier run. Resume it with "
            "--resume_from_checkpoint auto, or choose another --output_dir."
        )


def _resolve(resume_from_checkpoint: str | None, output_dir: Path) -> str | None:
    if resume_from_checkpoint == "auto":
        return find_checkpoint(output_dir)
    _check_resume(resume_from_checkpoint, output_dir)
    chosen = None if resume_from_checkpoint is None else Path(resume_from_checkpoint).resolve()
    earlier = [folder for folder in _checkpoints(output_dir) if folder.resolve() != chosen]
    for folder in earlier:
        if chosen is None or chosen.parent != output_dir.resolve():
            _set_aside(folder, "it was not finished")
        elif _step(folder) > _step(chosen):
            _set_aside(folder, f"the run resumes from {chosen.name}, which is older")
    return resume_from_checkpoint


def rotate_checkpoints(output_dir: str | Path, keep: int | None, protected: Iterable[str | Path] = ()) -> None:
    """Delete the oldest sealed checkpoints until `keep` are left, but never the newest or a protected one.

    Args:
        keep: number of checkpoints. None or 0 keeps all.
        protected: folders to keep, such as that of the best model.
    """
    # left over from a crash during a deletion
    for remains in Path(output_dir).glob(f"{DELETED}*"):
        shutil.rmtree(remains, ignore_errors=True)
    if not keep or keep < 0:
        return
    sealed = [folder for folder in _checkpoints(output_dir) if _is_sealed(folder)]
    kept = {Path(folder).resolve() for folder in protected}
    candidates = [folder for folder in sealed[:-1] if folder.resolve() not in kept]
    for folder in candidates[: max(0, len(sealed) - keep)]:
        # renamed first, so that a half-deleted folder never looks like a checkpoint
        remains = folder.with_name(DELETED + folder.name)
        folder.rename(remains)
        shutil.rmtree(remains, ignore_errors=True)


_lock_descriptors: set[int] = set()


def _close_inherited_locks() -> None:
    for descriptor in _lock_descriptors:
        os.close(descriptor)
    _lock_descriptors.clear()


# a data loader worker that outlives the run would keep its lock
os.register_at_fork(after_in_child=_close_inherited_locks)


def _acquire(descriptor: int, output_dir: str | Path) -> None:
    deadline = None
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            owner = os.pread(descriptor, 1000, 0).decode(errors="replace")
            if deadline is None:
                is_elsewhere = bool(owner) and not owner.endswith(f" on {socket.gethostname()}")
                deadline = time.monotonic() + (LOCK_OF_ANOTHER_MACHINE if is_elsewhere else 0)
                if is_elsewhere:
                    print(f"output_dir={output_dir} is locked ({owner}): waiting, in case it died.", flush=True)
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"output_dir={output_dir} is in use by another run ({owner}). Wait until it ends, or choose "
                    "another."
                ) from error
            time.sleep(1)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            print(
                f"output_dir={output_dir} cannot be locked ({error.strerror}): start no second run in it.", flush=True
            )
            return


@contextlib.contextmanager
def run_lock(output_dir: str | Path) -> Iterator[None]:
    """Lock a run's folder against other runs during the block. The lock is released even by a SIGKILL.

    On a file system that several machines share, the lock also keeps out the runs of other machines if the file system
    supports it, as NFS does; if not, a warning is printed. The lock of a machine that died is released late, so this
    waits `LOCK_OF_ANOTHER_MACHINE` seconds for one.

    Raises:
        ValueError: another process holds it.
    """
    if rank() != 0:
        yield
        return
    path = Path(output_dir, LOCK)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(descriptor, output_dir)
        _lock_descriptors.add(descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        _lock_descriptors.discard(descriptor)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


class CheckpointSealer:
    """Seals checkpoints in a background thread, and rotates the older ones after each.

    As a context manager, it waits for the last checkpoint at the end.

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
            # an error that is already being raised is likely the cause of this one
            if error is None:
                raise
        finally:
            self._pool.shutdown()

    def seal(self, folder: str | Path, protected: Iterable[str | Path] = ()) -> None:
        """Seal a folder. All processes call this after writing their part.

        Args:
            protected: folders that rotation must keep.

        Raises:
            OSError: the previous checkpoint could not be sealed.
        """
        self.wait()
        folder = Path(folder)
        # On a network file system, the main process may see the files of other machines late: each names its own.
        names: list[Any] = [_files(folder)]
        if world_size() > 1:
            names = names * world_size()
            dist.all_gather_object(names, names[0])
        if rank() == 0:
            self._pending = self._pool.submit(self._seal, folder, set().union(*names), list(protected))

    def _seal(self, folder: Path, names: set[str], protected: list[str | Path]) -> None:
        _wait_for_files(folder, names)
        seal_checkpoint(folder, self.run)
        rotate_checkpoints(self.output_dir, self.keep, protected)

    def wait(self) -> None:
        """Wait until the latest checkpoint is sealed.

        Raises:
            OSError: it could not be sealed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except OSError as error:
                raise self.write_error(error) from error

    def check(self) -> None:
        """Raise the error of `wait`, if there is one already, without waiting."""
        if self._pending is not None and self._pending.done():
            self.wait()

    @contextlib.contextmanager
    def saving(self, step: int, protected: Iterable[str | Path] = ()) -> Iterator[Path]:
        """Give the folder to write a checkpoint's files into, and seal it at the end of the block.

        Raises:
            OSError: the disk is full or fails otherwise. The message names the last valid checkpoint.
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
        """Return the newest checkpoint that is not sealed, or None."""
        return next((folder for folder in reversed(_checkpoints(self.output_dir)) if not _is_sealed(folder)), None)

    def write_error(self, error: Exception) -> OSError:
        """Return an error that names folder, free space and remedy. torch says only "unexpected pos 576 vs 534"."""
        folder = self.unfinished() or self.output_dir
        free = shutil.disk_usage(self.output_dir).free
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        return OSError(
            number,
            f"{folder} could not be written ({error}); the disk has {free / 1e6:,.0f} MB free. Free space, or lower "
            f"save_total_limit, then resume. Last valid checkpoint: {newest_sealed(self.output_dir)}",
        )
