"""What an integer program is made of: operations, bytes, products, and how wide its sums become."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from lightning_lowbit.export.runtime import Op, Program, Value

__all__ = ["OpRow", "ProgramSummary", "summarized"]

PRODUCTS = ("conv", "conv_transpose", "linear")
_SUMS = (*PRODUCTS, "sum_pool", "sum")


@dataclass(frozen=True)
class OpRow:
    """One operation, for a batch of one.

    Attributes:
        shape: of its output, as `Value` has it.
        format: of its output, such as ``int8·2^-5``.
        macs: products of two numbers.
        bytes: of its constants.
        accumulator_bits: proved for its sums; None where it sums no products or windows.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    format: str
    macs: int
    bytes: int
    accumulator_bits: int | None


@dataclass(frozen=True)
class ProgramSummary:
    """An integer program in numbers; prints as a table, float islands first.

    Attributes:
        islands: "path (function)" of each float operation between quantize and dequantize.
        macs: by kind, for a batch of one; ``island`` holds float products.
        not_followed: code of the network that conversion could not read, with the reason; layers there stay float.
    """

    islands: tuple[str, ...]
    rows: tuple[OpRow, ...]
    macs: dict[str, int]
    not_followed: tuple[str, ...] = ()

    @property
    def ops(self) -> int:
        return len(self.rows)

    @property
    def bytes(self) -> int:
        """Of all constants."""
        return sum(row.bytes for row in self.rows)

    @property
    def accumulator_bits(self) -> int:
        """Of the widest sum, proved from the weights; 0 where nothing is summed."""
        return max((row.accumulator_bits or 0 for row in self.rows), default=0)

    @property
    def accumulator(self) -> str:
        """The narrowest of int16, int32 and int64 that holds every sum."""
        return next((f"int{width}" for width in (16, 32) if self.accumulator_bits <= width), "int64")

    def __str__(self) -> str:
        lines = [f"float island: {island}" for island in self.islands]
        lines = lines or ["no float islands: integers from quantize to dequantize"]
        lines += [f"not followed: {part}" for part in self.not_followed]
        names = ("path", "kind", "output", "format", "MACs", "bytes", "sum bits")
        table = [names, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for cells in table:
            left = [cell.ljust(width) for cell, width in zip(cells[:4], widths[:4], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(cells[4:], widths[4:], strict=True)]
            lines.append("  ".join((*left, *right)).rstrip())
        each = ", ".join(f"{kind} {count:,}" for kind, count in self.macs.items()) or "none"
        lines.append(f"{self.ops} operations, {self.bytes:,} bytes of constants; MACs a sample: {each}")
        lines.append(f"widest sum: {self.accumulator_bits} bits, {self.accumulator} suffices")
        return "\n".join(lines)


def summarized(program: Program) -> ProgramSummary:
    """The numbers of a program."""
    rows = tuple(_row(op, program) for op in program.ops)
    macs: Counter[str] = Counter()
    for row in rows:
        macs[row.kind] += row.macs
    islands = tuple(f"{op.path} ({op.attributes['function']})" for op in program.ops if op.kind == "island")
    counts = {kind: count for kind, count in macs.items() if count}
    return ProgramSummary(islands, rows, counts, tuple(program.note.get("not_followed", ())))


def _row(op: Op, program: Program) -> OpRow:
    out = program.values[op.output]
    bits = _signed_bits(out) if op.kind in _SUMS and out.dtype == "int" else None
    weight_bytes = sum(array.nbytes for array in op.constants.values())
    return OpRow(op.path, op.kind, out.shape, _format(out), _macs(op, program), weight_bytes, bits)


def _macs(op: Op, program: Program) -> int:
    kind = op.attributes["function"] if op.kind == "island" else op.kind
    if kind not in PRODUCTS:
        return 0
    # Of each output element the weights behind it; of a transposed convolution each input element meets them instead.
    each = program.values[op.inputs[0] if kind == "conv_transpose" else op.output]
    return abs(math.prod(each.shape)) * math.prod(op.constants["weight"].shape[1:])


def _signed_bits(value: Value) -> int:
    """Two's complement, as accumulators are, also of sums that are never negative."""
    return max((~value.low).bit_length() if value.low < 0 else 0, value.high.bit_length()) + 1


def _format(value: Value) -> str:
    """Such as int8·2^-5.

    >>> _format(Value("v", (-1,), low=0, high=255, exponent=-7)), _format(Value("v", (-1,), "float32"))
    ('uint8·2^-7', 'float32')
    >>> _format(Value("v", (-1, 2), low=-9, high=9, exponent=(-7, -3), axis=1))
    'int5·2^-7..-3'
    """
    if value.dtype != "int":
        return value.dtype
    units = value.exponent if isinstance(value.exponent, tuple) else (value.exponent,)
    unit = f"{min(units)}" if min(units) == max(units) else f"{min(units)}..{max(units)}"
    return f"{'int' if value.low < 0 else 'uint'}{value.bits}·2^{unit}"


def _cells(row: OpRow) -> tuple[str, ...]:
    shape = ", ".join("N" if n == -1 else str(n) if n >= 0 else f"{-n}N" for n in row.shape)
    bits = "" if row.accumulator_bits is None else str(row.accumulator_bits)
    return (row.path, row.kind, f"[{shape}]", row.format, f"{row.macs:,}" if row.macs else "", str(row.bytes), bits)
