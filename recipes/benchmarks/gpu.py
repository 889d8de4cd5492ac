"""
Check and time the package on this machine's GPU: twelve checks, offline, in ten minutes at most.

    python recipes/benchmarks/gpu.py
    python recipes/benchmarks/gpu.py --only 2,4 --output_dir runs/gpu
    python recipes/benchmarks/gpu.py --dry_run               # the same code on a CPU, with tiny models

    1  environment, TF32                     7  MuonAdamW as on the CPU, loss scaler, save and load
    2  fp32 as on the CPU, all presets       8  greedy text as on the CPU, static cache as dynamic
    3  bf16 and fp16 near fp32               9  recipes beside the CPU's losses, resume
    4  packed documents as alone            10  FSDP2 and DDP as one process
    5  no synchronization in a step         11  peak memory
    6  compiled as eager                    12  speed

Every figure has bounds, and a control: the same figure of a variant that is broken on purpose, which must be out of
bounds. If a control passes, the check proves nothing and is `void`, which counts as failed. A check that cannot run
here is `skipped`, with the reason, and does not count as passed.

Each check runs in its own process, so that one that crashes or hangs does not stop the others. Writes results.json,
results.md (a table ready for the README) and a log.txt for each check to `--output_dir`. Exit codes: 0 all passed, 1
something failed or nothing passed, 2 no CUDA device.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import make_parser
from gpu_checks import correctness, speed, training  # noqa: F401 - registers the checks
from gpu_checks.harness import CHECKS, Failure, Machine, exit_code, line, markdown, record, run_check


def numbers(text: str) -> list[int]:
    """Parse `--only`, such as 2,4."""
    try:
        chosen = [int(part) for part in text.split(",")]
    except ValueError:
        chosen = []
    if not chosen or not set(chosen) <= set(CHECKS):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of checks. Give numbers from 1 to 12, such as 2,4.")
    return chosen


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--only", type=numbers, default=sorted(CHECKS), metavar="N,N", help="run only these checks")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--time_limit", type=float, default=600, help="seconds for all checks; default: 600")
    parser.add_argument("--dry_run", action="store_true", help="run on a CPU, with tiny models")
    parser.add_argument("--in_process", action="store_true", help="run the checks in this process, without time limit")
    # what this program starts itself: one check, and one of two processes of check 10
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_here(args: argparse.Namespace, machine: Machine) -> list[dict[str, Any]]:
    """Run the checks in this process, and write their records to records.jsonl as they come."""
    if not machine.dry_run:
        torch.cuda.set_device(machine.device)
    records = []
    with (machine.folder / "records.jsonl").open("w") as file:
        for number in args.only:
            for found in run_check(number, machine):
                print(line(found), flush=True)
                print(json.dumps(found), file=file, flush=True)
                records.append(found)
    return records


def run_apart(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run each check in a process of its own, until the time is up."""
    end = time.monotonic() + args.time_limit
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    records: list[dict[str, Any]] = []
    for number in args.only:
        folder = args.output_dir / f"check_{number}"
        file = folder / "records.jsonl"
        file.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--apart", "--only", str(number), "--output_dir", str(folder)]
        command += ["--dry_run"] if args.dry_run else []
        reason = None
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w") as log:
            # a group of processes, because a check may start others
            process = subprocess.Popen(command, stderr=log, env=environment, start_new_session=True)
            try:
                status = process.wait(max(end - time.monotonic(), 0))
                if status not in (0, 1):
                    reason = f"its process ended with status {status}; see {log.name}"
            except subprocess.TimeoutExpired:
                reason = f"the time limit of {args.time_limit:.0f} s is reached; raise --time_limit"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        found = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
        if reason is not None or not found:
            ended = record(Failure(reason or "its process found nothing"))
            found.append({"check": number, "title": CHECKS[number].title, **ended})
            print(line(found[-1]), flush=True)
        records += found
    return records


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with text in place of the numbers that JSON does not have."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    # the dry run pretends a GPU with a module of the tests
    sys.path.append(str(Path(__file__).parents[2]))
    if not args.dry_run and not torch.cuda.is_available():
        print("No CUDA device: this program checks a GPU. With --dry_run it shows on a CPU what it does.")
        return 2
    device = torch.device("cpu") if args.dry_run else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    folder = args.output_dir if args.worker is None else args.worker.parent
    folder.mkdir(parents=True, exist_ok=True)
    machine = Machine(device, folder.resolve(), args.dry_run)
    if args.worker is not None:
        if not args.dry_run:
            torch.cuda.set_device(device)
        training.worker(machine, args.worker)
        return 0
    if args.apart:
        return exit_code(run_here(args, machine))

    start = time.monotonic()
    records = run_here(args, machine) if args.in_process else run_apart(args)
    heading = f"{machine.name}, torch {torch.__version__}"
    table = markdown(records, heading)
    results = {
        "machine": heading,
        "seconds": round(time.monotonic() - start, 1),
        "records": list(map(finite, records)),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    (folder / "results.md").write_text(table)
    print(f"\n{table}\nAlso in {folder / 'results.md'} and {folder / 'results.json'}")
    code = exit_code(records)
    print(f"{'All that could run here has passed' if code == 0 else 'FAILED'}, {results['seconds']:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
