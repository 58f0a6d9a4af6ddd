"""Windows and moves of data in ONNX operators, for codes of any width and for floats."""

from __future__ import annotations

from typing import Any

from lightning_lowbit.export.onnx_arithmetic import Codes, larger
from lightning_lowbit.export.onnx_graph import Graph
from lightning_lowbit.export.runtime import Op, Value

__all__ = ["max_pool", "move", "pads", "pool_node", "sum_pool"]


def pads(op: Op) -> list[int]:
    """ONNX's order: all begins, then all ends."""
    padding = op.attributes["padding"]
    return [int(before) for before, _ in padding] + [int(after) for _, after in padding]


def pool_node(graph: Graph, kind: str, op: Op, name: str, **more: Any) -> str:
    """MaxPool or AveragePool with the geometry of ``op``."""
    kinds = op.attributes
    if any(n != 1 for n in kinds.get("dilation") or ()):
        more["dilations"] = list(kinds["dilation"])
    kernel, strides = list(kinds["kernel"]), list(kinds["stride"])
    return graph.node(kind, [name], kernel_shape=kernel, strides=strides, pads=pads(op), **more)


def max_pool(graph: Graph, op: Op, x: Codes, source: Value) -> Codes:
    """MaxPool where the codes have 8 bits, else the larger of shifted slices, one axis after the other."""
    if x.dtype in ("int8", "uint8"):
        return Codes(pool_node(graph, "MaxPool", op, x.name), x.dtype, x.low, x.high)
    return Codes(_windows(graph, op, x, source, "Max", source.low), x.dtype, x.low, x.high)


def sum_pool(graph: Graph, op: Op, x: Codes, source: Value, value: Value) -> Codes:
    """Sums of shifted slices, one axis after the other."""
    return Codes(_windows(graph, op, x, source, "Add", 0), x.dtype, value.low, value.high)


def _windows(graph: Graph, op: Op, x: Codes, source: Value, combine: str, filler: int) -> str:
    kinds, padding = op.attributes, op.attributes["padding"]
    dilation = kinds.get("dilation") or [1] * len(kinds["kernel"])
    before, after = ([0, 0, *(int(side[i]) for side in padding)] for i in (0, 1))
    name = graph.pad(x.name, before, after, filler, x.dtype)
    rank = len(source.shape)
    for axis, (kernel, stride, step) in enumerate(
        zip(kinds["kernel"], kinds["stride"], dilation, strict=True), start=2
    ):
        size = source.shape[axis] + before[axis] + after[axis]
        if combine == "Add" and kernel == size:
            name = graph.node("ReduceSum", [name, graph.constant([axis], "int64")], keepdims=1)
            continue
        last = (size - step * (kernel - 1) - 1) // stride * stride  # where the last window begins
        parts = []
        for tap in range(kernel):
            starts, stops, steps = [0] * rank, [None] * rank, [1] * rank
            starts[axis], stops[axis], steps[axis] = tap * step, tap * step + last + 1, int(stride)
            parts.append(graph.slice(name, starts, stops, steps))
        name = parts[0]
        for part in parts[1:]:
            name = graph.node("Add", [name, part]) if combine == "Add" else larger(graph, name, part, x.dtype)
    return name


def move(graph: Graph, op: Op, name: str, source: Value, zero: int, dtype: str, scale: float | None = None) -> str:
    """reshape, transpose, slice, pad or gather of a tensor whose code 0 is stored as ``zero``.

    Args:
        scale: what the code of a pad is multiplied with, where the tensor holds floats.
    """
    kinds = op.attributes
    if op.kind == "reshape":
        return graph.reshape(name, kinds["shape"])
    if op.kind == "transpose":
        return graph.node("Transpose", [name], perm=list(kinds["permutation"]))
    if op.kind == "slice":
        return graph.slice(name, kinds["starts"], kinds["stops"], kinds["steps"])
    if op.kind == "gather":
        return graph.gather(name, op.constants["index"], source, zero, dtype)
    before, after = ([int(side[i]) for side in kinds["padding"]] for i in (0, 1))
    return graph.pad(name, before, after, kinds["value"] * (scale or 1) + zero, dtype)
