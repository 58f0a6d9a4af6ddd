"""Random state as plain types and tensors, which load under ``weights_only=True``."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["capture_rng", "restore_rng"]


def capture_rng(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """The state of torch, Python, numpy, the current CUDA device and ``generators``; draws nothing.

    Word arrays are stored as int64 tensors: a tuple of 625 ints costs ten times as much to pickle.
    """
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        # The current device only: each rank keeps its own, and reading another's would open a context there.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "generators": [generator.get_state() for generator in generators],
    }


def restore_rng(state: dict[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Put back what ``capture_rng`` returned; a CUDA state is left out where there is no CUDA."""
    # map_location may have moved the states along with the weights.
    torch.set_rng_state(state["torch"].cpu())
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    for generator, saved in zip(generators, state["generators"], strict=True):
        generator.set_state(saved.cpu())
