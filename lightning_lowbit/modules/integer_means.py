"""Means over axes and windows in integers: sum, one exact division, one rounding; and their backward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_lowbit.kernels import bit_width
from lightning_lowbit.modules.block import BlockRange
from lightning_lowbit.modules.carrier import Carrier, apply, carry, is_codes
from lightning_lowbit.modules.elementwise import LowBitAvgPool
from lightning_lowbit.modules.integer_ops import lower_operands
from lightning_lowbit.modules.integer_pooling import Windows, zeros_for
from lightning_lowbit.modules.integer_rounding import error_codes, lower_carried, lower_entry
from lightning_lowbit.modules.lowering import Builder, Codes, Snap
from lightning_lowbit.modules.pooling import WINDOW, as_tuple
from lightning_lowbit.numerics.niti_rules import PAYLOAD_BITS
from lightning_lowbit.numerics.rounding import Rounding, divide_rounded

__all__ = ["integer_mean", "lower_mean"]


class _Mean(Protocol):
    """A linear map: ``sums`` of some of the values each, over ``count`` of them; ``spread`` is its transpose."""

    @property
    def count(self) -> int: ...

    def sums(self, x: Tensor) -> Tensor: ...

    def spread(self, err: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class _OverAxes:
    shape: torch.Size
    axes: tuple[int, ...]
    keepdim: bool

    @property
    def count(self) -> int:
        return math.prod(self.shape[axis] for axis in self.axes)

    def sums(self, x: Tensor) -> Tensor:
        return x.sum(self.axes, keepdim=self.keepdim, dtype=torch.int32)

    def spread(self, err: Tensor) -> Tensor:
        for axis in sorted(self.axes) if not self.keepdim else ():
            err = err.unsqueeze(axis)
        return err.expand(self.shape)


@dataclass(frozen=True)
class _OverWindows:
    windows: Windows
    count: int

    def sums(self, x: Tensor) -> Tensor:
        views = list(self.windows.views(self.windows.padded(x.to(torch.int32), 0)))
        return torch.stack(views).sum(0, dtype=torch.int32)

    def spread(self, err: Tensor) -> Tensor:
        overlapping = self.windows.overlapping and err.dtype is torch.int8
        whole = zeros_for(err, self.windows, torch.int32 if overlapping else err.dtype)
        for view in self.windows.views(whole):
            view.add_(err)
        return self.windows.cropped(whole)


def integer_mean(op: LowBitAvgPool, x: Tensor, *args: Any, **settings: Any) -> Tensor:
    """round(sum * 2^f / n), ties away from zero: exact division, and f as large as the range of the means allows.

    f is at most ceil(log2 n): means are no finer than their sums. Windows of unequal size (padding that does not
    count, adaptive sizes that do not divide) are left to float code.
    """
    if not is_codes(x):
        return op.op(x, *args, **settings)
    mean = _mean_of(op, x, args, settings)
    if mean is None:
        return op.op(x, *args, **settings)
    return apply(_MeanFn, x, op, mean)


def lower_mean(build: Builder, op: LowBitAvgPool, input: Codes, *args: Any, **settings: Any) -> Codes:
    """``integer_mean`` of evaluation; windows of unequal size are divided there as exactly, with another tie rule."""
    (x,), ranges = lower_operands(build, op, (input,)), op.lowbit_accumulator
    assert isinstance(ranges, BlockRange)
    sums, mean = build.pool(x, op.kind, *args, **{**op.settings, **settings}), None
    if x.word == 8:
        like = torch.empty([max(size, 1) for size in x.shape], device="meta")  # only its shape counts
        mean = _mean_of(op, like, args, settings)
    if mean is None:
        return lower_entry(build, sums, ranges)
    f = int(_bits_kept(x.exponent - ranges.range(), mean.count))
    return lower_carried(build, build.snap(sums, Snap(x.exponent - f, -127, 127, Rounding.HALF_AWAY)))


def _mean_of(op: LowBitAvgPool, x: Tensor, args: Any, settings: dict[str, Any]) -> _Mean | None:
    return _over_axes(x, *args, **settings) if op.kind is None else _over_windows(op, x, args, settings)


def _over_axes(x: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> _Mean:
    axes = range(x.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    return _OverAxes(x.shape, tuple(axis % x.dim() for axis in axes), keepdim)


def _over_windows(op: LowBitAvgPool, x: Tensor, args: Any, settings: dict[str, Any]) -> _Mean | None:
    assert op.kind is not None
    (dims, adaptive), given = op.kind, {**op.settings, **settings}
    size = tuple(x.shape[-dims:])
    if adaptive:
        wanted = as_tuple(args[0] if args else given["output_size"], dims)
        wanted = tuple(n if m is None else m for n, m in zip(size, wanted, strict=True))
        if any(n % m for n, m in zip(size, wanted, strict=True)):
            return None
        kernel = stride = tuple(n // m for n, m in zip(size, wanted, strict=True))
        padding, ceil_mode, divisor = (0,) * dims, False, None
    else:
        given.update(zip(WINDOW, args, strict=False))
        kernel = as_tuple(given["kernel_size"], dims)
        stride = kernel if given.get("stride") in (None, (), []) else as_tuple(given["stride"], dims)
        padding, ceil_mode = as_tuple(given.get("padding", 0), dims), bool(given.get("ceil_mode", False))
        divisor = given.get("divisor_override")
        unequal = ceil_mode or (any(padding) and not given.get("count_include_pad", True))
        if unequal and divisor is None:
            return None
    if kernel == size and not any(padding) and divisor is None:
        return _OverAxes(x.shape, tuple(range(x.dim() - dims, x.dim())), True)
    windows = Windows(size, kernel, stride, padding, (1,) * dims, ceil_mode)
    return _OverWindows(windows, math.prod(kernel) if divisor is None else divisor)


class _MeanFn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Carrier, op: LowBitAvgPool, mean: _Mean) -> Tensor:
        sums, ranges = mean.sums(x.payload), op.lowbit_accumulator

        # max|sum| <= 2^w, so the means are at most 2^(w - floor(log2 n)).
        whole = mean.count.bit_length() - 1
        assert isinstance(ranges, BlockRange)
        largest = ranges.follow(lambda: bit_width(sums) - whole + x.exponent, op.training)
        f = _bits_kept(x.exponent - largest, mean.count)
        scaled = sums.to(torch.int64) << f.clamp(min=0)
        codes = divide_rounded(scaled, mean.count << (-f).clamp(min=0), Rounding.HALF_AWAY).clamp(-127, 127)
        ctx.op, ctx.mean = op, mean
        return carry(codes.to(torch.int8), x.exponent - f, op)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        mean: _Mean = ctx.mean
        err, exponent = error_codes(grad, ctx.op, ctx.op.lowbit_error)
        bits = _fraction_bits(mean.count)
        if mean.count != 1 << bits:  # 1 / n is no power of two: keep 8 bits more, whoever made the tensor rounds
            err = divide_rounded(err.to(torch.int32) << (bits + 8), mean.count, Rounding.HALF_AWAY)
            bits += 8
        return Carrier(mean.spread(err), exponent - bits, ctx.op), None, None


def _bits_kept(above: Tensor, n: int) -> Tensor:
    """f of means of n values, in whose units their range is 2^-above."""
    return (above + PAYLOAD_BITS).clamp(max=_fraction_bits(n)).clamp(-31, 24)


def _fraction_bits(n: int) -> int:
    """ceil(log2 n)."""
    return (n - 1).bit_length()
