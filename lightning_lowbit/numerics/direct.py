"""Fixed-point numbers with a given unit: the direct quantizer and its clipped form (WAGEUBN, arXiv:1909.02384).

``bits`` k of the direct quantizer counts the sign and the fraction, hence the unit 2^-(k-1); integer bits come on
top of it, as many as the values need. A fixed width counts all of them, and clips.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.dtypes import compute_dtype, wide
from lightning_lowbit.numerics.exponent import whole_pow2
from lightning_lowbit.numerics.fraclen import largest_code
from lightning_lowbit.numerics.ste import eager_cpu, fake_quantize, slices
from lightning_lowbit.numerics.through import pass_through

__all__ = [
    "DIRECT_OFF",
    "code_dtype",
    "direct_quantize",
    "direct_quantize_reference",
    "fixed_width_codes",
    "fixed_width_codes_reference",
    "fixed_width_values",
    "fixed_width_values_reference",
    "grid_codes",
    "rectified_values",
]

DIRECT_OFF = 32
"""From this many bits on the direct quantizer is the identity."""
_SLICE = 1 << 17  # elements per thread and pass: the slices of one step share the L2 cache, calls stay few
_MAGIC = torch.tensor(1.5 * 2.0**23)  # added to a float32 it leaves the rounded number in the low bits
_LEAN_EXPONENT = 96


def direct_quantize(x: Tensor, bits: int, *, clipped: bool = False) -> Tensor:
    """Q(x, k) = round(x 2^(k-1)) 2^-(k-1), ties to even; the gradient is that of the identity, everywhere.

    ============  =================================  =============================================
    clipped       values                             use
    ============  =================================  =============================================
    False         every multiple of 2^-(k-1)         activations, statistics, momentum, parameters
    True          those within +-(1 - 2^-(k-1))      weights: codes of k bits, +-(2^(k-1) - 1)
    ============  =================================  =============================================

    Exact at any width: a float32 too large for x 2^(k-1) to have a fraction is a multiple of the unit already.
    Unclipped, float32 magnitudes from 2^(129-k) on become inf. NaN stays NaN.

    Args:
        x: float tensor of any shape and memory format; half-precision types are computed in float32.
        bits: k, from 1, clipped from 2 on; from 32 on nothing is rounded or clipped.
    Returns:
        float32 (float64 for float64 x), shape of x.
    Raises:
        ConfigError: too few bits.

    >>> x = torch.tensor([-2.0, -1.0, -0.75, -0.125, 0.125, 0.375, 0.625, 0.9])
    >>> direct_quantize(x, 3).tolist()
    [-2.0, -1.0, -0.75, -0.0, 0.0, 0.5, 0.5, 1.0]
    >>> direct_quantize(x, 3, clipped=True).tolist()
    [-0.75, -0.75, -0.75, 0.0, 0.0, 0.5, 0.5, 0.75]
    """
    if bits >= DIRECT_OFF:
        return wide(x)
    if clipped:
        _require_bits(bits, True, "direct_quantize")
        return fixed_width_values(x, bits - 1, bits=bits)
    if bits < 1:
        raise ConfigError(f"direct_quantize: got bits={bits}, expected at least 1.")
    if not eager_cpu(x):
        return direct_quantize_reference(x, bits)
    z, scale = x.detach(), 2.0 ** (bits - 1)
    y = torch.empty_like(z, dtype=compute_dtype(z))
    size = _SLICE * torch.get_num_threads()
    for z_i, y_i in zip(slices(z, size), slices(y, size), strict=True):
        torch.mul(wide(z_i), scale, out=y_i).round_().mul_(1 / scale)
    return pass_through(x, y)


def direct_quantize_reference(x: Tensor, bits: int, *, clipped: bool = False) -> Tensor:
    """The formula of :func:`direct_quantize`, one operation per symbol: slow, obvious, on every device."""
    if bits >= DIRECT_OFF:
        return wide(x)
    unit = 2.0 ** (1 - bits)
    y = torch.round(wide(x.detach()) / unit) * unit
    return pass_through(x, y.clamp(unit - 1, 1 - unit) if clipped else y)


def fixed_width_values(x: Tensor, fraclen: Tensor | int, *, bits: int = 8, signed: bool = True) -> Tensor:
    """clip(round(x 2^f), -M or 0, M) 2^-f; the gradient is that of the identity, also where the clip acts.

    ========  ==============================
    signed    codes
    ========  ==============================
    True      -M..M, M = 2^(bits-1) - 1
    False     0..M, M = 2^bits - 1
    ========  ==============================

    Ties to even; NaN stays NaN. ``widths.Format.fraction`` is f for a number of integer bits.

    Args:
        x: float tensor of any shape and memory format; half-precision types are computed in float32.
        fraclen: f, of any sign; integers, one number or what broadcasts against x.
        bits: width of a code, sign included; signed from 2 on.
        signed: codes of both signs.
    Returns:
        float32 (float64 for float64 x), shape of x.
    Raises:
        ConfigError: too few bits.

    >>> x = torch.tensor([-9.0, -0.75, 0.25, 0.75, 1.25, 9.0], requires_grad=True)
    >>> y = fixed_width_values(x, 1, bits=4)
    >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
    ([-3.5, -1.0, 0.0, 1.0, 1.0, 3.5], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    >>> fixed_width_values(x, 1, bits=4, signed=False).tolist()
    [0.0, 0.0, 0.0, 1.0, 1.0, 7.5]
    """
    most = _require_bits(bits, signed, "fixed_width_values")
    return pass_through(x, fake_quantize(x.detach(), -_whole(fraclen, x), qmin=-most if signed else 0, qmax=most))


def fixed_width_values_reference(x: Tensor, fraclen: Tensor | int, *, bits: int = 8, signed: bool = True) -> Tensor:
    """The formula of :func:`fixed_width_values`, one operation per symbol: slow, obvious, on every device."""
    code, step = _codes(x, fraclen, bits, signed)
    return pass_through(x, code * step)


@torch.no_grad()
def rectified_values(x: Tensor, fraction: int, bits: int) -> tuple[Tensor, Tensor]:
    """:func:`fixed_width_values` of relu(x), unsigned, and where x > 0: one reading of x. No gradient.

    >>> rectified_values(torch.tensor([-1.0, 0.2, 0.3, 9.0]), 1, bits=4)
    (tensor([0.0000, 0.0000, 0.5000, 7.5000]), tensor([False,  True,  True,  True]))
    """
    step, most = math.ldexp(1.0, -fraction), largest_code(bits, False)
    if not eager_cpu(x) or x.dtype != torch.float32 or most >= 1 << 22 or abs(fraction) > _LEAN_EXPONENT:
        return fixed_width_values(x, fraction, bits=bits, signed=False), x > 0
    y, positive = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    size, magic = _SLICE * torch.get_num_threads(), float(_MAGIC) * step
    for x_i, y_i, positive_i in zip(slices(x, size), slices(y, size), slices(positive, size), strict=True):
        torch.gt(x_i, 0.0, out=positive_i)
        # With 1.5 * 2^23 steps added and taken off again a float32 is rounded to one step, ties to even.
        torch.clamp(x_i, 0.0, most * step, out=y_i).add_(magic).sub_(magic)
    return y, positive


def fixed_width_codes(x: Tensor, fraclen: Tensor | int, *, bits: int = 8, signed: bool = True) -> Tensor:
    """The integers of :func:`fixed_width_values`: value = code * 2^-fraclen. NaN has no code and gives any.

    Args:
        x, fraclen, bits, signed: as there; one fraclen for all of x is the fast form.
    Returns:
        integers of :func:`code_dtype`, shape and memory format of x.

    >>> x = torch.tensor([-9.0, -0.75, 0.25, 0.75, 1.25, 9.0])
    >>> fixed_width_codes(x, 1, bits=4), fixed_width_codes(x, 5, signed=False)
    (tensor([-7, -2,  0,  2,  2,  7], dtype=torch.int8), tensor([  0,   0,   8,  24,  40, 255], dtype=torch.uint8))
    """
    most = _require_bits(bits, signed, "fixed_width_codes")
    whole = _whole(fraclen, x)
    if whole.numel() == 1 and eager_cpu(x):
        codes = grid_codes(x, -int(whole), -most if signed else 0, most, code_dtype(bits, signed))
        if codes is not None:
            return codes
    return fixed_width_codes_reference(x, fraclen, bits=bits, signed=signed)


def fixed_width_codes_reference(x: Tensor, fraclen: Tensor | int, *, bits: int = 8, signed: bool = True) -> Tensor:
    """The formula of :func:`fixed_width_codes`: slow, obvious, on every device."""
    return _codes(x, fraclen, bits, signed)[0].to(code_dtype(bits, signed))


def grid_codes(x: Tensor, exponent: int, qmin: int, qmax: int, dtype: torch.dtype) -> Tensor | None:
    """clip(round(x 2^-exponent), qmin, qmax) of a dense CPU tensor, as vectorized passes over slices in cache.

    None where float32 passes do not give it: float64 x, codes from 2^22 on, exponents beyond +-96.
    """
    if x.dtype == torch.float64 or max(-qmin, qmax) >= 1 << 22 or abs(exponent) > _LEAN_EXPONENT:
        return None
    step, scale = math.ldexp(1.0, exponent), math.ldexp(1.0, -exponent)
    x = x.detach()
    codes = torch.empty_like(x, dtype=dtype)
    size = _SLICE * torch.get_num_threads()
    parts = slices(x, size)
    buffer = torch.empty_like(parts[0], dtype=torch.float32)
    for x_i, codes_i in zip(parts, slices(codes, size), strict=True):
        v = buffer if x_i.shape == buffer.shape else buffer[: x_i.numel()]
        torch.clamp(wide(x_i), qmin * step, qmax * step, out=v)
        put_codes(v, scale, codes_i)
    return codes


def put_codes(v: Tensor, scale: float, codes: Tensor) -> None:
    """codes = round(v * scale), half to even, |codes| < 2^22; v is float32, and lost."""
    torch.add(_MAGIC, v, alpha=scale, out=v)
    # The low bits of 1.5 * 2^23 + n are those of n in two's complement; an integer copy keeps the lowest.
    word = v.view(torch.int32)
    codes.copy_(word if codes.dtype.itemsize < 4 else word - _MAGIC.view(torch.int32))


def code_dtype(bits: int, signed: bool = True) -> torch.dtype:
    """The narrowest integers that hold the codes: int8, uint8, int16 or int32, above that int64.

    >>> code_dtype(8), code_dtype(8, False), code_dtype(9), code_dtype(24)
    (torch.int8, torch.uint8, torch.int16, torch.int32)
    """
    if bits <= 8:
        return torch.int8 if signed else torch.uint8
    room = bits - int(signed)
    return torch.int16 if room <= 15 else torch.int32 if room <= 31 else torch.int64


def _codes(x: Tensor, fraclen: Tensor | int, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    most = _require_bits(bits, signed, "fixed_width_values")
    step = whole_pow2(-_whole(fraclen, x), compute_dtype(x))
    return torch.round(wide(x.detach()) / step).clamp(-most if signed else 0, most), step


def _whole(fraclen: Tensor | int, x: Tensor) -> Tensor:
    if not isinstance(fraclen, Tensor):
        return torch.full((), fraclen, dtype=torch.int32, device=x.device)
    return fraclen.reshape(()) if fraclen.numel() == 1 else fraclen


def _require_bits(bits: int, signed: bool, where: str) -> int:
    least = 2 if signed else 1
    if bits < least:
        raise ConfigError(
            f"{where}: got bits={bits}, expected at least {least} for {'signed' if signed else 'unsigned'} codes: "
            "with fewer every value is 0."
        )
    return largest_code(bits, signed)
