"""The command `hf-minigpt`, also `python -m hf_minigpt`: runs the recipes and the server."""

import argparse
import importlib
import re
import sys
from collections.abc import Sequence

import hf_minigpt

from .commands import COMMANDS, recipes_folder


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run a subcommand; the arguments after its name are its own.

    Args:
        argv: defaults to `sys.argv[1:]`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="hf-minigpt",
        usage="%(prog)s COMMAND [ARGUMENTS]   (%(prog)s COMMAND --help describes them)",
        description="Train and use MiniGPT models.",
        epilog="\n".join(
            [
                "commands:",
                *(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()),
                "",
                "Training in several processes: accelerate launch -m hf_minigpt COMMAND [ARGUMENTS]",
                f"The scripts and their YAML files: {recipes_folder()}",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("--version", action="version", version=f"%(prog)s {hf_minigpt.__version__}")
    name = parser.parse_args(argv[:1]).command

    module = importlib.import_module(COMMANDS[name].module)
    module.__doc__ = with_commands(module.__doc__ or "")
    # the name in usage lines, and the flags
    sys.argv = [f"{parser.prog} {name}", *argv[1:]]
    module.main()


def with_commands(text: str) -> str:
    """Replace the command lines of scripts, such as `python recipes/generate.py`, by those of subcommands."""
    for name, command in COMMANDS.items():
        script = command.module.rpartition(".")[2]
        text = re.sub(rf"(accelerate launch|python) recipes/{script}\.py", f"hf-minigpt {name}", text)
    return re.sub(r"--config recipes/configs/(\w+)\.yaml", r"--config \1", text)
