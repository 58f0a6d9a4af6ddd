"""Pool windows as slices of one padded tensor, and the max pool in integers, forward and backward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lowbit.modules.carrier import Carrier, apply
from lightning_lowbit.modules.pooling import as_tuple

__all__ = ["Windows", "integer_max_pool", "zeros_for"]


@dataclass(frozen=True)
class Windows:
    """Where the windows of a pool lie: per spatial axis the input's size, kernel, stride, padding and dilation."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False

    @property
    def count(self) -> tuple[int, ...]:
        """Windows along each axis, as torch counts them."""
        return tuple(map(self._count, *self._axes()))

    @property
    def overlapping(self) -> bool:
        return any(d * (k - 1) + 1 > s for k, s, d in zip(self.kernel, self.stride, self.dilation, strict=True))

    def _axes(self) -> tuple[tuple[int, ...], ...]:
        return self.size, self.kernel, self.stride, self.padding, self.dilation

    def _count(self, n: int, k: int, s: int, p: int, d: int) -> int:
        span = n + 2 * p - d * (k - 1) - 1
        windows = (-(-span // s) if self.ceil_mode else span // s) + 1
        if self.ceil_mode and (windows - 1) * s >= n + p:  # a window may not begin in the padding at the end
            windows -= 1
        return windows

    def padded(self, x: Tensor, value: int) -> Tensor:
        """``x`` with room for every window; a view where none is needed."""
        ends = [
            max((w - 1) * s + d * (k - 1) + 1 - n - p, 0)
            for (n, k, s, p, d), w in zip(zip(*self._axes(), strict=True), self.count, strict=True)
        ]
        room = [side for p, end in reversed(list(zip(self.padding, ends, strict=True))) for side in (p, end)]
        return F.pad(x, room, value=value) if any(room) else x

    def cropped(self, x: Tensor) -> Tensor:
        """The inverse of ``padded``."""
        for axis, (n, p) in enumerate(zip(self.size, self.padding, strict=True), x.dim() - len(self.size)):
            x = x.narrow(axis, p, n)
        return x

    def views(self, padded: Tensor) -> Iterator[Tensor]:
        """For each place in the kernel, row-major, the values at that place of all windows."""
        for place in itertools.product(*map(range, self.kernel)):
            view = padded
            axes = range(padded.dim() - len(self.size), padded.dim())
            for axis, i, s, d, w in zip(axes, place, self.stride, self.dilation, self.count, strict=True):
                view = view.narrow(axis, i * d, (w - 1) * s + 1)
                view = view[(*[slice(None)] * axis, slice(None, None, s))]
            yield view


def integer_max_pool(dims: int) -> Any:
    """F.max_pool1d or F.max_pool2d on a carrier: the exponent stays, ties go to the first value of a window."""

    def pool(
        input: Carrier, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Any:  # fmt: skip
        kernel = as_tuple(kernel_size, dims)
        if return_indices or input.dim() <= dims or math.prod(kernel) > 256:
            return NotImplemented
        strides = kernel if stride in (None, (), []) else as_tuple(stride, dims)
        windows = Windows(
            tuple(input.shape[-dims:]), kernel, strides, as_tuple(padding, dims), as_tuple(dilation, dims), ceil_mode
        )
        return apply(_MaxPool, input, windows)

    return pool


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Carrier, windows: Windows) -> Tensor:
        codes = x.payload
        if any(windows.padding) or windows.ceil_mode:
            codes = codes.to(torch.int16)  # padding must lie below -128, which an input may hold
        best: Tensor | None = None
        index = None
        for place, view in enumerate(windows.views(windows.padded(codes, -129))):
            if best is None or index is None:
                best, index = view.clone(), torch.zeros_like(view, dtype=torch.uint8)
                continue
            index.masked_fill_(view > best, place)  # strict: the first of equals stays
            best = torch.maximum(best, view)
        assert best is not None
        ctx.windows, ctx.origin = windows, x.origin
        ctx.save_for_backward(index)
        return Carrier(best.to(torch.int8), x.exponent, x.origin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        windows: Windows = ctx.windows
        err = grad.payload if isinstance(grad, Carrier) else grad
        # Errors of overlapping windows add up; whoever made the tensor rounds the sum once.
        whole = zeros_for(err, windows, torch.int32 if windows.overlapping and err.dtype is torch.int8 else err.dtype)
        for place, view in enumerate(windows.views(whole)):
            view.add_(err * (index == place))
        whole = windows.cropped(whole)
        return Carrier(whole, grad.exponent, ctx.origin) if isinstance(grad, Carrier) else whole, None


def zeros_for(err: Tensor, windows: Windows, dtype: torch.dtype) -> Tensor:
    """Zeros where the errors of a pool go, with room for every window, in the memory format of its output."""
    shape = (*err.shape[: -len(windows.size)], *windows.size)
    channels_last = err.dim() == 4 and err.is_contiguous(memory_format=torch.channels_last)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    return windows.padded(torch.zeros(shape, dtype=dtype, device=err.device).contiguous(memory_format=memory), 0)
