"""Keeps a run going if something optional fails, such as a plot or the encoding of the output."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


logger = logging.getLogger(__name__)


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Log exceptions inside the block as warnings, so that a run continues if an optional step fails.

    Args:
        what: description of the step for the warning, such as "drawing loss.png".
    """
    try:
        yield
    except Exception:
        logger.warning("%s failed. The run continues without it.", what[:1].upper() + what[1:], exc_info=True)


def written(folder: str | Path, *names: str) -> str:
    """Return those of the files that exist in a folder, as in ", README.md, loss.png"."""
    return "".join(f", {name}" for name in names if Path(folder, name).is_file())


def allow_any_output() -> None:
    """Make standard output and error escape the characters that their encoding lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """Return `text` with escapes for the characters that the encoding of standard output lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
