"""Quantizers of what flows back: the value of a tensor unchanged, its gradient on a grid (WAGEUBN, errors E1, E2)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from lightning_lowbit.numerics.flag import flag_quantize
from lightning_lowbit.numerics.shift import code_limit, shift_quantize
from lightning_lowbit.numerics.ste import gate_backward

__all__ = ["flag_gate", "shift_gate"]


def shift_gate(x: Tensor, bits: int = 8, *, clip_to_one: bool = False, nonfinite: Tensor | None = None) -> Tensor:
    """x unchanged; its gradient is :func:`shift_quantize` of the incoming one, summed over all consumers.

    Args:
        x: any shape, float.
        bits, clip_to_one: as there.
        nonfinite: integer 0-dim tensor on the device of x, counts the gradients that were not finite.
    """
    code_limit(bits, "shift_gate")
    return gate_backward(x, partial(_shifted, bits=bits, clip_to_one=clip_to_one, nonfinite=nonfinite))


def flag_gate(x: Tensor, bits: int = 8, *, nonfinite: Tensor | None = None) -> Tensor:
    """x unchanged; its gradient is :func:`flag_quantize` of the incoming one.

    Args:
        x, bits, nonfinite: as of :func:`shift_gate`.
    """
    code_limit(bits, "flag_gate")
    return gate_backward(x, partial(_flagged, bits=bits, nonfinite=nonfinite))


def _shifted(g: Tensor, bits: int, clip_to_one: bool, nonfinite: Tensor | None) -> Tensor:
    return _counted(*shift_quantize(g, bits, clip_to_one=clip_to_one), nonfinite).to(g.dtype)


def _flagged(g: Tensor, bits: int, nonfinite: Tensor | None) -> Tensor:
    return _counted(*flag_quantize(g, bits), nonfinite).to(g.dtype)


def _counted(y: Tensor, finite: Tensor, nonfinite: Tensor | None) -> Tensor:
    if nonfinite is not None:
        nonfinite.add_(~finite)
    return y
