"""A straight line, rounded and clipped, as integers that round alike wherever it is asked."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["MOST_BITS", "integer_affine"]

MOST_BITS = 44  # fraction bits at most: with a slope of 2^8 and inputs of 2^7 sums stay below 2^61


def integer_affine(x: Tensor, codes: Tensor, slope: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, int] | None:
    """m, b and the least s with clip(round((m x + b) / 2^s), -127, 127) = ``codes``, ties away from zero.

    Args:
        x: the inputs that there are, int64 [n], consecutive, within +-128.
        codes: what becomes of them, int64 [n, channels], of the line below.
        slope, offset: float64 [channels]; a code is a rounded slope * x + offset.
    Returns:
        m and b, int64 [channels], and s; None where no integers of 2^61 do.

    >>> x = torch.arange(-3, 4)
    >>> slope, offset = torch.tensor([0.1, -1e30]).double(), torch.tensor([0.25, 1e30]).double()
    >>> y = x[:, None] * slope + offset
    >>> codes = (y.sign() * (y.abs() + 0.5).floor()).clamp(-127, 127).long()
    >>> m, b, s = integer_affine(x, codes, slope, offset)
    >>> m.tolist(), b.tolist(), s
    ([1, -2048], [1, 2048], 3)
    """
    constant, steep = (codes == codes[0]).all(0), slope.abs() > 256
    # Of a steep line at most one code lies between the ends: it is pinned there, and 256 a step leave the ends.
    pinned = codes.abs().min(0)
    change = (codes != codes[0]).int().argmax(0)
    place = torch.where(pinned.values < 127, pinned.indices, change)
    at, here = codes.gather(0, place[None])[0], x[place]
    slope, offset = torch.where(constant, 0.0, slope).clamp(-256, 256), torch.where(constant | steep, 0.0, offset)
    for s in range(MOST_BITS + 1):
        m = torch.round(slope * 2.0**s).to(torch.int64)
        b = torch.where(constant | steep, (at << s) - m * here, torch.round(offset * 2.0**s).to(torch.int64))
        open_ = torch.ones_like(constant)
        for more in itertools.product((0, 1, -1), repeat=2):  # a tie may lie beside what rounds nearest
            tried_m, tried_b = m[open_] + more[0], b[open_] + more[1]
            fits = (_rounded(x[:, None] * tried_m + tried_b, s) == codes[:, open_]).all(0)
            found = open_.nonzero()[fits, 0]
            m[found], b[found], open_[found] = tried_m[fits], tried_b[fits], False
            if not bool(open_.any()):
                return m, b, s
    return None


def _rounded(acc: Tensor, s: int) -> Tensor:
    half = (1 << s) >> 1
    return (acc.sign() * ((acc.abs() + half) >> s)).clamp(-127, 127)
