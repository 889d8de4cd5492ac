"""What every test runs under: offline, on a CPU, with one thread, from a fixed seed."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import hf_minigpt  # noqa: F401 - registers the model with the Auto classes


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    # A recipe run in this process takes all cores; sums then come in another order.
    torch.set_num_threads(1)
