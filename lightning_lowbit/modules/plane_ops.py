"""Sums and averages of fixed-point tensors, in evaluation rounded once: by the quantizer behind them (WAGEUBN)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lowbit.modules.elementwise import LowBitAdd, LowBitAvgPool
from lightning_lowbit.numerics.normalize import odd_float32

__all__ = ["exact_op"]


def exact_op(op: LowBitAdd | LowBitAvgPool, x: Tensor, *rest: Any, **settings: Any) -> Tensor:
    """What is added or averaged, on steps of its own: rounded to odd where float32 does not hold the result.

    Training, and evaluation with gradients, round to nearest: they are not the integers' bits anyway.
    """
    plain = op.training or torch.is_grad_enabled() or op.lowbit_output is None or not op.switch.quantizing
    if plain or any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in (x, *rest)):
        return op.op(x, *rest, **settings)
    wide = [value.double() if isinstance(value, Tensor) else value for value in rest]
    return odd_float32(op.op(x.double(), *wide, **settings))
