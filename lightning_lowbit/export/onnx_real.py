"""The float skeleton that the QDQ form and the clip form share: every tensor holds the worth of its codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.export.onnx_graph import Array, Graph
from lightning_lowbit.export.onnx_windows import move, pads, pool_node
from lightning_lowbit.export.runtime import Op, Program, Value

__all__ = ["RealForm", "magnitude", "readers"]

_NONE = {
    "island": "a float function between integers. program.summary() lists them; the network needs another one there.",
    "threshold": "its signs come from one border per channel, which no quantizer of ONNX computes. Use form='integer'.",
    "normalize": "it divides by a deviation per channel in integers. Use form='integer'.",
}


def magnitude(value: Value) -> int:
    return max(-value.low, value.high)


def readers(program: Program) -> dict[str, list[Op]]:
    """The ops that read each value."""
    found: dict[str, list[Op]] = {name: [] for name in program.values}
    for op in program.ops:
        for name in op.inputs:
            found[name].append(op)
    return found


class RealForm:
    """Writes ``program`` into ``graph``; what rounds and what holds a weight is up to the form.

    Raises:
        UnsupportedModelError: an op that the form does not have; it names the path.
    """

    form = ""

    def __init__(self, program: Program, graph: Graph) -> None:
        for op in program.ops:
            if op.kind in _NONE:
                raise UnsupportedModelError(
                    f"{op.path} ({op.kind}): form={self.form!r} cannot hold it: {_NONE[op.kind]}"
                )
        self.program, self.graph = program, graph
        self.reals: dict[str, str] = dict(zip(program.inputs, graph.names("input"), strict=True))
        self.indices: dict[str, str] = {}
        self._maker = {op.output: op for op in program.ops}
        self._readers = readers(program)

    def build(self) -> tuple[list[str], list[str]]:
        """The tensors of the outputs, and their types."""
        for op in self.program.ops:
            self.graph.at(op)
            write: Callable[[Op, Value], None] = getattr(self, f"_{op.kind}")
            write(op, self.program.values[op.output])
        tensors = [self.indices.get(name) or self.real(name) for name in self.program.outputs]
        return tensors, ["int64" if name in self.indices else "float32" for name in self.program.outputs]

    def real(self, name: str) -> str:
        return self.reals[name]

    def settle(self, op: Op, value: Value, real: str) -> None:
        """Keep ``real`` as the output of ``op``, rounded and clipped as the form does."""
        raise NotImplementedError

    def weights(self, op: Op, weight: Array, axis: int) -> list[str]:
        """The worth of the weight, whose outputs lie along ``axis``, and of the bias if there is one."""
        raise NotImplementedError

    def weight_exponent(self, op: Op) -> Array:
        """One number, or one per output channel."""
        source, value = self.program.values[op.inputs[0]], self.program.values[op.output]
        if not isinstance(source.exponent, int):
            raise UnsupportedModelError(
                f"{op.path} (exponent): its input has one exponent per channel, and form={self.form!r} needs one. "
                "Use form='integer'."
            )
        return np.asarray(value.exponent) - source.exponent

    def clip(self, real: str, low: float | None, high: float | None) -> str:
        """Clip, its limits attributes before opset 11 and inputs from then on."""
        if low is None and high is None:
            return real
        if low == 0 and high is None:
            return self.graph.node("Relu", [real])
        if self.graph.opset < 11:
            ends: dict[str, Any] = {"min": low, "max": high}
            return self.graph.node("Clip", [real], **{k: v for k, v in ends.items() if v is not None})
        return self.graph.node(
            "Clip", [real, *("" if end is None else self.graph.constant(end, "float32") for end in (low, high))]
        )

    def _quantize(self, op: Op, value: Value) -> None:
        self.settle(op, value, self.real(op.inputs[0]))

    def _requantize(self, op: Op, value: Value) -> None:
        self.settle(op, value, self.real(op.inputs[0]))

    def _conv(self, op: Op, value: Value) -> None:
        kinds, weight = op.attributes, op.constants["weight"]
        inputs = [self.real(op.inputs[0]), *self.weights(op, weight, 0)]
        self.reals[op.output] = self.graph.node(
            "Conv",
            inputs,
            group=int(kinds["groups"]),
            kernel_shape=list(weight.shape[2:]),
            strides=list(kinds["stride"]),
            dilations=list(kinds["dilation"]),
            pads=pads(op),
        )

    def _conv_transpose(self, op: Op, value: Value) -> None:
        kinds, weight = op.attributes, op.constants["weight"]
        inputs = [self.real(op.inputs[0]), *self.weights(op, weight, 1)]
        self.reals[op.output] = self.graph.node(
            "ConvTranspose",
            inputs,
            group=int(kinds["groups"]),
            kernel_shape=list(weight.shape[2:]),
            strides=list(kinds["stride"]),
            dilations=list(kinds["dilation"]),
            pads=[*kinds["padding"], *kinds["padding"]],
            output_padding=list(kinds["output_padding"]),
        )

    def _linear(self, op: Op, value: Value) -> None:
        x, weight = self.real(op.inputs[0]), op.constants["weight"]
        if len(value.shape) == 2:
            self.reals[op.output] = self.graph.node("Gemm", [x, *self.weights(op, weight, 0)], transB=1)
            return
        kernel, *bias = self.weights(op, np.ascontiguousarray(weight.T), 1)
        real = self.graph.node("MatMul", [x, kernel])
        self.reals[op.output] = self.graph.node("Add", [real, *bias]) if bias else real

    def _add(self, op: Op, value: Value) -> None:
        real = self.real(op.inputs[0])
        for name in op.inputs[1:]:
            real = self.graph.node("Add", [real, self.real(name)])
        if "other" in op.constants:
            if not isinstance(value.exponent, int):
                raise UnsupportedModelError(f"{op.path} (exponent): one per channel. Use form='integer'.")
            worth = np.ldexp(op.constants["other"].astype(np.float64), value.exponent + int(op.attributes["left"][-1]))
            real = self.graph.node("Add", [real, self.graph.constant(worth, "float32")])
        self.reals[op.output] = real

    def _concat(self, op: Op, value: Value) -> None:
        names = [self.real(name) for name in op.inputs]
        self.reals[op.output] = self.graph.node("Concat", names, axis=int(op.attributes["axis"]))

    def _max_pool(self, op: Op, value: Value) -> None:
        self.reals[op.output] = pool_node(self.graph, "MaxPool", op, self.real(op.inputs[0]))

    def _moved(self, op: Op, value: Value) -> None:
        source = self.program.values[op.inputs[0]]
        scale = 2.0**source.exponent if isinstance(source.exponent, int) else 1.0
        real = move(self.graph, op, self.real(op.inputs[0]), source, 0, "float32", scale)
        if value.exponent != source.exponent:  # the same codes, read on another step
            factor = _steps(value) / _steps(source)
            real = self.graph.node("Mul", [real, self.graph.constant(factor, "float32")])
        self.reals[op.output] = real

    _reshape = _transpose = _slice = _pad = _gather = _moved

    def _sum(self, op: Op, value: Value) -> None:
        if self._averaged(op):
            return
        axes, keep = [int(axis) for axis in op.attributes["axes"]], int(op.attributes["keepdims"])
        real = self.real(op.inputs[0])
        if self.graph.opset < 13:
            self.reals[op.output] = self.graph.node("ReduceSum", [real], axes=axes, keepdims=keep)
        else:
            inputs = [real, self.graph.constant(axes, "int64")]
            self.reals[op.output] = self.graph.node("ReduceSum", inputs, keepdims=keep)

    def _sum_pool(self, op: Op, value: Value) -> None:
        """A convolution of every channel with ones."""
        if self._averaged(op):
            return
        ones = self.graph.constant(np.ones((value.shape[1], 1, *op.attributes["kernel"])), "float32")
        self.reals[op.output] = self.graph.node(
            "Conv",
            [self.real(op.inputs[0]), ones],
            group=value.shape[1],
            strides=list(op.attributes["stride"]),
            pads=pads(op),
        )

    def _averaged(self, op: Op) -> bool:
        """Whether all that reads these sums is written as an average pool, so that nobody needs them."""
        users = self._readers[op.output]
        return op.output not in self.program.outputs and bool(users) and all(self.pool_of(user) for user in users)

    def pool_of(self, op: Op) -> str | None:
        """How ONNX calls a divide together with the sums before it, if it has a name for them."""
        sums = self._maker.get(op.inputs[0])
        if op.kind != "divide" or sums is None:
            return None
        source = self.program.values[sums.inputs[0]]
        count = op.constants.get("count", op.attributes.get("count"))
        if sums.kind == "sum":
            axes = sorted(int(axis) % len(source.shape) for axis in sums.attributes["axes"])
            whole = len(source.shape) > 2 and axes == list(range(2, len(source.shape)))
            every = whole and np.all(np.asarray(count) == math.prod(source.shape[2:]))
            return "GlobalAveragePool" if every and self.trusts_global(math.prod(source.shape[2:])) else None
        if sums.kind == "sum_pool":
            full = np.all(np.asarray(count) == math.prod(sums.attributes["kernel"]))
            return "AveragePool" if full or np.array_equal(_inside(sums, source), np.asarray(count)) else None
        return None

    def trusts_global(self, count: int) -> bool:
        """Whether GlobalAveragePool over ``count`` elements gives the exact quotient."""
        return True

    def _divide(self, op: Op, value: Value) -> None:
        kind, count = self.pool_of(op), op.constants.get("count", op.attributes.get("count"))
        if kind is None:
            divisor = self.graph.constant(count, "float32")
            self.settle(op, value, self.graph.node("Div", [self.real(op.inputs[0]), divisor]))
            return
        sums = self._maker[op.inputs[0]]
        x = self.real(sums.inputs[0])
        if kind == "AveragePool":
            include = int(bool(np.all(np.asarray(count) == math.prod(sums.attributes["kernel"]))))
            self.settle(op, value, pool_node(self.graph, kind, sums, x, count_include_pad=include))
            return
        self.settle(op, value, self.graph.node(kind, [x]))
        if not sums.attributes["keepdims"]:
            self.flatten(op, value)

    def flatten(self, op: Op, value: Value) -> None:
        """Drop the window's dimensions, which GlobalAveragePool keeps."""
        self.reals[op.output] = self.graph.reshape(self.reals[op.output], value.shape)

    def _argmax(self, op: Op, value: Value) -> None:
        keep, axis = int(op.attributes["keepdims"]), int(op.attributes["axis"])
        self.indices[op.output] = self.graph.node("ArgMax", [self.real(op.inputs[0])], axis=axis, keepdims=keep)

    def _dequantize(self, op: Op, value: Value) -> None:
        real, precision = self.real(op.inputs[0]), str(op.attributes["precision"])
        count, factor = op.constants.get("count", op.attributes.get("count")), op.attributes.get("factor")
        if count is not None or factor is not None:
            real = real if precision == "float32" else self.graph.cast(real, precision)
            for kind, number in (("Div", count), ("Mul", factor)):
                if number is not None:
                    real = self.graph.node(kind, [real, self.graph.constant(number, precision)])
            real = real if precision == "float32" else self.graph.cast(real, "float32")
        self.reals[op.output] = real


def _steps(value: Value) -> Array:
    """2^exponent, broadcastable against the tensor."""
    if isinstance(value.exponent, int):
        return np.array(2.0**value.exponent)
    assert value.axis is not None
    steps: Array = np.ldexp(1.0, np.array(value.exponent)).reshape([-1] + [1] * (len(value.shape) - 1 - value.axis))
    return steps


def _inside(op: Op, source: Value) -> Array:
    """How many elements of each window lie within the input, [*out]."""
    counts = np.ones((), np.int64)
    kinds = op.attributes
    for size, kernel, stride, (before, after) in zip(
        source.shape[2:], kinds["kernel"], kinds["stride"], kinds["padding"], strict=True
    ):
        starts = np.arange(0, size + before + after - kernel + 1, stride) - before
        along = np.minimum(starts + kernel, size) - np.maximum(starts, 0)
        counts = counts[..., None] * along
    return counts
