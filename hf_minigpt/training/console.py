"""What a run prints: a header with its plan, and a summary of its results."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from .safeguards import printable


def print_header(title: str, rows: Mapping[str, str]) -> None:
    """
    Print what a run is about to do, in the main process only.

    Args:
        title: the first line, such as the recipe and the output folder.
        rows: a line each, such as {"model": "...", "data": "...", "device": "...", "plan": "..."}.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    width = max(map(len, rows))
    print(printable("\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])), flush=True)


def print_summary(
    metrics: Mapping[str, str], output_dir: str | Path, files: Sequence[str], next_commands: Sequence[str]
) -> None:
    """
    Print the results of a run, in the main process only.

    Args:
        metrics: name and formatted value, a line each.
        output_dir: where the model is.
        files: names in `output_dir` to look at, such as the model card and the loss plot; those that exist are listed.
        next_commands: shell commands that use the model.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    width = max(map(len, metrics), default=0)
    lines = [f"{name:<{width}}  {value}" for name, value in metrics.items()]
    paths = [str(Path(output_dir, name)) for name in files if Path(output_dir, name).is_file()]
    lines += ["", f"Model and tokenizer: {output_dir}", *(f"  {path}" for path in paths), "Next:"]
    print(printable("\n".join([*lines, *(f"  {command}" for command in next_commands)])), flush=True)
