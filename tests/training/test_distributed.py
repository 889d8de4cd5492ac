"""Two processes train like one: DDP, FSDP2, checkpoints between them, a signal, a worker that dies."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.training.checkpoints.sealing import verify_checkpoint
from hf_minigpt.training.checkpoints.train_safely import train_safely
from tests.programs.distributed_training import (
    OPTIMIZERS,
    SAVED,
    STEPS,
    build,
    classify,
    copy_checkpoint,
    open_store,
    take_steps,
    train,
)
from tests.programs.interrupted_training import make_trainer, write_store
from tests.tiny import tiny_config


ROOT = Path(__file__).parents[2]


def torchrun(folder: Path, *jobs: str, restarts: int = 0) -> subprocess.CompletedProcess:
    """Run jobs of tests/programs/distributed_training.py, one after the other, in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    command += ["-m", "tests.programs.distributed_training", str(folder), *jobs]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # without it, restarted processes may find the addresses of the dead ones
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # the time limit ends a job that hangs
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def losses(output_dir: Path) -> list[float]:
    state = json.loads((output_dir / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    open_store(folder / "store")
    write_store(folder / "signals_store")
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, dict[str, torch.Tensor]]:
    """Final weights of one process, by optimizer."""
    return {optimizer: train(folder, f"alone_{optimizer}", optimizer).model.state_dict() for optimizer in OPTIMIZERS}


@pytest.fixture(scope="module")
def together(folder, alone) -> str:
    """What two processes print that have done all jobs: one start of two processes takes longer than all jobs."""
    result = torchrun(folder, "ddp", "classify", "signals", "fsdp")
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ddp_is_one_process(folder, alone, together, optimizer):
    expected = losses(folder / f"alone_{optimizer}")
    assert len(expected) == STEPS and expected[-1] < expected[0] - 0.1
    for name in ("together", "resumed", "joined"):
        assert losses(folder / f"{name}_{optimizer}") == pytest.approx(expected, rel=1e-5)
        assert_close(torch.load(folder / f"{name}_{optimizer}" / "weights.pt"), alone[optimizer])
    found, resumed = (torch.load(folder / f"{name}_{optimizer}" / "weights.pt") for name in ("together", "resumed"))
    assert all(torch.equal(found[name], resumed[name]) for name in found)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_process_takes_over_from_two(folder, alone, together, optimizer):
    copy_checkpoint(folder, f"together_{optimizer}", f"taken_over_{optimizer}")
    with pytest.raises(ValueError, match="world_size: 2 in the checkpoint, 1 now"):
        train(folder, f"taken_over_{optimizer}", optimizer, resume_from_checkpoint="auto")
    resume = {"resume_from_checkpoint": "auto", "allow_changed_run": True}
    trainer = train(folder, f"taken_over_{optimizer}", optimizer, **resume)
    assert losses(folder / f"taken_over_{optimizer}") == pytest.approx(losses(folder / f"alone_{optimizer}"), rel=1e-5)
    assert_close(trainer.model.state_dict(), alone[optimizer])


def test_adversarial_classifier_of_ddp_is_that_of_one_process(folder, together):
    first, second = (torch.load(folder / f"classifier_2_{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, classify(folder), rtol=0, atol=1e-4)


def test_a_signal_to_one_process_stops_both(folder, together):
    """And one process can take over their checkpoint."""
    assert "signals: rank 0 done" in together and "signals: rank 1 done" in together
    checkpoint = folder / "signals" / "checkpoint-9"
    assert {"rng_state_0.pth", "rng_state_1.pth"} < verify_checkpoint(checkpoint)["files"].keys()
    shutil.copytree(checkpoint, folder / "signals_single" / "checkpoint-9")
    store = write_store(folder / "signals_store")
    trainer = make_trainer(store, folder / "signals_single", resume_from_checkpoint="auto", max_steps=12)
    with pytest.raises(ValueError, match="world_size: 2 in the checkpoint, 1 now"):
        train_safely(trainer)
    train_safely(trainer, allow_changed_run=True)
    assert trainer.state.global_step == 12


# resuming after a SIGKILL and under DDP is also tested apart, in seconds
@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker_and_the_run_resumes(folder, alone):
    """torchrun must also stop the other process, which waits for the gradients of the dead one."""
    result = torchrun(folder, "killed", restarts=1)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Resuming from" in result.stdout and f"checkpoint-{SAVED}" in result.stdout
    assert_close(torch.load(folder / "restarted/weights.pt"), alone["muon"])


def test_fsdp2_is_one_process(folder, together):
    for kind in OPTIMIZERS:
        model, optimizer = build(kind, sharded=False)
        take_steps(model, optimizer, open_store(folder / "store"), range(10))
        output_dir = folder / f"fsdp_{kind}"
        uninterrupted, resumed = (torch.load(output_dir / f"{name}.pt") for name in ("uninterrupted", "resumed"))
        assert_close(uninterrupted, model.state_dict())
        assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)
        assert any("distcp" in name for name in verify_checkpoint(output_dir / "checkpoint-5")["files"])


# The launch files, as accelerate reads them


def launch_arguments(name: str, *flags: str) -> Any:
    arguments = ["--config_file", str(ROOT / "recipes/launch" / name), *flags, "script.py"]
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[0]


def test_fsdp2_launch_file(monkeypatch):
    for name, value in prepare_multi_gpu_env(launch_arguments("fsdp2.yaml", "--num_processes", "2")).items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    plugin.set_auto_wrap_policy(MiniGPTForCausalLM(tiny_config("modern")))
    assert {layer.__name__ for layer in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]} == {"MiniGPTBlock"}


def test_deepspeed_launch_file():
    args = launch_arguments("deepspeed.yaml", "--num_processes", "2")
    assert (args.use_deepspeed, args.zero_stage) == (True, 2)
    # as the recipe's flags say
    assert (args.gradient_accumulation_steps, args.gradient_clipping) == ("auto", "auto")


def test_cpu_launch_file():
    args = launch_arguments("cpu.yaml")
    assert (args.use_cpu, args.num_processes, args.mixed_precision) == (True, 1, "no")


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fsdp2_by_accelerate(optimizer, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/launch/fsdp2.yaml"]
    command += ["--num_processes", str(torch.cuda.device_count()), "recipes/pretrain.py", "--max_examples", "400"]
    command += ["--optimizer", optimizer, "--save_steps", "5", "--cache_dir", str(tmp_path / "cache")]
    command += ["--output_dir", str(tmp_path / "run"), "--max_steps", "10", "--resume_from_checkpoint", "auto"]
    for _ in range(2):
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=600)
        # the second run resumes from the checkpoint at step 5
        shutil.rmtree(tmp_path / "run/checkpoint-10")
    assert MiniGPTForCausalLM.from_pretrained(tmp_path / "run").num_parameters() > 0
