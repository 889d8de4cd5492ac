"""recipes/benchmarks/gpu.py with and without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


SCRIPT = Path(__file__).parents[2] / "recipes/benchmarks/gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the message without a GPU")
def test_without_a_gpu_it_exits_with_a_message():
    result = run()
    assert result.returncode == 2
    assert "No CUDA device" in result.stdout


@pytest.mark.gpu
def test_every_setting_gives_the_loss_of_float32():
    result = run("--preset", "minigpt-small", "--batch_size", "4", "--context_length", "256", "--steps", "3")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["failed"] == []
    assert {"fp32", "tf32", "fp16"} <= set(report["results"])
