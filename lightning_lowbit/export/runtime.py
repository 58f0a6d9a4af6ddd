"""Runs an integer program with numpy and the standard library alone; a copy of this file runs by itself.

    python runtime.py program.lowbit input.npy [output.npy]

Codes are int64. Products are summed by float32 or float64 BLAS where the proved bounds, which hold for every partial
sum, lie below 2^24 or 2^53: there every sum is exact in whatever order. A program with float islands needs a copy of
runtime_float.py beside this file as well.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import math
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "KINDS", "ROUNDINGS", "Op", "Program", "ProgramError", "Value", "dequantize", "digest", "divide", "load",
    "pixel_table", "quantize", "quantize_pixels", "requantize", "run", "trace",
]  # fmt: skip

FORMAT = 1
SEAL = 64  # hex digits at the end of a file, a zip's comment: the sha256 of all bytes before them
_CHUNK = 1 << 20  # elements of the largest tensor that are computed at a time: a few samples stay in the cache
Array = NDArray[Any]
Bound = int | None
Given = Mapping[str, Array] | None


class ProgramError(ValueError):
    """A program file or an input that cannot be run; the message says which and what to do."""


@dataclass(frozen=True)
class Value:
    """A tensor of a program; where ``dtype`` is "int" its worth is code * 2**exponent.

    Args:
        shape: a dimension >= 0 is static, -k is k times the batch.
        dtype: "int", "float32", or "int64" for what argmax gives.
        low, high: proved bounds of the codes and of every partial sum that leads to them.
        exponent: one per channel along ``axis`` where it is a tuple.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "int"
    low: int = 0
    high: int = 0
    exponent: int | tuple[int, ...] = 0
    axis: int | None = None

    @property
    def bits(self) -> int:
        """Of the smallest integer that holds the bounds: two's complement where low < 0, else unsigned."""
        sign = int(self.low < 0)
        return max((~self.low).bit_length() * sign, self.high.bit_length(), 1 - sign) + sign

    @property
    def storage(self) -> str:
        """The smallest numpy integer dtype that holds the bounds; above 32 bits it is int64."""
        width = next((bits for bits in (8, 16, 32) if self.bits <= bits), None)
        return "int64" if width is None else f"int{width}" if self.low < 0 else f"uint{width}"


@dataclass(frozen=True, eq=False)
class Op:
    """One operation: ``kind`` with its attributes and constants, from ``path`` of the network, one output."""

    kind: str
    path: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Program:
    """Operations in the order in which they run, and the tensors between them.

    ``structure`` puts the outputs together: {"leaf": 0}, {"list": [...]}, {"tuple": [...]} or {"dict": {key: ...}}.
    """

    ops: tuple[Op, ...]
    values: Mapping[str, Value]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    structure: Any = field(default_factory=lambda: {"leaf": 0})
    note: Mapping[str, Any] = field(default_factory=dict)


def quantize(x: Array, exponent: int, rounding: str = "half_even", low: Bound = -128, high: Bound = 127) -> Array:
    """Codes of float32 numbers: clip(round(x * 2**-exponent), low, high), product and rounding in float32; int64.

    >>> [quantize(np.float32([-np.inf, -1.5, -0.5, 0.49999997, 2.5]), 0, rule).tolist() for rule in ROUNDINGS[:3]]
    [[-128, -2, 0, 0, 2], [-128, -1, 0, 0, 3], [-128, -2, -1, 0, 3]]
    """
    if x.dtype != np.float32 or not -127 <= exponent <= 149:
        got = f"{x.dtype} and exponent {exponent}"
        raise ProgramError(f"got {got}, expected float32 (x.astype) and an exponent from -127 to 149.")
    with np.errstate(all="ignore"):  # infinity is clipped
        v = _rule(rounding, _FLOAT)(x * np.float32(2.0**-exponent))
    if np.isnan(v).any():
        raise ProgramError("got NaN, which has no code; look at what made the input.")
    return _clip(np.clip(v, -(2.0**62), 2.0**62).astype(np.int64), low, high)


def requantize(
    acc: Array, shift: int | Sequence[int], rounding: str = "half_even", low: Bound = None, high: Bound = None,
    axis: int | None = None,
) -> Array:  # fmt: skip
    """clip(round(acc / 2**shift), low, high), int64; shifts along ``axis``, negative ones multiply. |acc| < 2**61.

    >>> acc = np.array([-2**31, -5, -3, -2, -1, 0, 1, 2, 3, 5, 2**31 - 1])
    >>> for rounding in ROUNDINGS:
    ...     print(f"{rounding:9}", requantize(acc, 1, rounding).tolist())
    half_even [-1073741824, -2, -2, -1, 0, 0, 0, 1, 2, 2, 1073741824]
    half_up   [-1073741824, -2, -1, -1, 0, 0, 1, 1, 2, 3, 1073741824]
    half_away [-1073741824, -3, -2, -1, -1, 0, 1, 1, 2, 3, 1073741824]
    floor     [-1073741824, -3, -2, -1, -1, 0, 0, 1, 1, 2, 1073741823]
    truncate  [-1073741824, -2, -1, -1, 0, 0, 0, 1, 1, 2, 1073741823]
    """
    v, n = acc.astype(np.int64, copy=False), _along(np.clip(np.asarray(shift, np.int64), -62, 62), axis, acc.ndim)
    if (n > 0).any():
        right = np.maximum(n, 0)
        q = v >> right
        v = q + _rule(rounding, _UP)(q, v < 0, v - (q << right), np.left_shift(1, right))
    if (n < 0).any():
        top = np.int64(2**63 - 1) >> np.maximum(-n, 0)
        v = np.clip(v, -top, top) << np.maximum(-n, 0)  # what is cut here, a clip cuts as well
    return _clip(v, low, high)


def divide(
    x: Array, count: int | Array, shift: int = 0, rounding: str = "half_even", low: Bound = None, high: Bound = None
) -> Array:
    """clip(round(x / (count * 2**shift)), low, high), exact, int64. |x| and |x| * 2**-shift < 2**61, count >= 1.

    >>> for rounding in ROUNDINGS:
    ...     print(f"{rounding:9}", divide(np.array([-9, -6, -5, -3, -1, 0, 1, 3, 5, 6, 9]), 3, 1, rounding).tolist())
    half_even [-2, -1, -1, 0, 0, 0, 0, 0, 1, 1, 2]
    half_up   [-1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 2]
    half_away [-2, -1, -1, -1, 0, 0, 0, 1, 1, 1, 2]
    floor     [-2, -1, -1, -1, -1, 0, 0, 0, 0, 1, 1]
    truncate  [-1, -1, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    """
    v, right = x.astype(np.int64, copy=False) << max(-shift, 0), min(max(shift, 0), 62)
    unit = np.minimum(np.asarray(count, np.int64), (1 << 62) >> right) << right  # beyond 2^62 nothing changes
    q = v // unit
    return _clip(q + _rule(rounding, _UP)(q, v < 0, v - q * unit, unit), low, high)


def dequantize(
    codes: Array, exponent: int | Sequence[int], axis: int | None = None, *, count: int | Array | None = None,
    factor: float | None = None, precision: str = "float32",
) -> Array:  # fmt: skip
    """codes * 2**exponent / count * factor, float32, every step rounded to ``precision``; exponents along ``axis``."""
    kind = np.dtype(precision).type
    v = np.ldexp(codes.astype(np.float64), _along(np.asarray(exponent), axis, codes.ndim)).astype(kind)
    v = v if count is None else v / np.asarray(count).astype(kind)
    return np.asarray(v if factor is None else v * kind(factor), np.float32)


def pixel_table(
    mean: Any, std: Any, exponent: int, rounding: str = "half_even", low: Bound = -128, high: Bound = 127
) -> Array:
    """The codes of all 256 pixels, [256, C] for C means: quantize((p / 255 - mean) / std), float32 in that order.

    >>> pixel_table([0.5, 0.0], [0.25, 1.0], -5)[[0, 128, 255]].tolist()
    [[-64, 0], [0, 16], [64, 32]]
    """
    if not (np.all(np.asarray(std) > 0) and np.all(np.isfinite(mean))):
        raise ProgramError(f"pixels: got mean {mean} and std {std}, expected finite means and stds above 0.")
    p = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    return quantize((p - np.float32(mean)) / np.float32(std), exponent, rounding, low, high)


def quantize_pixels(images: Array, table: Array) -> Array:
    """Codes [N, C, H, W] of uint8 images [N, H, W, C], looked up in ``table``, [256, C] or [256, 1]."""
    if images.dtype != np.uint8 or images.ndim != 4 or table.shape[1] not in (1, images.shape[3]):
        got = f"{images.dtype} {list(images.shape)}"
        raise ProgramError(f"got {got}, expected uint8 [N, H, W, {table.shape[1]}]: a mean and a std for each channel.")
    columns = np.broadcast_to(table, (256, images.shape[3])).T
    return np.stack([column[images[..., c]] for c, column in enumerate(columns)], axis=1)


def _rule(rounding: str, rules: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    if rounding not in rules:
        raise ProgramError(f"got rounding {rounding!r}, expected one of {', '.join(rules)}.")
    return rules[rounding]


_FLOAT: dict[str, Callable[..., Any]] = {
    "half_even": np.rint, "half_up": lambda v: np.floor(v) + (v - np.floor(v) >= 0.5), "floor": np.floor,
    "half_away": lambda v: np.copysign(_FLOAT["half_up"](np.abs(v)), v), "truncate": np.trunc,
}  # fmt: skip
# From q = floor(v / unit): whether v, of which rest = v - q * unit is left, goes up.
_UP: dict[str, Callable[..., Any]] = {
    "half_even": lambda q, negative, rest, unit: rest > unit - rest - (q & 1),
    "half_up": lambda q, negative, rest, unit: rest >= unit - rest,
    "half_away": lambda q, negative, rest, unit: rest + ~negative > unit - rest,
    "floor": lambda q, negative, rest, unit: 0,
    "truncate": lambda q, negative, rest, unit: negative & (rest > 0),
}
ROUNDINGS = tuple(_UP)


def _clip(v: Array, low: Bound, high: Bound) -> Array:
    return v if low is None and high is None else np.clip(v, low, high)


def _along(values: Array, axis: int | None, dims: int) -> Array:
    """[C] so that it broadcasts along ``axis`` of a tensor of ``dims`` dimensions."""
    return values if axis is None or not values.ndim else values.reshape([-1] + [1] * (dims - 1 - axis % dims))


class _Call(NamedTuple):
    """What a kind works with beside its inputs."""

    a: Mapping[str, Any]
    c: Mapping[str, Array]
    first: Value  # the input
    out: Value
    batch: int
    pixels: Any

    def row(self, name: str, axis: int, x: Array) -> Array:
        return _along(self.c[name].astype(np.int64), axis, x.ndim)

    def divisor(self) -> Any:
        return self.c.get("count", self.a.get("count"))

    def sums(self, product: Callable[[Array, Array], Array], x: Array, axis: int) -> Array:
        """product(x, weight) + bias in the cheapest arithmetic that is exact within the output's bounds."""
        most, real = max(-self.out.low, self.out.high), self.out.dtype == "float32"
        kind = np.float32 if real or most < 1 << 24 else np.float64 if most < 1 << 53 else np.int64
        y = product(x.astype(kind), self.c["weight"].astype(kind))
        if "bias" in self.c:
            y += _along(self.c["bias"].astype(kind), axis, y.ndim)
        return y if real else y.astype(np.int64)


def _pad(x: Array, padding: Sequence[Sequence[int]], value: float = 0) -> Array:
    """``value`` around x, [before, after] an axis; negative numbers crop."""
    x = x[tuple(slice(max(-b, 0), n - max(-a, 0)) for n, (b, a) in zip(x.shape, padding, strict=True))]
    return np.pad(x, [(max(b, 0), max(a, 0)) for b, a in padding], constant_values=value)


def _taps(x: Array, kernel: Sequence[int], a: Mapping[str, Any], value: float = 0) -> list[Array]:
    """For each position in the window the elements that lie there, views [N, C, *out]."""
    whole = (slice(None), slice(None))
    x = _pad(x, [(0, 0), (0, 0), *a["padding"]], value)
    axes = list(zip(x.shape[2:], kernel, a["stride"], a.get("dilation") or [1] * len(kernel), strict=True))
    return [
        x[(*whole, *(slice(i * d, i * d + n - d * (k - 1), s) for i, (n, k, s, d) in zip(at, axes, strict=True)))]
        for at in itertools.product(*map(range, kernel))
    ]


def _convolve(x: Array, w: Array, a: Mapping[str, Any]) -> Array:
    columns = np.stack(_taps(x, w.shape[2:], a), axis=2)  # [N, C, taps, *out]
    n, c, taps, *size = columns.shape
    columns = columns.reshape(n, a["groups"], c // a["groups"] * taps, math.prod(size))
    y: Array = w.reshape(a["groups"], -1, columns.shape[2]) @ columns
    return y.reshape(n, len(w), *size)


def _transposed(x: Array, w: Array, a: Mapping[str, Any]) -> Array:
    """A convolution of x with zeros between its elements, by the mirrored kernel."""
    (c, per, *kernel), groups = w.shape, a["groups"]
    w = w.reshape(groups, c // groups, per, *kernel).swapaxes(1, 2).reshape(groups * per, c // groups, *kernel)
    apart = np.zeros([*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], a["stride"], strict=True))], x.dtype)
    apart[(slice(None), slice(None), *(slice(None, None, s) for s in a["stride"]))] = x
    sides = zip(kernel, a["dilation"], a["padding"], a["output_padding"], strict=True)
    padding = [(d * (k - 1) - p, d * (k - 1) - p + more) for k, d, p, more in sides]
    plain = {**a, "stride": [1] * len(kernel), "padding": padding}
    return _convolve(apart, np.flip(w, tuple(range(2, w.ndim))), plain)


def _quantize(k: _Call, x: Array) -> Array:
    rule = [k.a[name] for name in ("exponent", "rounding", "low", "high")]
    return quantize_pixels(x, pixel_table(*k.pixels, *rule)) if x.dtype == np.uint8 else quantize(x, *rule)


def _normalize(k: _Call, x: Array) -> Array:
    a, (mean, s, gamma, beta) = k.a, (k.row(name, 1, x) for name in ("mean", "s", "gamma", "beta"))
    f = max(a["fraction_in"], a["mean_fraction"])
    d = (x << (f - a["fraction_in"])) - (mean << (f - a["mean_fraction"]))
    left, limit = a["xhat_fraction"] + a["s_fraction"] - f, a["limit"]
    xhat = divide(d << max(left, 0), s << max(-left, 0), low=None if limit is None else -limit, high=limit)
    return np.asarray(((gamma * xhat) << (a["out_fraction"] - a["product_fraction"])) + beta)


def _island(k: _Call, *xs: Array) -> Array:
    path, name = Path(__file__).with_name("runtime_float.py"), k.a["function"]
    if name in ("conv", "conv_transpose", "linear"):
        return np.asarray(KINDS[name](k, *xs))
    if not path.is_file():
        raise ProgramError(f"a float island needs {path.name} beside {Path(__file__).name}: copy it there.")
    with np.errstate(all="ignore"):
        return np.asarray(_functions(str(path))[name](k.a, k.c, *xs), np.float32)


_functions = functools.cache(lambda path: runpy.run_path(path)["FUNCTIONS"])
_LOWEST = {"f": -np.inf, "i": -(2**63)}  # of floats and of codes
KINDS: dict[str, Callable[..., Any]] = {
    "quantize": _quantize,
    "conv": lambda k, x: k.sums(lambda x, w: _convolve(x, w, k.a), x, 1),
    "conv_transpose": lambda k, x: k.sums(lambda x, w: _transposed(x, w, k.a), x, 1),
    "linear": lambda k, x: k.sums(lambda x, w: x @ w.T, x, -1),
    "requantize": lambda k, x: requantize(x, *(k.a[name] for name in ("shift", "rounding", "low", "high", "axis"))),
    "add": lambda k, *xs: sum(x.astype(np.int64) << n for x, n in zip([*xs, *k.c.values()], k.a["left"], strict=True)),
    "concat": lambda k, *xs: np.concatenate(xs, k.a["axis"]),
    "max_pool": lambda k, x: np.maximum.reduce(_taps(x, k.a["kernel"], k.a, _LOWEST[x.dtype.kind])),
    "sum_pool": lambda k, x: np.add.reduce(_taps(x, k.a["kernel"], k.a)),
    "sum": lambda k, x: x.sum(tuple(k.a["axes"]), keepdims=k.a["keepdims"]),
    "divide": lambda k, x: divide(x, k.divisor(), *(k.a[name] for name in ("shift", "rounding", "low", "high"))),
    "pad": lambda k, x: _pad(x, k.a["padding"], k.a["value"]),
    "slice": lambda k, x: x[tuple(map(slice, k.a["starts"], k.a["stops"], k.a["steps"]))],
    "reshape": lambda k, x: x.reshape([n if n >= 0 else -n * k.batch for n in k.a["shape"]]),
    "transpose": lambda k, x: x.transpose(k.a["permutation"]),
    "gather": lambda k, x: np.where(k.c["index"] < 0, 0, x.reshape(len(x), math.prod(x.shape[1:]))[:, k.c["index"]]),
    "threshold": lambda k, x: np.where((x >= k.row("low", k.a["axis"], x)) != k.row("flip", k.a["axis"], x), 1, -1),
    "normalize": _normalize,
    "argmax": lambda k, x: x.argmax(k.a["axis"], keepdims=k.a["keepdims"]),
    "dequantize": lambda k, x: dequantize(
        x, k.first.exponent, k.first.axis, count=k.divisor(), factor=k.a["factor"], precision=k.a["precision"]
    ),
    "island": _island,
}


def _execute(program: Program, arrays: Sequence[Array], batch: int, pixels: Any, given: Given) -> dict[str, Array]:
    found = {**dict(zip(program.inputs, arrays, strict=True)), **(given or {})}
    for op in program.ops:
        if op.output in found:
            continue
        out, first = program.values[op.output], program.values[op.inputs[0]]
        call = _Call(op.attributes, op.constants, first, out, batch, pixels)
        try:
            y = KINDS[op.kind](call, *(found[name] for name in op.inputs))
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ProgramError(f"{op.path} ({op.kind}): {error}") from error
        if y.shape != tuple(n if n >= 0 else -n * batch for n in out.shape):
            raise ProgramError(f"{op.path} ({op.kind}): got shape {y.shape}, expected {out.shape}, batch {batch}.")
        found[op.output] = y
    return found


def _taken(program: Program, inputs: Sequence[Any], pixels: Any) -> tuple[list[Array], int]:
    """The inputs as arrays, and the batch."""
    if len(inputs) != len(program.inputs):
        raise ProgramError(f"got {len(inputs)} inputs, expected {len(program.inputs)}: an array for each.")
    arrays, batches = [], set()
    for i, (x, name) in enumerate(zip(inputs, program.inputs, strict=True)):
        shape = program.values[name].shape
        sizes = ", ".join("N" if s == -1 else str(s) if s >= 0 else f"{-s} N" for s in shape)
        wanted = f"float32 [{sizes}]" + ", or uint8 [N, H, W, C] in run(..., pixels=(mean, std))" * (len(shape) == 4)
        try:
            x = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
        except (TypeError, ValueError) as error:
            raise ProgramError(f"input {i}: got what is no array ({error}), expected {wanted}.") from error
        readers = {op.kind for op in program.ops if name in op.inputs}
        images = x.dtype == np.uint8 and x.ndim == 4 and pixels is not None and readers == {"quantize"}
        got = (*x.shape[:1], *x.shape[3:], *x.shape[1:3]) if images else x.shape
        fits = len(got) == len(shape) and all(n == s if s >= 0 else n % s == 0 for n, s in zip(got, shape, strict=True))
        if not fits or (x.dtype != np.float32 and not images):
            raise ProgramError(f"input {i}: got {x.dtype} {list(x.shape)}, expected {wanted}; convert it.")
        batches |= {n // -s for n, s in zip(got, shape, strict=True) if s < 0}
        arrays.append(x)
    if len(batches) > 1:
        raise ProgramError(f"got batches of {sorted(batches)}, expected the same for all inputs.")
    return arrays, max(batches, default=1)


def _step(program: Program, batch: int) -> int:
    """How many samples are computed at a time: all, where any operation could mix them."""
    most = 1
    for op in program.ops:
        shape, dims = program.values[op.output].shape, len(program.values[op.inputs[0]].shape)
        axes = [axis for axis in (op.attributes.get("axis"), *op.attributes.get("axes", [])) if axis is not None]
        if [n < 0 for n in shape] != [True] + [False] * (len(shape) - 1) or any(axis % dims == 0 for axis in axes):
            return max(batch, 1)
        taps = math.prod(op.constants["weight"].shape[2:]) if "weight" in op.constants else 1
        most = max(most, -math.prod(shape) * taps)
    return max(1, _CHUNK // most)


def trace(program: Program, *inputs: Any, given: Given = None, pixels: Any = None) -> dict[str, Array]:
    """Every value of the program by its name; those of ``given`` are taken, not computed."""
    unknown = set(given or ()) - set(program.values)
    if unknown:
        raise ProgramError(f"given {sorted(unknown)}: expected names of the program's values.")
    return _execute(program, *_taken(program, inputs, pixels), pixels, given)


def run(program: Program, *inputs: Any, integers: bool = False, pixels: Any = None) -> Any:
    """The network's outputs, float32, put together as the network does.

    Args:
        inputs: float32 arrays or torch tensors; with ``pixels`` also uint8 images [N, H, W, C], which are not copied.
        integers: give (codes before they are dequantized, their exponent) for each output; of argmax the indices.
        pixels: mean and deviation of images in [0, 1], numbers or one a channel; None: note["pixels"].
    """
    pixels = program.note.get("pixels") if pixels is None else pixels
    arrays, batch = _taken(program, inputs, pixels)
    ends = {op.output: op.inputs[0] for op in program.ops if op.kind == "dequantize" and integers}
    outs, step = [program.values[ends.get(name, name)] for name in program.outputs], _step(program, batch)
    if integers and any(out.dtype == "float32" for out in outs):
        raise ProgramError("an output comes of a float island and has no integers; run with integers=False.")
    parts = []
    for at in range(0, max(batch, 1), step):
        found = _execute(program, [x[at : at + step] for x in arrays], min(step, batch - at), pixels, None)
        parts.append([found[out.name] for out in outs])
    leaves: list[Any] = [np.concatenate(column) for column in zip(*parts, strict=True)]
    if integers:
        leaves = [x if out.dtype == "int64" else (x, out.exponent) for x, out in zip(leaves, outs, strict=True)]
    return _assembled(program.structure, leaves)


def _assembled(structure: Any, leaves: Sequence[Any]) -> Any:
    ((kind, inside),) = structure.items()
    if kind == "leaf":
        return leaves[inside]
    if kind == "dict":
        return {key: _assembled(item, leaves) for key, item in inside.items()}
    return {"list": list, "tuple": tuple}[kind](_assembled(item, leaves) for item in inside)


def digest(document: Mapping[str, Any], members: Mapping[str, Array]) -> str:
    """The sha256 of a program: of its document without that field, and of its constants."""
    text = json.dumps({key: item for key, item in document.items() if key != "sha256"}, separators=(",", ":"))
    found = hashlib.sha256(text.encode())
    for name, array in sorted(members.items()):
        found.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    return str(found.hexdigest())


def load(path: Any) -> Program:
    """A program from its file; ProgramError where it is missing, damaged, of another kind or format."""
    try:
        data = Path(path).read_bytes()
        if not data.startswith(b"PK") or hashlib.sha256(data[:-SEAL]).hexdigest().encode() != data[-SEAL:]:
            raise ProgramError("not the file of a program, or one that was cut or changed.")
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            document = json.loads(file["program.json"].tobytes())
            members = {name: file[name] for name in file.files if name != "program.json"}
        unknown = {op["kind"] for op in document["ops"]} - set(KINDS)
        if document["format"] != FORMAT or unknown:
            raise ProgramError(f"got format {document['format']} {sorted(unknown)}, expected {FORMAT}.")
        if digest(document, members) != document["sha256"]:
            raise ProgramError("its contents do not fit their sha256.")
        values: dict[str, Value] = {}
        for entry in document["values"]:
            known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()}
            values[entry["name"]] = Value(**known)
        ops = []
        for op in document["ops"]:
            constants = {key: members[name] for key, name in op["constants"].items()}
            ops.append(Op(**{**op, "inputs": tuple(op["inputs"]), "constants": constants}))
        ends = (tuple(document["inputs"]), tuple(document["outputs"]))
        return Program(tuple(ops), values, *ends, document["structure"], document["note"])
    except Exception as error:  # whatever numpy, zipfile and json raise over what a file may hold
        why = getattr(error, "strerror", None) or error
        why = str(why).rstrip(".")
        raise ProgramError(f"{path}: {why}. Copy it again, or write it anew: IntegerProgram.save(path).") from error


def main(arguments: Sequence[str]) -> int:
    """The command of the first lines: 0 where it ran, 1 where a file or an input is wrong, 2 where one is not named."""
    if len(arguments) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    file = ""
    try:
        program = load(arguments[0])
        leaves = {"list": [{"leaf": i} for i in range(len(program.outputs))]}
        outputs = run(replace(program, structure=leaves), np.load(arguments[1], allow_pickle=False))
        if len(arguments) == 3:
            saved: Any = np.save if len(outputs) == 1 else np.savez
            saved(arguments[2], *outputs)
            suffix = ".npy" if len(outputs) == 1 else ".npz"  # numpy adds it to a name without
            file = f", written to {arguments[2].removesuffix(suffix)}{suffix}"
    except (ValueError, OSError, EOFError) as error:
        print(error, file=sys.stderr)
        return 1
    for i, y in enumerate(outputs):
        print(f"output {i}: {y.dtype} {list(y.shape)}{file}{f' as arr_{i}' if file and len(outputs) > 1 else ''}")
        for n, row in enumerate(y.reshape(len(y), -1)[:4] if y.size else []):
            numbers = " ".join(f"{v:.6g}" for v in row[:5]) + " ..." * (len(row) > 5)
            print(f"  sample {n}: {numbers}" + f", argmax {row.argmax()}" * (len(row) > 1))
        if len(y) > 4:
            print(f"  ... {len(y) - 4} more")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
