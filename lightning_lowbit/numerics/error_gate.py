"""Quantizers of what flows back: the value of a tensor unchanged, its gradient on a grid (WAGEUBN, errors E1, E2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lowbit.numerics.flag import flag_quantize
from lightning_lowbit.numerics.shift import code_limit, shift_quantize

__all__ = ["flag_gate", "shift_gate"]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, flag: bool, clip_to_one: bool, nonfinite: Tensor | None) -> Tensor:
        ctx.rule = bits, flag, clip_to_one
        ctx.nonfinite = nonfinite
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        bits, flag, clip_to_one = ctx.rule
        y, finite = flag_quantize(g, bits) if flag else shift_quantize(g, bits, clip_to_one=clip_to_one)
        if ctx.nonfinite is not None:
            ctx.nonfinite.add_(~finite)
        return y.to(g.dtype), None, None, None, None


def shift_gate(x: Tensor, bits: int = 8, *, clip_to_one: bool = False, nonfinite: Tensor | None = None) -> Tensor:
    """x unchanged; its gradient is :func:`shift_quantize` of the incoming one, summed over all consumers.

    Args:
        x: any shape, float.
        bits, clip_to_one: as there.
        nonfinite: integer 0-dim tensor on the device of x, counts the gradients that were not finite.
    """
    code_limit(bits, "shift_gate")
    return _apply(x, bits, False, clip_to_one, nonfinite)


def flag_gate(x: Tensor, bits: int = 8, *, nonfinite: Tensor | None = None) -> Tensor:
    """x unchanged; its gradient is :func:`flag_quantize` of the incoming one.

    Args:
        x, bits, nonfinite: as of :func:`shift_gate`.
    """
    code_limit(bits, "flag_gate")
    return _apply(x, bits, True, False, nonfinite)


def _apply(*args: Any) -> Tensor:
    return _Gate.apply(*args)  # type: ignore[no-untyped-call, no-any-return]  # torch leaves it untyped
