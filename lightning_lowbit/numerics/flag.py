"""Two units for one tensor of errors: the flag form of the shift quantizer (WAGEUBN, arXiv:1909.02384).

Values from one unit S on are codes of S, smaller ones codes of S 2^-(bits-1): a bit, the flag, says which. As two
planes of int8 codes such a tensor enters integer products; nothing here waits for a device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lowbit.numerics.direct import code_dtype, put_codes
from lightning_lowbit.numerics.dtypes import wide
from lightning_lowbit.numerics.exponent import EXPONENT_MIN, whole_pow2
from lightning_lowbit.numerics.shift import code_limit, host_exponent, max_abs, measured_range
from lightning_lowbit.numerics.ste import eager_cpu, slices, ulp
from lightning_lowbit.numerics.through import pass_through

__all__ = ["FlagPlanes", "flag_planes", "flag_planes_reference", "flag_quantize", "flag_quantize_reference"]

_SLICE = 1 << 17  # elements per thread and pass: the slices of one step share the L2 cache, calls stay few
_MAGIC = 1.5 * 2.0**23  # units that, added and taken off again, leave a float32 rounded to one unit
_LEAN_EXPONENT = 96


class FlagPlanes(NamedTuple):
    """A tensor as two of codes: value = big * 2^exponent_big + small * 2^exponent_small, one of them 0.

    Args:
        big, small: codes within +-(2^(bits-1) - 1), int8 or int16; zeros where not finite.
        exponent_big, exponent_small: int32, 0-dim; bits - 1 apart.
        finite: bool, 0-dim: whether every value was.
    """

    big: Tensor
    small: Tensor
    exponent_big: Tensor
    exponent_small: Tensor
    finite: Tensor


def flag_quantize(x: Tensor, bits: int = 8, *, peak: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Two units: S = R 2^-(k-1) from S on, S 2^-(k-1) below; ties to even, gradient of the identity.

    ==========  ==============================================  with v = x / S
    |v| >= 1    S clip(round(v), -(2^(k-1) - 1), 2^(k-1) - 1)
    |v| < 1     S Q(v, k)
    ==========  ==============================================

    The least step relative to the maximum is that of 2 k - 1 bits. A tensor of zeros gives zeros. R is held where
    both units are float32 numbers: at most 2^127, at least 2^-149 2^(2 (k-1)).

    Args:
        x: float tensor of any shape and memory format; half-precision types are computed in float32.
        bits: k, 2..16.
        peak: max|x| where it is known already, or that of several ranks; 0-dim.
    Returns:
        float32 (float64 for float64 x), shape of x, and whether peak is finite, bool 0-dim; if it is not, x itself.
    Raises:
        ConfigError: bits out of range.

    >>> x = torch.tensor([1.4, 1.0, 0.375, 0.25, 0.24, 0.2, -0.03, -0.04])  # R = 1, S = 1/4
    >>> flag_quantize(x, 3)[0].tolist()
    [0.75, 0.75, 0.5, 0.25, 0.25, 0.1875, 0.0, -0.0625]
    """
    limit = code_limit(bits, "flag_quantize")
    if not eager_cpu(x):
        return flag_quantize_reference(x, bits, peak=peak)
    top = float(max_abs(x) if peak is None else peak)
    if not math.isfinite(top):
        return wide(x), torch.tensor(False)
    exponent = host_exponent(top, EXPONENT_MIN + 2 * (bits - 1)) - (bits - 1)
    if not _lean(x, exponent, bits):
        return flag_quantize_reference(x, bits, peak=torch.tensor(top, dtype=torch.float64))
    z = x.detach()
    y = torch.empty_like(z, dtype=torch.float32)
    unit = math.ldexp(1.0, exponent)
    magic_big, magic_small = unit * _MAGIC, math.ldexp(unit * _MAGIC, 1 - bits)
    edge, most = _edge(unit, bits), limit * unit
    size = _SLICE * torch.get_num_threads()
    parts = slices(z, size)
    buffer = torch.empty_like(parts[0], dtype=torch.float32)
    for z_i, y_i in zip(parts, slices(y, size), strict=True):
        big = _big_part(z_i, edge, buffer)
        torch.sub(z_i, big, out=y_i)
        y_i.add_(magic_small).sub_(magic_small)
        y_i.add_(big.clamp_(-most, most).add_(magic_big).sub_(magic_big))
    return pass_through(x, y), torch.tensor(True)


def flag_quantize_reference(x: Tensor, bits: int = 8, *, peak: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The formula of :func:`flag_quantize`, one operation per symbol: slow, obvious, on every device."""
    limit = code_limit(bits, "flag_quantize")
    exponent, finite = measured_range(x, peak, EXPONENT_MIN + 2 * (bits - 1))
    z = wide(x.detach())
    unit = whole_pow2(exponent - (bits - 1), z.dtype)
    fine = whole_pow2(exponent - 2 * (bits - 1), z.dtype)
    v = z / unit
    big = torch.round(v).clamp(-limit, limit) * unit
    y = torch.where(v.abs() >= 1, big, torch.round(z / fine) * fine)
    return pass_through(x, torch.where(finite, y, z)), finite


def flag_planes(x: Tensor, bits: int = 8, *, peak: Tensor | None = None) -> FlagPlanes:
    """:func:`flag_quantize` as two operands of integer products; the sum of their values is its value, exactly.

    ================================  ==================================  ==================
    v = x / S                         big                                 small
    ================================  ==================================  ==================
    |v| >= 1                          clip(round(v), +-(2^(k-1) - 1))     0
    1 - 2^-k <= |v| < 1               sign(v): 2^(k-1) is no small code   0
    |v| < 1 - 2^-k                    0                                   round(v 2^(k-1))
    ================================  ==================================  ==================

    Args:
        x, bits, peak: as there.
    Returns:
        FlagPlanes; int8, int16 above 8 bits, memory format of x.

    >>> planes = flag_planes(torch.tensor([1.4, 1.0, 0.375, 0.25, 0.24, 0.2, -0.03, -0.04]), 3)
    >>> planes.big.tolist(), planes.small.tolist()
    ([3, 3, 2, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 3, 0, -1])
    >>> int(planes.exponent_big), int(planes.exponent_small)
    (-2, -4)
    """
    limit = code_limit(bits, "flag_planes")
    if not eager_cpu(x):
        return flag_planes_reference(x, bits, peak=peak)
    top = float(max_abs(x) if peak is None else peak)
    exponent = host_exponent(top, EXPONENT_MIN + 2 * (bits - 1)) - (bits - 1) if math.isfinite(top) else 0
    if not math.isfinite(top) or not _lean(x, exponent, bits):
        return flag_planes_reference(x, bits, peak=torch.tensor(top, dtype=torch.float64))
    z = x.detach()
    planes = [torch.empty_like(z, dtype=code_dtype(bits)) for _ in range(2)]
    unit, scale = math.ldexp(1.0, exponent), math.ldexp(1.0, -exponent)
    edge, most, fine = _edge(unit, bits), limit * unit, math.ldexp(scale, bits - 1)
    size = _SLICE * torch.get_num_threads()
    parts = slices(z, size)
    buffer, rest = (torch.empty_like(parts[0], dtype=torch.float32) for _ in range(2))
    for z_i, big_i, small_i in zip(parts, *(slices(plane, size) for plane in planes), strict=True):
        big = _big_part(z_i, edge, buffer)
        small = torch.sub(z_i, big, out=rest if z_i.shape == rest.shape else rest[: z_i.numel()])
        put_codes(big.clamp_(-most, most), scale, big_i)
        put_codes(small, fine, small_i)
    coarse = torch.tensor(exponent, dtype=torch.int32)
    return FlagPlanes(planes[0], planes[1], coarse, coarse - (bits - 1), torch.tensor(True))


def flag_planes_reference(x: Tensor, bits: int = 8, *, peak: Tensor | None = None) -> FlagPlanes:
    """The table of :func:`flag_planes`: slow, obvious, on every device."""
    limit = code_limit(bits, "flag_planes")
    exponent, finite = measured_range(x, peak, EXPONENT_MIN + 2 * (bits - 1))
    coarse, fine = exponent - (bits - 1), exponent - 2 * (bits - 1)
    z = wide(x.detach())
    big = torch.round(z / whole_pow2(coarse, z.dtype)).clamp(-limit, limit)
    small = torch.round(z / whole_pow2(fine, z.dtype))
    fits = small.abs() <= limit
    big = torch.where(finite & ~fits, big, 0.0)
    small = torch.where(finite & fits, small, 0.0)
    return FlagPlanes(big.to(code_dtype(bits)), small.to(code_dtype(bits)), coarse, fine, finite)


def _edge(unit: float, bits: int) -> float:
    """The float32 before unit (1 - 2^-bits), from which on the large unit holds the value."""
    first = unit * (1 - 2.0**-bits)
    return first - ulp(first, torch.float32)


def _big_part(x: Tensor, edge: float, buffer: Tensor) -> Tensor:
    """x where |x| > edge, else 0: hardshrink is a vectorized comparison of eager CPU torch."""
    out = buffer if x.shape == buffer.shape else buffer[: x.numel()]
    big: Tensor = torch.ops.aten.hardshrink.out(wide(x), edge, out=out)
    return big


def _lean(x: Tensor, exponent: int, bits: int) -> bool:
    """Whether float32 passes give both units."""
    return x.dtype != torch.float64 and exponent <= _LEAN_EXPONENT and exponent - (bits - 1) >= -_LEAN_EXPONENT
