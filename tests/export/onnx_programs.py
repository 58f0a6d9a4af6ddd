"""Integer programs written op by op, with the bounds and shapes that lowering would prove."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from lightning_lowbit.export.onnx_arithmetic import rounded
from lightning_lowbit.export.runtime import Op, Program, Value


class Writer:
    """Each method appends one op and returns its value."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.ops: list[Op] = []
        self.values: dict[str, Value] = {}
        self.inputs: list[str] = []

    def program(self, *outputs: Value, note: dict | None = None) -> Program:
        leaves = [{"leaf": index} for index in range(len(outputs))]
        structure = leaves[0] if len(leaves) == 1 else {"tuple": leaves}
        names = tuple(value.name for value in outputs)
        return Program(tuple(self.ops), self.values, tuple(self.inputs), names, structure, note or {})

    def value(self, shape, low=0, high=0, exponent=0, axis=None, dtype="int") -> Value:
        name = f"v{len(self.values)}"
        self.values[name] = Value(name, tuple(shape), dtype, int(low), int(high), exponent, axis)
        return self.values[name]

    def op(self, kind, inputs, output, constants=None, path=None, **attributes) -> Value:
        names = tuple(value.name for value in inputs)
        self.ops.append(Op(kind, path or f"{kind}{len(self.ops)}", names, output.name, attributes, constants or {}))
        return output

    def input(self, *shape) -> Value:
        value = self.value((-1, *shape), dtype="float32")
        self.inputs.append(value.name)
        return value

    def quantize(self, x, low=-128, high=127, exponent=-5, rounding="half_even") -> Value:
        out = self.value(x.shape, low, high, exponent)
        return self.op("quantize", [x], out, exponent=exponent, rounding=rounding, low=low, high=high)

    def codes(self, *shape, low=-128, high=127, exponent=-5, rounding="half_even") -> Value:
        return self.quantize(self.input(*shape), low, high, exponent, rounding)

    def weight(self, shape, bits=8):
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if bits > 1 else (-1, 1)
        if bits == 1:
            return self.random.choice(np.int8([-1, 1]), shape)
        drawn = self.random.integers(low, high + 1, shape)
        return drawn.astype(np.int8 if bits <= 8 else np.int16 if bits <= 16 else np.int32)

    def sums(self, x, weight, axis, bias) -> tuple[int, int]:
        """Bounds of every partial sum."""
        others = tuple(n for n in range(weight.ndim) if n != axis)
        most = np.abs(weight.astype(object)).sum(others) * max(-x.low, x.high)
        bound = int(max(most + np.abs(bias.astype(object)) if bias is not None else most))
        return -bound, bound

    def conv(self, x, out, kernel, stride=1, padding=None, dilation=1, groups=1, bits=8, bias=True, fraction=4):
        d = len(x.shape) - 2
        stride, dilation = [stride] * d, [dilation] * d
        padding = padding or [[k // 2, k // 2] for k in kernel]
        w = self.weight((out, x.shape[1] // groups, *kernel), bits)
        b = self.random.integers(-500, 501, out).astype(np.int16) if bias else None
        sizes = [
            (n + p + q - m * (k - 1) - 1) // s + 1
            for n, (p, q), m, k, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
        ]
        low, high = self.sums(x, w, 0, b)
        value = self.value((x.shape[0], out, *sizes), low, high, x.exponent - fraction)
        constants = {"weight": w, "bias": b} if bias else {"weight": w}
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return self.op("conv", [x], value, constants, **geometry)

    def conv_transpose(self, x, out, kernel, stride, padding, output_padding, dilation=1, groups=1, bits=8):
        d = len(kernel)
        w = self.weight((x.shape[1], out // groups, *kernel), bits)
        b = self.random.integers(-500, 501, out).astype(np.int16)
        sizes = [
            (n - 1) * stride - 2 * padding + dilation * (k - 1) + output_padding + 1
            for n, k in zip(x.shape[2:], kernel, strict=True)
        ]
        bound = int(np.abs(w.astype(object)).sum() * max(-x.low, x.high) + 500)
        value = self.value((x.shape[0], out, *sizes), -bound, bound, x.exponent - 4)
        geometry = {"stride": [stride] * d, "padding": [padding] * d, "output_padding": [output_padding] * d}
        geometry |= {"dilation": [dilation] * d, "groups": groups}
        return self.op("conv_transpose", [x], value, {"weight": w, "bias": b}, **geometry)

    def linear(self, x, out, bits=8, bias=True) -> Value:
        w = self.weight((out, x.shape[-1]), bits)
        b = self.random.integers(-500, 501, out).astype(np.int16) if bias else None
        low, high = self.sums(x, w, 0, b)
        value = self.value((*x.shape[:-1], out), low, high, x.exponent - 4)
        return self.op("linear", [x], value, {"weight": w, "bias": b} if bias else {"weight": w})

    def requantize(self, x, shift, low=-128, high=127, rounding="half_even", axis=None) -> Value:
        listed = [shift] if isinstance(shift, int) else shift
        ends = [rounded[rounding](Fraction(end) / Fraction(2) ** n) for end in (x.low, x.high) for n in listed]
        bounds = [min(max(end, end if low is None else low), end if high is None else high) for end in ends]
        exponent = x.exponent + shift if isinstance(shift, int) else tuple(x.exponent + n for n in shift)
        out = self.value(x.shape, min(bounds), max(bounds), exponent, None if isinstance(shift, int) else axis)
        return self.op("requantize", [x], out, shift=shift, axis=axis, rounding=rounding, low=low, high=high)

    def add(self, *xs, left=None, other=None) -> Value:
        finest = min(x.exponent for x in xs)
        left = left or [x.exponent - finest for x in xs] + [0] * (other is not None)
        lows = [x.low << n for x, n in zip(xs, left, strict=False)]
        highs = [x.high << n for x, n in zip(xs, left, strict=False)]
        if other is not None:
            lows.append(int(other.min()) << left[-1])
            highs.append(int(other.max()) << left[-1])
        shape = max((x.shape for x in xs), key=len)
        out = self.value(shape, sum(lows), sum(highs), xs[0].exponent - left[0])
        return self.op("add", xs, out, {} if other is None else {"other": other}, left=left)

    def concat(self, *xs, axis=1) -> Value:
        shape = list(xs[0].shape)
        shape[axis] = sum(x.shape[axis] for x in xs)
        out = self.value(shape, min(x.low for x in xs), max(x.high for x in xs), xs[0].exponent)
        return self.op("concat", xs, out, axis=axis)

    def pool(self, kind, x, kernel, stride, padding, dilation=1) -> Value:
        sizes = [
            (n + sum(p) - dilation * (k - 1) - 1) // s + 1
            for n, k, s, p in zip(x.shape[2:], kernel, stride, padding, strict=True)
        ]
        attributes = {"kernel": kernel, "stride": stride, "padding": padding}
        if kind == "max_pool":
            attributes["dilation"] = [dilation] * len(kernel)
        factor = math.prod(kernel) if kind == "sum_pool" else 1
        bounds = min(x.low * factor, x.low), max(x.high * factor, x.high)
        return self.op(kind, [x], self.value((*x.shape[:2], *sizes), *bounds, x.exponent), **attributes)

    def sum(self, x, axes, keepdims) -> Value:
        count = math.prod(x.shape[axis] for axis in axes)
        shape = [1 if n in axes else size for n, size in enumerate(x.shape) if keepdims or n not in axes]
        out = self.value(shape, min(x.low * count, x.low), max(x.high * count, x.high), x.exponent)
        return self.op("sum", [x], out, axes=axes, keepdims=keepdims)

    def divide(self, x, count, shift=0, rounding="half_even", low=None, high=None) -> Value:
        bound = math.ceil(max(-x.low, x.high) * 2.0**-shift) + 1
        bounds = (-bound if low is None else low, bound if high is None else high)
        out = self.value(x.shape, *bounds, x.exponent + shift)
        constants = {} if isinstance(count, int) else {"count": count}
        number = count if isinstance(count, int) else None
        fields = {"shift": shift, "rounding": rounding, "low": low, "high": high, "count": number}
        return self.op("divide", [x], out, constants, **fields)

    def move(self, kind, x, to, constants=None, **attributes) -> Value:
        ends = 0, attributes.get("value", 0), x.low, x.high
        return self.op(kind, [x], self.value(to, min(ends), max(ends), x.exponent), constants, **attributes)

    def threshold(self, x, low, flip, axis=1) -> Value:
        return self.op("threshold", [x], self.value(x.shape, -1, 1), {"low": low, "flip": flip}, axis=axis)

    def argmax(self, x, axis, keepdims) -> Value:
        shape = [1 if n == axis else size for n, size in enumerate(x.shape) if keepdims or n != axis]
        return self.op("argmax", [x], self.value(shape, dtype="int64"), axis=axis, keepdims=keepdims)

    def dequantize(self, x, factor=None, precision="float32", count=None) -> Value:
        out = self.value(x.shape, dtype="float32")
        return self.op("dequantize", [x], out, factor=factor, precision=precision, count=count)

    def samples(self, batch=3):
        """Floats among which are ties of the first grid, and some beyond its ends."""
        shapes = [self.values[name].shape for name in self.inputs]
        return [(self.random.integers(-300, 301, (batch, *shape[1:])) / 64).astype(np.float32) for shape in shapes]


def branches(w: Writer, rounding: str = "half_even") -> Value:
    """A residual network: convolutions, an aligned operand, a subsampled and padded shortcut, pools, a last layer."""
    x = w.codes(3, 8, 8, rounding=rounding)
    x = w.requantize(w.conv(x, 8, [3, 3]), 6, 0, 255, rounding)
    y = w.requantize(w.conv(x, 8, [3, 3], stride=2), 8, 0, 255, rounding)
    y = w.requantize(w.conv(y, 16, [3, 3]), 7, -128, 127, rounding)
    short = w.move("slice", x, (-1, 8, 4, 4), starts=[0] * 4, stops=[None] * 4, steps=[1, 1, 2, 2])
    short = w.move("pad", short, (-1, 16, 4, 4), padding=[[0, 0], [4, 4], [0, 0], [0, 0]], value=0)
    total = w.requantize(w.add(y, short), 2, 0, 255, rounding)
    total = w.pool("max_pool", total, [2, 2], [2, 2], [[0, 0], [0, 0]])
    mean = w.divide(w.sum(total, [2, 3], False), 4, 0, rounding, 0, 255)
    return w.dequantize(w.linear(mean, 5))


def tangle(w: Writer, rounding: str) -> list[Value]:
    """A random graph on [N, C, H, W] of bytes: every op reads what some op before it made."""
    random = w.random

    def bytes_of(x: Value) -> Value:
        shift = max(0, x.bits - 8 - int(random.integers(0, 3)))
        low, high = [(-128, 127), (0, 255), (-127, 127), (0, 15), (-8, 7)][random.integers(0, 5)]
        return w.requantize(x, shift, low, high, rounding)

    low = int(random.choice([-128, 0]))
    pool = [w.codes(4, 6, 6, low=low, high=low + 255, rounding=rounding)]
    for _ in range(int(random.integers(3, 9))):
        x = pool[random.integers(0, len(pool))]
        if random.random() < 0.6:
            x = pool[-1]
        kind = random.choice(
            ["conv", "add", "concat", "max_pool", "average", "clip", "transpose", "pad", "gather", "align"]
        )
        c, h, v = x.shape[1:]
        if kind == "conv":
            groups = int(random.choice([g for g in (1, 2, 4) if c % g == 0]))
            y = bytes_of(w.conv(x, groups * int(random.integers(1, 5)), [1 if h < 3 else 3, 1], groups=groups))
        elif kind in ("add", "concat"):
            others = [o for o in pool if o.shape == x.shape and (kind == "add" or o.exponent == x.exponent)]
            other = others[random.integers(0, len(others))]
            near = abs(other.exponent - x.exponent) <= 4
            y = bytes_of(w.add(x, other if near else x)) if kind == "add" else w.concat(x, other)
            y = y if y.bits <= 8 else bytes_of(y)
        elif kind == "max_pool":
            y = w.pool(
                "max_pool", x, [2, 1], [int(random.integers(1, 3)), 1], [[int(random.integers(0, 2)), 1], [0, 0]]
            )
        elif kind == "average":
            n = int(random.integers(1, min(h, v) + 1))
            y = w.divide(w.pool("sum_pool", x, [n, n], [1, 1], [[0, 0]] * 2), n * n, 0, rounding, x.low, x.high)
        elif kind == "clip":
            y = w.requantize(x, 0, 0, None, rounding)
        elif kind == "transpose":
            y = w.move("transpose", x, (-1, h, c, v), permutation=[0, 2, 1, 3])
        elif kind == "pad":
            y = w.move("pad", x, (-1, c, h + 1, v), padding=[[0, 0], [0, 0], [1, 0], [0, 0]], value=0)
        elif kind == "gather":
            y = w.move(
                "gather", x, (-1, 3, 4, 4), {"index": random.integers(-1, c * h * v, (3, 4, 4)).astype(np.int32)}
            )
        else:
            y = w.requantize(x, int(random.integers(-1, 3)), *[(-128, 127), (0, 255)][random.integers(0, 2)], rounding)
        pool.append(y)
    return [w.dequantize(x) for x in pool]
