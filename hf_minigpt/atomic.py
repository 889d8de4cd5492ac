"""Files and folders in places that several processes and people share: whole or not there, and readable by others.

Python's `tempfile`, and some libraries that write by its means (safetensors among them), make files and folders that
only their owner can read. In a shared cache, others would then find them and fail.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def made_at_once(folder: str | Path) -> Iterator[Path]:
    """Write a folder's files into the folder that this gives: others see all of them, or no folder.

    The folder and everything in it get the permissions of new files, which the umask decides. If another process made
    the folder in the meantime, its folder stays.
    """
    folder = Path(folder)
    work = _beside(folder)
    work.mkdir(parents=True)
    try:
        yield work
        follow_umask(work)
        try:
            os.replace(work, folder)
        except OSError:
            # another process was first, and did the same work
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def written_at_once(path: str | Path) -> Iterator[Path]:
    """Write a file under the path that this gives: others see the whole file under `path`, or what was there before.

    The file gets the permissions of new files, which the umask decides.
    """
    path = Path(path)
    work = _beside(path)
    work.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield work
        follow_umask(work)
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    # in the same folder, since a rename is atomic only on one file system; the suffix may decide how a file is written
    return path.with_name(f".{uuid.uuid4().hex}-{path.name}")


def follow_umask(path: str | Path) -> None:
    """Give a file, or a folder and all that is in it, the permissions of new files; what may be run stays so."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    # a new folder shows the umask: to ask for it is to change it, for all threads
    probe = folder / f".umask-{uuid.uuid4().hex}"
    probe.mkdir()
    try:
        mode = probe.stat().st_mode & 0o777
    finally:
        probe.rmdir()
    for each in [path, *path.rglob("*")]:
        if each.is_symlink():
            continue
        current = each.stat().st_mode & 0o7777
        wanted = current | (mode if each.is_dir() or current & 0o100 else mode & 0o666)
        # another user's file, in a folder of several, cannot be changed and need not be
        if wanted != current:
            with contextlib.suppress(PermissionError):
                each.chmod(wanted)
