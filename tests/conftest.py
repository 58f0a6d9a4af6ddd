"""One thread a process, so that workers do not fight for cores and float sums come out in one order."""

from __future__ import annotations

import os

# Before torch is imported, and for the programs that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from hypothesis import settings

torch.set_num_threads(1)

# The first call of a torch function can take longer than hypothesis allows any call by default.
settings.register_profile("lowbit", deadline=None)
settings.load_profile("lowbit")
