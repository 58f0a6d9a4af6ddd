"""The QDQ form: float operators between QuantizeLinear and DequantizeLinear, which runtimes fuse into int8 kernels.

Activations are uint8, with zero point 0 where no code is negative and 128 where some are; weights int8, one scale per
tensor or output channel; bias int32 on the product of the two scales. All scales are powers of two. Measured on ONNX
Runtime 1.31 (x86 with VNNI): its fused convolution, product and sum then give the integers of the program. What it
does not keep is avoided here: a pair Q -> DQ -> Q -> DQ is merged into one with a scale of its own making (a Clip of
the bytes stands between them), its sum is off by one in ties where a zero point is odd, and so is its global average
over a count that is no power of two (there the sum is divided in float32, which is exact below 2^23).

On x86 without VNNI the kernels for uint8 times int8 saturate sums of two products, and nearly every output of a network
is then wrong. The session option ``session.x64quantprecision`` = "1" avoids that, and so does weight_type="uint8" (zero
point 128); both halve the speed where there is VNNI. The integer form is exact everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from lightning_lowbit.export.onnx_arithmetic import rounded
from lightning_lowbit.export.onnx_graph import Array, Graph
from lightning_lowbit.export.onnx_real import RealForm, magnitude, readers
from lightning_lowbit.export.onnx_windows import move, pool_node
from lightning_lowbit.export.runtime import Op, Program, Value

__all__ = ["QdqForm", "objections", "zero_point"]

_EXACT = 2**24  # integers up to here are float32 numbers
_PRODUCTS = ("conv", "conv_transpose", "linear")


def zero_point(low: int, high: int) -> int | None:
    """Where code 0 lies among the 256 bytes; None if the codes do not fit, or only with an odd one.

    >>> [zero_point(*ends) for ends in [(0, 255), (-128, 127), (-100, 155), (-101, 154), (-300, 0)]]
    [0, 128, 100, None, None]
    """
    for zero in (0, 128, -low + -low % 2):
        if zero + low >= 0 and zero + high <= 255:
            return zero
    return None


def objections(program: Program) -> list[str]:
    """What the QDQ form does not compute exactly, each with the path and the field."""
    found = []
    used = readers(program)
    for op in program.ops:
        value, kinds = program.values[op.output], op.attributes
        if value.dtype != "int":
            continue
        rounds = op.kind in ("quantize", "divide") or (op.kind == "requantize" and max(_shifts(op)) > 0)
        if rounds and kinds["rounding"] != "half_even":
            found.append(f"{op.path} ({op.kind}, rounding): {kinds['rounding']}, and QuantizeLinear rounds half_even")
        if rounds and zero_point(value.low, value.high) is None:
            found.append(
                f"{op.path} ({op.kind}, bits): a stage of {value.bits} bits, codes {value.low}..{value.high}, "
                "and QuantizeLinear here gives bytes with an even zero point"
            )
        if not isinstance(value.exponent, int) and op.kind not in _PRODUCTS:
            found.append(f"{op.path} ({op.kind}, exponent): one per channel, and an activation here has one")
        if op.kind in _PRODUCTS:
            source = program.values[op.inputs[0]]
            if zero_point(source.low, source.high) is None:
                found.append(f"{op.path} ({op.kind}, input bits): {source.bits}, and the int8 kernels take 8")
            if not _fits(op.constants["weight"], np.int8):
                found.append(f"{op.path} ({op.kind}, weight bits): beyond int8")
            if "bias" in op.constants and not _fits(op.constants["bias"], np.int32):
                found.append(f"{op.path} ({op.kind}, bias bits): beyond int32")
        if op.kind == "divide" and magnitude(program.values[op.inputs[0]]) >= _EXACT // 2:
            found.append(f"{op.path} (divide, sum bits): a float32 quotient of sums from 2^23 on may round to a tie")
        fused = op.kind in ("conv", "linear") and all(_saturates(user, program) for user in used[op.output])
        if magnitude(value) > _EXACT and not (fused and used[op.output]):
            found.append(f"{op.path} ({op.kind}, sum bits): {value.bits}, and float32 is exact up to 2^24")
    return found


def _shifts(op: Op) -> list[int]:
    shift = op.attributes["shift"]
    return [shift] if isinstance(shift, int) else list(shift)


def _fits(array: Array, dtype: Any) -> bool:
    return bool(array.size == 0 or (np.iinfo(dtype).min <= array.min() and array.max() <= np.iinfo(dtype).max))


def _saturates(op: Op, program: Program) -> bool:
    """Bytes of a sum shifted by at most 16: what lies beyond 2^24 saturates, however float32 rounds it."""
    value = program.values[op.output]
    return op.kind == "requantize" and zero_point(value.low, value.high) is not None and max(_shifts(op)) <= 16


class QdqForm(RealForm):
    """Values of up to 8 bits exist as bytes (`codes`: name, zero point, scale) and, where a float op reads them, as
    the floats that DequantizeLinear makes of those."""

    form = "qdq"

    def __init__(self, program: Program, graph: Graph, weight_type: str = "int8") -> None:
        super().__init__(program, graph)
        self.weight_type = weight_type
        self.codes: dict[str, tuple[str, int, int]] = {}  # tensor, zero point, exponent
        self._bytes_of: dict[str, tuple[str, int, int]] = {}  # what each DequantizeLinear reads

    def real(self, name: str) -> str:
        if name not in self.reals:
            tensor, zero, exponent = self.codes[name]
            self.reals[name] = self._dequantized(tensor, zero, exponent)
        return self.reals[name]

    def _dequantized(self, tensor: str, zero: int, exponent: int) -> str:
        scale = self.graph.constant(2.0**exponent, "float32")
        real = self.graph.node("DequantizeLinear", [tensor, scale, self.graph.constant(zero, "uint8")])
        self._bytes_of[real] = (tensor, zero, exponent)
        return real

    def _quantized(self, real: str, zero: int, exponent: int) -> str:
        if real in self._bytes_of:
            # bytes to other bytes: a Clip that clips nothing keeps ONNX Runtime from merging the two pairs
            tensor, *format = self._bytes_of[real]
            ends = [self.graph.constant(end, "uint8") for end in (0, 255)]
            real = self._dequantized(self.graph.node("Clip", [tensor, *ends]), *format)
        scale = self.graph.constant(2.0**exponent, "float32")
        return self.graph.node("QuantizeLinear", [real, scale, self.graph.constant(zero, "uint8")])

    def settle(self, op: Op, value: Value, real: str) -> None:
        low, high = op.attributes["low"], op.attributes["high"]
        zero = zero_point(value.low, value.high)
        if zero is None or not isinstance(value.exponent, int):  # wider than bytes: clipped, and not rounded
            exponent = np.asarray(value.exponent).max()
            ends = [None if end is None else float(end) * 2.0 ** int(exponent) for end in (low, high)]
            self.reals[op.output] = self.clip(real, *ends)
            return
        tensor = self._quantized(real, zero, value.exponent)
        self.codes[op.output] = (self._clipped(tensor, zero, low, high, self._reach(op)), zero, value.exponent)

    def _reach(self, op: Op) -> tuple[int, int]:
        """Between which codes the quantizer of ``op`` gives any, before it saturates."""
        if op.kind != "requantize":
            return -_EXACT, _EXACT
        source = self.program.values[op.inputs[0]]
        ends = [
            rounded["half_even"](Fraction(e) / Fraction(2) ** n) for e in (source.low, source.high) for n in _shifts(op)
        ]
        return min(ends), max(ends)

    def _clipped(self, tensor: str, zero: int, low: int | None, high: int | None, reach: tuple[int, int]) -> str:
        """The bytes clipped to what is narrower than the byte itself."""
        first = -zero if low is None else max(low, -zero)
        last = 255 - zero if high is None else min(high, 255 - zero)
        if first <= max(reach[0], -zero) and min(reach[1], 255 - zero) <= last:
            return tensor
        ends = [self.graph.constant(end + zero, "uint8") for end in (first, last)]
        return self.graph.node("Clip", [tensor, *ends])

    def weights(self, op: Op, weight: Array, axis: int) -> list[str]:
        exponent = self.weight_exponent(op)
        source = self.program.values[op.inputs[0]].exponent
        names = [self._held(weight, exponent, np.int8, axis)]
        if "bias" in op.constants:
            names.append(self._held(op.constants["bias"], exponent + source, np.int32, 0))
        return names

    def _held(self, codes: Array, exponent: Array, dtype: Any, axis: int) -> str:
        scale = np.ldexp(np.float32(1), exponent).astype(np.float32)
        if not _fits(codes, dtype):
            along = [-1 if n == axis else 1 for n in range(codes.ndim)] if scale.ndim else ()
            return self.graph.constant(codes * scale.reshape(along), "float32")
        zero = 0
        if dtype is np.int8 and self.weight_type == "uint8":
            codes, zero, dtype = codes.astype(np.int16) + 128, 128, np.uint8
        # the AVX2 mode of ONNX Runtime rewrites the two in place, and fails where nodes share them
        tensor = self.graph.constant(codes, dtype, own=True)
        zeros = self.graph.constant(np.full(scale.shape, zero), dtype, own=True)
        more: dict[str, Any] = {"axis": axis} if scale.ndim else {}
        return self.graph.node("DequantizeLinear", [tensor, self.graph.constant(scale), zeros], **more)

    def _requantize(self, op: Op, value: Value) -> None:
        source = self.codes.get(op.inputs[0])
        if source is None or any(_shifts(op)):
            super()._requantize(op, value)
            return
        tensor, zero, exponent = source
        within = self.program.values[op.inputs[0]]
        low, high = op.attributes["low"], op.attributes["high"]
        self.codes[op.output] = (self._clipped(tensor, zero, low, high, (within.low, within.high)), zero, exponent)

    def _concat(self, op: Op, value: Value) -> None:
        parts = [self.codes.get(name) for name in op.inputs]
        if any(part is None for part in parts) or len({part[1:] for part in parts if part}) > 1:
            self._exactly(op, value, super()._concat)
            return
        tensor = self.graph.node("Concat", [part[0] for part in parts if part], axis=int(op.attributes["axis"]))
        self.codes[op.output] = (tensor, *parts[0][1:])  # type: ignore[index]  # none is None here

    def _max_pool(self, op: Op, value: Value) -> None:
        self._bytes(op, value, super()._max_pool)

    def _moved(self, op: Op, value: Value) -> None:
        self._bytes(op, value, super()._moved)

    _reshape = _transpose = _slice = _pad = _gather = _moved

    def _add(self, op: Op, value: Value) -> None:
        self._exactly(op, value, super()._add)

    def _exactly(self, op: Op, value: Value, write: Callable[[Op, Value], None]) -> None:
        """Keep the floats of ``write`` as bytes where their codes are bytes, so that the next kernel reads bytes."""
        write(op, value)
        zero = zero_point(value.low, value.high)
        if value.dtype == "int" and zero is not None and isinstance(value.exponent, int):
            tensor = self._quantized(self.reals.pop(op.output), zero, value.exponent)
            self.codes[op.output] = (tensor, zero, value.exponent)

    def _bytes(self, op: Op, value: Value, otherwise: Callable[[Op, Value], None]) -> None:
        """Move bytes where the input is bytes and a padded code is one, else the floats."""
        source = self.codes.get(op.inputs[0])
        filler = int(op.attributes["value"]) if op.kind == "pad" else 0
        if source is None or not 0 <= filler + source[1] <= 255:
            self._exactly(op, value, otherwise)
            return
        tensor, zero, exponent = source
        if op.kind == "max_pool":
            moved = pool_node(self.graph, "MaxPool", op, tensor)
        else:
            moved = move(self.graph, op, tensor, self.program.values[op.inputs[0]], zero, "uint8")
        self.codes[op.output] = (moved, zero, value.exponent if isinstance(value.exponent, int) else exponent)

    def trusts_global(self, count: int) -> bool:
        return count & (count - 1) == 0

    def flatten(self, op: Op, value: Value) -> None:
        if op.output not in self.codes:
            super().flatten(op, value)
            return
        tensor, zero, exponent = self.codes[op.output]
        self.codes[op.output] = (self.graph.reshape(tensor, value.shape), zero, exponent)
