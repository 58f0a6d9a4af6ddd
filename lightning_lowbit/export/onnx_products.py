"""Integer products of codes and weights of any width through ConvInteger and MatMulInteger.

    x = sum_i x_i 256^i    w = sum_j w_j 2^(b j)    x * w = sum_ij (x_i * w_j) 2^(8 i + b j)

Each x_i * w_j is one product of unsigned bytes with zero points, whose sum stays within int32: b, the digits' width, is
the widest for which the weights at hand prove that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.export.onnx_arithmetic import Codes, Integers
from lightning_lowbit.export.onnx_graph import Array
from lightning_lowbit.export.onnx_windows import pads
from lightning_lowbit.export.runtime import Op, Value

__all__ = ["conv", "conv_transpose", "linear", "weight_planes"]

_INT32 = 2**31 - 1


@dataclass(frozen=True)
class _Plane:
    """Bytes of a tensor: worth (byte - zero) * factor."""

    name: str
    zero: int
    factor: int


_Product = Callable[[_Plane, _Plane], str]


def conv(integers: Integers, op: Op, x: Codes, value: Value) -> Codes:
    kinds = op.attributes
    geometry: dict[str, Any] = {
        "strides": list(kinds["stride"]),
        "pads": pads(op),
        "dilations": list(kinds["dilation"]),
        "group": int(kinds["groups"]),
    }
    return _products(integers, op, x, value, op.constants["weight"], _convolution(integers, geometry))


def conv_transpose(integers: Integers, op: Op, x: Codes, source: Value, value: Value) -> Codes:
    """A convolution with the mirrored kernel of x with stride - 1 zeros after each element."""
    kinds, graph = op.attributes, integers.graph
    groups, spatial = int(kinds["groups"]), source.shape[2:]
    weight = op.constants["weight"]  # [in, out/groups, *k]
    kernel = weight.shape[2:]
    per_group = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).swapaxes(1, 2)
    mirrored = np.flip(per_group, tuple(range(3, per_group.ndim))).reshape(-1, weight.shape[0] // groups, *kernel)
    stride, dilation = kinds["stride"], kinds["dilation"]
    before = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, kinds["padding"], strict=True)]
    after = [b + o - (s - 1) for b, o, s in zip(before, kinds["output_padding"], stride, strict=True)]
    convolve = _convolution(integers, {"dilations": list(dilation), "group": groups})

    def product(part: _Plane, weights: _Plane) -> str:
        name = part.name
        if any(s > 1 for s in stride):
            apart = [n for size in spatial for n in (size, 1)]
            name = graph.reshape(name, (*source.shape[:2], *apart))
            gaps = [0, 0, *(n for s in stride for n in (0, s - 1))]
            name = graph.pad(name, [0] * len(gaps), gaps, part.zero, "uint8")
            name = graph.reshape(name, (*source.shape[:2], *(n * s for n, s in zip(spatial, stride, strict=True))))
        name = graph.pad(name, [0, 0, *before], [0, 0, *after], part.zero, "uint8")
        return convolve(_Plane(name, part.zero, part.factor), weights)

    return _products(integers, op, x, value, mirrored, product)


def linear(integers: Integers, op: Op, x: Codes, value: Value) -> Codes:
    graph = integers.graph

    def product(part: _Plane, weights: _Plane) -> str:
        zeros = [graph.constant(plane.zero, "uint8") for plane in (part, weights)]
        return graph.node("MatMulInteger", [part.name, weights.name, *zeros])

    return _products(integers, op, x, value, op.constants["weight"].T, product, bias_axis=-1)


def _convolution(integers: Integers, geometry: dict[str, Any]) -> _Product:
    graph = integers.graph

    def product(part: _Plane, weights: _Plane) -> str:
        zeros = [graph.constant(plane.zero, "uint8") for plane in (part, weights)]
        return graph.node("ConvInteger", [part.name, weights.name, *zeros], **geometry)

    return product


def _products(
    integers: Integers, op: Op, x: Codes, value: Value, weight: Array, product: _Product, bias_axis: int = 1
) -> Codes:
    graph = integers.graph
    parts = _input_planes(integers, x)
    most = max(-x.low, x.high) if len(parts) == 1 else 255
    planes = weight_planes(weight, 0 if bias_axis == 1 else 1, most, op.path)
    weights = [_Plane(graph.constant(plane), zero, factor) for plane, zero, factor in planes]
    dtype = "int32" if len(parts) == len(weights) == 1 else "int64"
    total: Codes | None = None
    for part in parts:
        for plane in weights:
            term = integers.cast(Codes(product(part, plane), "int32", -_INT32 - 1, _INT32), dtype)
            if part.factor * plane.factor != 1:
                scaled = graph.node("Mul", [term.name, graph.constant(part.factor * plane.factor, dtype)])
                term = Codes(scaled, dtype, term.low, term.high)
            name = term.name if total is None else graph.node("Add", [total.name, term.name])
            total = Codes(name, dtype, value.low, value.high)
    assert total is not None
    if "bias" in op.constants:
        bias = op.constants["bias"].astype(object)
        bias = bias.reshape(-1, *[1] * (len(value.shape) - 2)) if bias_axis == 1 else bias
        total = integers.combine("Add", total, bias, value.low, value.high)
    return total


def _input_planes(integers: Integers, x: Codes) -> list[_Plane]:
    """x as bytes: itself, itself + 128, or its digits to the base 256, the highest of which carries the sign."""
    if x.low >= 0 and x.high <= 255:
        return [_Plane(integers.cast(x, "uint8").name, 0, 1)]
    if x.low >= -128 and x.high <= 127:
        return [_Plane(integers.cast(integers.add(x, 128), "uint8").name, 128, 1)]
    high = integers.quotient(x, 256, "floor")
    base = integers.multiply(high, 256)
    low = integers.combine("Sub", x, base, 0, 255)
    planes = [_Plane(integers.cast(low, "uint8").name, 0, 1)]
    return planes + [_Plane(p.name, p.zero, p.factor * 256) for p in _input_planes(integers, high)]


def weight_planes(weight: Array, axis: int, most: int, path: str) -> list[tuple[Array, int, int]]:
    """Bytes, zero point and factor of planes whose sum is ``weight``.

    Args:
        weight: integers; its products are summed along every axis but ``axis``.
        most: the largest magnitude of what the weights are multiplied with.

    >>> weight_planes(np.array([[-128, 127]]), 0, 255, "fc")
    [(array([[  0, 255]], dtype=uint8), 128, 1)]
    >>> [(plane.tolist(), zero, factor) for plane, zero, factor in weight_planes(np.array([[1000, -3]]), 0, 255, "fc")]
    [([[104, 125]], 128, 1), ([[132, 128]], 128, 256)]
    """
    wide = weight.astype(np.int64)
    others = tuple(n for n in range(weight.ndim) if n != axis)
    for bits in range(8, 0, -1):
        planes: list[tuple[Array, int]] = []
        rest, factor = wide, 1
        while not planes or rest.any():
            half = 1 << (bits - 1)
            digit = (rest + half) % (1 << bits) - half  # in [-half, half)
            planes.append((digit, factor))
            rest, factor = (rest - digit) >> bits, factor << bits
        if all(int(np.abs(digit).sum(others).max()) * most <= _INT32 for digit, _ in planes):
            return [((digit + 128).astype(np.uint8), 128, factor) for digit, factor in planes]
    raise UnsupportedModelError(
        f"{path}: a sum of {weight.size // weight.shape[axis]} products exceeds int32 even bit by bit; ONNX has no "
        "wider product. Split the layer, or export another form."
    )
