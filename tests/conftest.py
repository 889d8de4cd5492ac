"""What every test runs under: offline, on a CPU, with one thread, from a fixed seed. How xdist shares the tests."""

import gc
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import hf_minigpt  # noqa: F401 - registers the model with the Auto classes


def available_cores() -> list[int]:
    """The cores that this process may use; on systems that cannot say, all of them."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def pytest_configure(config):
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and hasattr(os, "sched_setaffinity"):
        # Each worker keeps to its own cores, and so do the programs that its tests start: OpenMP's threads of two
        # processes that share cores wait for each other in busy loops.
        own = available_cores()[int(worker.removeprefix("gw")) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
        os.sched_setaffinity(0, own or available_cores())


def pytest_collection_finish():
    # Accelerate collects garbage after each run, which takes 0.3 s with the objects of all imports, 0.05 s without.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    # A worker takes 1 to 2 GB.
    return min(len(available_cores()), 8)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByFixtures(LoadScopeScheduling):
        """Keep the tests of a file in one worker, and all front doors, which share trained models."""

        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return "tests/frontdoors" if file.startswith("tests/frontdoors") else file

    return ByFixtures(config, log)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    # A recipe run in this process takes all cores; sums then come in another order.
    torch.set_num_threads(1)
