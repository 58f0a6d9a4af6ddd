"""max(x, 0) in compiled graphs: its gradient reads the result, not a mask of bools, which loops store slowly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["rectify"]


def rectify(x: Tensor) -> Tensor:
    """relu(x), any shape and float dtype: the same values and gradients everywhere; 0 in the gradient where x <= 0."""
    if not torch.compiler.is_compiling():
        return torch.relu(x)
    result: Tensor = _Rectify.apply(x)  # type: ignore[no-untyped-call]  # torch does not type it
    return result


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp(min=0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        result: Tensor = torch.ops.lightning_lowbit.rectifier_gradient(g, y)
        return result


def _gradient(g: Tensor, y: Tensor) -> Tensor:
    gradient: Tensor = torch.ops.aten.threshold_backward(g, y, 0)
    return gradient


_operator = torch.library.custom_op(
    "lightning_lowbit::rectifier_gradient", _gradient, mutates_args=(), schema="(Tensor g, Tensor y) -> Tensor"
)


@_operator.register_fake
def _shape(g: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(g)
