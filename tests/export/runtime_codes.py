"""Random codes, and their comparison bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_lowbit.export.runtime import Array


def codes(generator: np.random.Generator, shape: Any, low: int = -128, high: int = 127) -> Array:
    return generator.integers(low, high, shape, endpoint=True)


def equal(found: Array, expected: Any) -> None:
    wanted = np.asarray(expected)
    assert found.dtype == np.int64
    assert found.shape == wanted.shape
    assert np.array_equal(found, wanted)
