"""What keeps a run alive, and what it has made, when something beside the training goes wrong."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


logger = logging.getLogger(__name__)


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Let a run go on without something that it can do without: an exception becomes a warning.

    Args:
        what: is done inside, as the warning names it: "drawing loss.png".
    """
    try:
        yield
    except Exception:
        logger.warning("%s failed; the run goes on without it.", what[:1].upper() + what[1:], exc_info=True)


def written(folder: str | Path, *names: str) -> str:
    """Those of the files that a run has written, for its last words: ", README.md, loss.png"."""
    return "".join(f", {name}" for name in names if Path(folder, name).is_file())


def allow_any_output() -> None:
    """Let standard output and error take every character: one that their encoding lacks is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """`text` with escapes for what standard output cannot write."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
