"""Rounded integer division in ONNX operators, on int32 where the bounds allow it and on int64 where not.

ONNX's integer Div truncates in ONNX Runtime, so that the floor of x / d is Div(x + k d, d) - k with k d >= -min(x).
With D the divisor, h = D / 2 and floor as above:

    half_up     floor((x + h) / D)
    half_even   floor((x + h - 1 + (floor(x / D) mod 2)) / D)
    half_away   Div(x < 0 ? x - h : x + h, D)
    floor       floor(x / D)
    truncate    Div(x, D)

A divisor that is odd is doubled together with x.

Clip, Min, Max, Sign and Abs of int64 are avoided: ONNX Runtime 1.31 compares their low words wrongly on x86 (Eigen's
packed minimum; 1 of 1000 random numbers of 41 bits came out unclipped). Less, Where, Div and Mod are exact there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

import numpy as np

from lightning_lowbit.errors import InvariantError, UnsupportedModelError
from lightning_lowbit.export.onnx_graph import Array, Graph, onnx_dtype

__all__ = ["Codes", "Integers", "larger", "rounded"]

# exact over the rationals
rounded: dict[str, Callable[[Fraction], int]] = {
    "half_even": round,
    "half_up": lambda v: floor(v + Fraction(1, 2)),
    "half_away": lambda v: floor(abs(v) + Fraction(1, 2)) * (1 if v > 0 else -1),
    "floor": floor,
    "truncate": int,
}


@dataclass(frozen=True)
class Codes:
    """An integer tensor of a graph: its name, its type, and bounds of what it holds."""

    name: str
    dtype: str
    low: int
    high: int


def _ints(values: Array) -> list[int]:
    return [int(v) for v in np.ravel(values)]


class Integers:
    """Exact integer arithmetic in nodes of ``graph``; the constants are Python integers or arrays that broadcast."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def cast(self, x: Codes, dtype: str) -> Codes:
        return x if x.dtype == dtype else Codes(self.graph.cast(x.name, dtype), dtype, x.low, x.high)

    def combine(self, kind: str, x: Codes, other: Codes | Array | int, low: int, high: int) -> Codes:
        """Add, Sub or Mul whose result has the bounds low and high, in int32 where everything fits."""
        second = other if isinstance(other, Codes) else None
        constants = [] if isinstance(other, Codes) else _ints(np.asarray(other, object))
        ends = [x.low, x.high, low, high, *constants, *([second.low, second.high] if second else [])]
        dtype = _work(min(ends), max(ends), self.graph)
        right = self.cast(second, dtype).name if second else self.graph.constant(np.asarray(other, dtype))
        return Codes(self.graph.node(kind, [self.cast(x, dtype).name, right]), dtype, low, high)

    def add(self, x: Codes, other: Codes | Array | int) -> Codes:
        if isinstance(other, Codes):
            return self.combine("Add", x, other, x.low + other.low, x.high + other.high)
        values = _ints(np.asarray(other, object))
        if not any(values):
            return x
        return self.combine("Add", x, other, x.low + min(values), x.high + max(values))

    def multiply(self, x: Codes, factor: Array | int) -> Codes:
        values = _ints(np.asarray(factor, object))
        if all(v == 1 for v in values):
            return x
        ends = [end * v for end in (x.low, x.high) for v in values]
        return self.combine("Mul", x, factor, min(ends), max(ends))

    def clip(self, x: Codes, low: int | None, high: int | None) -> Codes:
        """Saturate; nothing is emitted where the bounds say that nothing would saturate."""
        low = x.low if low is None else low
        high = x.high if high is None else high
        if low <= x.low and x.high <= high:
            return x
        result = min(max(x.low, low), high), max(min(x.high, high), low)
        ends = [self.graph.constant(np.asarray(_into(end, x.dtype), x.dtype)) for end in (low, high)]
        if x.dtype != "int64":
            return Codes(self.graph.node("Clip", [x.name, *ends]), x.dtype, *result)
        name = larger(self.graph, x.name, ends[0], "int64") if low > x.low else x.name
        if high < x.high:
            name = self.graph.node("Where", [self.graph.node("Less", [ends[1], name]), ends[1], name])
        return Codes(name, x.dtype, *result)

    def store(self, x: Codes, low: int, high: int) -> Codes:
        """In the narrowest type for the proved bounds of a value."""
        return self.cast(Codes(x.name, x.dtype, low, high), onnx_dtype(low, high))

    def requantize(
        self, x: Codes, shifts: Sequence[int] | int, shape: Sequence[int], rounding: str, ends: tuple[int | None, ...]
    ) -> Codes:
        """clip(round(x / 2^shift)); a shift per entry of ``shape`` (a channel, broadcast) where there are several."""
        listed = [shifts] if isinstance(shifts, int) else list(shifts)
        if not any(listed):
            return self.clip(x, *ends)
        # a shift beyond the width of x leaves the same quotient as one that passes it by two bits
        most = max(-x.low, x.high, 1).bit_length() + 2
        listed = [min(shift, most) for shift in listed]
        # then all of them divide, by two at least, and the tie rules need no case of their own
        left = max(0, (1 if max(listed) > 0 else 0) - min(listed))
        factor = 1 << left
        powers = np.array([1 << (shift + left) for shift in listed], object)
        divisor: Array | int = int(powers[0]) if isinstance(shifts, int) else powers.reshape(tuple(shape))
        return self.clip(self.quotient(self.multiply(x, factor), divisor, rounding), *ends)

    def quotient(self, x: Codes, divisor: Array | int, rounding: str) -> Codes:
        """round(x / divisor), for divisors above zero."""
        values = _ints(np.asarray(divisor, object))
        if min(values) < 1:
            raise InvariantError(f"a divisor of {min(values)} in an ONNX graph; expected 1 or more. Please report it.")
        if all(v == 1 for v in values):
            return x
        results = [rounded[rounding](Fraction(end, v)) for end in (x.low, x.high) for v in values]
        low, high = min(results), max(results)
        if rounding in ("half_even", "half_up", "half_away") and any(v % 2 for v in values):
            x, divisor = self.multiply(x, 2), np.asarray(divisor, object) * 2
        if rounding == "truncate":
            quotient = self._divide(x, divisor)
        elif rounding == "floor":
            quotient = self._floor(x, divisor)
        else:
            quotient = getattr(self, f"_{rounding}")(x, divisor, np.asarray(divisor, object) // 2)
        return Codes(quotient.name, quotient.dtype, low, high)

    def _half_up(self, x: Codes, divisor: Array | int, half: Array) -> Codes:
        return self._floor(x, divisor, half)

    def _half_even(self, x: Codes, divisor: Array | int, half: Array) -> Codes:
        quotient = self._floor(x, divisor)
        two = self.graph.constant(np.asarray(2, quotient.dtype))
        odd = Codes(self.graph.node("Mod", [quotient.name, two]), quotient.dtype, 0, 1)
        return self._floor(self.add(x, odd), divisor, half - 1)

    def _half_away(self, x: Codes, divisor: Array | int, half: Array) -> Codes:
        most = max(_ints(half))
        x = self.cast(x, _work(x.low - most, x.high + most, self.graph))
        negative = self.graph.node("Less", [x.name, self.graph.constant(0, x.dtype)])
        halves = [self.graph.constant(np.asarray(h, x.dtype)) for h in (-half, half)]
        return self._divide(
            self.add(x, Codes(self.graph.node("Where", [negative, *halves]), x.dtype, -most, most)), divisor
        )

    def _floor(self, x: Codes, divisor: Array | int, addend: Array | int = 0) -> Codes:
        """floor((x + addend) / divisor), addend >= 0."""
        divisors = np.asarray(divisor, object)
        offset = -(min(x.low, 0) // divisors)
        return self.add(self._divide(self.add(x, divisors * offset + addend), divisor), -offset)

    def _divide(self, x: Codes, divisor: Array | int) -> Codes:
        values = _ints(np.asarray(divisor, object))
        ends = [int(Fraction(end, v)) for end in (x.low, x.high) for v in values]
        return self.combine("Div", x, divisor, min(ends), max(ends))


def larger(graph: Graph, first: str, second: str, dtype: str) -> str:
    """The elementwise maximum of two integer tensors."""
    if dtype != "int64":
        return graph.node("Max", [first, second])
    return graph.node("Where", [graph.node("Less", [first, second]), second, first])


def _into(value: int, dtype: str) -> int:
    info = np.iinfo(dtype)
    return max(int(info.min), min(value, int(info.max)))


def _work(low: int, high: int, graph: Graph) -> str:
    """int32 or int64."""
    for dtype in ("int32", "int64"):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    raise UnsupportedModelError(
        f"{graph.path}: the integer graph would need numbers from {low} to {high}, and ONNX has no type beyond "
        "64 bits. Use form='qdq', or fewer bits in this layer."
    )
