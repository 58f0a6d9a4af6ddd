"""Pools as windows of integers: sums that somebody divides once, and maxima."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_lowbit.modules.integer_pooling import Windows
from lightning_lowbit.modules.lowering import refuse
from lightning_lowbit.modules.pooling import WINDOW, as_tuple, window_sums

if TYPE_CHECKING:
    from lightning_lowbit.export.builder import Held, ProgramBuilder

__all__ = ["largest", "pooled"]

Array = np.ndarray[Any, Any]
_ADAPTIVE_WINDOW = ("output_size", "return_indices")
_MAX_WINDOW = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def pooled(build: ProgramBuilder, x: Held, kind: tuple[int, bool] | None, *args: Any, **settings: Any) -> Held:
    """Sums of an average pool's windows; their counts stand beside them until somebody divides. Means of floats."""
    if kind is None:
        return _mean(build, x, *args, **settings)
    dims, adaptive = kind
    _require_batch(build, x, dims)
    sums = _adaptive(build, x, dims, *args, **settings) if adaptive else _windows(build, x, dims, *args, **settings)
    _, count = window_sums(kind, torch.ones((1, 1, *x.shape[2:]), dtype=torch.float64), *args, **settings)
    if isinstance(count, torch.Tensor):
        each = np.broadcast_to(count.to(torch.int64).numpy(), sums.shape[2:]).copy()
        number = int(each.reshape(-1)[0])
        return _counted(build, sums, number if bool((each == number).all()) else each)
    return _counted(build, sums, count)


def _counted(build: ProgramBuilder, sums: Held, count: int | Array) -> Held:
    if isinstance(count, int) and count < 1:
        raise refuse(build.path, f"it divides by {count}", "Divide by a positive number.")
    if isinstance(count, int) and count == 1:
        return sums
    if sums.is_float:
        return build.island("div", sums, constants={"other": torch.as_tensor(count)})
    return replace(sums, count=count)


def _require_batch(build: ProgramBuilder, x: Held, dims: int) -> None:
    if len(x.shape) != dims + 2 or min(x.shape[1:]) < 0:
        raise refuse(build.path, f"it pools a tensor of shape {x.shape}", "Give it a batch of samples.")


def _windows(build: ProgramBuilder, x: Held, dims: int, *args: Any, **settings: Any) -> Held:
    given = {**dict(zip(WINDOW, args, strict=False)), **settings}
    kernel, padding = as_tuple(given["kernel_size"], dims), as_tuple(given.get("padding", 0), dims)
    stride = kernel if given.get("stride") in (None, (), []) else as_tuple(given["stride"], dims)
    shape = Windows(x.shape[2:], kernel, stride, padding, (1,) * dims, bool(given.get("ceil_mode", False)))
    return _sums(build, x, shape)


def _sums(build: ProgramBuilder, x: Held, windows: Windows) -> Held:
    shape = (*x.shape[:2], *windows.count)
    if x.is_float:
        settings = {"stride": list(windows.stride), "padding": _sides(windows), "dilation": list(windows.dilation)}
        ones = {"weight": torch.ones((x.shape[1], 1, *windows.kernel))}
        return build.island("conv", x, shape=shape, constants=ones, groups=x.shape[1], **settings)
    attributes = {"kernel": list(windows.kernel), "stride": list(windows.stride), "padding": _sides(windows)}
    n = math.prod(windows.kernel)
    fields: dict[str, Any] = {
        "low": n * min(x.low, 0),
        "high": n * max(x.high, 0),
        "exponent": x.exponent,
        "axis": x.value.axis,
    }
    return build.emit("sum_pool", [x], shape, attributes, **fields)


def _sides(windows: Windows) -> list[list[int]]:
    """Padding before and behind, so that the last window lies inside."""
    sides = []
    axes = zip(windows.size, windows.kernel, windows.stride, windows.padding, windows.dilation, strict=True)
    for (n, k, s, p, d), count in zip(axes, windows.count, strict=True):
        sides.append([p, max((count - 1) * s + d * (k - 1) + 1 - n - p, 0)])
    return sides


def _adaptive(build: ProgramBuilder, x: Held, dims: int, output_size: Any) -> Held:
    """Windows from floor(i n / m) to ceil((i + 1) n / m); where they are not regular, axis by axis."""
    wanted = [n if m is None else m for n, m in zip(x.shape[2:], as_tuple(output_size, dims), strict=True)]
    regular = [n // m if n % m == 0 else 1 for n, m in zip(x.shape[2:], wanted, strict=True)]
    if max(regular) > 1:
        x = _sums(build, x, _blocks(x, regular))
    for axis, m in enumerate(wanted, 2):
        if x.shape[axis] != m:
            x = build.concat([_sum(build, part, [axis], True) for part in _parts(build, x, axis, m)], axis)
    return x


def _parts(build: ProgramBuilder, x: Held, axis: int, m: int) -> list[Held]:
    """The windows of an adaptive pool along one axis."""
    n = x.shape[axis]
    bounds = [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
    return [build.move(x, lambda t, low=low, high=high: t.narrow(axis, low, high - low)) for low, high in bounds]  # type: ignore[misc]  # defaults bind


def _mean(
    build: ProgramBuilder, x: Held, dim: Any = None, keepdim: bool = False, dtype: Any = None, axis: Any = None
) -> Held:
    rank, dim = len(x.shape), dim if axis is None else axis
    axes = list(range(rank)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    axes = sorted(axis % rank for axis in axes)
    if any(x.shape[axis] < 0 for axis in axes):
        raise refuse(build.path, "it takes a mean over the batch", "Samples of a batch are computed one by one.")
    return _counted(build, _sum(build, x, axes, keepdim), math.prod(x.shape[axis] for axis in axes))


def _sum(build: ProgramBuilder, x: Held, axes: Sequence[int], keepdims: bool) -> Held:
    n = math.prod(x.shape[axis] for axis in axes)
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape) if keepdims or axis not in axes]
    if x.is_float:
        mean = build.island("mean", x, shape=shape, axes=list(axes), keepdims=keepdims)
        return build.island("mul", mean, constants={"other": torch.tensor(float(n))})
    fields: dict[str, Any] = {"low": n * min(x.low, 0), "high": n * max(x.high, 0), "exponent": x.exponent}
    return build.emit("sum", [x], shape, {"axes": list(axes), "keepdims": keepdims}, **fields)


def largest(build: ProgramBuilder, x: Held, dims: int, adaptive: bool, *args: Any, **settings: Any) -> Held:
    """A max pool, of integers or floats."""
    _require_batch(build, x, dims)
    given = dict(zip(_ADAPTIVE_WINDOW if adaptive else _MAX_WINDOW, args, strict=False)) | settings
    if given.get("return_indices"):
        raise refuse(build.path, "it returns the places of the largest values", "Use the values alone.")
    if adaptive:
        return _adaptive_largest(build, x, dims, given["output_size"])
    kernel = as_tuple(given["kernel_size"], dims)
    stride = kernel if given.get("stride") in (None, (), []) else as_tuple(given["stride"], dims)
    padding, dilation = (as_tuple(given.get(name, n), dims) for name, n in (("padding", 0), ("dilation", 1)))
    return _maxima(build, x, Windows(x.shape[2:], kernel, stride, padding, dilation, bool(given.get("ceil_mode"))))


def _maxima(build: ProgramBuilder, x: Held, windows: Windows) -> Held:
    attributes = {
        "kernel": list(windows.kernel), "stride": list(windows.stride), "padding": _sides(windows),
        "dilation": list(windows.dilation),
    }  # fmt: skip
    shape = (*x.shape[:2], *windows.count)
    if x.is_float:
        return build.emit("max_pool", [x], shape, attributes, dtype="float32")
    x = build.whole(x) if isinstance(x.count, np.ndarray) else x  # of equal windows' sums the largest stays that
    fields: dict[str, Any] = {"low": x.low, "high": x.high, "exponent": x.exponent, "axis": x.value.axis}
    return replace(build.emit("max_pool", [x], shape, attributes, **fields), count=x.count, precision=x.precision)


def _adaptive_largest(build: ProgramBuilder, x: Held, dims: int, output_size: Any) -> Held:
    wanted = [n if m is None else m for n, m in zip(x.shape[2:], as_tuple(output_size, dims), strict=True)]
    x = _maxima(build, x, _blocks(x, [n // m if n % m == 0 else 1 for n, m in zip(x.shape[2:], wanted, strict=True)]))
    for axis, m in enumerate(wanted, 2):
        if x.shape[axis] != m:
            kernel = [1] * dims
            found = []
            for part in _parts(build, x, axis, m):
                kernel[axis - 2] = part.shape[axis]
                found.append(_maxima(build, part, _blocks(part, kernel)))
            x = build.concat(found, axis)
    return x


def _blocks(x: Held, kernel: Sequence[int]) -> Windows:
    """Windows side by side."""
    whole = tuple(kernel)
    return Windows(x.shape[2:], whole, whole, (0,) * len(whole), (1,) * len(whole))
