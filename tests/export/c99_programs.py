"""Programs written by hand, with the bounds that their ops can reach."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lowbit.export import runtime
from lightning_lowbit.export.runtime import Op, Program, Value

Array = NDArray[Any]
Bounds = tuple[int, int]


def smallest(numbers: Any) -> Array:
    """In the narrowest signed type."""
    array = np.asarray(numbers, np.int64)
    reach = max(int(array.max(initial=0)), -int(array.min(initial=0)) - 1)
    return array.astype(next(t for t in ("int8", "int16", "int32", "int64") if reach <= np.iinfo(t).max))


def reached(weight: Array, bias: Array | None, x: Value) -> Bounds:
    """Bounds of all partial sums of weight [out, ...] times x, in any order."""
    w = weight.astype(object).reshape(len(weight), -1)
    least = np.minimum(np.minimum(w * x.low, w * x.high), 0).sum(1)
    most = np.maximum(np.maximum(w * x.low, w * x.high), 0).sum(1)
    b = np.zeros(1, object) if bias is None else bias.astype(object)
    return int((least + np.minimum(b, 0)).min()), int((most + np.maximum(b, 0)).max())


def shape_of(op: Op, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the output for one sample."""
    a, c, x = op.attributes, op.constants, shapes[0]
    match op.kind:
        case "conv" | "max_pool" | "sum_pool":
            kernel = a.get("kernel") or c["weight"].shape[2:]
            spans = [d * (k - 1) + 1 for d, k in zip(a.get("dilation", [1, 1, 1]), kernel, strict=False)]
            padded = [n + sum(p) for n, p in zip(x[2:], a["padding"], strict=True)]
            sizes = [(n - span) // s + 1 for n, span, s in zip(padded, spans, a["stride"], strict=True)]
            return (x[0], len(c["weight"]) if "weight" in c else x[1], *sizes)
        case "conv_transpose":
            names = ("stride", "padding", "dilation", "output_padding")
            rows = zip(x[2:], c["weight"].shape[2:], *(a[name] for name in names), strict=True)
            sizes = [(n - 1) * s - 2 * p + d * (k - 1) + more + 1 for n, k, s, p, d, more in rows]
            return (x[0], c["weight"].shape[1] * a["groups"], *sizes)
        case "linear":
            return (*x[:-1], len(c["weight"]))
        case "add":
            return np.broadcast_shapes(*shapes, *(array.shape for array in c.values()))
        case "concat":
            axis = a["axis"] % len(x)
            return (*x[:axis], sum(shape[axis] for shape in shapes), *x[axis + 1 :])
        case "pad":
            return tuple(n + sum(p) for n, p in zip(x, a["padding"], strict=True))
        case "slice":
            cuts = zip(a["starts"], a["stops"], a["steps"], x, strict=True)
            return tuple(len(range(*slice(*cut).indices(n))) for *cut, n in cuts)
        case "reshape":
            return tuple(abs(n) for n in a["shape"])
        case "transpose":
            return tuple(x[axis] for axis in a["permutation"])
        case "gather":
            return (x[0], *c["index"].shape)
        case "sum" | "argmax":
            axes = {axis % len(x) for axis in a.get("axes", [a.get("axis")])}
            return tuple(1 if axis in axes else n for axis, n in enumerate(x) if a["keepdims"] or axis not in axes)
    return x


class Net:
    """A program under construction; every method adds an op and returns the name of its output."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.ops: list[Op] = []
        self.values: dict[str, Value] = {}
        self.inputs: list[str] = []
        self.outputs: list[str] = []

    def ints(self, low: int, high: int, *shape: int) -> Array:
        return smallest(self.rng.integers(low, high, shape, endpoint=True))

    def program(self, **note: Any) -> Program:
        structure = {"list": [{"leaf": k} for k in range(len(self.outputs))]}
        names = (tuple(self.inputs), tuple(self.outputs))
        return Program(tuple(self.ops), dict(self.values), *names, structure, {"scheme": "by hand", **note})

    def input(self, *shape: int) -> str:
        name = f"x{len(self.inputs)}"
        self.values[name] = Value(name, (-1, *shape), "float32")
        self.inputs.append(name)
        return name

    def op(
        self, kind: str, inputs: str | Sequence[str], bounds: Bounds = (0, 0), unit: Any = 0,
        dtype: str = "int", along: int | None = None, constants: dict[str, Array | None] | None = None,
        **attributes: Any,
    ) -> str:  # fmt: skip
        """Any op; axis 0 of every value is -k, k times the batch."""
        inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs)
        output, kept = f"v{len(self.ops)}", {k: c for k, c in (constants or {}).items() if c is not None}
        op = Op(kind, f"net.{kind}{len(self.ops)}", inputs, output, attributes, kept)
        rows, *rest = shape_of(op, [(-self.values[i].shape[0], *self.values[i].shape[1:]) for i in inputs])
        self.values[output] = Value(output, (-rows, *rest), dtype, *bounds, unit, along)
        self.ops.append(op)
        return output

    def out(self, name: str, **attributes: Any) -> None:
        """An output: floats of codes, unless it is none."""
        if self.values[name].dtype == "int":
            count = attributes.pop("counts", None)
            full = {"factor": None, "precision": "float32", "count": None, **attributes}
            name = self.op("dequantize", name, dtype="float32", constants={"count": count}, **full)
        self.outputs.append(name)

    def quantize(
        self, x: str, low: int = -128, high: int = 127, exponent: int = -4, rounding: str = "half_even"
    ) -> str:
        limits = {"low": low, "high": high}
        return self.op("quantize", x, (low, high), exponent, exponent=exponent, rounding=rounding, **limits)

    def codes(self, *shape: int, low: int = -128, high: int = 127, **kinds: Any) -> str:
        return self.quantize(self.input(*shape), low, high, **kinds)

    def requantize(
        self, x: str, shift: Any, low: int | None = -128, high: int | None = 127, rounding: str = "half_even",
        axis: int | None = None,
    ) -> str:  # fmt: skip
        value = self.values[x]
        ends = [
            int(runtime.requantize(np.array([end]), int(s), rounding, low, high)[0])
            for end, s in itertools.product((value.low, value.high), np.atleast_1d(shift))
        ]
        limits = {"low": low, "high": high}
        bounds = (min(ends), max(ends))
        return self.op("requantize", x, bounds, shift=shift, axis=axis, rounding=rounding, **limits)

    def divide(self, x: str, count: Any, shift: int = 0, rounding: str = "half_even", **limits: int) -> str:
        value, kept = self.values[x], {"low": limits.get("low"), "high": limits.get("high")}
        counts = np.asarray(count)
        ends = [
            int(runtime.divide(np.array([end]), int(n), shift, rounding, **kept)[0])
            for end, n in itertools.product((value.low, value.high), counts.ravel())
        ]
        array = counts if counts.ndim else None
        bounds = (min(ends), max(ends))
        whole = None if counts.ndim else int(count)
        return self.op(
            "divide", x, bounds, constants={"count": array}, shift=shift, rounding=rounding, count=whole, **kept
        )

    def conv(self, x: str, weight: Array, bias: Array | None = None, **geometry: Any) -> str:
        d = weight.ndim - 2
        full = {"stride": [1] * d, "padding": [[0, 0]] * d, "dilation": [1] * d, "groups": 1, **geometry}
        constants = {"weight": weight, "bias": bias}
        return self.op("conv", x, reached(weight, bias, self.values[x]), constants=constants, **full)

    def conv_transpose(self, x: str, weight: Array, bias: Array | None = None, **geometry: Any) -> str:
        d, groups = weight.ndim - 2, geometry.get("groups", 1)
        plain = {"stride": [1] * d, "padding": [0] * d, "output_padding": [0] * d, "dilation": [1] * d, "groups": 1}
        by_output = np.concatenate([part.swapaxes(0, 1) for part in np.split(weight, groups)])
        bounds = reached(by_output, bias, self.values[x])
        constants = {"weight": weight, "bias": bias}
        return self.op("conv_transpose", x, bounds, constants=constants, **{**plain, **geometry})

    def linear(self, x: str, weight: Array, bias: Array | None = None) -> str:
        bounds = reached(weight, bias, self.values[x])
        return self.op("linear", x, bounds, constants={"weight": weight, "bias": bias})

    def add(self, inputs: Sequence[str], left: Sequence[int], other: Array | None = None) -> str:
        ends = [(self.values[name].low, self.values[name].high) for name in inputs]
        ends += [] if other is None else [(int(other.min()), int(other.max()))]
        low = sum(min(0, low << n) for (low, _), n in zip(ends, left, strict=True))
        high = sum(max(0, high << n) for (_, high), n in zip(ends, left, strict=True))
        return self.op("add", inputs, (low, high), left=list(left), constants={"other": other})

    def same(self, kind: str, x: str, **attributes: Any) -> str:
        """A move of numbers: bounds stay, 0 among them."""
        value = self.values[x]
        constants = {name: attributes.pop(name) for name in ("index",) if name in attributes}
        return self.op(kind, x, (min(value.low, 0), max(value.high, 0)), constants=constants, **attributes)

    def summed(self, kind: str, x: str, terms: int, **attributes: Any) -> str:
        value = self.values[x]
        return self.op(kind, x, (min(0, terms * value.low), max(0, terms * value.high)), **attributes)

    def normalize(self, x: str, channels: int, **fields: Any) -> str:
        a = {
            "fraction_in": 4, "mean_fraction": 7, "s_fraction": 8, "xhat_fraction": 9, "out_fraction": 20,
            "product_fraction": 18, "limit": None, **fields,
        }  # fmt: skip
        constants = {
            "mean": self.ints(-300, 300, channels).astype(np.int64),
            "s": self.ints(1, 600, channels).astype(np.int64),
            "gamma": self.ints(-200, 200, channels).astype(np.int64),
            "beta": self.ints(-(2**20), 2**20, channels).astype(np.int64),
        }
        constants["s"][0] = 2  # so that halves occur
        value, most = self.values[x], 1 << 60
        fraction = max(a["fraction_in"], a["mean_fraction"])
        left = a["xhat_fraction"] + a["s_fraction"] - fraction
        reach = (max(-value.low, value.high) << (fraction - a["fraction_in"])) + (
            300 << (fraction - a["mean_fraction"])
        )
        xhat = (reach << max(left, 0)) + 1 if a["limit"] is None else a["limit"]
        bound = (200 * xhat << (a["out_fraction"] - a["product_fraction"])) + 2**20
        assert bound < most
        return self.op("normalize", x, (-bound, bound), constants=constants, **a)
