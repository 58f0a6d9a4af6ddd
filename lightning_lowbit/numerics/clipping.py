"""Activation quantizers whose limits are observed: clipped and rounded values, the gradient of the clip.

PAct2 of TI's quantization-aware training: limits follow two running extremes, the step follows from the limits,
rounding is straight-through and only the clip itself stops a gradient. Nothing here is trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lowbit.numerics.dtypes import wide
from lightning_lowbit.numerics.exponent import ceil2
from lightning_lowbit.numerics.merged import TINY
from lightning_lowbit.numerics.rounding import Rounding, round_to
from lightning_lowbit.numerics.ste import eager_cpu, slices, ulp

__all__ = ["HostLimits", "Limits", "clip_quantize", "clip_quantize_reference", "clip_saturated", "limits_of"]

_SLICE = 1 << 17  # elements per thread and pass: the slices of one step share the L2 cache, calls stay few
_LEAN_CODES = 1 << 17  # codes up to this stay exact in every pass
_LEAN_ROUNDINGS = (Rounding.HALF_UP, Rounding.HALF_EVEN, Rounding.HALF_AWAY)
_SUBNORMAL = 2.0**-1074  # compares as 0 where subnormal numbers are flushed


@dataclass(frozen=True)
class HostLimits:
    """:class:`Limits` as Python floats."""

    low: float
    high: float
    scale: float
    qmin: float
    qmax: float
    zero_point: float


@dataclass(frozen=True)
class Limits:
    """A grid and the values it is clipped to; 0-dim float tensors on one device.

    Args:
        low, high: limits of the values. A symmetric grid has its last code one step below ``high``.
        scale: codes in one unit: 1 / step.
        qmin, qmax: first and last code.
        zero_point: the code of 0.
        host: the same as Python floats, where they are known.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    qmin: Tensor
    qmax: Tensor
    zero_point: Tensor
    host: HostLimits | None = None

    def to_host(self) -> HostLimits:
        """The same as Python floats; waits for the device."""
        return self.host or HostLimits(*map(float, _numbers(self)))


@torch.no_grad()
def limits_of(clips: Tensor, signed: bool | None, bits: int, power2: bool = True, symmetric: bool = True) -> Limits:
    """The grid for observed extremes c0, c1; nothing waits for the device.

        grid                 low        high                    codes                        1 / scale
        symmetric, signed    -A         A                       -2^(bits-1) .. 2^(bits-1)-1  A / 2^(bits-1)
        symmetric, unsigned  0          A                       0 .. 2^bits - 1              A / 2^bits
        affine               -z * step  (2^bits - 1 - z) * step 0 .. 2^bits - 1              step

    A = ceil2(max(|c0|, |c1|, 2^-16)), without |c0| where unsigned; ceil2(v) = 2^ceil(log2 v), at most 2^127.
    Affine: with l = min(c0, 0), h = max(c1, 2^-16), step = ceil2((h - l) / (2^bits - 1)), z = round(-l / step).

    Args:
        clips: (c0, c1), float32 or float64 [2].
        signed: None decides by c0 < 0; False takes c0 as 0.
        bits: of the codes.
        power2: without it ceil2 is left out.
        symmetric: or affine, with a zero point.
    Returns:
        Limits of the dtype and on the device of clips; NaN where a clip that matters is not finite.

    >>> for clips in ((-0.3, 4.0), (0.0, 4.1)):
    ...     print(limits_of(torch.tensor(clips), None, 8).to_host())
    HostLimits(low=-4.0, high=4.0, scale=32.0, qmin=-128.0, qmax=127.0, zero_point=0.0)
    HostLimits(low=0.0, high=8.0, scale=32.0, qmin=0.0, qmax=255.0, zero_point=0.0)
    >>> limits_of(torch.tensor([-1.0, 3.0]), None, 8, symmetric=False).to_host()
    HostLimits(low=-1.0, high=6.96875, scale=32.0, qmin=0.0, qmax=255.0, zero_point=32.0)
    """
    clips = clips.detach()
    if power2 and symmetric and eager_cpu(clips):
        low, high = clips.tolist()
        if math.isfinite(low) and math.isfinite(high):
            host = _power_of_two_limits(low, high, signed, bits)
            numbers = host.low, host.high, host.scale, host.qmin, host.qmax, host.zero_point
            c = clips.new_tensor(numbers).unbind()
            return Limits(c[0], c[1], c[2], c[3], c[4], c[5], host)
    if torch.compiler.is_compiling():  # one call in the graph, for what is read by every element
        packed = torch.ops.lightning_lowbit.clip_limits(clips, signed, bits, power2, symmetric)
    else:
        packed = _limits(clips, signed, bits, power2, symmetric)
    return Limits(*packed.unbind())


def _power_of_two_limits(low: float, high: float, signed: bool | None, bits: int) -> HostLimits:
    """The symmetric rows of the table on the host: a fifth of the time of operations on tensors of one number."""
    negative = low < 0 if signed is None else signed
    reach = max(abs(high), abs(low) if negative else 0.0, TINY)
    mantissa, exponent = math.frexp(reach)
    a = min(math.ldexp(1.0, exponent - (mantissa == 0.5)), 2.0**127)
    half = 2.0 ** (bits - 1)
    if negative:
        return HostLimits(-a, a, half / a, -half, half - 1, 0.0)
    return HostLimits(0.0, a, 2 * half / a, 0.0, 2 * half - 1, 0.0)


def _limits(clips: Tensor, signed: bool | None, bits: int, power2: bool, symmetric: bool) -> Tensor:
    c0, c1 = clips.unbind()
    half, last = 2.0 ** (bits - 1), 2.0**bits - 1
    raised = ceil2 if power2 else _finite
    if not symmetric:
        low = torch.zeros_like(c0) if signed is False else c0.clamp(max=0.0)
        scale = raised((c1.clamp(min=TINY) - low) / last).reciprocal()
        z = (0.0 - low * scale).round().clamp(0, last)
        step = scale.reciprocal()  # as the codes are scaled back
        return torch.stack([0.0 - z * step, (last - z) * step, scale, 0 * z, 0 * z + last, z])
    if signed is None:
        negative = (c0 < 0).to(c0.dtype)
        reach = torch.maximum(c1.abs(), -c0)
    else:
        negative = torch.full_like(c0, signed)
        reach = clips.abs().amax() if signed else c1.abs()
    a = raised(reach.clamp(min=TINY))
    qmin = 0.0 - half * negative  # nowhere -0
    return torch.stack([0.0 - a * negative, a, (last + 1 + qmin) / a, qmin, qmin + last, 0 * negative])


def _finite(v: Tensor) -> Tensor:
    return v + 0 * v


def clip_quantize(x: Tensor, limits: Limits, rounding: Rounding, value: Tensor | None = None) -> Tensor:
    """Quantized values of one tensor, with the gradient of the clip of another: the step that replaces a ReLU.

    y = (clip(round(v * scale) + zero_point, qmin, qmax) - zero_point) * (1 / scale), v = ``value`` or x itself.
    dL/dx = g where low <= x <= high, else 0 (NaN included); ``value`` gets none. Only x is kept for
    backward, or on the CPU one byte of it.

    Args:
        x: the tensor whose clip is differentiated; float, any shape and memory format.
        limits: of :func:`limits_of`, on the device of x.
        rounding: ties as named; HALF_UP, HALF_EVEN and HALF_AWAY are fast on the CPU.
        value: what is quantized, shape of x: the same quantity, computed from quantized weights.
    Returns:
        y, float32 (float64 for float64 values), shape and memory format of v. NaN stays NaN.

    >>> limits = limits_of(torch.tensor([0.0, 4.0]), None, 2)  # 0, 1, 2, 3
    >>> x = torch.tensor([-1.0, 0.0, 0.5, 2.5, 4.0, 5.0], requires_grad=True)
    >>> y = clip_quantize(x, limits, Rounding.HALF_UP)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.0, 0.0, 1.0, 3.0, 3.0, 3.0], [0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    """
    v, rounding = x.detach() if value is None else value.detach(), Rounding(rounding)
    if eager_cpu(x) and eager_cpu(v):
        host = limits.to_host()
        codes = host.qmin - host.zero_point, host.qmax - host.zero_point
        if rounding in _LEAN_ROUNDINGS and max(-codes[0], codes[1]) <= _LEAN_CODES and math.isfinite(host.high):
            return _apply(_Lean, x, v, host, float(limits.scale.reciprocal()), codes, rounding)
    return _apply(_Formula, x, v, *_numbers(limits), rounding)


def clip_quantize_reference(x: Tensor, limits: Limits, rounding: Rounding, value: Tensor | None = None) -> Tensor:
    """The formula of :func:`clip_quantize`, one operation per symbol: slow, obvious, on every device."""
    return _apply(_Formula, x, x.detach() if value is None else value.detach(), *_numbers(limits), rounding)


def _numbers(limits: Limits) -> tuple[Tensor, ...]:
    return limits.low, limits.high, limits.scale, limits.qmin, limits.qmax, limits.zero_point


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    return function.apply(*args)  # type: ignore[no-untyped-call, no-any-return]  # torch leaves it untyped


class _Formula(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v: Tensor,
        low: Tensor,
        high: Tensor,
        scale: Tensor,
        qmin: Tensor,
        qmax: Tensor,
        zero_point: Tensor,
        rounding: Rounding,
    ) -> Tensor:
        ctx.dtype = x.dtype
        if torch.compiler.is_compiling() and x.device.type == "cpu":
            # Loops of the CPU store bools slowly: masks are made, and used, in calls of their own.
            mask = torch.ops.lightning_lowbit.clip_mask(x, low, high)
        else:
            mask = (wide(x) >= low) & (wide(x) <= high)
        ctx.save_for_backward(mask)
        code = round_to(wide(v) * scale, rounding) + zero_point
        return (torch.clamp(code, qmin, qmax) - zero_point) * scale.reciprocal()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        if mask.dtype == torch.bool:
            return torch.where(mask, g, 0.0).to(ctx.dtype), *[None] * 8
        return torch.ops.lightning_lowbit.clip_gradient(g, mask).to(ctx.dtype), *[None] * 8


def _around(low: float, high: float, dtype: torch.dtype) -> tuple[float, float]:
    """Strict bounds for low <= z <= high: hardtanh_backward is the one vectorized comparison of eager CPU torch."""
    return low - ulp(low, dtype) if low else -_least(dtype), high + ulp(high, dtype)


def _mask(x: Tensor, low: float, high: float) -> Tensor:
    """int8 1 where low <= x <= high, in x's memory format: a quarter of what x itself would keep."""
    if not eager_cpu(x) or not math.isfinite(high):
        return ((wide(x) >= low) & (wide(x) <= high)).to(torch.int8)
    mask = torch.empty_like(x, dtype=torch.int8)
    size, total = _SLICE * torch.get_num_threads(), 0.0
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    one, bounds = torch.ones((), dtype=dtype), _around(low, high, dtype)
    parts = slices(x, size)
    inside = torch.empty_like(parts[0], dtype=dtype)
    for x_i, mask_i in zip(parts, slices(mask, size), strict=True):
        z = wide(x_i)
        inside = inside if z.shape == inside.shape else inside[: z.numel()]
        mask_i.copy_(torch.ops.aten.hardtanh_backward.grad_input(one, z, *bounds, grad_input=inside))
        total += float(z.sum())  # only to notice a NaN, which is outside
    return mask if math.isfinite(total) else ((x >= low) & (x <= high)).to(torch.int8)


class _Lean(torch.autograd.Function):
    """The formula as vectorized passes over slices that stay in cache; ``codes`` are counted from the code of 0.

    The limits are read on the host: on the CPU that waits for nothing, and scalar operands need fewer passes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor, host: HostLimits, step: float, codes: tuple[float, float], rounding: Rounding
    ) -> Tensor:
        ctx.dtype = x.dtype
        ctx.save_for_backward(_mask(x, host.low, host.high) if ctx.needs_input_grad[0] else None)
        y = torch.empty_like(v, dtype=torch.float64 if v.dtype == torch.float64 else torch.float32)
        ramp = rounding is Rounding.HALF_UP and codes[0] >= 0 and math.frexp(host.scale)[0] == 0.5
        quantize = _ramp if ramp else _codes
        size = _SLICE * torch.get_num_threads()
        for v_i, y_i in zip(slices(v, size), slices(y, size), strict=True):
            quantize(wide(v_i), y_i, host.scale, step, codes, rounding)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return _masked(g, mask).to(ctx.dtype), *[None] * 5


def _masked(g: Tensor, mask: Tensor) -> Tensor:
    """g where the mask is 1, else 0."""
    if torch.is_grad_enabled() or g.stride() != mask.stride() or not eager_cpu(g):
        return torch.where(mask.bool(), g, 0.0)
    dx = torch.empty_like(g)
    size = _SLICE * torch.get_num_threads()
    gs = slices(g, size)
    inside = torch.empty_like(gs[0])
    for g_i, mask_i, dx_i in zip(gs, slices(mask, size), slices(dx, size), strict=True):
        inside = inside if g_i.shape == inside.shape else inside[: g_i.numel()]
        # Selected, not multiplied: an infinite g times 0 is NaN.
        torch.ops.aten.hardtanh_backward.grad_input(g_i, inside.copy_(mask_i), 0.5, 1.5, grad_input=dx_i)
    return dx


def _ramp(v: Tensor, y: Tensor, scale: float, step: float, codes: tuple[float, float], rounding: Rounding) -> None:
    """Half up for codes from 0 and a power of two: floor(v - 1/2) + 1 is exact from 0 up, and at most 0 below."""
    torch.add(torch.tensor(-0.5, dtype=y.dtype), v, alpha=scale, out=y)
    y.floor_().clamp_(codes[0] - 1, codes[1] - 1)
    torch.add(torch.tensor(step, dtype=y.dtype), y, alpha=step, out=y)


def _codes(v: Tensor, y: Tensor, scale: float, step: float, codes: tuple[float, float], rounding: Rounding) -> None:
    """Any of _LEAN_ROUNDINGS, codes and scale."""
    if rounding is Rounding.HALF_EVEN:
        torch.mul(v, scale, out=y).round_()
    else:  # v + 1/2 may itself round, hence floor((floor(2 v) + 1) / 2)
        torch.mul(v, 2 * scale, out=y)
        y = y.abs_() if rounding is Rounding.HALF_AWAY else y
        torch.add(torch.tensor(0.5, dtype=y.dtype), y.floor_(), alpha=0.5, out=y).floor_()
        y = torch.copysign(y, v, out=y) if rounding is Rounding.HALF_AWAY else y
    y.clamp_(*codes).mul_(step)


def _least(dtype: torch.dtype) -> float:
    """The least positive number, the least normal one where subnormal numbers are flushed."""
    double = dtype == torch.float64
    subnormal = 2.0**-1074 if double else 2.0**-149
    return subnormal if _SUBNORMAL > 0 else 2.0**-1022 if double else 2.0**-126


@torch.no_grad()
def clip_saturated(x: Tensor, limits: Limits, rounding: Rounding) -> Tensor:
    """How many values of x have a code outside qmin..qmax; int64, 0-dim; NaN is not counted."""
    code = round_to(wide(x.detach()) * limits.scale, rounding) + limits.zero_point
    return ((code < limits.qmin) | (code > limits.qmax)).sum()


_limits_operator = torch.library.custom_op(
    "lightning_lowbit::clip_limits",
    _limits,
    mutates_args=(),
    schema="(Tensor clips, bool? signed, int bits, bool power2, bool symmetric) -> Tensor",
)


@_limits_operator.register_fake
def _limits_shape(clips: Tensor, signed: bool | None, bits: int, power2: bool, symmetric: bool) -> Tensor:
    return clips.new_empty(6)


def _clip_mask(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return _mask(x, float(low), float(high))


_mask_operator = torch.library.custom_op(
    "lightning_lowbit::clip_mask", _clip_mask, mutates_args=(), schema="(Tensor x, Tensor low, Tensor high) -> Tensor"
)


@_mask_operator.register_fake
def _mask_shape(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8)


def _clip_gradient(g: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return _masked(g, mask)


_gradient_operator = torch.library.custom_op(
    "lightning_lowbit::clip_gradient", _clip_gradient, mutates_args=(), schema="(Tensor g, Tensor mask) -> Tensor"
)


@_gradient_operator.register_fake
def _gradient_shape(g: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(g)
