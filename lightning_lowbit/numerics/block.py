"""Integer payloads with one power-of-two exponent per tensor: width, rounding shift, common exponent.

Value = payload * 2**exponent (NITI, arXiv 2009.13108; sections 2 to 4 of its specification). Everything here runs
on the tensor's device and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor

__all__ = ["MAX_SHIFT", "NARROW_ROOM", "WIDE_ROOM", "ShiftRounding", "align", "align_all", "bit_width", "shift_round"]

MAX_SHIFT = 62
"""A larger shift gives 0."""
NARROW_ROOM = 22  # 2^7 << 22 = 2^29: four such terms add up within int32
WIDE_ROOM = 30  # 2^31 << 30 = 2^61: two such terms add up within int64


class ShiftRounding(StrEnum):
    """What the bits dropped by a shift do to the magnitude; negative numbers mirror positive ones.

    HALF_AWAY is NITI's RoundShift, PSEUDO_STOCHASTIC its PstoShift (the low dropped bits are the random number
    for the high ones), STOCHASTIC its StoShift.
    """

    HALF_AWAY = "half_away"
    PSEUDO_STOCHASTIC = "pseudo_stochastic"
    STOCHASTIC = "stochastic"


def bit_width(x: Tensor) -> Tensor:
    """Smallest bw >= 0 with max|x| <= 2**bw, exact; 0 where x is empty or all zero (NITI, range estimate).

    Args:
        x: integers of any dtype, or float32 / float64 that hold integers below 2**63; any shape.
    Returns:
        int32, 0-dim, on x's device.

    >>> peaks = (0, 1, 2, 3, 4, 5, 127, 128, 129, 2**24 + 1, -(2**31))
    >>> [bit_width(torch.tensor([0, peak])).item() for peak in peaks]
    [0, 0, 1, 2, 2, 3, 7, 7, 8, 25, 31]
    """
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.int32, device=x.device)
    low, high = x.detach().amin().to(torch.int64), x.detach().amax().to(torch.int64)
    # |x| - 1 is ~x for a negative x: nothing overflows, and its bit length is the answer.
    below = torch.maximum(high.clamp(min=1) - 1, ~low.clamp(max=-1))
    places = torch.arange(63, device=x.device)
    return ((below >> places) > 0).sum().to(torch.int32)


def shift_round(x: Tensor, shift: int | Tensor, rounding: ShiftRounding | str, noise: Tensor | None = None) -> Tensor:
    """Divide integers by 2**shift, rounding the magnitude; the result is not clipped (NITI, shift and round).

    With s = shift, a = |x|, q = a >> s and the dropped bits f = a & (2^s - 1), the result is sign(x) * (q + up):

        =================  ==========================================================================
        HALF_AWAY          up = f >= 2^(s-1)
        PSEUDO_STOCHASTIC  h = s // 2; up = (f >> h) > (f & (2^h - 1)) * (2 if s is odd else 1)
        STOCHASTIC         up = f > r, r a uniform integer in [0, 2^s)
        =================  ==========================================================================

    PSEUDO_STOCHASTIC at s = 1 is HALF_AWAY. Over uniform f it goes up with probability 1/2 for odd s and
    (1 - 2^(-s/2)) / 2 for even s, where (1 - 2^-s) / 2 would be unbiased.

    Args:
        x: integer tensor, |x| below 2**63, any shape.
        shift: int, or integer 0-dim tensor; below 1 nothing happens (never a left shift), above ``MAX_SHIFT`` all
            becomes 0.
        noise: STOCHASTIC only, integers of x's shape. Its low ``shift`` bits are r, so that a uniform integer in
            [0, 2^s) acts as it is. int32 noise counts as 31 random bits, int64 as 62: for a larger shift the lowest
            dropped bits of x are not compared.
    Returns:
        x's dtype and shape.

    >>> x = torch.tensor([-7, -6, -5, -3, -2, -1, 0, 1, 2, 3, 5, 6, 7])
    >>> for shift in (0, 1, 2, 40):
    ...     print(shift, shift_round(x, shift, "half_away").tolist())
    0 [-7, -6, -5, -3, -2, -1, 0, 1, 2, 3, 5, 6, 7]
    1 [-4, -3, -3, -2, -1, -1, 0, 1, 1, 2, 3, 3, 4]
    2 [-2, -2, -1, -1, -1, 0, 0, 0, 1, 1, 1, 2, 2]
    40 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    >>> for shift in (0, 1, 2, 40):  # at 2 a fraction of 1/2 goes up and 3/4 goes down
    ...     print(shift, shift_round(x, shift, "pseudo_stochastic").tolist())
    0 [-7, -6, -5, -3, -2, -1, 0, 1, 2, 3, 5, 6, 7]
    1 [-4, -3, -3, -2, -1, -1, 0, 1, 1, 2, 3, 3, 4]
    2 [-1, -2, -1, 0, -1, 0, 0, 0, 1, 0, 1, 2, 1]
    40 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    >>> x = torch.tensor([-7, -6, -5, -4, 4, 5, 6, 7])
    >>> for r in range(4):
    ...     print(r, shift_round(x, 2, "stochastic", torch.full_like(x, r)).tolist())
    0 [-2, -2, -2, -1, 1, 2, 2, 2]
    1 [-2, -2, -1, -1, 1, 1, 2, 2]
    2 [-2, -1, -1, -1, 1, 1, 1, 2]
    3 [-1, -1, -1, -1, 1, 1, 1, 1]
    """
    s = torch.as_tensor(shift, device=x.device).to(torch.int64)
    lost = s > MAX_SHIFT
    s = s.clamp(0, MAX_SHIFT)
    one = torch.ones_like(s)
    a = x.to(torch.int64).abs()
    q, f = a >> s, a & ((one << s) - 1)
    rounding = ShiftRounding(rounding)
    if rounding is ShiftRounding.HALF_AWAY:
        up = (s > 0) & (f >= one << (s - 1).clamp(min=0))
    elif rounding is ShiftRounding.PSEUDO_STOCHASTIC:
        h = s >> 1
        up = (f >> h) > ((f & ((one << h) - 1)) << (s & 1))
    else:
        if noise is None:
            raise TypeError("shift_round: got no noise for stochastic rounding; pass integers of x's shape.")
        bits = 31 if noise.dtype == torch.int32 else MAX_SHIFT
        r = noise.to(torch.int64) & ((one << s.clamp(max=bits)) - 1)
        up = (f >> (s - bits).clamp(min=0)) > r
    magnitude = torch.where(lost, 0, q + up.to(torch.int64))
    return (x.sign() * magnitude).to(x.dtype)


def align(a: Tensor, exponent_a: int | Tensor, b: Tensor, exponent_b: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring two integer payloads to one exponent: the two-tensor form of :func:`align_all`.

    >>> a, b, exponent = align(torch.tensor([3], dtype=torch.int8), -2, torch.tensor([5], dtype=torch.int8), 1)
    >>> a.tolist(), b.tolist(), exponent.item(), a.dtype
    ([3], [40], -2, torch.int32)
    >>> a, b, exponent = align(torch.tensor([64], dtype=torch.int8), -7, torch.tensor([1], dtype=torch.int8), 22)
    >>> a.tolist(), b.tolist(), exponent.item()  # 29 apart: the finer payload gives up 7 bits, half away
    ([1], [4194304], 0)
    """
    (a, b), exponent = align_all((a, b), (exponent_a, exponent_b))
    return a, b, exponent


def align_all(payloads: Sequence[Tensor], exponents: Sequence[int | Tensor]) -> tuple[list[Tensor], Tensor]:
    """Bring integer payloads to one exponent e = max(least exponent, greatest exponent - room).

    A payload with a greater exponent is shifted left, exactly; one with a lesser exponent, which exists only where
    the exponents lie more than ``room`` apart, is shifted right, half away. The rule reads no payload, so that
    processes that hold parts of one batch agree.

        =============================  =====  =================================  ======  ======================
        payloads                       room   bound on a payload                 result  sum that cannot overflow
        =============================  =====  =================================  ======  ======================
        all int8                       22     128                                int32   of 4
        any wider (sums of payloads)   30     2^31                               int64   of 2; of n below 2^32/n
        =============================  =====  =================================  ======  ======================

    Args:
        payloads: integer tensors, not empty; shapes may differ.
        exponents: one int or integer 0-dim tensor each.
    Returns:
        the payloads, int32 or int64, and their exponent, int32 0-dim.
    """
    narrow = all(payload.dtype == torch.int8 for payload in payloads)
    word, room = (torch.int32, NARROW_ROOM) if narrow else (torch.int64, WIDE_ROOM)
    device = payloads[0].device
    each = torch.stack([torch.as_tensor(exponent, device=device).to(torch.int64) for exponent in exponents])
    common = torch.maximum(each.amin(), each.amax() - room)
    left = (each - common).clamp(min=0).to(word)
    aligned = [
        shift_round(payload.to(word) << left[i], common - each[i], ShiftRounding.HALF_AWAY)
        for i, payload in enumerate(payloads)
    ]
    return aligned, common.to(torch.int32)
