"""Two network namespaces as two hosts: a run over both is that of one process; a host that dies comes back."""

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.recipes import pretrain
from hf_minigpt.training.checkpoints import sealing
from hf_minigpt.training.checkpoints.sealing import (
    CheckpointSealer,
    check_resume,
    newest_sealed,
    resolve_resume,
    run_lock,
    verify_checkpoint,
)
from hf_minigpt.training.checkpoints.signals import StopSignals
from tests.programs.forked_processes import free_port, run_forked
from tests.programs.hosts import Unavailable, two_hosts, wait_for


ROOT = Path(__file__).parents[2]
SMALL = shlex.split(
    "--max_examples 80 --context_length 32 --cpu_threads 1 --save_steps 20 --save_total_limit 2 --eval_strategy no "
    "--resume_from_checkpoint auto --config_overrides hidden_size=32 num_attention_heads=2 num_hidden_layers=2"
)


@pytest.fixture
def hosts():
    with contextlib.ExitStack() as stack:
        try:
            pair = stack.enter_context(two_hosts())
        except Unavailable as error:
            pytest.skip(f"no network namespaces: {error}")
        yield pair


def flags(folder: Path, name: str, *more: str) -> list[str]:
    return [*SMALL, "--cache_dir", str(folder / "cache"), "--output_dir", str(folder / name), *more]


def wait(folder: Path, *processes) -> None:
    try:
        codes = [process.wait(240) for process in processes]
    finally:
        logs = "".join(f"{log.name}\n{log.read_text()[-3000:]}\n" for log in sorted(folder.glob("*.log")))
        print(logs)
    assert not any(codes), codes


def assert_equals_one_process(folder: Path, name: str) -> None:
    alone = pretrain.main(flags(folder, "alone", "--max_steps", "6", "--per_device_train_batch_size", "4"))
    together = json.loads((folder / name / "all_results.json").read_text())
    assert together["train_tokens"] == alone["train_tokens"]
    assert together["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-6)
    found, expected = (MiniGPTForCausalLM.from_pretrained(folder / run).state_dict() for run in (name, "alone"))
    for parameter, tensor in expected.items():
        torch.testing.assert_close(found[parameter], tensor, rtol=0, atol=1e-5)


def test_torchrun_on_two_hosts_is_one_process(hosts, tmp_path):
    arguments = flags(tmp_path, "two", "--max_steps", "6", "--per_device_train_batch_size", "2")
    wait(tmp_path, *[host.torchrun("recipes/pretrain.py", *arguments, log=tmp_path / "two.log") for host in hosts])
    assert "2 processes" in (tmp_path / "two.log").read_text()
    assert_equals_one_process(tmp_path, "two")


@pytest.mark.slow
def test_accelerate_launch_on_two_hosts_is_one_process(hosts, tmp_path):
    arguments = flags(tmp_path, "two", "--max_steps", "6", "--per_device_train_batch_size", "2")
    wait(tmp_path, *[host.accelerate("recipes/pretrain.py", *arguments, log=tmp_path / "two.log") for host in hosts])
    assert "2 processes" in (tmp_path / "two.log").read_text()
    assert_equals_one_process(tmp_path, "two")


@pytest.mark.slow
def test_a_host_that_dies_comes_back_and_no_step_is_lost(hosts, tmp_path):
    """First the second host loses its cable and power, later the first host, which holds the rendezvous, its power.

    As in recipes/benchmarks/crash_test.py, a step is lost if the run resumes from an earlier checkpoint than the
    newest complete one, or if a weight differs at the end.
    """
    first, second = hosts
    dropout = ["--max_steps", "200", "--per_device_train_batch_size", "2", "--ddp_timeout", "15"]
    dropout += ["attn_pdrop=0.1", "resid_pdrop=0.1"]
    arguments = [*SMALL, *dropout[-2:], *dropout[:-2], "--cache_dir", str(tmp_path / "cache"), "--output_dir"]

    def start(host, name: str):
        log = tmp_path / f"{name}.log"
        return host.torchrun("recipes/pretrain.py", *arguments, str(tmp_path / name), log=log, restarts=3)

    def newest() -> int:
        checkpoint = newest_sealed(tmp_path / "killed")
        return 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])

    wait(tmp_path, *[start(host, "uninterrupted") for host in hosts])
    running = [start(host, "killed") for host in hosts]
    wait_for(lambda: newest() >= 40, 120, "checkpoint-40")
    second.connect(False)
    second.kill()
    resumed_at = [newest()]
    second.connect(True)
    # torchrun of the first host waits for this
    running[1] = start(second, "killed")
    wait_for(lambda: newest() >= 120, 180, "checkpoint-120")
    first.kill()
    # without the rendezvous it ends by itself, so a supervisor can start it again
    assert running[1].wait(120) != 0
    resumed_at.append(newest())
    wait(tmp_path, *[start(host, "killed") for host in hosts])

    resumed = re.findall(r"Resuming from .*checkpoint-(\d+)", (tmp_path / "killed.log").read_text())
    assert [int(step) for step in resumed] == resumed_at
    final = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("uninterrupted", "killed")]
    assert final[0] == final[1]


# Without hosts: forked processes


def test_hosts_without_a_shared_folder_are_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(sealing, "SHARED_WITHIN", 0.5)
    message = r"output_dir=.*host-0 is not visible on host-1: .* Set it to a folder on a file system that all machines"

    def job(rank: int) -> None:
        dist.init_process_group("gloo")
        monkeypatch.setattr(sealing.socket, "gethostname", lambda: f"host-{rank}")
        for check in (check_resume, resolve_resume):
            with pytest.raises(ValueError, match=message):
                check("auto", tmp_path / str(rank) / "run")
            check("auto", tmp_path / "shared")
        # a folder that exists on one host only, and nothing remains in any
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    assert run_forked(2, job) == [0, 0]


def test_files_that_the_main_process_sees_late_are_sealed(tmp_path, monkeypatch):
    """A network file system may show the files of other hosts late."""
    calls = itertools.count()
    list_files = sealing._files

    def job(rank: int) -> None:
        dist.init_process_group("gloo")
        if rank == 0:
            monkeypatch.setattr(
                sealing, "_files", lambda folder: list_files(folder) - ({"1.bin"} if next(calls) < 3 else set())
            )
        with CheckpointSealer(tmp_path) as sealer, sealer.saving(1) as folder:
            (folder / f"{rank}.bin").write_bytes(bytes(rank))
        if rank == 0:
            assert verify_checkpoint(folder)["files"].keys() == {"0.bin", "1.bin"}
            # one that never appears
            monkeypatch.setattr(sealing, "_files", lambda folder: list_files(folder) - {"1.bin"})
            monkeypatch.setattr(sealing, "SHARED_WITHIN", 0.3)
        refused = pytest.raises(OSError, match=r"'1.bin'.* do not appear") if rank == 0 else contextlib.nullcontext()
        with refused, CheckpointSealer(tmp_path) as sealer, sealer.saving(2) as folder:
            (folder / f"{rank}.bin").write_bytes(bytes(rank))

    assert run_forked(2, job, seconds=40) == [0, 0]
    assert newest_sealed(tmp_path) == str(tmp_path / "checkpoint-1")


def test_a_silent_host_does_not_hang_the_others(tmp_path):
    """A stopped process keeps its connections, as a host that lost its network does."""

    def job(rank: int) -> None:
        dist.init_process_group("gloo")
        with StopSignals(timeout=2) as stop:
            assert not stop.requested()
            pids = [None, None]
            dist.all_gather_object(pids, os.getpid())
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            start = time.monotonic()
            with pytest.raises(RuntimeError, match=r"(?i)timed out|timeout"):
                stop.requested()
            assert time.monotonic() - start < 20
            os.kill(pids[1], signal.SIGKILL)

    assert run_forked(2, job, seconds=20) == [0, -signal.SIGKILL]


def test_the_lock_of_a_dead_host_is_waited_for(tmp_path, monkeypatch, capsys):
    """A file server releases the lock of a dead host late; a run on this host is refused at once."""
    held, release = os.pipe()

    def job(rank: int) -> None:
        monkeypatch.setattr(sealing.socket, "gethostname", lambda: "host-2")
        with run_lock(tmp_path):
            os.write(release, b".")
            time.sleep(4)

    child = os.fork()
    if child == 0:
        run_forked(1, job)
        os._exit(0)
    os.read(held, 1)
    start = time.monotonic()
    monkeypatch.setattr(sealing, "LOCK_OF_ANOTHER_MACHINE", 1.0)
    with pytest.raises(ValueError, match=r"in use by another run \(process \d+ on host-2\)"), run_lock(tmp_path):
        pass
    assert "waiting" in capsys.readouterr().out
    monkeypatch.setattr(sealing, "LOCK_OF_ANOTHER_MACHINE", 30.0)
    with run_lock(tmp_path):
        assert 3 < time.monotonic() - start < 20
    os.waitpid(child, 0)


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(sealing.fcntl, "flock", flock)
    with run_lock(tmp_path):
        pass
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().out


@pytest.mark.slow
def test_the_slurm_script_stops_with_a_checkpoint_and_queues_itself_again(tmp_path):
    """srun runs its command on this machine; scontrol notes what it was called with."""
    for name, script in {
        "srun": 'exec "$@"',
        "scontrol": f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> {tmp_path}/requeued; fi',
    }.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1"}
    environment |= {"SLURM_GPUS_ON_NODE": "2", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    arguments = flags(tmp_path, "run", "--max_steps", "300", "--per_device_train_batch_size", "2")

    def sbatch() -> subprocess.Popen:
        command = ["recipes/launch/slurm.sh", "recipes/pretrain.py", *arguments]
        with (tmp_path / "run.log").open("a") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    job = sbatch()
    wait_for(lambda: newest_sealed(tmp_path / "run") is not None, 120, "a checkpoint")
    job.terminate()
    assert job.wait(120) != 0
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    stopped_at = newest_sealed(tmp_path / "run")
    assert "stopping after this step" in (tmp_path / "run.log").read_text()
    wait(tmp_path, sbatch())
    assert f"Resuming from {stopped_at}" in (tmp_path / "run.log").read_text()
    assert (tmp_path / "run/model.safetensors").is_file()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
