"""Quantizers whose unit follows the largest magnitude of the tensor, for errors (WAGEUBN, arXiv:1909.02384).

R = 2^round(log2 max|x|) is the range, a code is worth R 2^-(bits-1). Nothing here waits for a device, and a tensor
with NaN or inf is handed on as it is, with a sign of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.direct import code_dtype, grid_codes
from lightning_lowbit.numerics.dtypes import wide
from lightning_lowbit.numerics.exponent import EXPONENT_MIN, whole_pow2
from lightning_lowbit.numerics.ste import eager_cpu, fake_quantize
from lightning_lowbit.numerics.through import pass_through

__all__ = [
    "code_limit",
    "host_exponent",
    "max_abs",
    "measured_range",
    "range_exponent",
    "shift_codes",
    "shift_codes_reference",
    "shift_quantize",
    "shift_quantize_reference",
]

_MAX_BITS = 16
_EXPONENT_MAX = 127  # R itself must be a float32
_ROOT_HALF = math.sqrt(0.5)  # the float64 just above the root


def max_abs(x: Tensor) -> Tensor:
    """max|x| as float64, 0-dim; NaN if a value is, 0 where x is empty. Integers below 2^53 are exact."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=x.device)
    x = x.detach()
    # Two vectorized passes: a third of the time of abs and one.
    return torch.maximum(x.amax().to(torch.float64), -x.amin().to(torch.float64))


def range_exponent(peak: Tensor, least: int = EXPONENT_MIN) -> Tensor:
    """round(log2 peak), exact: n with 2^n / sqrt(2) < peak < 2^n sqrt(2).

    No number is half-way, as sqrt(2) is irrational; the neighbor of sqrt(2) below goes down, the one above up,
    whatever a library's log2 says. 0 where peak is 0 or not finite. The result is held in least..127.

    Args:
        peak: max|x|, float, any shape.
    Returns:
        int32, shape of peak.

    >>> range_exponent(torch.tensor([0.0, 0.7071067, 0.70710677, 0.7071068, 1.0, 1.4142135, 1.4142137, 3.0])).tolist()
    [0, -1, -1, 0, 0, 0, 1, 2]
    >>> range_exponent(torch.tensor([2.0**-149, 3e38, float("inf"), float("nan")])).tolist()
    [-149, 127, 0, 0]
    """
    if torch.compiler.is_compiling():  # one call: fused, its operations are repeated for every element scaled
        result: Tensor = torch.ops.lightning_lowbit.range_exponent(peak.detach(), least)
        return result
    return _range_exponent(peak.detach(), least)


def _range_exponent(peak: Tensor, least: int) -> Tensor:
    peak = peak.to(torch.float64)  # float32 subnormals are normal here
    mantissa, exponent = torch.frexp(peak)  # peak = mantissa * 2^exponent, 1/2 <= mantissa < 1
    n = exponent - (mantissa < _ROOT_HALF).to(exponent.dtype)
    n = torch.where((peak > 0) & torch.isfinite(peak), n, 0)
    return n.clamp(least, _EXPONENT_MAX).to(torch.int32)


def host_exponent(peak: float, least: int) -> int:
    """The same of one finite number that is on the host."""
    mantissa, exponent = math.frexp(peak)
    n = exponent - (mantissa < _ROOT_HALF) if peak > 0 else 0
    return min(max(n, least), _EXPONENT_MAX)


def shift_quantize(
    x: Tensor, bits: int = 8, *, clip_to_one: bool = False, peak: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """SQ(x, k) = R clip(Q(x / R, k), -(1 - d), 1 - d) with d = 2^-(k-1); ties to even, gradient of the identity.

    ===============  =================================
    clip_to_one      codes, of R d each
    ===============  =================================
    False            -(2^(k-1) - 1) .. 2^(k-1) - 1
    True             -2^(k-1) .. 2^(k-1): the largest does not fit k bits
    ===============  =================================

    A tensor of zeros gives zeros. R is held where R d is a float32: at most 2^127, at least 2^-149 / d.

    Args:
        x: float tensor of any shape and memory format; half-precision types are computed in float32.
        bits: k, 2..16.
        clip_to_one: the other row.
        peak: max|x| where it is known already, or that of several ranks; 0-dim.
    Returns:
        float32 (float64 for float64 x), shape of x, and whether peak is finite, bool 0-dim; if it is not, x itself.
    Raises:
        ConfigError: bits out of range.

    >>> x = torch.tensor([1.4, 1.0, 0.125, -0.375, -0.7, -1.4])
    >>> shift_quantize(x, 3)
    (tensor([ 0.7500,  0.7500,  0.0000, -0.5000, -0.7500, -0.7500]), tensor(True))
    >>> shift_quantize(x, 3, clip_to_one=True)[0].tolist()
    [1.0, 1.0, 0.0, -0.5, -0.75, -1.0]
    """
    limit = code_limit(bits, "shift_quantize") + int(clip_to_one)
    if not eager_cpu(x):
        return shift_quantize_reference(x, bits, clip_to_one=clip_to_one, peak=peak)
    top = float(max_abs(x) if peak is None else peak)
    if not math.isfinite(top):
        return wide(x), torch.tensor(False)
    exponent = torch.tensor(host_exponent(top, EXPONENT_MIN + bits - 1) - (bits - 1))
    return pass_through(x, fake_quantize(x.detach(), exponent, qmin=-limit, qmax=limit)), torch.tensor(True)


def shift_quantize_reference(
    x: Tensor, bits: int = 8, *, clip_to_one: bool = False, peak: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The formula of :func:`shift_quantize`, one operation per symbol: slow, obvious, on every device."""
    limit = code_limit(bits, "shift_quantize") + int(clip_to_one)
    exponent, finite = measured_range(x, peak, EXPONENT_MIN + bits - 1)
    z = wide(x.detach())
    step = whole_pow2(exponent - (bits - 1), z.dtype)
    y = torch.round(z / step).clamp(-limit, limit) * step
    return pass_through(x, torch.where(finite, y, z)), finite


def shift_codes(x: Tensor, bits: int = 8, *, peak: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The integers of :func:`shift_quantize`: value = code * 2^exponent.

    Args:
        x, bits, peak: as there.
    Returns:
        codes within +-(2^(bits-1) - 1), int8 (int16 above 8 bits), shape and memory format of x; their exponent,
        int32 0-dim; whether peak is finite, bool 0-dim: if not, zeros.

    >>> shift_codes(torch.tensor([1.4, 1.0, 0.125, -0.375, -1.4]), 3)
    (tensor([ 3,  3,  0, -2, -3], dtype=torch.int8), tensor(-2, dtype=torch.int32), tensor(True))
    """
    limit = code_limit(bits, "shift_codes")
    if not eager_cpu(x):
        return shift_codes_reference(x, bits, peak=peak)
    top = float(max_abs(x) if peak is None else peak)
    if math.isfinite(top):
        exponent = host_exponent(top, EXPONENT_MIN + bits - 1) - (bits - 1)
        codes = grid_codes(x, exponent, -limit, limit, code_dtype(bits))
        if codes is not None:
            return codes, torch.tensor(exponent, dtype=torch.int32), torch.tensor(True)
    return shift_codes_reference(x, bits, peak=torch.tensor(top, dtype=torch.float64))


def shift_codes_reference(x: Tensor, bits: int = 8, *, peak: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The formula of :func:`shift_codes`: slow, obvious, on every device."""
    limit = code_limit(bits, "shift_codes")
    exponent, finite = measured_range(x, peak, EXPONENT_MIN + bits - 1)
    exponent = exponent - (bits - 1)
    z = wide(x.detach())
    code = torch.round(z / whole_pow2(exponent, z.dtype)).clamp(-limit, limit)
    return torch.where(finite, code, 0.0).to(code_dtype(bits)), exponent, finite


def measured_range(x: Tensor, peak: Tensor | None, least: int) -> tuple[Tensor, Tensor]:
    peak = max_abs(x) if peak is None else peak.detach()
    return range_exponent(peak, least), torch.isfinite(peak)


def code_limit(bits: int, where: str) -> int:
    if not 2 <= bits <= _MAX_BITS:
        raise ConfigError(f"{where}: got bits={bits}, expected 2..{_MAX_BITS}; 1 bit has no code but 0.")
    return (1 << (bits - 1)) - 1


_operator = torch.library.custom_op(
    "lightning_lowbit::range_exponent",
    _range_exponent,
    mutates_args=(),
    schema="(Tensor peak, int least) -> Tensor",
)


@_operator.register_fake
def _shape(peak: Tensor, least: int) -> Tensor:
    return torch.empty_like(peak, dtype=torch.int32)
