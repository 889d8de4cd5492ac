"""DeepSpeed's ZeRO: what cannot be trained with it is refused; the rest trains like DDP."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.pretraining.arguments import PretrainArguments
from hf_minigpt.recipes import finetune_imdb, pretrain, pretrain_loop, sft


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("recipe", [pretrain, pretrain_loop, sft, finetune_imdb])
def test_muon_is_refused_before_any_work(recipe, tmp_path, monkeypatch):
    # set by `accelerate launch`
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    arguments = ["--output_dir", str(tmp_path / "run"), *(["--model", "none"] if recipe is sft else [])]
    with pytest.raises(ValueError, match=r"optimizer='muon'.*DeepSpeed.*--optimizer adamw.*fsdp2.yaml"):
        recipe.main([*arguments, "--optimizer", "muon"])
    assert not (tmp_path / "run").exists()


def test_the_loop_refuses_deepspeed(tmp_path, monkeypatch):
    args = PretrainArguments(str(tmp_path), optimizer="adamw")
    pretrain_loop.check_loop_possible(args)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"DeepSpeed.*recipes/pretrain.py"):
        pretrain_loop.check_loop_possible(args)


@pytest.mark.slow
def test_zero_2_is_ddp(tmp_path):
    """With gloo on CPUs, of which DeepSpeed compiles its own communication at the first use."""
    pytest.importorskip("deepspeed")
    arguments = shlex.split(
        "--optimizer adamw --max_examples 80 --context_length 32 --per_device_train_batch_size 2 --cpu_threads 1 "
        "--max_steps 6 --save_steps 3 --eval_strategy no --resume_from_checkpoint auto "
        "--config_overrides hidden_size=32 num_attention_heads=2 num_hidden_layers=2"
    )
    for name in ("ddp", "deepspeed"):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--config_file"]
        command += [f"recipes/launch/{name}.yaml", "recipes/pretrain.py", *arguments]
        command += ["--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / name)]
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "DS_ACCELERATOR": "cpu",
        }
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=400)
    ddp, zero = (MiniGPTForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("ddp", "deepspeed"))
    for name, tensor in ddp.items():
        torch.testing.assert_close(zero[name], tensor, rtol=0, atol=1e-6)
