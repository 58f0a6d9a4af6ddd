"""Rounding to integers, by value, by shift and by division; ties are named, never left to an operator."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

__all__ = ["Rounding", "divide_rounded", "round_to", "saturate", "shift_right_rounded"]

_MAX_SHIFT = 62


class Rounding(StrEnum):
    """What happens to a value between two integers.

    HALF_EVEN and HALF_UP are the published and the plain-hardware rule; DPU is half-even for positive and
    half-up for negative values, as the Vitis AI accelerator does; HALF_AWAY is C's ``round``; FLOOR is a bare
    arithmetic shift, TRUNCATE C's integer division.
    """

    HALF_EVEN = "half_even"
    HALF_UP = "half_up"
    HALF_AWAY = "half_away"
    DPU = "dpu"
    FLOOR = "floor"
    TRUNCATE = "truncate"


def round_to(x: Tensor, rounding: Rounding | str = Rounding.HALF_EVEN) -> Tensor:
    """Round a float tensor to integer values, same dtype and shape; inf and NaN pass.

    >>> x = torch.tensor([-2.5, -1.5, -1.2, -0.5, 0.0, 0.49999997, 0.5, 1.5, 2.5, 8388609.0])
    >>> for rounding in Rounding:
    ...     print(f"{rounding.value:9}", [int(v) for v in round_to(x, rounding)])
    half_even [-2, -2, -1, 0, 0, 0, 0, 2, 2, 8388609]
    half_up   [-2, -1, -1, 0, 0, 0, 1, 2, 3, 8388609]
    half_away [-3, -2, -1, -1, 0, 0, 1, 2, 3, 8388609]
    dpu       [-2, -1, -1, 0, 0, 0, 0, 2, 2, 8388609]
    floor     [-3, -2, -2, -1, 0, 0, 0, 1, 2, 8388609]
    truncate  [-2, -1, -1, 0, 0, 0, 0, 1, 2, 8388609]
    """
    rounding = Rounding(rounding)
    if rounding is Rounding.HALF_EVEN:
        return torch.round(x)
    if rounding is Rounding.FLOOR:
        return torch.floor(x)
    if rounding is Rounding.TRUNCATE:
        return torch.trunc(x)
    if rounding is Rounding.HALF_UP:
        return _half_up(x)
    if rounding is Rounding.HALF_AWAY:
        return torch.copysign(_half_up(x.abs()), x)
    return torch.where(x < 0, _half_up(x), torch.round(x))


def _half_up(x: Tensor) -> Tensor:
    # Not floor(x + 0.5): that sum rounds, so 0.49999997 becomes 1 and odd values above 2^23 move.
    floor = torch.floor(x)
    return floor + (x - floor >= 0.5).to(x.dtype)


def shift_right_rounded(acc: Tensor, shift: int | Tensor, rounding: Rounding | str = Rounding.HALF_EVEN) -> Tensor:
    """Divide integers by 2**shift, rounding as asked; a negative shift multiplies.

    Nothing is added before the shift, so a right shift never overflows: any int32 (or narrower) acc, and
    int64 with |acc| < 2**61. A left shift is exact while the result fits acc's dtype. |shift| above 62 acts
    as 62.

    Args:
        acc: integer tensor, any shape.
        shift: int, or integer tensor that broadcasts against acc (one per channel, or 0-dim on the device).
        rounding: the rule, by name or member.

    Returns:
        acc's dtype, broadcast shape.

    >>> acc = torch.tensor([-2**31, -5, -3, -2, -1, 0, 1, 2, 3, 5, 2**31 - 1], dtype=torch.int32)
    >>> for rounding in Rounding:
    ...     print(f"{rounding.value:9}", shift_right_rounded(acc, 1, rounding).tolist())
    half_even [-1073741824, -2, -2, -1, 0, 0, 0, 1, 2, 2, 1073741824]
    half_up   [-1073741824, -2, -1, -1, 0, 0, 1, 1, 2, 3, 1073741824]
    half_away [-1073741824, -3, -2, -1, -1, 0, 1, 1, 2, 3, 1073741824]
    dpu       [-1073741824, -2, -1, -1, 0, 0, 0, 1, 2, 2, 1073741824]
    floor     [-1073741824, -3, -2, -1, -1, 0, 0, 1, 1, 2, 1073741823]
    truncate  [-1073741824, -2, -1, -1, 0, 0, 0, 1, 1, 2, 1073741823]
    >>> shift_right_rounded(torch.tensor([-3, 3]), torch.tensor([-2, 40])).tolist()
    [-12, 0]
    """
    _require_integers(acc, "shift_right_rounded")
    v = acc.to(torch.int64)
    n = torch.as_tensor(shift, device=acc.device).to(torch.int64).clamp(-_MAX_SHIFT, _MAX_SHIFT)
    one = torch.ones_like(n)
    right = n.clamp(min=0)
    q = v >> right  # arithmetic: the floor
    rest = v - (q << right)  # 0 <= rest < 2^right
    half = torch.where(n > 0, one << (right - 1).clamp(min=0), one)  # n = 0: rest is 0, half is never reached
    q = q + _round_up(q, v < 0, rest > half, rest == half, rest > 0, Rounding(rounding))
    return (q << (-n).clamp(min=0)).to(acc.dtype)


def divide_rounded(num: Tensor, den: int | Tensor, rounding: Rounding | str = Rounding.HALF_EVEN) -> Tensor:
    """Divide integers by a positive integer, rounding as asked; exact for every int64 num and den > 0.

    Args:
        num: integer tensor, any shape.
        den: positive int, or integer tensor that broadcasts against num. A tensor is not checked (no sync).
        rounding: the rule, by name or member.

    Returns:
        num's dtype, broadcast shape.

    Raises:
        ZeroDivisionError: den is an int below 1.

    >>> num = torch.tensor([-9, -6, -5, -3, -1, 0, 1, 3, 5, 6, 9])
    >>> for rounding in Rounding:
    ...     print(f"{rounding.value:9}", divide_rounded(num, 6, rounding).tolist())
    half_even [-2, -1, -1, 0, 0, 0, 0, 0, 1, 1, 2]
    half_up   [-1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 2]
    half_away [-2, -1, -1, -1, 0, 0, 0, 1, 1, 1, 2]
    dpu       [-1, -1, -1, 0, 0, 0, 0, 0, 1, 1, 2]
    floor     [-2, -1, -1, -1, -1, 0, 0, 0, 0, 1, 1]
    truncate  [-1, -1, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    """
    _require_integers(num, "divide_rounded")
    if isinstance(den, int) and den < 1:
        raise ZeroDivisionError(f"divide_rounded: got den {den}, expected an integer >= 1; move the sign to num.")
    v = num.to(torch.int64)
    d = torch.as_tensor(den, device=num.device).to(torch.int64)
    q = torch.div(v, d, rounding_mode="floor")
    rest = v - q * d  # 0 <= rest < d
    other = d - rest  # compared instead of 2 * rest, which could overflow
    return (q + _round_up(q, v < 0, rest > other, rest == other, rest > 0, Rounding(rounding))).to(num.dtype)


def _round_up(
    floor: Tensor, negative: Tensor, above: Tensor, tie: Tensor, inexact: Tensor, rounding: Rounding
) -> Tensor:
    """1 where the floor must go up by one, else 0; ``above`` and ``tie`` compare the rest with a half."""
    if rounding is Rounding.FLOOR:
        up = torch.zeros_like(above)
    elif rounding is Rounding.TRUNCATE:
        up = negative & inexact
    elif rounding is Rounding.HALF_UP:
        up = above | tie
    elif rounding is Rounding.HALF_AWAY:
        up = above | (tie & ~negative)
    elif rounding is Rounding.DPU:
        up = above | (tie & (negative | (floor & 1).bool()))
    else:
        up = above | (tie & (floor & 1).bool())
    return up.to(torch.int64)


def saturate(x: Tensor, qmin: int | Tensor, qmax: int | Tensor) -> Tensor:
    """Clip to [qmin, qmax], two numbers or two tensors, same dtype; NaN passes.

    >>> saturate(torch.tensor([-129, -128, 0, 127, 128]), -128, 127).tolist()
    [-128, -128, 0, 127, 127]
    """
    return torch.clamp(x, qmin, qmax)  # type: ignore[arg-type]  # stubs allow numbers or tensors, not a mix


def _require_integers(x: Tensor, where: str) -> None:
    if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
        raise TypeError(f"{where}: got dtype {x.dtype}, expected an integer tensor; use round_to for floats.")
