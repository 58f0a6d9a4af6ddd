"""One thread a process, so that workers do not fight for cores and float sums come out in one order."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

# Before torch is imported, and for the programs that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# Where a test asks for more threads, those that wait leave the cores to others.
os.environ["OMP_WAIT_POLICY"] = "passive"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# The first call of a torch function can take longer than hypothesis allows any call by default.
settings.register_profile("lowbit", deadline=None)
settings.load_profile("lowbit")


def pytest_collection_finish() -> None:
    """Keep what was imported and collected out of garbage collections, which take a seventh of the time otherwise."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(autouse=True)
def no_seed_left_behind() -> Iterator[None]:
    """``seed_everything`` speaks through the environment, which the next test's processes would inherit."""
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
