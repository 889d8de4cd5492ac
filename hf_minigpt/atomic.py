"""Write files and folders atomically, with the permissions that the umask gives new files.

Python's `tempfile`, and libraries that write through it such as safetensors, create files that only their owner can
read. Other users of a shared cache would then fail to read them.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` on success, so that others see all of its files or no folder.

    The folder and its content get the permissions of new files. If another process has created the folder in the
    meantime, that one is kept.
    """
    folder = Path(folder)
    work = _temporary_sibling(folder)
    work.mkdir(parents=True)
    try:
        yield work
        follow_umask(work)
        try:
            os.replace(work, folder)
        except OSError:
            # another process was first and did the same work
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` on success, so that others see the whole new file or the old one.

    The file gets the permissions of new files.
    """
    path = Path(path)
    work = _temporary_sibling(path)
    work.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield work
        follow_umask(work)
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def _temporary_sibling(path: Path) -> Path:
    # in the same folder, since a rename is atomic only within a file system; with the same suffix, which some writers
    # use to choose the format
    return path.with_name(f".{uuid.uuid4().hex}-{path.name}")


def follow_umask(path: str | Path) -> None:
    """Give a file, or a folder and its content, the permissions of new files. Executable files stay executable."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    # a new folder shows the umask: os.umask can only read it by changing it for all threads
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
        new = current | (mode if each.is_dir() or current & 0o100 else mode & 0o666)
        # files of other users in a shared folder cannot be changed
        if new != current:
            with contextlib.suppress(PermissionError):
                each.chmod(new)
