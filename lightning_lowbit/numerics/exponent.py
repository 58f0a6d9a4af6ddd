"""Exact powers of two: no ``pow`` or ``log`` of the platform decides what a scale is."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "EXPONENT_MAX",
    "EXPONENT_MIN",
    "LOG2_T_MIN",
    "ceil2",
    "ceil_log2",
    "clamp_exponent",
    "log2_threshold",
    "pow2",
    "whole_pow2",
]

EXPONENT_MIN = -149
"""2^-149 is the smallest positive float32: below it a step of the grid cannot be represented."""
EXPONENT_MAX = 120
"""int8 codes times 2^120 stay finite in float32, and so do sums of two of them."""
LOG2_T_MIN = -24
"""Thresholds below 2^-24 are raised to it when log2_t is set (TQT, sec. 3.3 initialization)."""


def clamp_exponent(exponent: Tensor) -> Tensor:
    """Clamp to the exponents whose int8 carriers are exact in float32; same dtype and shape.

    >>> clamp_exponent(torch.tensor([-200, -149, 0, 120, 121])).tolist()
    [-149, -149, 0, 120, 120]
    """
    return exponent.clamp(EXPONENT_MIN, EXPONENT_MAX)


def pow2(exponent: Tensor | int, dtype: torch.dtype = torch.float32) -> Tensor:
    """2**exponent, exact, built from its bits; underflows to 0 and overflows to inf as IEEE does.

    Args:
        exponent: integers, or floats with integer values (a buffer that averaging may touch); any shape.
        dtype: torch.float32 or torch.float64.

    >>> pow2(torch.tensor([-150, -149, -126, -1, 0, 127, 128])).tolist()
    [0.0, 1.401298464324817e-45, 1.1754943508222875e-38, 0.5, 1.0, 1.7014118346046923e+38, inf]
    >>> pow2(-1074, torch.float64).item() == 2.0**-1074
    True
    """
    if dtype == torch.float32:
        mantissa_bits, bias, word = 23, 127, torch.int32
    elif dtype == torch.float64:
        mantissa_bits, bias, word = 52, 1023, torch.int64
    else:
        raise TypeError(f"pow2: got dtype {dtype}, expected torch.float32 or torch.float64; convert the result.")
    # Bits, not torch.ldexp or pow: ldexp multiplies by pow(2, e), which flushes subnormals on some devices.
    e = torch.as_tensor(exponent).to(word)
    biased = (e + bias).clamp(0, 2 * bias + 1)
    normal = biased << mantissa_bits
    place = (e + bias + mantissa_bits - 1).clamp(-1, mantissa_bits)
    subnormal = torch.where(place < 0, torch.zeros_like(e), torch.ones_like(e) << place.clamp(min=0))
    return torch.where(biased > 0, normal, subnormal).view(dtype)


def whole_pow2(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """The same, in a compiled graph as one call: fused, its dozen operations are repeated for every element scaled.

    Args:
        exponent, dtype: as of :func:`pow2`.
    """
    if not torch.compiler.is_compiling():
        return pow2(exponent, dtype)
    result: Tensor = torch.ops.lightning_lowbit.pow2(exponent.detach(), dtype == torch.float64)
    return result


def _pow2(exponent: Tensor, double: bool) -> Tensor:
    return pow2(exponent, torch.float64 if double else torch.float32)


_operator = torch.library.custom_op(
    "lightning_lowbit::pow2", _pow2, mutates_args=(), schema="(Tensor exponent, bool double) -> Tensor"
)


@_operator.register_fake
def _shape(exponent: Tensor, double: bool) -> Tensor:
    return torch.empty_like(exponent, dtype=torch.float64 if double else torch.float32)


def ceil_log2(t: Tensor) -> Tensor:
    """Smallest integer k with 2**k >= t, exact; int32, same shape.

    Where t <= 0 there is none: EXPONENT_MIN. Where t is inf or NaN: 128, the first exponent beyond float32.

    >>> ceil_log2(torch.tensor([0.0, 2.0**-149, 0.49, 0.5, 0.51, 1.0, 8.0, 8.000001, float("inf")])).tolist()
    [-149, -149, -1, -1, 0, 0, 3, 4, 128]
    """
    t = t.detach()
    if t.dtype != torch.float64:
        t = t.to(torch.float64)  # float32 subnormals are normal here: frexp never meets one
    mantissa, exponent = torch.frexp(t)  # t = mantissa * 2^exponent, 0.5 <= mantissa < 1
    k = exponent - (mantissa == 0.5).to(exponent.dtype)
    k = torch.where(t > 0, k, torch.full_like(k, EXPONENT_MIN))
    return torch.where(torch.isfinite(t), k, torch.full_like(k, 128)).to(torch.int32)


def ceil2(v: Tensor) -> Tensor:
    """2^ceil(log2 v) of positive normal numbers, at most 2^127: exact, from their bits; v's dtype and shape.

    A fifth of the operations of an exponent and back. inf and NaN give NaN.

    >>> ceil2(torch.tensor([4.0, 4.0000005, 7.9, 3e38, float("inf"), float("nan")])).log2().tolist()
    [2.0, 3.0, 3.0, 127.0, nan, nan]
    """
    word, mantissa = (torch.int64, 52) if v.dtype == torch.float64 else (torch.int32, 23)
    bits = v.clamp(max=2.0**127).view(word) + ((1 << mantissa) - 1)  # any bit of the mantissa carries
    return (bits >> mantissa << mantissa).view(v.dtype) + 0 * v


def log2_threshold(t: Tensor) -> Tensor:
    """log2(max(t, 2^-24)) as float32, such that ``ceil`` of it is exactly ``ceil_log2`` of the raised t.

    A float32 log2 of 8 may come out as 3.0000002, whose ceil doubles the step; and the log2 of a value just
    above 2^20 rounds down to 20, whose ceil clips it. Both sides are pinned here.

    >>> log2_threshold(torch.tensor([0.0, 2.0**-24, 0.75, 1.0, 8.0])).tolist()
    [-24.0, -24.0, -0.41503751277923584, 0.0, 3.0]
    >>> float(torch.ceil(log2_threshold(torch.tensor(2.0**20 * (1 + 2.0**-23)))))
    21.0
    """
    t = t.detach().to(torch.float64).clamp(min=2.0**LOG2_T_MIN)
    k = ceil_log2(t).to(torch.float32)
    above = torch.nextafter(k - 1, k)  # the least float32 whose ceil is k
    log2_t = torch.log2(t).to(torch.float32)
    return torch.where(pow2(k, torch.float64) == t, k, log2_t.clamp(min=above, max=k))
