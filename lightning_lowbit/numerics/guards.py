"""When is a float32 sum of integer products the integer sum itself? Bounds from the actual weights."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FLOAT32_EXACT", "accumulator_bound", "float_sums_exact"]

FLOAT32_EXACT = 2**24
"""float32 represents every integer up to this magnitude."""


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
