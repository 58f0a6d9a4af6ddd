"""Weight gradients brought to a constant range and rounded at random (WAGEUBN, arXiv:1909.02384).

n = dr x / R with R = 2^round(log2 max|x|) has one magnitude whatever the gradient's; codes are rounded n, worth
2^-(bits-1) each. So the learning rate alone decides how far a weight moves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.block import ShiftRounding, shift_round
from lightning_lowbit.numerics.exponent import pow2
from lightning_lowbit.numerics.guards import FLOAT32_EXACT
from lightning_lowbit.numerics.noise import counter_floats
from lightning_lowbit.numerics.rounding import shift_right_rounded
from lightning_lowbit.numerics.shift import max_abs, range_exponent
from lightning_lowbit.numerics.ste import eager_cpu, slices

__all__ = ["constant_codes", "constant_codes_reference", "constant_quantize", "uniform_draws"]

_SLICE = 1 << 17  # elements per thread and pass: the slices of one step share the L2 cache, calls stay few
_ROW = 1 << 16  # elements that share one counter of the noise
_MAX_DR = 1 << 15  # codes are int16
_LEAN_EXPONENT = 96


def constant_quantize(grad: Tensor, draws: Tensor | None, *, dr: int, bits: int = 15) -> tuple[Tensor, Tensor]:
    """CQ(x) = clip(SR(dr x / R), -dr + 1, dr - 1) 2^-(bits-1), as float; :func:`constant_codes` times its unit.

    Args:
        grad, draws, dr: as of :func:`constant_codes`.
        bits: kGC; the unit is 2^-(bits-1).
    Returns:
        float32 (float64 for float64 grad), shape of grad, and whether all of grad is finite, bool 0-dim; if it is
        not, grad itself.
    Raises:
        ConfigError: dr is no power of two in 2..2^15.

    >>> grad = torch.tensor([-3e-5, 0.0, 1e-5, 2e-5])
    >>> y, finite = constant_quantize(grad, None, dr=8)
    >>> (y * 2**14).tolist(), bool(finite)
    ([-7.0, 0.0, 3.0, 5.0], True)
    """
    codes, finite = constant_codes(grad, draws, dr=dr)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return torch.where(finite, codes.to(wide) * 2.0 ** (1 - bits), grad.to(wide)), finite


@torch.no_grad()
def constant_codes(grad: Tensor, draws: Tensor | None, *, dr: int) -> tuple[Tensor, Tensor]:
    """clip(SR(n), -dr + 1, dr - 1) with n = dr x / R; no gradient.

    ===========  ===================================================  ===============
    draws        SR(n)                                                n = 2.25, -0.75
    ===========  ===================================================  ===============
    u in [0,1)   sign(n) (floor|n| + [frac|n| > u])                   u < 1/4: 3; u < 3/4: -1
    None         round(n), ties to even                               2; -1
    ===========  ===================================================  ===============

    frac|n| = u is not greater. Of integers n is a shift and SR a random integer below one unit added before it:
    equal to the float form in every bit where a float32 holds grad. A tensor of zeros gives zeros.

    Args:
        grad: float tensor (half-precision types are computed in float32), or int32 with an exponent of its own,
            which drops out; int64 below 2^53.
        draws: uniform numbers in [0, 1), float32 or float64, shape of grad; see :func:`uniform_draws`.
        dr: the range, a power of two in 2..2^15: 128 at first, then 32, 8, 2 as the learning rate falls.
    Returns:
        int16 codes within +-(dr - 1), shape of grad, and whether all of grad is finite, bool 0-dim; if not, zeros.
    Raises:
        ConfigError: dr is no such power of two, or draws of another shape.

    >>> grad = torch.tensor([-5, 0, 2, 3, 9], dtype=torch.int32)  # R = 8, n = grad / 4
    >>> for u in (0.0, 0.25, 0.5):
    ...     constant_codes(grad, torch.full((5,), u), dr=2)[0].tolist()
    [-1, 0, 1, 1, 1]
    [-1, 0, 1, 1, 1]
    [-1, 0, 0, 1, 1]
    """
    _require(grad, draws, dr)
    if not eager_cpu(grad) or (draws is not None and not (eager_cpu(draws) and draws.stride() == grad.stride())):
        return constant_codes_reference(grad, draws, dr=dr)
    peak = max_abs(grad)
    shift = dr.bit_length() - 1 - int(range_exponent(peak))
    if not math.isfinite(float(peak)) or abs(shift) > _LEAN_EXPONENT:
        return constant_codes_reference(grad, draws, dr=dr)
    # Integers that a float holds have the same n in it.
    narrow = float(peak) <= FLOAT32_EXACT if not grad.dtype.is_floating_point else grad.dtype != torch.float64
    wide = torch.float32 if narrow else torch.float64
    codes = torch.empty_like(grad, dtype=torch.int16)
    scale = math.ldexp(1.0, shift)
    size = _SLICE * torch.get_num_threads()
    parts = slices(grad, size)
    picks = [None] * len(parts) if draws is None else slices(draws, size)
    n, up = (torch.empty_like(parts[0], dtype=wide) for _ in range(2))
    for x_i, u_i, codes_i in zip(parts, picks, slices(codes, size), strict=True):
        if x_i.shape != n.shape:
            n, up = n[: x_i.numel()], up[: x_i.numel()]
        torch.mul(x_i.to(wide), scale, out=n)
        if u_i is None:
            codes_i.copy_(n.round_().clamp_(1 - dr, dr - 1))
            continue
        torch.frac(n, out=up)
        n.sub_(up)  # towards 0; torch.trunc is not vectorized
        # |frac| - u lies in (-1, 1) and keeps its sign when it rounds: its ceiling is [|frac| > u].
        up.abs_().sub_(u_i).ceil_()
        torch.copysign(up, x_i, out=up)
        codes_i.copy_(n.add_(up).clamp_(1 - dr, dr - 1))
    return codes, torch.tensor(True)


@torch.no_grad()
def constant_codes_reference(grad: Tensor, draws: Tensor | None, *, dr: int) -> tuple[Tensor, Tensor]:
    """The formulas of :func:`constant_codes`, one operation per symbol: slow, obvious, on every device."""
    _require(grad, draws, dr)
    peak = max_abs(grad)
    finite = torch.isfinite(peak)
    shift = range_exponent(peak) - (dr.bit_length() - 1)  # n = x / 2^shift
    if grad.dtype.is_floating_point:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        n = grad.to(torch.float64) / pow2(shift, torch.float64)
        n = n.to(wide)
        if draws is None:
            code = torch.round(n)
        else:
            a = n.abs()
            code = torch.sign(n) * (torch.floor(a) + (a - torch.floor(a) > draws).to(wide))
        code = torch.where(finite, code, 0.0)
    else:
        x = grad.to(torch.int64)
        if draws is None:
            code = shift_right_rounded(x, shift)
        else:
            right = shift.clamp(min=0)
            # frac > u exactly where the dropped bits exceed floor(u 2^shift).
            below = torch.floor(draws.to(torch.float64) * pow2(right, torch.float64)).to(torch.int64)
            code = shift_round(x << (-shift).clamp(min=0), right, ShiftRounding.STOCHASTIC, below)
    return code.clamp(1 - dr, dr - 1).to(torch.int16), finite


def uniform_draws(key: int | Tensor, like: Tensor) -> Tensor:
    """Uniform multiples of 2^-24 in [0, 1), a pure function of key and place: equal on every device and rank.

    Args:
        key: of ``noise.combine``, for example of (seed, global step, index of the parameter).
        like: gives shape and device.
    Returns:
        float32, shape and memory format of like; place i in row-major order depends on key and i only.

    >>> from lightning_lowbit.numerics.noise import combine
    >>> uniform_draws(combine(1), torch.zeros(1, 3))
    tensor([[0.8092, 0.1617, 0.2645]])
    """
    rows = -(-like.numel() // _ROW)
    words = counter_floats(key, torch.arange(rows, device=like.device), min(_ROW, like.numel()))
    draws = words.flatten()[: like.numel()].view(like.shape)
    # Of a tensor in row-major order they are the draws; of another a copy has its strides.
    return draws if draws.stride() == like.stride() else torch.empty_like(like, dtype=torch.float32).copy_(draws)


def _require(grad: Tensor, draws: Tensor | None, dr: int) -> None:
    if not 2 <= dr <= _MAX_DR or dr & (dr - 1):
        raise ConfigError(
            f"constant quantizer: got dr={dr!r}, expected a power of two in 2..{_MAX_DR}: the codes are "
            "+-(dr - 1), so that dr=1 leaves only 0."
        )
    if draws is not None and draws.shape != grad.shape:
        raise ConfigError(
            f"constant quantizer: got draws of shape {tuple(draws.shape)} for a gradient of shape "
            f"{tuple(grad.shape)}; pass uniform_draws(key, grad)."
        )
