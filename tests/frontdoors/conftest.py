"""A small model trained on the tales, made once and kept in pytest's cache while the code stays the same."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers


ROOT = Path(__file__).parents[2]
# The default run with fewer steps: about a minute on two cores.
COMMAND = ["recipes/pretrain.py", "--max_steps", "600", "--eval_strategy", "no", "--save_strategy", "no"]


@pytest.fixture(scope="session")
def trained_folder(pytestconfig) -> Path:
    """What `recipes/pretrain.py` leaves: weights, tokenizer, code."""
    digest = hashlib.blake2b(repr((torch.__version__, transformers.__version__, COMMAND)).encode(), digest_size=8)
    for file in sorted([*ROOT.glob("hf_minigpt/**/*.py"), ROOT / COMMAND[0]]):
        digest.update(file.read_bytes())
    cache = Path(pytestconfig.cache.mkdir("trained"))
    folder = cache / digest.hexdigest()
    if not (folder / "all_results.json").is_file():
        subprocess.run(
            [sys.executable, *COMMAND, "--output_dir", str(folder), "--cache_dir", str(cache / "data")],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            check=True,
            capture_output=True,
        )
    return folder
