"""A small model trained on the tales, made once and kept in pytest's cache while the code stays the same."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


ROOT = Path(__file__).parents[2]
QUIET = ["--eval_strategy", "no", "--save_strategy", "no"]
# The default run with fewer steps: about a minute on two cores.
COMMAND = ["recipes/pretrain.py", "--max_steps", "600", *QUIET]
# A model that GPT-2's own classes and llama.cpp can hold, in a quarter of a minute.
GPT2_COMMAND = ["recipes/pretrain.py", "--preset", "gpt2", "--max_steps", "80", "--context_length", "256", *QUIET]
GPT2_COMMAND += ["--config_overrides", "hidden_size=128", "num_hidden_layers=2", "num_attention_heads=4"]


def train(command: list[str], cache: Path) -> Path:
    """What a recipe leaves in its folder: weights, tokenizer, code. A folder of the same code is used again."""
    digest = hashlib.blake2b(repr((torch.__version__, transformers.__version__, command)).encode(), digest_size=8)
    for file in sorted([*ROOT.glob("hf_minigpt/**/*.py"), ROOT / command[0]]):
        digest.update(file.read_bytes())
    folder = cache / digest.hexdigest()
    if not (folder / "all_results.json").is_file():
        subprocess.run(
            [sys.executable, *command, "--output_dir", str(folder), "--cache_dir", str(cache / "data")],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            check=True,
            capture_output=True,
        )
    return folder


@pytest.fixture(scope="session")
def trained_folder(pytestconfig) -> Path:
    """A model of the default architecture, trained on the tales."""
    return train(COMMAND, Path(pytestconfig.cache.mkdir("trained")))


@pytest.fixture(scope="session")
def trained_gpt2_folder(pytestconfig) -> Path:
    """A small GPT-2, trained on the tales."""
    return train(GPT2_COMMAND, Path(pytestconfig.cache.mkdir("trained")))


@pytest.fixture(scope="module")
def model(trained_folder):
    return AutoModelForCausalLM.from_pretrained(trained_folder).eval()


@pytest.fixture(scope="module")
def tokenizer(trained_folder):
    return AutoTokenizer.from_pretrained(trained_folder)
