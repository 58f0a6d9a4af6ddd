"""The dtype that quantizers compute in: float32, and float64 where a tensor has it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compute_dtype", "wide"]


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 of a float64 tensor, else float32: half-precision types hold too few codes."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """The tensor in the dtype that is computed in."""
    return x.to(compute_dtype(x))
