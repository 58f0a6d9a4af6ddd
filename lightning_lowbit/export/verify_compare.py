"""Codes of a program beside those of its network: exact between float islands, floats within a tolerance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lightning_lowbit.export.program import IntegerProgram, Op
from lightning_lowbit.export.verify_observe import Array, codes_of
from lightning_lowbit.export.verify_report import Accumulator, Difference, Entry

__all__ = ["Comparison", "other_codes"]

_PRODUCTS = ("conv", "conv_transpose", "linear")
_AT_ONCE = 1 << 24  # numbers of all the program's values together


class Comparison:
    """What the batches showed so far.

    Attributes:
        values: names of the values that were compared.
        elements: numbers in them, over all batches.
        observed: the first difference.
        float_error: the largest of floats behind islands, relative to the largest value of their tensor.
    """

    def __init__(self, program: IntegerProgram, tolerance: float) -> None:
        self.program, self.tolerance = program, tolerance
        self.islands = tuple(op.path for op in program.ops if op.kind == "island")
        self._starts = {op.output for op in program.ops if op.kind == "island"}
        self.behind = _behind(program, self._starts, frozenset())
        self.floats = dict(self._entering())
        self.entries = [op for op in program.ops if op.output in self.floats]
        self.values: set[str] = set()
        self.samples = self.elements = 0
        self.observed: Difference | None = None
        self.float_error = 0.0
        self._flipped: dict[str, int] = {op.output: 0 for op in self.entries}
        self._entered: dict[str, int] = {op.output: 0 for op in self.entries}
        self._unseen: set[str] = set()
        self._sums: dict[str, tuple[int, int]] = {}

    def _entering(self) -> Iterator[tuple[str, str]]:
        """Values that are integers made of floats behind an island, and those floats.

        Signs are made in two steps, of which the network has the second.
        """
        program, values = self.program, self.program.values
        for op in program.ops:
            floats = [name for name in op.inputs if name in self.behind and values[name].dtype == "float32"]
            if floats and values[op.output].dtype != "float32":
                readers = [reader for reader in program.ops if op.output in reader.inputs]
                sign = len(readers) == 1 and readers[0].kind == "threshold"
                yield readers[0].output if sign else op.output, floats[0]

    # -- one batch -------------------------------------------------------------------------------------------------
    def batch(self, number: int, inputs: Sequence[Array], network: Mapping[str, Array]) -> None:
        """Run the program on a batch of which ``network`` holds the network's own tensors, by values' names."""
        for rows, samples in self._pieces(inputs):
            self._piece(number, samples, [rows(x, name) for x, name in zip(inputs, self.program.inputs, strict=True)],
                        {name: rows(array, name) for name, array in network.items()})  # fmt: skip

    def _pieces(self, inputs: Sequence[Array]) -> Iterator[tuple[Any, range]]:
        """Stretches of samples of which all values can be held at once."""
        values = self.program.values
        shapes = [value.shape for value in values.values()]
        first = values[self.program.inputs[0]].shape
        batch = len(inputs[0]) // -first[0]
        apart = all(shape and shape[0] < 0 and min(shape[1:], default=0) >= 0 for shape in shapes)
        each = sum(-int(np.prod(shape, dtype=np.int64)) for shape in shapes) if apart else 1
        step = max(1, _AT_ONCE // each) if apart else batch
        for start in range(0, batch, step):
            samples = range(start, min(start + step, batch))

            def rows(array: Array, name: str, samples: range = samples) -> Array:
                k = -values[name].shape[0]
                return array[k * samples.start : k * samples.stop] if apart else array

            yield rows, samples

    def _piece(self, number: int, samples: range, inputs: list[Array], network: Mapping[str, Array]) -> None:
        own = self._traced(inputs, {})
        entries = {op.output: self._codes(op.output, network[op.output]) for op in self.entries if op.output in network}
        self._unseen.update(op.output for op in self.entries if op.output not in network)
        for name, codes in entries.items():
            self._flipped[name] += int((own[name] != codes).sum())
            self._entered[name] += codes.size
        given = self._traced(inputs, entries) if entries else own
        self._entries(inputs, network, entries, (number, samples))
        uncertain = _behind(self.program, self._starts, entries.keys())  # in their last bits
        unknown = _behind(self.program, self._unseen, entries.keys())
        for place, op in enumerate(self.program.ops):
            if op.kind in _PRODUCTS and self.program.values[op.output].dtype == "int":
                self._sum(op, given[op.output])
            integer = self.program.values[op.output].dtype != "float32"
            skipped = entries.keys() | unknown | (uncertain if integer else frozenset())
            if op.output in network and op.output not in skipped:
                self._value(place, op, given[op.output], network[op.output], op.output in uncertain, (number, samples))
        self.samples += len(samples)

    def _entries(
        self, inputs: list[Array], network: Mapping[str, Array], entries: Mapping[str, Array], where: tuple[int, range]
    ) -> None:
        """The quantizers at the entries, given the network's own floats."""
        known = {name: self.floats[name] for name in entries if self.floats[name] in network}
        floats = {name: network[name] for name in known.values() if network[name].dtype == np.float32}
        if floats:
            given = self._traced(inputs, floats)
            for place, op in enumerate(self.program.ops):
                if known.get(op.output) in floats:
                    self._value(place, op, given[op.output], network[op.output], False, where)

    def _traced(self, inputs: list[Array], given: Mapping[str, Array]) -> dict[str, Array]:
        with np.errstate(all="ignore"):  # a wrong program may overflow: that is a difference
            return self.program.trace(*inputs, given=given)

    def _codes(self, name: str, array: Array) -> Array:
        """What the network has, as the program has it; numbers off the grid are rounded and found elsewhere."""
        value = self.program.values[name]
        return np.rint(codes_of(array, value.exponent, value.axis)).astype(np.int64) if value.dtype == "int" else array

    def _sum(self, op: Op, sums: Array) -> None:
        low, high = int(sums.min()), int(sums.max())
        before = self._sums.get(op.output, (low, high))
        self._sums[op.output] = min(low, before[0]), max(high, before[1])

    def _value(self, place: int, op: Op, got: Array, recorded: Array, loosely: bool, where: tuple[int, range]) -> None:
        value = self.program.values[op.output]
        self.values.add(op.output)
        self.elements += got.size
        if got.shape != recorded.shape:
            self._report(place, op, "shape", str(got.shape), str(recorded.shape), None, where)
            return
        if value.dtype == "int":
            expected = codes_of(recorded, value.exponent, value.axis)
            apart = other_codes(got, expected)
        else:
            expected = recorded
            apart = (got != expected) & ~((got != got) & (expected != expected))
        if loosely and value.dtype == "float32":
            apart = self._beyond(got, expected, apart)
        if apart.any():
            index = tuple(int(i) for i in np.argwhere(apart)[0])
            what = "codes" if value.dtype != "float32" else "values"
            self._report(place, op, what, _number(got[index]), _number(expected[index]), index, where)

    def _beyond(self, got: Array, expected: Array, apart: Array) -> Array:
        """Where floats differ by more than the tolerance."""
        if not apart.any():
            return apart
        with np.errstate(all="ignore"):
            error = np.where(apart, np.abs(got.astype(np.float64) - expected), 0.0)
            error = np.where(error == error, error, np.inf) / (
                np.abs(expected[np.isfinite(expected)]).max(initial=0) or 1
            )
        self.float_error = max(self.float_error, float(error.max()))
        return np.asarray(error > self.tolerance)

    def _report(
        self, place: int, op: Op, what: str, got: Any, expected: Any, index: tuple[int, ...] | None,
        where: tuple[int, range],
    ) -> None:  # fmt: skip
        if self.observed is not None and (self.observed.batch, self.observed.op) <= (where[0], place):
            return
        shape, sample = self.program.values[op.output].shape, None
        if index is not None and shape and shape[0] < 0:
            sample, index = where[1].start + index[0] // -shape[0], (index[0] % -shape[0], *index[1:])
            index = index[1:] if shape[0] == -1 else index
        self.observed = Difference(place, op.kind, op.path, op.output, what, got, expected, index, where[0], sample)

    # -- what it came to -------------------------------------------------------------------------------------------
    def entered(self) -> tuple[Entry, ...]:
        return tuple(
            Entry(op.path, op.output, self._flipped[op.output], self._entered[op.output], op.output not in self._unseen)
            for op in self.entries
        )

    def accumulators(self) -> tuple[Accumulator, ...]:
        found = []
        for op in self.program.ops:
            if op.output in self._sums:
                value = self.program.values[op.output]
                found.append(Accumulator(op.path, *self._sums[op.output], value.low, value.high, value.bits))
        return tuple(found)


def other_codes(got: Array, expected: Array) -> Array:
    """Where codes are not those of the network, which holds them as floats.

    A code that such a float cannot hold counts as equal to either neighbor: networks round to even or to odd.
    """
    rounded = got.astype(expected.dtype)
    apart = rounded != expected
    if apart.any():
        with np.errstate(invalid="ignore"):  # no honest code comes near the end of int64
            rest = got - rounded.astype(np.int64)
        other = np.nextafter(rounded, np.where(rest > 0, np.inf, -np.inf).astype(expected.dtype))
        apart &= (rest == 0) | (other != expected)
    return np.asarray(apart)


def _behind(program: IntegerProgram, start: set[str], stop: Any) -> frozenset[str]:
    """Values that depend on those of ``start``, these included, on ways that do not lead through ``stop``."""
    found = set(start) - set(stop)
    for op in program.ops:
        if op.output not in stop and not found.isdisjoint(op.inputs):
            found.add(op.output)
    return frozenset(found)


def _number(value: Any) -> int | float:
    """For a report: a code where it is one."""
    number = float(value)
    return int(value) if np.isfinite(number) and number == int(number) else number
