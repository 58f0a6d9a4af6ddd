"""Average pools as window sums and one exact division each.

torch's own pools divide by a reciprocal, or twice (adaptive): their quotients are not the rounded quotients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["WINDOW", "as_tuple", "kind_of", "pool", "window_sums"]

WINDOW = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
"""Arguments of torch's average pools, in their order."""


def kind_of(function: Callable[..., Tensor]) -> tuple[int, bool]:
    """Spatial dimensions of an average pool of torch.nn.functional, and whether it is adaptive."""
    return int(function.__name__[-2]), function.__name__.startswith("adaptive")


def pool(kind: tuple[int, bool], x: Tensor, *args: Any, **settings: Any) -> Tensor:
    """What an average pool of torch.nn.functional returns, with one division per value.

    Args:
        kind: of the function (``kind_of``).
        x: [N, C, *spatial] or [C, *spatial]; codes times a power of two, their window sums below 2^24.
        args, settings: as the function takes them.
    """
    sums, count = window_sums(kind, x, *args, **settings)
    return sums / count


def window_sums(kind: tuple[int, bool], x: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, int | Tensor]:
    """The sums of ``pool``'s windows, and how many values each is of: a tensor where that differs between them."""
    dims, adaptive = kind
    if adaptive:
        return _adaptive(x, as_tuple(args[0] if args else settings["output_size"], dims))
    given = {**dict(zip(WINDOW, args, strict=False)), **settings}
    kernel, padding = as_tuple(given["kernel_size"], dims), as_tuple(given.get("padding", 0), dims)
    stride = kernel if given.get("stride") in (None, (), []) else as_tuple(given["stride"], dims)
    return _pool(
        x, kernel, stride, padding, given.get("ceil_mode", False), given.get("count_include_pad", True),
        given.get("divisor_override"),
    )  # fmt: skip


def _pool(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], ceil_mode: bool,
    include: bool, divisor: int | None,
) -> tuple[Tensor, int | Tensor]:  # fmt: skip
    dims = len(kernel)
    if not any(padding) and tuple(x.shape[-dims:]) == kernel:  # global: a plain sum keeps any memory format
        return x.sum(dim=list(range(-dims, 0)), keepdim=True), divisor or math.prod(kernel)
    sums = _window_sums(x, kernel, stride, padding, ceil_mode)
    if divisor is not None:
        return sums, divisor
    if not any(padding) and not ceil_mode:
        return sums, math.prod(kernel)
    counts = [
        _counted(size, k, s, p, windows, include)
        for size, k, s, p, windows in zip(x.shape[-dims:], kernel, stride, padding, sums.shape[-dims:], strict=True)
    ]
    each = [
        torch.tensor(count, dtype=x.dtype, device=x.device).reshape(-1, *([1] * (dims - 1 - axis)))
        for axis, count in enumerate(counts)
    ]
    return sums, math.prod(each)


def _counted(size: int, kernel: int, stride: int, padding: int, windows: int, include: bool) -> list[int]:
    """Along one axis, how many elements of each window count; those that only ceil_mode adds never do."""
    starts = [index * stride - padding for index in range(windows)]
    if include:
        return [min(start + kernel, size + padding) - start for start in starts]
    return [min(start + kernel, size) - max(start, 0) for start in starts]


def _window_sums(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], ceil_mode: bool
) -> Tensor:
    if len(kernel) == 3:
        return F.avg_pool3d(x, kernel, stride, padding, ceil_mode, True, 1)
    if len(kernel) == 1:  # avg_pool1d has no divisor_override
        lifted = F.avg_pool2d(x[..., None, :], (1, *kernel), (1, *stride), (0, *padding), ceil_mode, True, 1)
        return lifted[..., 0, :]
    return F.avg_pool2d(x, kernel, stride, padding, ceil_mode, True, 1)


def _adaptive(x: Tensor, size: tuple[int | None, ...]) -> tuple[Tensor, int | Tensor]:
    """Windows from floor(i n / m) to ceil((i + 1) n / m), one axis after the other: sums of sums are sums."""
    counts: list[int | Tensor] = []
    for axis, wanted in zip(range(-len(size), 0), size, strict=True):
        n = x.shape[axis]
        m = n if wanted is None else wanted
        if n % m == 0:
            x = x.reshape(*x.shape[:axis], m, n // m, *x.shape[x.dim() + axis + 1 :]).sum(axis)
            counts.append(n // m)
            continue
        bounds = [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
        x = torch.cat([x.narrow(axis, low, high - low).sum(axis, keepdim=True) for low, high in bounds], axis)
        width = torch.tensor([high - low for low, high in bounds], dtype=x.dtype, device=x.device)
        counts.append(width.reshape(-1, *([1] * (-axis - 1))))
    return x, math.prod(counts)


def as_tuple(value: Any, dims: int) -> tuple[Any, ...]:
    """One value per axis."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims
