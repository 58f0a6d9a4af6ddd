"""What the published NITI code does where the package does otherwise: for the golden vectors only."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_lowbit.numerics.block import ShiftRounding, shift_round


def float_bit_width(x: Tensor) -> Tensor:
    """ceil(log2(max|x|)) through a float32 log2, which cannot tell 2^k from what is just above it for k > 20.

    Computed in float64 and rounded, so that it does not depend on a platform's float32 log2.
    """
    largest = np.float64(np.float32(x.abs().max().item()))
    return torch.tensor(0 if largest == 0 else int(np.ceil(np.float32(np.log2(largest)))))


def wrapped(acc: Tensor) -> Tensor:
    """The bare cast of accumulators that need no shift: +128 becomes -128."""
    return acc.to(torch.int8)


def legacy_shift(shift: Tensor) -> Tensor:
    """In 2020 a shift of 1 became 2, so that the pseudo-random bit exists."""
    return torch.where(shift == 1, torch.full_like(shift, 2), shift)


def true_division_wide_error(logits: Tensor, exponent: int, target: Tensor) -> Tensor:
    """The 2021 loss before its final shift: the integer one's divisions became float32 divisions.

    Truncation is left in two places: x where its sum is taken, and P where it is cast and where S is.
    """
    a = logits.to(torch.int64)
    if exponent > -7:
        z = (a * 47274).float() / 2**15
        z = z * 2.0**exponent if exponent >= 0 else z / 2.0**-exponent
        z = (z - (z.amax(1, keepdim=True) - 10)).clamp(min=0)
        x = torch.pow(torch.tensor(2.0), z) - 1
    else:
        x = 2 ** (1 - 2 * exponent) + a * 2 ** (1 - exponent) + a * a
    # Integers times 2^11 before they turn float32: the products wrap in int64 only below -25.
    p = (x * 2**11).float() / x.sum(1, dtype=torch.int64).float()[:, None]
    p[torch.arange(len(p)), target] -= p.sum(1, dtype=torch.int64).float()
    return p.to(torch.int32)


def true_division_error(logits: Tensor, exponent: int, target: Tensor, noise: Tensor) -> Tensor:
    """The 2021 loss: the int8 error."""
    wide = true_division_wide_error(logits, exponent, target)
    return shift_round(wide, 4, ShiftRounding.STOCHASTIC, noise).clamp(-127, 127).to(torch.int8)
