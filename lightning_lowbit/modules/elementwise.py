"""Operations without weights: rectifiers, sums, concats and average pools, as modules a scheme can answer for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.modules.base import LowBitModule
from lightning_lowbit.modules.quantizer import Quantizer, on
from lightning_lowbit.numerics.grid import Grid

__all__ = ["LowBitAdd", "LowBitAfter", "LowBitAvgPool", "LowBitCat", "LowBitOp", "LowBitReLU", "make_op"]


class LowBitOp(LowBitModule):
    """An operation with a quantizer on its result, and one on every operand that arrives in float.

    Slots: ``lowbit_output``, ``lowbit_operand_0`` ...; an operand quantized where it was made has none here.
    """

    lowbit_kind: Kind
    lowbit_output: Quantizer | None
    operand_grids: list[Quantizer]  # declare the grids of the operands
    replaced: nn.Module | None  # the user's module in whose place it stands

    def __init__(self) -> None:
        super().__init__()
        self.register_module("lowbit_output", None)
        self.__dict__["operand_grids"] = []
        self.__dict__["replaced"] = None

    def operand(self, index: int, x: Tensor) -> Tensor:
        return on(self._modules.get(f"lowbit_operand_{index}"), x)  # type: ignore[arg-type]  # a Quantizer by its slot

    def result_grid(self) -> Grid | None:
        """Grid of the result before any output quantizer; None while it is open."""
        return None

    def _common(self) -> list[Grid]:
        if not self.operand_grids or not all(q.ready for q in self.operand_grids):
            return []
        return [q.grid() for q in self.operand_grids]


class LowBitReLU(LowBitOp):
    """max(x, 0), at most ``ceiling`` (6 for ReLU6); rectifier and quantizer are one step."""

    lowbit_kind = Kind.RELU

    def __init__(self, ceiling: float | None = None) -> None:
        super().__init__()
        self.ceiling = ceiling

    def op(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.ceiling is None else torch.clamp(x, 0.0, self.ceiling)

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        if self.lowbit_output is None:
            return self.scheme.compute(self, x)
        if self.ceiling is not None:
            x = torch.clamp(x, max=self.ceiling)
        return self.lowbit_output(x, True)  # type: ignore[no-any-return]


class LowBitAdd(LowBitOp):
    """a + b of two tensors on one step: their codes add."""

    lowbit_kind = Kind.ADD

    def op(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def forward(self, input: Tensor, other: Tensor) -> Tensor:  # noqa: A002  # the name that torch.add uses
        y = self.scheme.compute(self, self.operand(0, input), self.operand(1, other))
        return on(self.lowbit_output, y)

    def result_grid(self) -> Grid | None:
        grids = self._common()
        if not grids or any(not isinstance(grid.exponent, int) for grid in grids):
            return None
        low, high = sum(grid.qmin for grid in grids), sum(grid.qmax for grid in grids)
        return _holding(low, high, min(grid.exponent for grid in grids))  # type: ignore[type-var, arg-type]


class LowBitCat(LowBitOp):
    """Tensors of one grid, side by side."""

    lowbit_kind = Kind.CAT

    def op(self, tensors: Sequence[Tensor], dim: int) -> Tensor:
        return torch.cat(list(tensors), dim)

    def forward(self, tensors: Sequence[Tensor], dim: int = 0, axis: int | None = None) -> Tensor:
        tensors = [self.operand(index, x) for index, x in enumerate(tensors)]
        return on(self.lowbit_output, self.scheme.compute(self, tensors, dim if axis is None else axis))

    def result_grid(self) -> Grid | None:
        grids = self._common()
        return grids[0] if grids else None


class LowBitAvgPool(LowBitOp):
    """Mean over a window as sum and one exact division: round(sum * 2^f / n) with the output quantizer's tie rule.

    Float arithmetic does that exactly: the sum of codes is below 2^24, its quotient is rounded once, and a
    quotient half way between two codes is a dyadic number that float32 holds. torch's own pools divide twice
    (adaptive) or by a reciprocal.

    Args:
        function: a torch.nn.functional pool, or torch.mean.
        settings: keyword arguments of every call (those of a pooling module).
    """

    lowbit_kind = Kind.AVG_POOL

    def __init__(self, function: Callable[..., Tensor], settings: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.function, self.settings = function, settings or {}

    def op(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs = {**self.settings, **kwargs}
        if not self.switch.folding:
            return self.function(x, *args, **kwargs)
        if self.function is torch.mean:
            return _mean(x, *args, **kwargs)
        window = _window(self.function, x, args, kwargs)
        return self.function(x, *args, **kwargs) if window is None else _pool(x, *window)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return on(self.lowbit_output, self.scheme.compute(self, self.operand(0, x), *args, **kwargs))

    def result_grid(self) -> Grid | None:
        return None if self.lowbit_output is None or not self.lowbit_output.ready else self.lowbit_output.grid()


class LowBitAfter(LowBitOp):
    """Stands behind a float function that has a result on a grid: only the output quantizer."""

    lowbit_kind = Kind.ACTIVATION

    def op(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return on(self.lowbit_output, x)


def make_op(kind: Kind, target: Any) -> LowBitOp:
    """The op that takes the place of a call: of a module (settings from it), a function or a method's name."""
    if kind is Kind.ADD:
        return LowBitAdd()
    if kind is Kind.CAT:
        return LowBitCat()
    if kind is Kind.ACTIVATION:
        return LowBitAfter()
    if kind is Kind.RELU:
        return LowBitReLU(6.0 if isinstance(target, nn.ReLU6) or target is F.relu6 else None)
    if isinstance(target, nn.Module):
        name = type(target).__name__
        function = getattr(F, _snake(name))
        fields = ("output_size",) if "Adaptive" in name else ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
        return LowBitAvgPool(function, {f: getattr(target, f) for f in fields})
    return LowBitAvgPool(torch.mean if target == "mean" else target)


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    axes = [dim] if isinstance(dim, int) else list(dim)
    return x.sum(dim=axes, keepdim=keepdim) / math.prod(x.shape[axis] for axis in axes)


def _window(function: Any, x: Tensor, args: tuple[Any, ...], settings: dict[str, Any]) -> tuple[Any, ...] | None:
    """Kernel, stride, padding, ceil_mode, count_include_pad of a pool, each a tuple over the spatial axes."""
    dims = int(function.__name__[-2])
    if function.__name__.startswith("adaptive"):
        size = _tuple(args[0] if args else settings["output_size"], dims)
        have = tuple(x.shape[-dims:])
        size = tuple(h if s is None else s for s, h in zip(size, have, strict=True))
        if any(h % s for s, h in zip(size, have, strict=True)):
            return None
        kernel = tuple(h // s for s, h in zip(size, have, strict=True))
        return kernel, kernel, (0,) * dims, False, True
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given = {**dict(zip(names, args, strict=False)), **settings}
    if given.get("divisor_override") is not None:
        return None
    kernel = _tuple(given["kernel_size"], dims)
    stride = given.get("stride")
    return (
        kernel, _tuple(stride, dims) if stride else kernel, _tuple(given.get("padding", 0), dims),
        given.get("ceil_mode", False), given.get("count_include_pad", True),
    )  # fmt: skip


def _pool(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], ceil_mode: bool, include: bool
) -> Tensor:
    """Window sums, then one division by the number of elements that count."""
    dims = len(kernel)
    if not any(padding) and tuple(x.shape[-dims:]) == kernel:  # global: a plain sum keeps any memory format
        return x.sum(dim=list(range(-dims, 0)), keepdim=True) / math.prod(kernel)
    sums = _window_sums(x, kernel, stride, padding, ceil_mode)
    if not any(padding) and not ceil_mode:
        return sums / math.prod(kernel)
    ones = x.new_ones((1, 1, *x.shape[-dims:]))
    if include:
        pad = [p for size in reversed(padding) for p in (size, size)]
        ones, padding = F.pad(ones, pad, value=1.0), (0,) * dims
    return sums / _window_sums(ones, kernel, stride, padding, ceil_mode)


def _window_sums(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], ceil_mode: bool
) -> Tensor:
    if len(kernel) == 3:
        return F.avg_pool3d(x, kernel, stride, padding, ceil_mode, True, 1)
    if len(kernel) == 1:  # avg_pool1d has no divisor_override
        return F.avg_pool2d(x[..., None, :], (1, *kernel), (1, *stride), (0, *padding), ceil_mode, True, 1)[..., 0, :]
    return F.avg_pool2d(x, kernel, stride, padding, ceil_mode, True, 1)  # type: ignore[arg-type]  # stubs want ints


def _tuple(value: Any, dims: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims


def _holding(low: int, high: int, exponent: int) -> Grid:
    """The smallest format that holds codes low..high."""
    if low < 0:
        return Grid(bits=max(high.bit_length(), (-low - 1).bit_length()) + 1, exponent=exponent)
    return Grid(bits=max(high.bit_length(), 1), exponent=exponent, signed=False)
