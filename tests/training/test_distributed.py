"""Two processes are one run: DDP, FSDP2, checkpoints between them, and a worker that dies. On CPUs, with gloo."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp


# this file is also the program that torchrun starts
sys.path.insert(0, str(Path(__file__).parents[2]))

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification
from hf_minigpt.classification.arguments import ClassificationArguments
from hf_minigpt.classification.batching import ReviewCollator
from hf_minigpt.classification.data import ReviewRows
from hf_minigpt.classification.trainer import ClassificationTrainer, classification_optimizer
from hf_minigpt.data.collators import LanguageModelCollator
from hf_minigpt.data.rows import ShuffledDocumentRows
from hf_minigpt.data.token_store import TokenStore, TokenStoreWriter
from hf_minigpt.tokenization import train_tokenizer
from hf_minigpt.training.arguments import PretrainArguments
from hf_minigpt.training.checkpoints.sealing import CheckpointSealer, resolve_resume, verify_checkpoint
from hf_minigpt.training.checkpoints.train_safely import train_safely
from hf_minigpt.training.optimizers import adamw_decaying_matrices, muon_adamw, optimizer_cls_and_kwargs
from hf_minigpt.training.trainer import LanguageModelTrainer
from tests.tiny import tiny_config


ROOT = Path(__file__).parents[2]
OPTIMIZERS = ("muon", "adamw")
ROWS_PER_STEP = 8
STEPS = 20
# an epoch has 10
SAVED = 7


def open_store(folder: Path) -> TokenStore:
    if not folder.is_dir():
        writer = TokenStoreWriter(folder, eos_token_id=0, vocab_size=67)
        rng = np.random.default_rng(0)
        for length in rng.integers(3, 40, 60):
            # each token follows from the one before, so that there is something to learn
            writer.add(1 + np.cumsum(rng.integers(1, 4, length)) % 66, num_bytes=int(length))
        writer.close()
    return TokenStore.open(folder)


def torchrun(*arguments, restarts: int = 0) -> subprocess.CompletedProcess:
    """This file in two processes. A job that hangs fails by its time limit."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1", __file__, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # without it, restarted processes may find the addresses of the dead ones
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


# DDP, by the Trainer


class KillAt(TrainerCallback):
    """SIGKILL, in one process, before torchrun has restarted it."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        is_victim = args.process_index == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if is_victim and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, output_dir: str, optimizer: str, **arguments) -> LanguageModelTrainer:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    callbacks = [KillAt(arguments.pop("kill_at"))] if "kill_at" in arguments else []
    args = PretrainArguments(
        str(folder / output_dir),
        optimizer=optimizer,
        per_device_train_batch_size=ROWS_PER_STEP // 2 // world_size,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        save_steps=SAVED,
        save_total_limit=None,
        logging_steps=1,
        # the rows that an epoch's last step lacks would be taken from its first
        dataloader_drop_last=True,
        eval_strategy="no",
        disable_tqdm=True,
        **arguments,
    )
    trainer = LanguageModelTrainer(
        MiniGPTForCausalLM(tiny_config("modern")),
        args,
        train_dataset=ShuffledDocumentRows(open_store(folder / "store"), 16, seed=3),
        data_collator=LanguageModelCollator(pad_token_id=1),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args),
        callbacks=callbacks,
    )
    train_safely(trainer, allow_changed_run=args.allow_changed_run)
    if args.process_index == 0:
        torch.save(trainer.model.state_dict(), folder / output_dir / "weights.pt")
    return trainer


def losses(output_dir: Path) -> list[float]:
    state = json.loads((output_dir / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def copy_checkpoint(folder: Path, source: str, target: str) -> None:
    shutil.copytree(folder / source / f"checkpoint-{SAVED}", folder / target / f"checkpoint-{SAVED}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    open_store(folder / "store")
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, dict[str, torch.Tensor]]:
    """Final weights of one process, by optimizer."""
    return {optimizer: train(folder, f"alone_{optimizer}", optimizer).model.state_dict() for optimizer in OPTIMIZERS}


@pytest.fixture(scope="module")
def together(folder, alone) -> None:
    result = torchrun("ddp", folder)
    assert result.returncode == 0, result.stderr[-3000:]


def ddp(folder: Path) -> None:
    for optimizer in OPTIMIZERS:
        train(folder, f"together_{optimizer}", optimizer)
        if dist.get_rank() == 0:
            copy_checkpoint(folder, f"together_{optimizer}", f"resumed_{optimizer}")
            copy_checkpoint(folder, f"alone_{optimizer}", f"joined_{optimizer}")
        dist.barrier()
        train(folder, f"resumed_{optimizer}", optimizer, resume_from_checkpoint="auto")
        # what one process has begun
        resume = {"resume_from_checkpoint": "auto", "allow_changed_run": True}
        train(folder, f"joined_{optimizer}", optimizer, **resume)


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


def classify(folder: Path) -> torch.Tensor:
    """Final weights of a classifier, in one vector; every process's must be the same."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    texts = ["good " * (1 + i % 7) + "film" if i % 2 else "a bad " * (1 + i % 5) for i in range(40)]
    tokenizer = train_tokenizer(texts, 320, model_max_length=24, show_progress=False)
    args = ClassificationArguments(
        str(folder / f"classifier_{world_size}"),
        adversarial_epsilon=0.01,
        auxiliary_lm_weight=0.5,
        tokens_per_batch=64,
        gradient_accumulation_steps=2 // world_size,
        max_steps=6,
        cpu_threads=1,
        disable_tqdm=True,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        early_stopping_patience=None,
    )
    torch.manual_seed(0)
    config = tiny_config("modern", vocab_size=320, unpadded_vocab_size=len(tokenizer), auxiliary_lm_weight=0.5)
    config.pad_token_id = tokenizer.pad_token_id
    labels = [i % 2 for i in range(40)]
    trainer = ClassificationTrainer(
        model=MiniGPTForSequenceClassification(config),
        args=args,
        train_dataset=ReviewRows(texts, labels, tokenizer, 24, training=True),
        data_collator=ReviewCollator(tokenizer.pad_token_id),
        optimizer_cls_and_kwargs=classification_optimizer(args),
    )
    # of an odd number one would be cut in two for two processes
    assert len(trainer.get_train_dataloader()) * world_size % 2 == 0
    trainer.train()
    weights = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach()
    torch.save(weights, folder / f"classifier_{world_size}_{args.process_index}.pt")
    return weights


def test_adversarial_classifier_of_ddp_is_that_of_one_process(folder):
    result = torchrun("classify", folder)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(folder / f"classifier_2_{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, classify(folder), rtol=0, atol=1e-4)


def killed(folder: Path, output_dir: str) -> None:
    train(folder, output_dir, "muon", kill_at=13, resume_from_checkpoint="auto")


def test_a_killed_worker_ends_the_job_and_torchrun_resumes_it(folder, alone):
    """The other process, which waits for the dead one's gradients, must not wait long."""
    result = torchrun("killed", folder, "not_restarted")
    assert result.returncode != 0 and "SIGKILL" in result.stderr
    assert not (folder / "not_restarted/weights.pt").exists()

    result = torchrun("killed", folder, "restarted", restarts=1)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Resuming from" in result.stdout and f"checkpoint-{SAVED}" in result.stdout
    assert_close(torch.load(folder / "restarted/weights.pt"), alone["muon"])


# FSDP2 and distributed checkpoints, without accelerate, which wants a GPU for them


def build(optimizer: str, sharded: bool):
    torch.manual_seed(0)
    model = MiniGPTForCausalLM(tiny_config("modern"))
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if optimizer == "muon":
        return model, muon_adamw(model, learning_rate=1e-2, matrix_learning_rate=2e-2, weight_decay=0.1)
    return model, adamw_decaying_matrices(model, learning_rate=1e-2, weight_decay=0.1)


def take_steps(model, optimizer, store: TokenStore, steps: range) -> None:
    rows = ShuffledDocumentRows(store, 16, seed=3)
    collator = LanguageModelCollator(pad_token_id=1)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for step in steps:
        batch = collator([rows[i] for i in range(ROWS_PER_STEP * step + rank, ROWS_PER_STEP * (step + 1), world_size)])
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def fsdp(folder: Path) -> None:
    dist.init_process_group("gloo")
    store = open_store(folder / "store")
    for kind in OPTIMIZERS:
        output_dir = folder / f"fsdp_{kind}"
        model, optimizer = build(kind, sharded=True)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        take_steps(model, optimizer, store, range(5))
        with CheckpointSealer(output_dir) as sealer, sealer.saving(5) as checkpoint:
            weights, states = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": states}, checkpoint_id=checkpoint)
        take_steps(model, optimizer, store, range(5, 10))
        results = {"uninterrupted": model}

        model, optimizer = build(kind, sharded=True)
        weights, states = get_state_dict(model, optimizer)
        content = {"model": weights, "optimizer": states}
        dcp.load(content, checkpoint_id=resolve_resume("auto", output_dir))
        set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
        take_steps(model, optimizer, store, range(5, 10))
        results["resumed"] = model

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        for name, trained in results.items():
            weights = get_model_state_dict(trained, options=options)
            if dist.get_rank() == 0:
                torch.save(weights, output_dir / f"{name}.pt")


def test_fsdp2_is_one_process(folder):
    result = torchrun("fsdp", folder)
    assert result.returncode == 0, result.stderr[-3000:]
    for kind in OPTIMIZERS:
        model, optimizer = build(kind, sharded=False)
        take_steps(model, optimizer, open_store(folder / "store"), range(10))
        output_dir = folder / f"fsdp_{kind}"
        uninterrupted, resumed = (torch.load(output_dir / f"{name}.pt") for name in ("uninterrupted", "resumed"))
        assert_close(uninterrupted, model.state_dict())
        assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)
        assert any("distcp" in name for name in verify_checkpoint(output_dir / "checkpoint-5")["files"])


# What accelerate makes of the launch files


def launch_arguments(name: str) -> Any:
    arguments = ["--config_file", str(ROOT / "recipes/launch" / name), "--num_processes", "2", "script.py"]
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[0]


def test_fsdp2_launch_file(monkeypatch):
    for name, value in prepare_multi_gpu_env(launch_arguments("fsdp2.yaml")).items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    plugin.set_auto_wrap_policy(MiniGPTForCausalLM(tiny_config("modern")))
    assert {layer.__name__ for layer in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]} == {"MiniGPTBlock"}


def test_deepspeed_launch_file():
    args = launch_arguments("deepspeed.yaml")
    assert (args.use_deepspeed, args.zero_stage) == (True, 2)
    # as the recipe's flags say
    assert (args.gradient_accumulation_steps, args.gradient_clipping) == ("auto", "auto")


def test_muon_under_deepspeed_is_refused(folder, monkeypatch):
    def as_under_deepspeed(self):
        create_accelerator(self)
        self.is_deepspeed_enabled = True

    create_accelerator = LanguageModelTrainer.create_accelerator_and_postprocess
    monkeypatch.setattr(LanguageModelTrainer, "create_accelerator_and_postprocess", as_under_deepspeed)
    with pytest.raises(ValueError, match=r"optimizer='muon'.*--optimizer adamw"):
        train(folder, "deepspeed", "muon")


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fsdp2_by_accelerate(optimizer, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/launch/fsdp2.yaml"]
    command += ["--num_processes", str(torch.cuda.device_count()), "recipes/pretrain.py", "--max_examples", "400"]
    command += ["--optimizer", optimizer, "--save_steps", "5", "--cache_dir", str(tmp_path / "cache")]
    command += ["--output_dir", str(tmp_path / "run"), "--max_steps", "10", "--resume_from_checkpoint", "auto"]
    for _ in range(2):
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=600)
        # the second goes on from the first one's half
        shutil.rmtree(tmp_path / "run/checkpoint-10")
    assert MiniGPTForCausalLM.from_pretrained(tmp_path / "run").num_parameters() > 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    job, job_folder, *rest = sys.argv[1:]
    {"ddp": ddp, "classify": classify, "killed": killed, "fsdp": fsdp}[job](Path(job_folder), *rest)
    dist.barrier()
    # a process that exits with its group alive is sometimes aborted, and one that destroys FSDP2's groups as well
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
