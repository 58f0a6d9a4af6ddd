"""How large the integers of a program become: behind roundings, and in batch norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_lowbit.errors import InvariantError
from lightning_lowbit.export.program_check import MOST
from lightning_lowbit.numerics.rounding import Rounding

if TYPE_CHECKING:
    from lightning_lowbit.export.builder import Held

__all__ = ["DEVICE_KINDS", "bounds_after", "normalize_bounds", "round_fraction"]

DEVICE_KINDS = (Rounding.HALF_EVEN, Rounding.HALF_UP, Rounding.HALF_AWAY, Rounding.FLOOR, Rounding.TRUNCATE)
Array = np.ndarray[Any, Any]


def round_fraction(v: Fraction, rounding: Rounding) -> int:
    """One rational rounded, by one of the rules that devices have.

    >>> [round_fraction(Fraction(5, 2), kind) for kind in DEVICE_KINDS]
    [2, 3, 3, 2, 2]
    """
    floor = v.numerator // v.denominator
    rest = v - floor
    if rounding is Rounding.FLOOR or rest == 0:
        return floor
    if rounding is Rounding.TRUNCATE:
        return floor + int(v < 0)
    if rest != Fraction(1, 2):
        return floor + int(rest > Fraction(1, 2))
    up = {Rounding.HALF_UP: True, Rounding.HALF_AWAY: v > 0, Rounding.HALF_EVEN: floor % 2 == 1}
    return floor + int(up[rounding])


def bounds_after(x: Held, shifts: Sequence[int], low: int | None, high: int | None) -> tuple[int, int]:
    """Bounds behind a shift, a division and a clip."""
    counts = [1] if x.count is None else np.unique(x.count).tolist()
    ends = [
        (Fraction(x.low) / c / Fraction(2) ** s, Fraction(x.high) / c / Fraction(2) ** s)
        for s in shifts
        for c in counts
    ]
    least = min(a.numerator // a.denominator for a, _ in ends)
    most = max(-(-b.numerator // b.denominator) for _, b in ends)
    least, most = (max(least, low), max(most, low)) if low is not None else (least, most)
    return (min(least, high), min(most, high)) if high is not None else (least, most)


def normalize_bounds(x: Held, attributes: Mapping[str, Any], constants: Mapping[str, Array]) -> tuple[int, int]:
    """Bounds of what runtime's ``normalize`` gives and of its products; its numerators are checked on the way."""
    a = attributes
    f = max(a["fraction_in"], a["mean_fraction"])
    left = a["xhat_fraction"] + a["s_fraction"] - f
    ends = [0]
    for mean, s, gamma, beta in zip(*(constants[n].tolist() for n in ("mean", "s", "gamma", "beta")), strict=True):
        for code in (x.low, x.high):
            d = ((code << (f - a["fraction_in"])) - (mean << (f - a["mean_fraction"]))) << max(left, 0)
            if abs(d) > MOST:
                raise InvariantError(f"a batch norm's numerator can reach {d:.3g}, beyond int64.")
            xhat = round_fraction(Fraction(d, s << max(-left, 0)), Rounding.HALF_EVEN)
            if a["limit"] is not None:
                xhat = max(-a["limit"], min(a["limit"], xhat))
            product = gamma * xhat << (a["out_fraction"] - a["product_fraction"])
            ends += [product, product + beta]
    return min(ends), max(ends)
