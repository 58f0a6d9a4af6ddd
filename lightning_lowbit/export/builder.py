"""Writes the operations of an integer program, and proves while it does how large every integer can become."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.export.bounds import DEVICE_KINDS, bounds_after, normalize_bounds, round_fraction
from lightning_lowbit.export.carried import HELD, Carried, carried_on
from lightning_lowbit.export.moves import BATCHES, concrete, moved, moved_counts
from lightning_lowbit.export.products import geometry, product_bounds, product_shape, whole_codes
from lightning_lowbit.export.program_check import MOST
from lightning_lowbit.export.runtime import Op, Value
from lightning_lowbit.export.signs import line, signs
from lightning_lowbit.export.windows import pooled
from lightning_lowbit.modules.lowering import Snap, refuse
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.guards import FLOAT32_EXACT
from lightning_lowbit.numerics.rounding import Rounding

__all__ = ["Held", "ProgramBuilder", "smallest"]

_APART = 2**21  # floats of different integers below it differ, also divided and multiplied in float32
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Held:
    """A value of the program that is being written.

    ``count`` is what it still has to be divided by; ``word`` is the bits of the integers that the network keeps it in,
    ``precision`` that of the quotient that stands there in evaluation.
    """

    value: Value
    count: int | Array | None = None
    word: int = 0
    precision: str = "float32"

    @property
    def name(self) -> str:
        return self.value.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def is_float(self) -> bool:
        return self.value.dtype == "float32"

    @property
    def exponent(self) -> int | tuple[int, ...]:
        return self.value.exponent

    @property
    def low(self) -> int:
        return self.value.low

    @property
    def high(self) -> int:
        return self.value.high


class ProgramBuilder:
    """The `Builder` that modules write with (modules.lowering says what each function means)."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.values: dict[str, Value] = {}
        self.carried: dict[str, Carried] = {}  # by the name of a value
        self.signs: dict[str, Held] = {}  # by the name of what they are of
        self.path = ""
        self.output_size: Any = None  # what the call that is being lowered asks for

    # -- writing ---------------------------------------------------------------------------------------------------
    def input(self, shape: tuple[int, ...]) -> Held:
        return self._held(shape, dtype="float32")

    def _held(self, shape: Sequence[int], **fields: Any) -> Held:
        value = Value(f"v{len(self.values)}", tuple(shape), **fields)
        if value.dtype == "int" and max(-value.low, value.high) > MOST:
            raise refuse(
                self.path, f"its sums can reach {max(-value.low, value.high):.3g}, beyond int64",
                "Look at its weights and steps for outliers.",
            )  # fmt: skip
        self.values[value.name] = value
        return Held(value)

    def emit(
        self, kind: str, inputs: Sequence[Held], shape: Sequence[int], attributes: Mapping[str, Any] | None = None,
        constants: Mapping[str, Array | None] | None = None, **fields: Any,
    ) -> Held:  # fmt: skip
        """One operation; ``fields`` are those of its value: dtype, low, high, exponent, axis."""
        out = self._held(shape, **fields)
        kept = {name: array for name, array in (constants or {}).items() if array is not None}
        carried = carried_on(kind, attributes or {}, [self.carried.get(x.name) for x in inputs], self.path)
        if carried is not None:
            self.carried[out.name] = carried
        self.ops.append(Op(kind, self.path, tuple(x.name for x in inputs), out.name, attributes or {}, kept))
        return out

    def whole(self, x: Held) -> Held:
        """x where nothing is left to divide."""
        if x.count is not None:
            raise refuse(self.path, "it reads a mean that nobody has rounded", "Quantize the mean where it is made.")
        return x

    # -- rounding --------------------------------------------------------------------------------------------------
    def snap(self, x: Held, by: Quantizer | Snap | None, rectify: bool = False, limit: float | None = None) -> Held:
        if by is None:
            return self._rectified(x, limit) if rectify else x
        to = by.as_snap() if isinstance(by, Quantizer) else by
        if to.rounding not in DEVICE_KINDS:
            raise refuse(
                self.path, f"it rounds by {to.rounding.value!r}, which is one accelerator's own rule",
                "Train with half_even, half_up or half_away.",
            )  # fmt: skip
        low, high = max(to.low, 0) if rectify else to.low, to.high
        if limit is not None:  # rounding is monotone: round(min(v, 6)) = min(round(v), round(6))
            high = min(high, round_fraction(Fraction(limit) / Fraction(2) ** to.exponent, to.rounding))
        return self.rounded(x, to.exponent, low, high, to.rounding)

    def rounded(self, x: Held, exponent: int, low: int | None, high: int | None, rounding: Rounding) -> Held:
        """clip(round(v / 2^exponent), low, high) of a tensor of any kind."""
        ends = {"rounding": rounding.value, "low": low, "high": high}
        if x.is_float:
            assert low is not None
            assert high is not None
            found = line(self, x, exponent, rounding.value, low, high)
            if found is not None:
                return found
            attributes = {"exponent": exponent, **ends}
            return self.emit("quantize", [x], x.shape, attributes, low=low, high=high, exponent=exponent)
        shifts = [exponent - e for e in (x.exponent if isinstance(x.exponent, tuple) else (x.exponent,))]
        least, most = bounds_after(x, shifts, low, high)
        fields: dict[str, Any] = {"low": least, "high": most, "exponent": exponent}
        if x.count is not None:
            if len(shifts) > 1:
                raise refuse(self.path, "it divides sums on a step per channel", "Convert with per-tensor steps.")
            number, each = _counts(x)
            attributes = {"shift": shifts[0], **ends, "count": number}
            return self.emit("divide", [x], x.shape, attributes, {"count": each}, **fields)
        if shifts == [0] and least == x.low and most == x.high:
            return x
        shift: Any = shifts[0] if x.value.axis is None else shifts
        return self.emit("requantize", [x], x.shape, {"shift": shift, "axis": x.value.axis, **ends}, **fields)

    def clip(self, x: Held, low: int | None, high: int | None) -> Held:
        if x.count is not None and (low, high) != (0, None):
            self.whole(x)
        least, most = bounds_after(x, [0], low, high)
        if least == x.low and most == x.high:
            return x
        attributes = {"shift": 0, "axis": None, "rounding": "floor", "low": low, "high": high}
        fields: dict[str, Any] = {"low": least, "high": most, "exponent": x.exponent, "axis": x.value.axis}
        clipped = self.emit("requantize", [x], x.shape, attributes, **fields)
        return replace(clipped, count=x.count, precision=x.precision)

    def _rectified(self, x: Held, limit: float | None) -> Held:
        if x.is_float:
            return self.island("relu" if limit is None else "relu6", x)
        if limit is None:
            return self.clip(x, 0, None)
        code = Fraction(limit) / Fraction(2) ** x.exponent if isinstance(x.exponent, int) else Fraction(1, 2)
        if code.denominator != 1:
            raise refuse(self.path, f"{limit} lies between two codes", "Quantize the tensor before or behind it.")
        return self.clip(x, 0, int(code))

    # -- products, sums ---------------------------------------------------------------------------------------------
    def product(self, layer: nn.Module, x: Held, weight: Tensor, exponent: Tensor, bias: Tensor | None) -> Held:
        self.whole(x)
        if not isinstance(x.exponent, int):
            raise refuse(self.path, "its input has a step per channel", "Convert with per-tensor steps of inputs.")
        step, x = x.exponent, self.bordered(layer, x)
        codes = whole_codes(weight, exponent.reshape(-1), self.path, "weight", layer)
        units = [step + int(e) for e in exponent.reshape(-1).tolist()]
        unit: int | tuple[int, ...] = units[0] if len(set(units)) == 1 else tuple(units)
        biases = None if bias is None else whole_codes(bias, torch.tensor(units), self.path, "bias", None)
        low, high = product_bounds(layer, codes, biases, x.low, x.high)
        kind, attributes = geometry(layer, x.shape, self.output_size)
        constants = {"weight": smallest(codes), "bias": None if biases is None else smallest(biases)}
        shape = product_shape(layer, kind, attributes, x.shape)
        axis = None if isinstance(unit, int) else 1 if kind != "linear" else len(shape) - 1
        return self.emit(kind, [x], shape, attributes, constants, low=low, high=high, exponent=unit, axis=axis)

    def bordered(self, layer: Any, x: Held) -> Held:
        """x with the border of a layer that pads by other values than 0 (its product then pads nothing)."""
        if getattr(layer, "padding_mode", "zeros") == "zeros":
            return x
        border, mode = layer._reversed_padding_repeated_twice, layer.padding_mode
        return self.move(x, lambda t: nn.functional.pad(t, border, mode=mode))

    def constant(self, x: Held, values: Tensor, exponent: int | Tensor, axis: int) -> Held:
        x = self.leveled(self.whole(x))
        assert isinstance(x.exponent, int)
        step = min(x.exponent, int(exponent))
        codes = whole_codes(values, torch.tensor([step]), self.path, "constant", None)
        left = [x.exponent - step, 0]
        low, high = (x.low << left[0]) + min(int(codes.min()), 0), (x.high << left[0]) + max(int(codes.max()), 0)
        other = smallest(codes).reshape(-1, *[1] * (len(x.shape) - 1 - axis % len(x.shape)))
        return self.emit("add", [x], x.shape, {"left": left}, {"other": other}, low=low, high=high, exponent=step)

    def aligned(self, parts: Sequence[Held]) -> tuple[int, list[int]]:
        """The finest step of integers, and by how many bits each shifts onto it."""
        steps = [step for step in (self.whole(x).exponent for x in parts) if isinstance(step, int)]
        if len(steps) < len(parts):
            raise refuse(self.path, "it joins tensors on a step per channel", "Convert with per-tensor steps.")
        finest = min(steps)
        return finest, [step - finest for step in steps]

    def add(self, terms: Sequence[Held]) -> Held:
        if any(x.is_float for x in terms):
            return self.island("add", *terms)
        step, left = self.aligned(terms)
        ends = [((x.low << n), (x.high << n)) for x, n in zip(terms, left, strict=True)]
        low, high = sum(min(a, 0) for a, _ in ends), sum(max(b, 0) for _, b in ends)
        shape = _broadcast([x.shape for x in terms], self.path)
        return self.emit("add", terms, shape, {"left": left}, low=low, high=high, exponent=step)

    def concat(self, parts: Sequence[Held], axis: int, new: bool = False) -> Held:
        axis %= len(parts[0].shape) + int(new)
        if new:
            parts = [self.move(x, lambda t: t.unsqueeze(axis)) for x in parts]
        if axis == 0:
            raise refuse(self.path, "it joins along the batch", "Join along another axis.")
        size = sum(x.shape[axis] for x in parts)
        shape = tuple(size if i == axis else n for i, n in enumerate(parts[0].shape))
        if any(x.is_float for x in parts):
            return self.emit("concat", [self.floats(x) for x in parts], shape, {"axis": axis}, dtype="float32")
        step, left = self.aligned(parts)
        moved_parts = [
            x if n == 0 else self.rounded(x, step, None, None, Rounding.FLOOR) for x, n in zip(parts, left, strict=True)
        ]
        low, high = min(x.low for x in moved_parts), max(x.high for x in moved_parts)
        return self.emit("concat", moved_parts, shape, {"axis": axis}, low=low, high=high, exponent=step)

    def pool(self, x: Held, kind: tuple[int, bool] | None, *args: Any, **settings: Any) -> Held:
        x = x if x.count is None else self.floats(x)  # a mean of means that nobody rounded is one of floats
        return pooled(self, x, kind, *args, **settings)

    def scaled(self, x: Held, exponent: int) -> Held:
        step = x.exponent
        new: Any = tuple(e + exponent for e in step) if isinstance(step, tuple) else step + exponent
        fields: dict[str, Any] = {"low": x.low, "high": x.high, "exponent": new, "axis": x.value.axis}
        same = self.emit("reshape", [x], x.shape, {"shape": list(x.shape)}, **fields)
        return replace(same, count=x.count, precision=x.precision)

    # -- moves, and the rest ----------------------------------------------------------------------------------------
    def move(self, x: Held, function: Callable[[Tensor], Tensor]) -> Held:
        x = self.leveled(x)
        count = x.count if not isinstance(x.count, np.ndarray) else moved_counts(x.count, x.shape, function)
        return replace(moved(self, x, function), count=count, precision=x.precision)

    def leveled(self, x: Held) -> Held:
        """Integers on a step per channel brought to the finest one."""
        if not isinstance(x.exponent, tuple):
            return x
        if x.count is not None:
            raise refuse(self.path, "it reads means on a step per channel", "Convert with per-tensor steps.")
        return self.rounded(x, min(x.exponent), None, None, Rounding.FLOOR)

    def ordered(self, x: Held) -> Held:
        """Integers in the order of floats that are their multiples; x itself where rounding may have made equals."""
        maker = next((op for op in self.ops if op.output == x.name), None) if x.is_float else None
        if maker is not None and maker.kind == "dequantize" and not maker.constants:
            source, factor = self.values[maker.inputs[0]], maker.attributes["factor"]
            alike = isinstance(source.exponent, int) and (factor is None or factor > 0)
            plain = factor is None and maker.attributes["count"] is None
            most = FLOAT32_EXACT if plain else _APART
            return Held(source) if alike and max(-source.low, source.high) < most else x
        whole = isinstance(x.exponent, int) and not isinstance(x.count, np.ndarray)
        most = FLOAT32_EXACT if x.count is None else _APART
        return x if x.is_float or (whole and max(-x.low, x.high) < most) else self.floats(x)

    def zeros(self, like: Held, shape: tuple[int, ...]) -> Held:
        """Zeros of a shape, on the step of ``like``."""
        batch = [concrete(like.shape, n)[0] for n in BATCHES]
        return self.move(like, lambda t: torch.zeros(concrete(shape, BATCHES[batch.index(len(t))]), dtype=t.dtype))

    def threshold(self, x: Held, low: Tensor, flip: Tensor, axis: int = 1) -> Held:
        constants = {"low": smallest(low.numpy()), "flip": flip.numpy().astype(np.uint8)}
        return self.emit("threshold", [self.whole(x)], x.shape, {"axis": axis}, constants, low=-1, high=1)

    def sign(self, x: Held) -> Held:
        return signs(self, x)

    def border(self, x: Held, sides: Sequence[Sequence[int]], value: int) -> Held:
        padding = [[0, 0], [0, 0], *(list(side) for side in sides)]
        shape = (*x.shape[:2], *(n + sum(side) for n, side in zip(x.shape[2:], sides, strict=True)))
        fields: dict[str, Any] = {"low": min(x.low, value), "high": max(x.high, value), "exponent": x.exponent}
        return self.emit("pad", [self.whole(x)], shape, {"padding": padding, "value": value}, **fields)

    def in_float32(self, x: Held, how: Literal["nearest", "odd"], instead: str) -> Held:
        if not x.is_float and max(-x.low, x.high) > HELD:
            self.carried[x.name] = Carried(how, instead)
        return x

    def normalize(self, x: Held, attributes: Mapping[str, Any], constants: Mapping[str, Tensor], bits: int) -> Held:
        arrays = {name: tensor.cpu().numpy().astype(np.int64) for name, tensor in constants.items()}
        low, high = normalize_bounds(x, attributes, arrays)
        return self.emit("normalize", [self.whole(x)], x.shape, attributes, arrays, low=low, high=high, exponent=-bits)

    def floats(self, x: Held, factor: float | None = None, precision: str = "float32") -> Held:
        if x.is_float:
            return x
        number, each = _counts(x)
        wide = "float64" in (precision, x.precision)
        attributes = {"factor": factor, "precision": "float64" if wide else "float32", "count": number}
        return self.emit("dequantize", [x], x.shape, attributes, {"count": each}, dtype="float32")

    def island(
        self, function: str, *inputs: Held, shape: Sequence[int] | None = None,
        constants: Mapping[str, Tensor] | None = None, **attributes: Any,
    ) -> Held:  # fmt: skip
        if function == "layer":
            return self._float_layer(inputs[0], **attributes)
        given = [self.floats(x) for x in inputs]
        arrays = {name: tensor.detach().cpu().float().numpy() for name, tensor in (constants or {}).items()}
        out = shape if shape is not None else _broadcast([x.shape for x in given], self.path)
        return self.emit("island", given, out, {"function": function, **attributes}, arrays, dtype="float32")

    def _float_layer(self, x: Held, layer: nn.Module, weight: Tensor, bias: Tensor | None) -> Held:
        x = self.bordered(layer, x)
        kind, attributes = geometry(layer, x.shape, self.output_size)
        constants = {"weight": weight} | ({} if bias is None else {"bias": bias})
        shape = product_shape(layer, kind, attributes, x.shape)
        return self.island(kind, x, shape=shape, constants=constants, **attributes)


def _counts(x: Held) -> tuple[int | None, Array | None]:
    """What x is to be divided by: one number, or one a place."""
    return (None, x.count) if isinstance(x.count, np.ndarray) else (x.count, None)


def _broadcast(shapes: Sequence[tuple[int, ...]], path: str) -> tuple[int, ...]:
    """numpy's rule, with -k for k times the batch."""
    length = max(map(len, shapes))
    padded = [(1,) * (length - len(shape)) + tuple(shape) for shape in shapes]
    found = []
    for sizes in zip(*padded, strict=True):
        wide = {n for n in sizes if n != 1}
        if len(wide) > 1:
            raise UnsupportedModelError(f"{path}: got shapes {shapes}, expected shapes that broadcast for any batch.")
        found.append(wide.pop() if wide else 1)
    return tuple(found)


def smallest(codes: Array) -> Array:
    """Integers in the smallest dtype that holds them, signed.

    >>> smallest(np.array([-128, 127])).dtype, smallest(np.array([128])).dtype
    (dtype('int8'), dtype('int16'))
    """
    ends = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    for dtype in (np.int8, np.int16, np.int32):
        if np.iinfo(dtype).min <= ends[0] and ends[1] <= np.iinfo(dtype).max:
            return codes.astype(dtype)
    return codes.astype(np.int64)
