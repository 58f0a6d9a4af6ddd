"""Quantizers on power-of-two grids with straight-through gradients (TQT: Jain et al., MLSys 2020).

``threshold_quantize`` has a trained threshold, ``fake_quantize`` a given exponent, ``gate_backward`` acts on
what flows back. On the CPU they run as vectorized in-place passes over slices that stay in cache;
``threshold_quantize_reference`` is the obvious twin, equal in output and input gradient (-0 counts as 0).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_lowbit.numerics.dtypes import compute_dtype
from lightning_lowbit.numerics.exponent import whole_pow2
from lightning_lowbit.numerics.rounding import Rounding, round_to

__all__ = [
    "eager_cpu",
    "fake_quantize",
    "gate_backward",
    "open_interval",
    "slices",
    "threshold_quantize",
    "threshold_quantize_reference",
    "ulp",
]

Window = tuple[float, float]

_LN2 = math.log(2.0)
_LOG2_T_LIMIT = 32  # thresholds beyond 2^+-32 act as that; their gradient passes
_SLICE = 1 << 17  # elements per thread and pass: the slices of one step share the L2 cache, calls stay few

# (g, v, low, high) -> g where low < v < high, else 0: the one vectorized comparison of eager CPU torch.
# Bool masks and torch.where take five times as long, fake_quantize_per_tensor_affine thirty times.
_select = torch.ops.aten.hardtanh_backward.grad_input
_MAGIC = {torch.float32: 1.5 * 2.0**23, torch.float64: 1.5 * 2.0**52}
_LEAN_CODES = 1 << 22  # codes below this round exactly by _MAGIC
_LEAN_EXPONENTS = 96  # steps for which _MAGIC steps are normal float32 numbers


def threshold_quantize(
    x: Tensor,
    log2_t: Tensor,
    *,
    qmin: int,
    qmax: int,
    point: int,
    rounding: Rounding = Rounding.HALF_EVEN,
    rectify: bool = False,
) -> Tensor:
    """Quantize to a power-of-two grid whose threshold is trained (TQT, sec. 3.3).

    s = 2^(ceil(log2_t) - point), v = x / s, r = round(v), y = clip(r, qmin, qmax) * s.
    Backward, for g = dL/dy:

        ============================  =====  =======================================
        r                             dL/dx  dL/dlog2_t, summed over the elements
        ============================  =====  =======================================
        r < qmin                      0      g * s * ln2 * qmin
        qmin <= r <= qmax             g      g * s * ln2 * (r - v)
        r > qmax                      0      g * s * ln2 * qmax
        ============================  =====  =======================================

    Elements of x that are not finite add nothing to dL/dlog2_t; NaN stays NaN in y, with 0 in dL/dx.
    Only x is kept for backward.

    Args:
        x: float tensor of any shape and memory format; half-precision types are computed in float32.
        log2_t: log2 of the clipping threshold, one element; acts within [-32, 32], NaN makes y NaN.
        qmin, qmax: first and last code.
        point: log2 of the codes in one threshold: bits - 1 signed, bits unsigned.
        rounding: ties as named; HALF_EVEN is the published rule and the fast one.
        rectify: quantize relu(x) without storing it: same values and gradients, 0 in dL/dx where x <= 0.
    Returns:
        y, float32 (float64 for float64 x), shape and memory format of x.
    """
    if eager_cpu(x) and _lean_rounds(rounding, qmin, qmax):
        y = _apply(_Lean, x, log2_t, _host_scale(float(log2_t.detach()), point), qmin, qmax, rectify, None)
    else:
        y = _apply(_Formula, x, log2_t, qmin, qmax, point, rounding, rectify)
    return y


def threshold_quantize_reference(
    x: Tensor,
    log2_t: Tensor,
    *,
    qmin: int,
    qmax: int,
    point: int,
    rounding: Rounding = Rounding.HALF_EVEN,
    rectify: bool = False,
) -> Tensor:
    """The table of :func:`threshold_quantize`, one operation per symbol: slow, obvious, on every device."""
    return _apply(_Formula, x, log2_t, qmin, qmax, point, rounding, rectify)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    return function.apply(*args)  # type: ignore[no-untyped-call, no-any-return]  # torch leaves it untyped


def _scale(log2_t: Tensor, point: int, dtype: torch.dtype) -> Tensor:
    """s = 2^(ceil(log2_t) - point), exact, 0-dim; a NaN threshold stays NaN."""
    exponent = log2_t.detach().reshape(()).ceil().to(torch.float32).clamp(-_LOG2_T_LIMIT, _LOG2_T_LIMIT)
    # Always a normal number, hence fewer operations than pow2; inductor repeats them inside every fused loop.
    bits = (exponent + (127 - point)).to(torch.int32) << 23
    return (bits.view(torch.float32) + 0 * exponent).to(dtype)


def _host_scale(log2_t: float, point: int) -> float:
    """The same as a float."""
    if math.isnan(log2_t):
        return math.nan
    return math.ldexp(1.0, math.ceil(min(max(log2_t, -_LOG2_T_LIMIT), _LOG2_T_LIMIT)) - point)


class _Formula(torch.autograd.Function):
    """The table, recomputed from x in backward; torch.compile fuses each side into one loop."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log2_t: Tensor,
        qmin: int,
        qmax: int,
        point: int,
        rounding: Rounding,
        rectify: bool,
    ) -> Tensor:
        s = _scale(log2_t, point, compute_dtype(x))
        ctx.save_for_backward(x, s)
        ctx.log2_t = log2_t.shape, log2_t.dtype
        ctx.grid = qmin, qmax, rounding, rectify
        z = x.to(s.dtype)  # a 0-dim s would not promote it
        v = (z.relu() if rectify else z) * s.reciprocal()  # exact: s is a power of two
        return round_to(v, rounding).clamp(qmin, qmax) * s

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, s = ctx.saved_tensors
        dx, dlog2_t = _formula_backward(g, x, s, *ctx.grid)
        shape, dtype = ctx.log2_t
        return dx, dlog2_t.to(dtype).reshape(shape), None, None, None, None, None


def _inside(v: Tensor, r: Tensor, qmin: int, qmax: int, window: Window | None) -> Tensor:
    """Where the gradient passes: v in the open window, or its code r in the grid."""
    if window is None:
        return (r >= qmin) & (r <= qmax)
    return (v > window[0]) & (v < window[1])


def _formula_backward(
    g: Tensor,
    x: Tensor,
    s: Tensor,
    qmin: int,
    qmax: int,
    rounding: Rounding,
    rectify: bool,
    window: Window | None = None,
) -> tuple[Tensor, Tensor]:
    z = x.to(s.dtype)
    z = z.relu() if rectify else z
    v = z * s.reciprocal()
    r = round_to(v, rounding)
    inside = _inside(v, r, qmin, qmax, window)
    c = torch.where(inside, r - v, r.clamp(qmin, qmax))
    c = torch.where(z.isfinite(), c, 0.0)
    passed = inside & (x > 0) if rectify else inside
    return torch.where(passed, g, 0.0).to(x.dtype), (g * c).sum() * (s * _LN2)


def eager_cpu(x: Tensor) -> bool:
    """Plain dense CPU tensors outside tracing; anything else takes a form that never reads a value."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and _dense_format(x) is not None
        and torch._C._get_tracing_state() is None
    )


def _lean_rounds(rounding: Rounding, qmin: int, qmax: int) -> bool:
    return rounding is Rounding.HALF_EVEN and max(-qmin, qmax) < _LEAN_CODES


def _dense_format(x: Tensor) -> torch.memory_format | None:
    if x.is_contiguous():
        return torch.contiguous_format
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return None


def slices(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """Views of at most ``size`` elements that cover x in memory order."""
    return torch.split(x.as_strided((x.numel(),), (1,)), size) if x.numel() > size else (x,)


def open_interval(qmin: int, qmax: int, dtype: torch.dtype) -> Window:
    """Strict bounds on v for qmin <= round_half_even(v) <= qmax, as numbers of ``dtype``.

    >>> open_interval(1, 3, torch.float32)  # the ties 0.5 and 3.5 go to the even codes 0 and 4
    (0.5, 3.5)
    >>> open_interval(0, 2, torch.float32) == (-0.5 - 2.0**-24, 2.5 + 2.0**-22)
    True
    """
    low, high = qmin - 0.5, qmax + 0.5
    # A tie goes to the even code: the bound itself is inside if the code beside it is even.
    low -= ulp(low, dtype) if qmin % 2 == 0 else 0.0
    high += ulp(high, dtype) if qmax % 2 == 0 else 0.0
    return low, high


def ulp(v: float, dtype: torch.dtype) -> float:
    """The distance from v to the next number of ``dtype`` that is farther from 0."""
    return math.ldexp(1.0, math.frexp(v)[1] - (53 if dtype == torch.float64 else 24))


_cached_interval = functools.cache(open_interval)  # not under torch.compile, which objects to caches


@functools.cache
def _one(dtype: torch.dtype) -> Tensor:
    return torch.ones((), dtype=dtype)


class _Lean(torch.autograd.Function):
    """The table times s, so that no pass is spent on v, as vectorized passes over slices that stay in cache.

    s is read on the host: on the CPU that waits for nothing, and scalar operands need fewer passes.
    ``log2_t`` is None where nothing is trained.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log2_t: Tensor | None,
        s: float,
        qmin: int,
        qmax: int,
        rectify: bool,
        window: Window | None,
    ) -> Tensor:
        dtype = compute_dtype(x)
        ctx.save_for_backward(x)
        ctx.log2_t = None if log2_t is None else (log2_t.shape, log2_t.dtype)
        ctx.grid = s, qmin, qmax, rectify, window
        # Adding 1.5 * 2^23 steps leaves no bits below one step: the adder itself rounds, half to even.
        magic = s * _MAGIC[dtype]
        low, high = s * (max(qmin, 0) if rectify else qmin), s * qmax  # relu comes free with the clip
        y = torch.empty_like(x, dtype=dtype)
        size = _SLICE * torch.get_num_threads()
        for x_i, y_i in zip(slices(x, size), slices(y, size), strict=True):
            torch.add(x_i.to(dtype), magic, out=y_i)
            y_i.sub_(magic).clamp_(low, high)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        s, qmin, qmax, rectify, window = ctx.grid
        dtype = g.dtype
        magic = s * _MAGIC[dtype]
        low, high = s * (max(qmin, 0) if rectify else qmin), s * qmax
        first, last = (s * bound for bound in window or _cached_interval(qmin, qmax, dtype))
        first = 0.0 if rectify else first
        train_threshold = ctx.needs_input_grad[1]
        one = _one(dtype)
        g = g.contiguous(memory_format=_dense_format(x) or torch.contiguous_format)
        dx = torch.empty_like(x, dtype=dtype)
        size = _SLICE * torch.get_num_threads()
        xs, gs, dxs = slices(x, size), slices(g, size), slices(dx, size)
        inside, c = torch.empty_like(xs[0], dtype=dtype), torch.empty_like(xs[0], dtype=dtype)
        total = 0.0
        for x_i, g_i, dx_i in zip(xs, gs, dxs, strict=True):
            x_i = x_i.to(dtype)
            if not train_threshold:
                _select(g_i, x_i, first, last, grad_input=dx_i)
                total += float(x_i.sum())  # only to notice a NaN, which is outside
                continue
            if x_i.shape != c.shape:
                inside, c = inside[: x_i.numel()], c[: x_i.numel()]
            _select(one, x_i, first, last, grad_input=inside)
            torch.mul(g_i, inside, out=dx_i)
            torch.add(x_i, magic, out=c)
            # s * c = y - x inside, y outside; an infinite x times 0 is NaN and shows in the sum.
            c.sub_(magic).clamp_(low, high).addcmul_(x_i, inside, value=-1)
            total += float(c.mul_(g_i).sum())  # not torch.dot: the cascade of sum keeps two more digits
        if not math.isfinite(total):
            step = torch.tensor(s, dtype=dtype)
            dx, exact = _formula_backward(g, x, step, qmin, qmax, Rounding.HALF_EVEN, rectify, window)
            total = float(exact) / _LN2
        dx = dx.to(x.dtype)
        if not train_threshold:
            return dx, None, None, None, None, None, None
        shape, log2_t_dtype = ctx.log2_t
        return dx, torch.full(shape, total * _LN2, dtype=log2_t_dtype), None, None, None, None, None


def fake_quantize(
    x: Tensor,
    exponent: Tensor,
    *,
    qmin: int,
    qmax: int,
    rounding: Rounding = Rounding.HALF_EVEN,
    window: Window | None = None,
) -> Tensor:
    """Quantize to a given power-of-two grid: y = clip(round(x / s), qmin, qmax) * s with s = 2^exponent.

    The gradient passes where qmin <= round(x / s) <= qmax, or where x / s is in ``window``; it is 0 elsewhere,
    NaN included.

    Args:
        x: float tensor of any shape and memory format; half-precision types are computed in float32.
        exponent: log2 of the step; integers, 0-dim or broadcastable against x (one per channel).
        qmin, qmax: first and last code.
        rounding: ties as named; HALF_EVEN with one exponent is the fast one.
        window: the open interval of x / s, in codes, that passes gradient.
    Returns:
        y, float32 (float64 for float64 x), shape of x.
    """
    if exponent.numel() > 1 or not eager_cpu(x):
        s = whole_pow2(exponent, compute_dtype(x))
        return _apply(_Static, x, s, qmin, qmax, rounding, window)
    step = math.ldexp(1.0, int(exponent.detach()))
    if _lean_rounds(rounding, qmin, qmax) and 2.0**-_LEAN_EXPONENTS <= step <= 2.0**_LEAN_EXPONENTS:
        return _apply(_Lean, x, None, step, qmin, qmax, False, window)
    s = torch.tensor(step, dtype=compute_dtype(x))  # what pow2 gives, in one operation
    return _apply(_Static, x, s, qmin, qmax, rounding, window)


class _Static(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, s: Tensor, qmin: int, qmax: int, rounding: Rounding, window: Window | None
    ) -> Tensor:
        ctx.save_for_backward(x, s)
        ctx.grid = qmin, qmax, rounding, window
        return round_to(x.to(s.dtype) / s, rounding).clamp(qmin, qmax) * s

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, s = ctx.saved_tensors
        qmin, qmax, rounding, window = ctx.grid
        v = x.to(s.dtype) / s
        inside = _inside(v, round_to(v, rounding), qmin, qmax, window)
        return torch.where(inside, g, 0.0).to(x.dtype), None, None, None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.fn = fn
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None]:
        return ctx.fn(g), None


def gate_backward(x: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``x`` unchanged; its gradient is ``fn`` of the incoming one.

    Args:
        x: any shape and dtype.
        fn: called once in backward with the gradient; must keep shape and dtype.
    """
    return _apply(_Gate, x, fn)
