"""Fixed-point numbers of few bits: how wide they are, and the quantizer (F8Net, arXiv:2202.05239).

A code n of ``bits`` bits is worth n 2^-fraclen. Signed codes leave out the most negative one, so that negation
is exact.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.exponent import pow2, whole_pow2
from lightning_lowbit.numerics.ste import eager_cpu, fake_quantize, ulp

__all__ = ["STE", "fix_quant", "largest_code", "largest_fraclen"]

STE: tuple[str, ...] = ("strict", "clip")

_select = torch.ops.aten.hardtanh_backward  # (g, y, low, high) -> g where low < y < high, else 0: one vectorized pass


def largest_code(bits: int, signed: bool) -> int:
    """M: codes are -M..M signed, 0..M unsigned.

    >>> largest_code(8, True), largest_code(8, False)
    (127, 255)
    """
    return (1 << largest_fraclen(bits, signed)) - 1


def largest_fraclen(bits: int, signed: bool) -> int:
    """All bits but the sign behind the point."""
    return bits - int(signed)


def fix_quant(
    x: Tensor,
    fraclen: Tensor | int,
    *,
    bits: int = 8,
    signed: bool = True,
    ste: str = "strict",
    axis: int = 0,
    rounding: bool = True,
) -> Tensor:
    """clip(round(x 2^fraclen), -M or 0, M) 2^-fraclen; ties to even (F8Net section 3).

    The gradient passes where the value is inside, by one of two masks, z = round(x 2^fraclen) before the clip:

        ste       signed          unsigned
        strict    |z| < M         0 < z < M      as published: the last codes, and what rounds to 0, pass nothing
        clip      |x| <= M 2^-f   0 < x <= M 2^-f

    NaN stays NaN and passes nothing.

    Args:
        x: float tensor; half-precision types are computed in float32.
        fraclen: integers from 0 on: one, or one per index of ``axis``.
        bits, signed: the codes.
        ste: the mask.
        axis: of a fraclen per channel.
        rounding: False only clips; z of the strict mask is then not rounded either.
    Returns:
        float32 (float64 for float64 x), shape of x.

    >>> fix_quant(torch.tensor([-9.0, -0.75, 0.25, 0.75, 1.25, 9.0]), 1, bits=4).tolist()
    [-3.5, -1.0, 0.0, 1.0, 1.0, 3.5]
    """
    if ste not in STE:
        raise ConfigError(f"fix_quant: got ste={ste!r}, expected one of {list(STE)}.")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    fraclen = fraclen if isinstance(fraclen, Tensor) else torch.full((), fraclen, dtype=torch.int32, device=x.device)
    fraclen = fraclen.reshape(()) if fraclen.numel() == 1 else _along(axis, fraclen, x)
    most = largest_code(bits, signed)
    least = -most if signed else 0
    if rounding and ste == "strict":
        result: Tensor = _Strict.apply(x, -fraclen, least, most)  # type: ignore[no-untyped-call]  # torch does not type it
        return result
    if rounding:
        above = most + ulp(most, dtype)
        return fake_quantize(x, -fraclen, qmin=least, qmax=most, window=(-above if signed else 0.0, above))
    x = x.to(dtype)
    v = x.detach() * pow2(fraclen, dtype)
    inside = v < most if ste == "strict" else v <= most
    inside &= v > 0 if not signed else v > least if ste == "strict" else v >= least
    return torch.where(inside, x, v.clamp(least, most) / pow2(fraclen, dtype))


def _along(axis: int, values: Tensor, x: Tensor) -> Tensor:
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


class _Strict(torch.autograd.Function):
    """The strict mask can be read off the result: 0 or -M < code < M. Whoever multiplies by it keeps it anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exponent: Tensor, least: int, most: int) -> Tensor:
        if eager_cpu(x):
            y = fake_quantize(x, exponent, qmin=least, qmax=most)
        else:
            s = whole_pow2(exponent, torch.float64 if x.dtype == torch.float64 else torch.float32)
            y = torch.round(x.to(s.dtype) / s).clamp(least, most) * s
        ctx.save_for_backward(y, exponent)
        ctx.ends = least, most, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, exponent = ctx.saved_tensors
        least, most, dtype = ctx.ends
        if eager_cpu(y) and exponent.numel() == 1 and math.isfinite(float(y.sum())):
            step = math.ldexp(1.0, int(exponent))
            return _select(g, y, step * least, step * most).to(dtype), None, None, None
        s = whole_pow2(exponent, y.dtype)
        return torch.where((y > s * least) & (y < s * most), g, 0.0).to(dtype), None, None, None
