"""Processes of one run, forked from a process that has imported the libraries already."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env


ROOT = Path(__file__).parents[2]


def launch_environment(launch_file: str) -> dict[str, str]:
    """The variables of FSDP that `accelerate launch` sets."""
    flags = ["--config_file", str(ROOT / "recipes/launch" / launch_file), "--main_process_port", "0", "script.py"]
    environment = prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args(flags))[0])
    return {name: value for name, value in environment.items() if name.startswith(("FSDP_", "ACCELERATE_"))}


def torchrun_environment(rank: int, number: int, port: int) -> dict[str, str]:
    """The variables that `torchrun` sets."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in numbers.items()}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_forked(number: int, job: Callable[[int], None], seconds: int = 120) -> list[int]:
    """Call `job(rank)` in forked processes with the environment of `torchrun`, and return their exit codes.

    A process that takes longer is killed: its exit code is negative.
    """
    port = free_port()
    children = []
    for rank in range(number):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= torchrun_environment(rank, number, port)
                job(rank)
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                # without the destructors of the process group, see distributed_training.py
                os._exit(code)
        children.append(child)
    deadline, codes = time.monotonic() + seconds, {}
    while len(codes) < number:
        for child in children:
            if child not in codes and (status := os.waitpid(child, os.WNOHANG)) != (0, 0):
                codes[child] = os.waitstatus_to_exitcode(status[1])
            elif child not in codes and time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]
