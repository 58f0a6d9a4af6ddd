"""Operations without weights as modules: rectifiers, sums, concats and average pools."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.modules.base import LowBitModule
from lightning_lowbit.modules.lowering import Builder, refuse
from lightning_lowbit.modules.pooling import WINDOW, kind_of, window_sums
from lightning_lowbit.modules.quantizer import Quantizer, on
from lightning_lowbit.numerics.grid import Grid

__all__ = ["LowBitAdd", "LowBitAfter", "LowBitAvgPool", "LowBitCat", "LowBitOp", "LowBitReLU", "make_op"]


_MOST_APART = 32  # bits between the steps of two tensors whose sum still has a format


class LowBitOp(LowBitModule):
    """An operation with a quantizer on its result, and one on every operand that arrives in float.

    Slots: ``lowbit_output``, ``lowbit_operand_0`` ...; an operand quantized where it was made has none here.
    """

    lowbit_kind: Kind
    lowbit_output: Quantizer | None
    lowbit_accumulator: Quantizer | None
    lowbit_error: Quantizer | None
    operand_grids: list[Quantizer]  # declare the grids of the operands
    replaced: nn.Module | None  # the user's module in whose place it stands

    def __init__(self) -> None:
        super().__init__()
        self.register_module("lowbit_output", None)
        self.register_module("lowbit_accumulator", None)
        self.register_module("lowbit_error", None)
        self.overwrites = False
        self.__dict__["operand_grids"] = []
        self.__dict__["replaced"] = None

    def op(self, *operands: Any, **settings: Any) -> Tensor:
        """The float operation, bit for bit what the user's code would do."""
        raise NotImplementedError

    def _run(self, first: Tensor, rest: Callable[[Tensor], Tensor]) -> Tensor:
        """``rest`` of ``first``; where the user's code works in place and reads the tensor again, into it."""
        if not self.overwrites:
            return rest(first)
        result = rest(first.clone())  # the backward of what is done here must find its operand unchanged
        written = first.copy_(result)
        return written if written.dtype == result.dtype else result  # a sum that needs more bits than its operand had

    def lower(self, build: Builder, *operands: Any, **settings: Any) -> Any:
        """The forward of evaluation as integer operations."""
        raise refuse(self.path, f"{type(self).__name__} does not say what its integers are", "Define lower() on it.")

    def snapped(self, build: Builder, index: int, x: Any) -> Any:
        """``operand`` in a program."""
        return build.snap(x, self._modules.get(f"lowbit_operand_{index}"))  # type: ignore[arg-type]  # a Quantizer

    def operand(self, index: int, x: Any) -> Any:
        if not isinstance(x, Tensor):  # an argument of forward that was a number this time
            return x
        quantizer: Any = self._modules.get(f"lowbit_operand_{index}")
        return on(quantizer, x)

    def result_grid(self) -> Grid | None:
        """Grid of the result before any output quantizer; None while it is open."""
        return None

    def _common(self) -> list[Grid]:
        if not self.operand_grids or not all(q.ready for q in self.operand_grids):
            return []
        return [q.grid() for q in self.operand_grids]


class LowBitReLU(LowBitOp):
    """max(x, 0), at most 6 for ReLU6; rectifier and quantizer are one step."""

    lowbit_kind = Kind.RELU

    def __init__(self, six: bool = False) -> None:
        super().__init__()
        self.six = six

    def op(self, x: Tensor) -> Tensor:
        return F.relu6(x) if self.six else F.relu(x)

    def forward(self, input: Tensor, inplace: bool = False) -> Tensor:  # torch's name for it
        return self._run(input, self._rectify)

    def lower(self, build: Builder, input: Any, inplace: bool = False) -> Any:
        return build.snap(input, self.lowbit_output, True, 6.0 if self.six else None)

    def _rectify(self, x: Tensor) -> Tensor:
        if not self.switch.folding:
            return self.op(x)
        if self.lowbit_output is None:
            return self.scheme.compute(self, x)
        if self.six:
            x = torch.clamp(x, max=6.0)
        return self.lowbit_output(x, True)  # type: ignore[no-any-return]


class LowBitAdd(LowBitOp):
    """a + b: on one step codes add; of two steps that are powers of two the coarser tensor's are shifted first."""

    lowbit_kind = Kind.ADD

    def op(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        return self._run(input, lambda a: self._add(a, other))

    def _add(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.switch.folding:
            return self.op(a, b)
        return on(self.lowbit_output, self.scheme.compute(self, self.operand(0, a), self.operand(1, b)))

    def lower(self, build: Builder, input: Any, other: Any) -> Any:
        return build.snap(
            build.add([self.snapped(build, i, x) for i, x in enumerate((input, other))]), self.lowbit_output
        )

    def result_grid(self) -> Grid | None:
        grids = self._common()
        if not grids or any(not isinstance(grid.exponent, int) for grid in grids):
            return None
        step = min(grid.exponent for grid in grids)  # type: ignore[type-var]  # all have one exponent
        apart = [grid.exponent - step for grid in grids]  # type: ignore[operator]
        if max(apart) > _MOST_APART:
            return None
        low = sum((grid.qmin - grid.zero_point) << n for grid, n in zip(grids, apart, strict=True))
        high = sum((grid.qmax - grid.zero_point) << n for grid, n in zip(grids, apart, strict=True))
        return _holding(low, high, step)  # type: ignore[arg-type]


class LowBitCat(LowBitOp):
    """Tensors of one grid, side by side (torch.cat) or along a new axis (torch.stack)."""

    lowbit_kind = Kind.CAT

    def __init__(self, function: Callable[..., Tensor] = torch.cat) -> None:
        super().__init__()
        self.function = function

    def op(self, tensors: Sequence[Tensor], dim: int) -> Tensor:
        return self.function(tensors, dim)

    def forward(self, tensors: Sequence[Tensor], dim: int = 0, axis: int | None = None) -> Tensor:
        dim = dim if axis is None else axis
        if not self.switch.folding:
            return self.op(tensors, dim)
        tensors = [self.operand(index, x) for index, x in enumerate(tensors)]
        return on(self.lowbit_output, self.scheme.compute(self, tensors, dim))

    def lower(self, build: Builder, tensors: Sequence[Any], dim: int = 0, axis: int | None = None) -> Any:
        parts = [self.snapped(build, index, x) for index, x in enumerate(tensors)]
        joined = build.concat(parts, dim if axis is None else axis, self.function is torch.stack)
        return build.snap(joined, self.lowbit_output)

    def result_grid(self) -> Grid | None:
        return max(self._common(), key=lambda grid: grid.bits, default=None)


class LowBitAvgPool(LowBitOp):
    """Mean over a window as sum and one exact division: round(sum * 2^f / n) with the output quantizer's tie
    rule.

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
        self.kind = None if function is torch.mean else kind_of(function)

    def op(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.switch.folding:
            return self.function(x, *args, **{**self.settings, **kwargs})
        sums, count = self.sums(x, *args, **kwargs)
        return sums / count

    def sums(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, int | Tensor]:
        """The sums of the windows, and how many values each is of."""
        kwargs = {**self.settings, **kwargs}
        return _sums(x, *args, **kwargs) if self.kind is None else window_sums(self.kind, x, *args, **kwargs)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.switch.folding:
            return self.op(input, *args, **kwargs)
        return on(self.lowbit_output, self.scheme.compute(self, self.operand(0, input), *args, **kwargs))

    def lower(self, build: Builder, input: Any, *args: Any, **kwargs: Any) -> Any:
        sums = build.pool(self.snapped(build, 0, input), self.kind, *args, **{**self.settings, **kwargs})
        return build.snap(sums, self.lowbit_output)

    def result_grid(self) -> Grid | None:
        return None if self.lowbit_output is None or not self.lowbit_output.ready else self.lowbit_output.grid()


class LowBitAfter(LowBitOp):
    """Stands behind a float function that has a result on a grid: only the output quantizer."""

    lowbit_kind = Kind.ACTIVATION

    def op(self, x: Tensor) -> Tensor:
        return x

    def forward(self, input: Tensor) -> Tensor:
        return on(self.lowbit_output, input)

    def lower(self, build: Builder, input: Any) -> Any:
        return build.snap(input, self.lowbit_output)


def make_op(kind: Kind, target: Any, overwrites: bool = False) -> LowBitOp:
    """The op that takes the place of a call: of a module (settings from it), a function or a method's name.

    Args:
        overwrites: the user's code works in place, and reads the first operand again.
    """
    op = _new_op(kind, target)
    op.overwrites = overwrites
    return op


def _new_op(kind: Kind, target: Any) -> LowBitOp:
    if kind is Kind.ADD:
        return LowBitAdd()
    if kind is Kind.CAT:
        return LowBitCat(torch.stack if target is torch.stack else torch.cat)
    if kind is Kind.ACTIVATION:
        return LowBitAfter()
    if kind is Kind.RELU:
        return LowBitReLU(isinstance(target, nn.ReLU6) or target is F.relu6)
    if isinstance(target, nn.Module):
        name = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(target).__name__).lstrip("_")
        fields = [f for f in (*WINDOW, "output_size") if hasattr(target, f)]
        return LowBitAvgPool(getattr(F, name), {f: getattr(target, f) for f in fields})
    return LowBitAvgPool(torch.mean if target == "mean" else target)


def _sums(
    x: Tensor, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None, axis: Any = None
) -> tuple[Tensor, int | Tensor]:
    """What torch.mean divides, and by what."""
    dim = dim if axis is None else axis
    axes = list(range(x.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    return x.sum(dim=axes, keepdim=keepdim, dtype=dtype), math.prod([x.shape[axis] for axis in axes])


def _holding(low: int, high: int, exponent: int) -> Grid:
    """The smallest format that holds codes low..high."""
    if low < 0:
        return Grid(bits=max(high.bit_length(), (-low - 1).bit_length()) + 1, exponent=exponent)
    return Grid(bits=max(high.bit_length(), 1), exponent=exponent, signed=False)
