"""When is a float32 sum of integer products the integer sum itself? Bounds from the actual weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["FLOAT32_EXACT", "FLOAT64_EXACT", "accumulator_bound", "float_sums_exact", "quotients_exact"]

FLOAT32_EXACT = 2**24
"""float32 represents every integer up to this magnitude."""
FLOAT64_EXACT = 2**53
"""float64 does up to this one."""


def accumulator_bound(
    weight_int: Tensor, x_max: float | Tensor, bias_int: Tensor | None = None, out_axis: int = 0
) -> float:
    """Largest magnitude that any accumulator of a linear or convolution layer can reach.

    bound = max over outputs o of  sum_i |w[o, i]| * max|x|  +  |b[o]|

    Args:
        weight_int: weight codes, any numeric dtype, any shape.
        x_max: largest |code| of the input: a number, or a tensor that broadcasts against weight_int (for
            example one value per input channel).
        bias_int: bias codes on the accumulator's grid, one per output, or None.
        out_axis: axis of weight_int that counts outputs: 0 for Linear and Conv, 1 for ConvTranspose with one
            group (with more, view the weight as [in/groups, groups * out/groups, ...] first).

    Returns:
        The bound in units of one accumulator code; NaN if a weight is NaN.

    >>> accumulator_bound(torch.tensor([[1, -2], [3, 4]]), 127, torch.tensor([-500, 10]))
    899.0
    """
    products = (
        weight_int.detach().to(torch.float64).abs()
        * torch.as_tensor(x_max, dtype=torch.float64, device=weight_int.device).abs()
    )
    if products.numel() == 0:
        return float(bias_int.abs().max()) if bias_int is not None and bias_int.numel() else 0.0
    sums = products.movedim(out_axis, 0).flatten(1).sum(1) if products.dim() > 1 else products
    if bias_int is not None:
        sums = sums + bias_int.detach().to(torch.float64).abs()
    return float(sums.max())


def float_sums_exact(
    weight_int: Tensor, x_max: float | Tensor, bias_int: Tensor | None = None, out_axis: int = 0, groups: int = 1
) -> bool:
    """Whether the layer computed in float32 on codes (or on codes times powers of two) is exact.

    The argument: every product and every partial sum, in whatever order and blocking a library adds them,
    fused or not, is an integer of magnitude at most ``accumulator_bound``. Below 2^24 float32 represents each
    of them, so no operation rounds and the order cannot matter. A common power-of-two factor moves only
    exponents. This covers direct and im2col convolution. Winograd and FFT transforms leave the integers and
    are not covered; TF32 keeps 11 significant bits of each operand, enough for codes of at most 11 bits.

    Args:
        weight_int, x_max, bias_int, out_axis: as of :func:`accumulator_bound`.
        groups: of a transposed convolution, whose outputs stand on axis 1 group by group.

    >>> w = torch.full((1, 600), 127)
    >>> float_sums_exact(w, 127), float_sums_exact(w, 255)
    (True, False)
    """
    if out_axis == 1 and groups > 1:  # a transposed convolution: one group after the other holds its own outputs
        weight_int = weight_int.reshape(groups, -1, *weight_int.shape[1:]).transpose(1, 2).flatten(0, 1)
        out_axis = 0
    return accumulator_bound(weight_int, x_max, bias_int, out_axis) < FLOAT32_EXACT


def quotients_exact(count: Any, shift: int, bits: int, digits: int = 53) -> bool:
    """Whether sum / count, rounded to a float and then to a code, is the exact quotient rounded once.

    In units of a code, sum / (count 2^shift) is a tie or at least 1 / (count 2^(shift+1)) from one; a float of
    ``digits`` binary digits up to 2^bits errs by less than 2^(bits-digits), and holds every tie.

    Args:
        count: how many values; an integer, or an array where windows differ.
        shift: log2 of the codes of the sum in one code of the result.
        bits: of a code.
        digits: of the float: 53, or 24 of float32.

    >>> quotients_exact(49, 8, 8, 24), quotients_exact(49, 10, 8, 24), quotients_exact(49, 30, 8)
    (True, False, True)
    """
    largest = int(count if isinstance(count, int) else count.max())
    return largest << max(shift, 0) < 1 << max(digits - 1 - bits, 0)
