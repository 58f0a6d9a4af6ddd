"""An integer program as an ONNX graph of integers: float32 -> codes -> ... -> codes -> float32.

Products run through ConvInteger and MatMulInteger with operands of unsigned 8 bits and zero points: that pair is exact
on every CPU, while ONNX Runtime's kernels for uint8 times int8 saturate sums of two products on x86 without VNNI.
Wider operands are cut into planes of 8 bits, and sums beyond int32 are put together in int64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.export.onnx_arithmetic import Codes, Integers
from lightning_lowbit.export.onnx_graph import Graph, onnx_dtype
from lightning_lowbit.export.onnx_products import conv, conv_transpose, linear
from lightning_lowbit.export.onnx_windows import max_pool, move, pool_node, sum_pool
from lightning_lowbit.export.program_check import MOST
from lightning_lowbit.export.runtime import Op, Program, Value

__all__ = ["IntegerForm"]

_MOVES = ("reshape", "transpose", "slice", "pad", "gather", "concat", "max_pool")


class IntegerForm:
    """Writes ``program`` into ``graph``, op by op; `build` gives the tensors of the outputs and their types."""

    def __init__(self, program: Program, graph: Graph) -> None:
        self.program, self.graph = program, graph
        self.integers = Integers(graph)
        self.codes: dict[str, Codes] = {}
        self.floats: dict[str, str] = dict(zip(program.inputs, graph.names("input"), strict=True))
        self.indices: dict[str, str] = {}
        self._late: set[str] = set()  # floats made of codes

    def build(self) -> tuple[list[str], list[str]]:
        """The tensors of the outputs, and their types.

        Raises:
            UnsupportedModelError: a float island, or numbers of more than 64 bits; it names the path.
        """
        for op in self.program.ops:
            self.graph.at(op)
            if op.kind == "island":
                raise UnsupportedModelError(
                    f"{op.path}: the float function {op.attributes.get('function')!r} has no integer form. The integer "
                    "graph needs a network without float islands: program.summary() lists them."
                )
            value = self.program.values[op.output]
            if value.dtype == "float32" and op.kind in _MOVES:
                self._move_float(op)
                continue
            write: Callable[[Op, Value], None] = getattr(self, f"_{op.kind}")
            write(op, value)
        tensors = [self.indices.get(name) or self.floats[name] for name in self.program.outputs]
        return tensors, ["int64" if name in self.indices else "float32" for name in self.program.outputs]

    def _keep(self, op: Op, value: Value, codes: Codes) -> None:
        self.codes[op.output] = self.integers.store(codes, value.low, value.high)

    def _quantize(self, op: Op, value: Value) -> None:
        graph, kinds = self.graph, op.attributes
        if op.inputs[0] in self._late:
            raise UnsupportedModelError(
                f"{op.path}: it quantizes floats that an earlier layer made of its codes, so that the graph would not "
                "be of integers alone. Use form='qdq', or give that layer an output format."
            )
        exponent = int(kinds["exponent"])
        if not -149 <= -exponent <= 127:
            raise UnsupportedModelError(
                f"{op.path}: exponent {exponent} has no float32 power of two (2^-exponent, -127..149)."
            )
        v = self.floats[op.inputs[0]]
        if exponent:
            v = graph.node("Mul", [v, graph.constant(2.0**-exponent, "float32")])
        v = _round_float(graph, v, str(kinds["rounding"]))
        low, high = (end if kinds[name] is None else int(kinds[name]) for name, end in (("low", -MOST), ("high", MOST)))
        if max(-low, high) <= 2**24:
            v = graph.node("Clip", [v, graph.constant(low, "float32"), graph.constant(high, "float32")])
            codes = Codes(graph.cast(v, onnx_dtype(low, high)), onnx_dtype(low, high), low, high)
        else:  # the limits are no float32 numbers, and are met as integers
            v = graph.node("Clip", [v, graph.constant(-MOST, "float32"), graph.constant(MOST, "float32")])
            wide = Codes(graph.cast(v, "int64"), "int64", -MOST, MOST)
            codes = self.integers.clip(wide, low, high)
        self._keep(op, value, codes)

    def _requantize(self, op: Op, value: Value) -> None:
        kinds, source = op.attributes, self.program.values[op.inputs[0]]
        shape = _along(kinds.get("axis"), kinds["shift"], source)
        ends = (kinds.get("low"), kinds.get("high"))
        codes = self.integers.requantize(self.codes[op.inputs[0]], kinds["shift"], shape, kinds["rounding"], ends)
        self._keep(op, value, codes)

    def _divide(self, op: Op, value: Value) -> None:
        kinds, x = op.attributes, self.codes[op.inputs[0]]
        count = np.asarray(op.constants["count"] if "count" in op.constants else kinds["count"]).astype(object)
        shift = int(kinds["shift"])
        x = self.integers.multiply(x, 1 << max(-shift, 0))
        codes = self.integers.quotient(x, np.asarray(count * (1 << max(shift, 0)), object), kinds["rounding"])
        self._keep(op, value, self.integers.clip(codes, kinds.get("low"), kinds.get("high")))

    def _conv(self, op: Op, value: Value) -> None:
        self._keep(op, value, conv(self.integers, op, self.codes[op.inputs[0]], value))

    def _conv_transpose(self, op: Op, value: Value) -> None:
        source = self.program.values[op.inputs[0]]
        self._keep(op, value, conv_transpose(self.integers, op, self.codes[op.inputs[0]], source, value))

    def _linear(self, op: Op, value: Value) -> None:
        self._keep(op, value, linear(self.integers, op, self.codes[op.inputs[0]], value))

    def _add(self, op: Op, value: Value) -> None:
        left = [int(n) for n in op.attributes["left"]]
        terms = [self.integers.multiply(self.codes[name], 1 << n) for name, n in zip(op.inputs, left, strict=False)]
        total = terms[0]
        for term in terms[1:]:
            total = self.integers.add(total, term)
        if "other" in op.constants:
            total = self.integers.add(total, op.constants["other"].astype(object) * (1 << left[-1]))
        self._keep(op, value, total)

    def _sum(self, op: Op, value: Value) -> None:
        x = self.integers.cast(self.codes[op.inputs[0]], "int32" if _narrow(value) else "int64")
        axes = self.graph.constant([int(axis) for axis in op.attributes["axes"]], "int64")
        name = self.graph.node("ReduceSum", [x.name, axes], keepdims=int(op.attributes["keepdims"]))
        self._keep(op, value, Codes(name, x.dtype, value.low, value.high))

    def _sum_pool(self, op: Op, value: Value) -> None:
        x = self.integers.cast(self.codes[op.inputs[0]], "int32" if _narrow(value) else "int64")
        self._keep(op, value, sum_pool(self.graph, op, x, self.program.values[op.inputs[0]], value))

    def _max_pool(self, op: Op, value: Value) -> None:
        x = max_pool(self.graph, op, self.codes[op.inputs[0]], self.program.values[op.inputs[0]])
        self._keep(op, value, x)

    def _concat(self, op: Op, value: Value) -> None:
        dtype = onnx_dtype(value.low, value.high)
        names = [self.integers.cast(self.codes[name], dtype).name for name in op.inputs]
        name = self.graph.node("Concat", names, axis=int(op.attributes["axis"]))
        self._keep(op, value, Codes(name, dtype, value.low, value.high))

    def _moved(self, op: Op, value: Value) -> None:
        x = self.integers.cast(self.codes[op.inputs[0]], onnx_dtype(value.low, value.high))
        source = self.program.values[op.inputs[0]]
        self._keep(op, value, Codes(move(self.graph, op, x.name, source, 0, x.dtype), x.dtype, value.low, value.high))

    _reshape = _transpose = _slice = _pad = _gather = _moved

    def _move_float(self, op: Op) -> None:
        """Before the first codes, or after the last."""
        names = [self.floats[name] for name in op.inputs]
        if op.kind == "concat":
            moved = self.graph.node("Concat", names, axis=int(op.attributes["axis"]))
        elif op.kind == "max_pool":
            moved = pool_node(self.graph, "MaxPool", op, names[0])
        else:
            moved = move(self.graph, op, names[0], self.program.values[op.inputs[0]], 0, "float32")
        self.floats[op.output] = moved
        if self._late.intersection(op.inputs):
            self._late.add(op.output)

    def _threshold(self, op: Op, value: Value) -> None:
        source, x = self.program.values[op.inputs[0]], self.codes[op.inputs[0]]
        shape = _along(op.attributes["axis"], op.constants["low"].tolist(), source)
        # a border outside the bounds is one that is always met, or never
        border = np.clip(op.constants["low"].astype(object), source.low, source.high + 1)
        x = self.integers.cast(x, "int32" if source.high + 1 < 2**31 and x.dtype != "int64" else "int64")
        met = self.graph.node("GreaterOrEqual", [x.name, self.graph.constant(border.reshape(shape), x.dtype)])
        above = (1 - 2 * op.constants["flip"].astype(np.int32)).reshape(shape)
        name = self.graph.node("Where", [met, self.graph.constant(above), self.graph.constant(-above)])
        self._keep(op, value, Codes(name, "int32", -1, 1))

    def _normalize(self, op: Op, value: Value) -> None:
        kinds, of, integers = op.attributes, op.constants, self.integers
        source = self.program.values[op.inputs[0]]
        shape = _along(1, of["mean"].tolist(), source)
        mean, s, gamma, beta = (of[name].astype(object).reshape(shape) for name in ("mean", "s", "gamma", "beta"))
        fraction = max(kinds["fraction_in"], kinds["mean_fraction"])
        x = integers.multiply(self.codes[op.inputs[0]], 1 << (fraction - kinds["fraction_in"]))
        x = integers.add(x, -(mean * (1 << (fraction - kinds["mean_fraction"]))))
        left = kinds["xhat_fraction"] + kinds["s_fraction"] - fraction
        x = integers.multiply(x, 1 << max(left, 0))
        x = integers.quotient(x, s * (1 << max(-left, 0)), "half_even")
        if kinds.get("limit") is not None:
            x = integers.clip(x, -kinds["limit"], kinds["limit"])
        x = integers.multiply(x, gamma * (1 << (kinds["out_fraction"] - kinds["product_fraction"])))
        self._keep(op, value, integers.add(x, beta))

    def _argmax(self, op: Op, value: Value) -> None:
        axis, keep = int(op.attributes["axis"]), int(op.attributes["keepdims"])
        if op.inputs[0] in self.floats:  # behind a dequantize: of floats, of which rounding may have made equals
            name = self.floats[op.inputs[0]]
            self.indices[op.output] = self.graph.node("ArgMax", [name], axis=axis, keepdims=keep)
            return
        x = self.codes[op.inputs[0]]
        if x.dtype == "int64":  # ArgMax does not take it; of equals TopK gives the first one too
            one = self.graph.constant([1], "int64")
            self.graph.node("TopK", [x.name, one], axis=axis)
            self.graph.nodes[-1].output.append(f"{self.graph.nodes[-1].output[0]}_index")
            index = str(self.graph.nodes[-1].output[1])
            self.indices[op.output] = (
                index if keep else self.graph.node("Squeeze", [index, self.graph.constant([axis], "int64")])
            )
        else:
            self.indices[op.output] = self.graph.node("ArgMax", [x.name], axis=axis, keepdims=keep)

    def _dequantize(self, op: Op, value: Value) -> None:
        count = op.constants.get("count", op.attributes.get("count"))
        source = self.program.values[op.inputs[0]]
        self._late.add(op.output)
        self.floats[op.output] = self._worth(self.codes[op.inputs[0]], source, op.attributes, count)

    def _worth(self, x: Codes, source: Value, kinds: Any, count: Any) -> str:
        """code * 2^exponent, divided by count, times factor: each one operation of the asked precision."""
        graph, precision = self.graph, kinds["precision"]
        name = graph.cast(x.name, precision)
        if source.exponent != 0:
            listed = source.exponent if isinstance(source.exponent, int) else list(source.exponent)
            scale = np.ldexp(np.ones(np.shape(listed)), listed).reshape(_along(source.axis, listed, source))
            name = graph.node("Mul", [name, graph.constant(scale, precision)])
        if count is not None:
            name = graph.node("Div", [name, graph.constant(count, precision)])
        if kinds.get("factor") is not None:
            name = graph.node("Mul", [name, graph.constant(kinds["factor"], precision)])
        return name if precision == "float32" else graph.cast(name, "float32")


def _narrow(value: Value) -> bool:
    return onnx_dtype(value.low, value.high) != "int64"


def _along(axis: int | None, entries: Sequence[int] | int, value: Value) -> tuple[int, ...]:
    """The shape that puts one entry per channel along ``axis``; () for a single number."""
    if isinstance(entries, int):
        return ()
    return tuple(-1 if n == (axis or 0) % len(value.shape) else 1 for n in range(len(value.shape)))


def _round_float(graph: Graph, v: str, rounding: str) -> str:
    """To a whole float32, by the formula of the runtime."""
    if rounding == "half_even":
        return graph.node("Round", [v])
    if rounding == "floor":
        return graph.node("Floor", [v])
    if rounding == "half_up":
        whole = graph.node("Floor", [v])
        up = graph.node("GreaterOrEqual", [graph.node("Sub", [v, whole]), graph.constant(0.5, "float32")])
        return graph.node("Add", [whole, graph.cast(up, "float32")])
    inner = "half_up" if rounding == "half_away" else "floor"
    size = _round_float(graph, graph.node("Abs", [v]), inner)
    return graph.node("Mul", [graph.node("Sign", [v]), size])
