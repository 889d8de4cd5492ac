"""Runs recipes as `accelerate launch` starts them from a file of recipes/launch, in two processes on a CPU.

Started from the repository's root: `python -m tests.programs.launched_recipes FOLDER`. The jobs in FOLDER/jobs.json
run one after the other. Each has a `name` (also the folder of its results), a `launch` file (null: one process, not
launched), a `recipe`, `flags`, a `checkpoint` of another job to resume from (or null) and a limit in `seconds`. What a
process prints goes to FOLDER/NAME.RANK.log, and the exit codes to FOLDER/codes.json.

`accelerate launch` ignores the number of processes where there is no GPU. So this program sets the variables that it
would set, and tells accelerate that the processes run on GPUs, because it shards only there.
"""

import importlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from hf_minigpt.classification import report
from hf_minigpt.recipes import sft


ROOT = Path(__file__).parents[2]
NUM_PROCESSES = 2
TIMED_OUT = 124
RECIPES = ("pretrain", "pretrain_loop", "sft", "finetune_imdb")


def launch_environment(file: str, *flags: str) -> dict[str, str]:
    """Return the variables by which `accelerate launch` configures accelerate in the processes that it starts."""
    command = ["--config_file", str(ROOT / "recipes/launch" / file), *flags, "script.py"]
    args = _validate_launch_command(launch_command_parser().parse_args(command))[0]
    environment = prepare_multi_gpu_env(args) if args.num_processes > 1 else prepare_simple_launcher_cmd_env(args)[1]
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def pretend_gpus() -> None:
    """Make accelerate treat processes on a CPU as it treats processes on GPUs."""
    init = PartialState.__init__

    def init_and_rename(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init_and_rename


def run_recipe(job: dict[str, Any], rank: int, port: int, folder: Path) -> None:
    log = os.open(folder / f"{job['name']}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["launch"] is not None:
        os.environ.update(launch_environment(job["launch"]))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(WORLD_SIZE=str(NUM_PROCESSES), LOCAL_WORLD_SIZE=str(NUM_PROCESSES))
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            pretend_gpus()
    importlib.import_module(f"hf_minigpt.recipes.{job['recipe']}").main(job["flags"])


def wait_for(processes: list[int], seconds: float) -> int:
    """End with the first process that fails or with the limit. Return its exit code, TIMED_OUT, or 0."""
    code, end = 0, time.monotonic() + seconds
    while processes and code == 0:
        for process in list(processes):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                processes.remove(process)
                code = code or os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            code = TIMED_OUT
        time.sleep(0.05)
    for process in processes:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return code


def main() -> None:
    folder = Path(sys.argv[1])
    # imported once and shared by all processes: imports take longer than the work
    for recipe in RECIPES:
        importlib.import_module(f"hf_minigpt.recipes.{recipe}")
    # each resample of the pipeline's accuracy takes as long as a training step of these tiny models
    report.NUM_RESAMPLES = 10
    # the base of sft.py without --model
    sizes = ["--config_overrides", "hidden_size=16", "num_attention_heads=1", "num_hidden_layers=1"]
    sft.EMBEDDED_BASE_FLAGS = ["--max_examples", "40", "--max_steps", "1", "--context_length", "64", *sizes]
    codes = {}
    for job in json.loads((folder / "jobs.json").read_text()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        if job["checkpoint"] is not None:
            checkpoint = folder / job["checkpoint"]
            shutil.copytree(checkpoint, folder / job["name"] / checkpoint.name)
        processes = []
        for rank in range(NUM_PROCESSES if job["launch"] is not None else 1):
            process = os.fork()
            if process == 0:
                # returns, so that the interpreter ends as that of a launched process does
                return run_recipe(job, rank, port, folder)
            processes.append(process)
        codes[job["name"]] = wait_for(processes, job["seconds"])
        (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
