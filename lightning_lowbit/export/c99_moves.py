"""Sums of tensors and ops that move numbers, in C: the functions, and calls of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lightning_lowbit.export.c99_graph import Step, channel_axis, elements
from lightning_lowbit.export.c99_kernels import Source, Stage, ctype, literal
from lightning_lowbit.export.c99_stages import divisor_of, limits, passed, sum_type
from lightning_lowbit.export.runtime import Op, Value

__all__ = ["MOVES", "collapsed", "strides_of"]

_MAP = """
static void $name(const $X *x, $Y *y, int32_t outer, int32_t channels, int32_t inner$parameters)
{
    for (int32_t plane = 0; plane < outer * channels; ++plane) {
        $channel
        $prepare
        for (int32_t i = plane * inner; i < (plane + 1) * inner; ++i) {
            const $X v0 = x[i];
            $stages
            y[i] = ($Y)$result;
        }
    }
}
"""

_GATHER = """
static void $name(const $X *restrict x, $Y *restrict y, const $I *restrict index,
    int32_t rows, int32_t from, int32_t to)
{
    for (int32_t row = 0; row < rows; ++row) {
        for (int32_t i = 0; i < to; ++i) {
            y[row * to + i] = index[i] < 0 ? 0 : ($Y)x[row * from + index[i]];
        }
    }
}
"""

_ARGMAX = """
static void $name(const $X *restrict x, int64_t *restrict y, int32_t outer, int32_t length, int32_t inner)
{
    for (int32_t o = 0; o < outer; ++o) {
        for (int32_t i = 0; i < inner; ++i) {
            $A most = ${seen}x[o * length * inner + i]);
            y[o * inner + i] = 0;
            for (int32_t k = 1; k < length; ++k) {
                const $A v = ${seen}x[(o * length + k) * inner + i]);
                if (v > most) {
                    most = v;
                    y[o * inner + i] = k;
                }
            }
        }
    }
}
"""

_FILL = """
static void $name($Y *y, int32_t size, $Y value)
{
    for (int32_t i = 0; i < size; ++i) {
        y[i] = value;
    }
}
"""


def strides_of(shape: Sequence[int], onto: Sequence[int] | None = None) -> list[int]:
    """Elements from one index to the next along each axis; 0 where the axis is repeated to match ``onto``.

    >>> strides_of((2, 3, 4)), strides_of((3, 1), onto=(2, 3, 4))
    ([12, 4, 1], [0, 1, 0])
    """
    strides, step = list[int](), 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    strides.reverse()
    if onto is None:
        return strides
    return [0] * (len(onto) - len(shape)) + [0 if n == 1 else s for n, s in zip(shape, strides, strict=True)]


def collapsed(shape: Sequence[int], *strides: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """Axes of length 1 left out and neighbors that every tensor walks evenly made one.

    >>> collapsed((2, 3, 4), (12, 4, 1), (0, 4, 1))
    ([2, 12], [[12, 1], [0, 1]])
    """
    axes: list[list[int]] = []
    for axis in ([n, *steps] for n, *steps in zip(shape, *strides, strict=True) if n != 1):
        if axes and all(outer == inner * axis[0] for outer, inner in zip(axes[-1][1:], axis[1:], strict=True)):
            axes[-1] = [axes[-1][0] * axis[0], *axis[1:]]
        else:
            axes.append(axis)
    columns = [list(column) for column in zip(*(axes or [[1] * (1 + len(strides))]), strict=True)]
    return columns[0], columns[1:]


def _nest(depth: int, letter: str, body: str, at: int = 0) -> str:
    """``depth`` loops around the body; their lengths are n<letter>0, n<letter>1, ..."""
    for axis in reversed(range(depth)):
        i = f"{letter}{axis}"
        inner = "\n".join(f"    {line}" for line in body.strip("\n").split("\n"))
        body = f"for (int32_t {i} = 0; {i} < n{i}; ++{i}) {{\n{inner}\n}}"
    return "\n".join("    " * at + line if line else "" for line in body.split("\n"))


def _place(tensor: str, depth: int, letter: str) -> str:
    """The index of an element of ``tensor`` inside a nest."""
    return " + ".join(f"{letter}{axis} * {tensor}{letter}{axis}" for axis in range(depth))


def _sizes(tensors: Sequence[str], depth: int, letter: str, start: int = 0) -> str:
    """Lines that read lengths and strides from the table p."""
    names = [f"{t}{letter}{axis}" for t in ("n", *tensors) for axis in range(depth)]
    return "\n".join(f"    const int32_t {name} = p[{start + k}];" for k, name in enumerate(names))


def _copy(
    source: Source, x: str, y: str, shape: Sequence[int], from_: Sequence[int], to: Sequence[int]
) -> tuple[str, str]:
    """A function that copies from strides to strides, and the table of its plan."""
    lengths, (a, b) = collapsed(shape, from_, to)
    depth = len(lengths)
    body = f"y[{_place('y', depth, 'i')}] = ($Y)x[{_place('x', depth, 'i')}];"
    template = (
        "static void $name(const $X *restrict x, $Y *restrict y, const int32_t *restrict p)\n{\n"
        f"{_sizes(('x', 'y'), depth, 'i')}\n{_nest(depth, 'i', body, 1)}\n}}"
    )
    name = source.function(f"copy{depth}", (x, y), template, {"X": ctype(x), "Y": ctype(y)})
    return name, source.table([*lengths, *a, *b], "int32")


def _moved(
    op: Op,
    x: Value,
    y: Value,
    source: Source,
    *,
    shape: Sequence[int],
    steps: Sequence[int],
    skip: int = 0,
    to: Sequence[int] | None = None,
    at: int = 0,
    place: str = "x",
) -> str:
    name, plan = _copy(source, x.storage, y.storage, shape, steps, strides_of(y.shape) if to is None else to)
    return f"{name}({{{place}}} + {skip}, {{y}} + {at}, {plan});"


def _concat(step: Step, values: Mapping[str, Value], stages: Sequence[Stage], source: Source) -> str:
    op, y = _base(step), values[step.output]
    axis, at, calls = int(op.attributes["axis"]) % len(y.shape), 0, []
    strides = strides_of(y.shape)
    for k, name in enumerate(op.inputs):
        x = values[name]
        place = "x" if k == 0 else f"x{k}"
        calls.append(_moved(op, x, y, source, shape=x.shape, steps=strides_of(x.shape), at=at, place=place))
        at += x.shape[axis] * strides[axis]
    return "\n".join(calls)


def _slice(step: Step, values: Mapping[str, Value], stages: Sequence[Stage], source: Source) -> str:
    op, x, y = _base(step), values[step.inputs[0]], values[step.output]
    a, strides = op.attributes, strides_of(x.shape)
    ranges = [
        slice(*cut).indices(n)
        for cut, n in zip(zip(a["starts"], a["stops"], a["steps"], strict=True), x.shape, strict=True)
    ]
    skip = sum(start * s for (start, _, _), s in zip(ranges, strides, strict=True))
    steps = [by * s for (_, _, by), s in zip(ranges, strides, strict=True)]
    return _moved(op, x, y, source, shape=y.shape, steps=steps, skip=skip)


def _transpose(step: Step, values: Mapping[str, Value], stages: Sequence[Stage], source: Source) -> str:
    op, x, y = _base(step), values[step.inputs[0]], values[step.output]
    strides = strides_of(x.shape)
    return _moved(op, x, y, source, shape=y.shape, steps=[strides[int(i)] for i in op.attributes["permutation"]])


def _pad(step: Step, values: Mapping[str, Value], stages: Sequence[Stage], source: Source) -> str:
    """Filled, then the part of x that is not cut away by negative padding copied in."""
    op, x, y = _base(step), values[step.inputs[0]], values[step.output]
    padding = [(int(b), int(a)) for b, a in op.attributes["padding"]]
    shape = [n + min(b, 0) + min(a, 0) for n, (b, a) in zip(x.shape, padding, strict=True)]
    from_, to = strides_of(x.shape), strides_of(y.shape)
    skip = sum(max(-b, 0) * s for (b, _), s in zip(padding, from_, strict=True))
    at = sum(max(b, 0) * s for (b, _), s in zip(padding, to, strict=True))
    fill = source.function("fill", (y.storage,), _FILL, {"Y": ctype(y.storage)})
    filled = f"{fill}({{y}}, {elements(y.shape)}, {literal(int(op.attributes['value']))});"
    if min(shape) <= 0:
        return filled
    return f"{filled}\n{_moved(op, x, y, source, shape=shape, steps=from_, skip=skip, at=at)}"


def _gather(step: Step, values: Mapping[str, Value], stages: Sequence[Stage], source: Source) -> str:
    op, x, y = _base(step), values[step.inputs[0]], values[step.output]
    index = op.constants["index"].ravel()
    dtype = "int16" if index.max(initial=0) < 1 << 15 else "int32"
    types = {"X": ctype(x.storage), "Y": ctype(y.storage), "I": ctype(dtype)}
    name = source.function("gather", (x.storage, dtype, y.storage), _GATHER, types)
    rows = x.shape[0]
    return f"{name}({{x}}, {{y}}, {source.table(index, dtype)}, {rows}, {elements(x.shape) // rows}, {index.size});"


def _argmax(step: Step, values: Mapping[str, Value], stages: Sequence[Stage], source: Source) -> str:
    """First of the largest; where the network compares floats, codes that one float32 stands for are equal."""
    op, x = _base(step), values[step.inputs[0]]
    rounds = values[op.inputs[0]].dtype == "float32" and max(-x.low, x.high) > 1 << 24
    a = "int64" if rounds else sum_type(x.low, x.high)
    types = {"X": ctype(x.storage), "A": ctype(a), "seen": f"{source.significant()}(" if rounds else f"({ctype(a)})("}
    axis = int(op.attributes["axis"]) % len(x.shape)
    name = source.function("argmax_float32" if rounds else "argmax", (x.storage, a), _ARGMAX, types)
    return f"{name}({{x}}, {{y}}, {elements(x.shape[:axis])}, {x.shape[axis]}, {elements(x.shape[axis + 1 :])});"


def _map(step: Step, values: Mapping[str, Value], stages: Sequence[Stage], source: Source) -> str:
    x, stored = values[step.inputs[0]], values[step.output].storage
    blocks = {"channel": "const int32_t c = plane % channels;"}
    name = source.function(
        "map", (x.storage, stored), _MAP, {"X": ctype(x.storage), "Y": ctype(stored)}, stages, blocks
    )
    axis = next((a for op in step.stages if (a := channel_axis(op, values)) is not None), None)
    outer, channels, inner = 1, 1, elements(x.shape)
    if axis is not None:
        outer, channels, inner = elements(x.shape[:axis]), x.shape[axis], elements(x.shape[axis + 1 :])
    return f"{name}({{x}}, {{y}}, {outer}, {channels}, {inner}{passed(stages)});"


def _add(step: Step, values: Mapping[str, Value], stages: Sequence[Stage], source: Source) -> str:
    """Sums of shifted inputs, each repeated along the axes where it has length 1."""
    op = _base(step)
    sums, stored = values[op.output], values[step.output].storage
    a, types, shapes, places = sum_type(sums.low, sums.high), list[str](), list[tuple[int, ...]](), list[str]()
    for k, name in enumerate(op.inputs):
        types.append(values[name].storage)
        shapes.append(values[name].shape)
        places.append("{x}" if k == 0 else f"{{x{k}}}")
    if "other" in op.constants:
        other = op.constants["other"]
        types.append(other.dtype.name)
        shapes.append(other.shape)
        places.append(source.table(other))
    lengths, strides = collapsed(sums.shape, strides_of(sums.shape), *(strides_of(s, onto=sums.shape) for s in shapes))
    depth, tensors = len(lengths), [f"x{k}" for k in range(len(types))]
    terms = " + ".join(f"({ctype(a)}){t}[{_place(t + '_', depth, 'i')}] * left_{t}" for t in tensors)
    inputs = ", ".join(f"const {ctype(d)} *{t}, {ctype(a)} left_{t}" for t, d in zip(tensors, types, strict=True))
    body = f"const {ctype(a)} v0 = {terms};\n$stages\ny[{_place('y', depth, 'i')}] = ({ctype(stored)})$result;"
    template = (
        f"static void $name({inputs}, {ctype(stored)} *y, const int32_t *p$parameters)\n{{\n"
        f"{_sizes(('y', *(t + '_' for t in tensors)), depth, 'i')}\n    $prepare\n{_nest(depth, 'i', body, 1)}\n}}"
    )
    name = source.function(f"add{depth}", (*types, a, stored), template, {}, stages)
    left = [1 << int(n) for n in op.attributes["left"]]
    given = ", ".join(f"{place}, {factor}" for place, factor in zip(places, left, strict=True))
    plan = source.table([*lengths, *(n for row in strides for n in row)], "int32")
    return f"{name}({given}, {{y}}, {plan}{passed(stages)});"


def _sum(step: Step, values: Mapping[str, Value], stages: Sequence[Stage], source: Source) -> str:
    op, x, sums, stored = _base(step), values[step.inputs[0]], values[_base(step).output], values[step.output].storage
    axes = {int(axis) % len(x.shape) for axis in op.attributes["axes"]}
    kept = [axis for axis in range(len(x.shape)) if axis not in axes]
    strides = strides_of(x.shape)
    shape = [x.shape[axis] for axis in kept]
    outer, (to, from_) = collapsed(shape, strides_of(shape), [strides[axis] for axis in kept])
    inner, (along,) = collapsed([x.shape[axis] for axis in sorted(axes)], [strides[axis] for axis in sorted(axes)])
    a = sum_type(sums.low, sums.high)
    depth, deep = len(outer), len(inner)
    body = (
        f"{ctype(a)} v0 = 0;\n"
        + _nest(deep, "j", f"v0 += ({ctype(a)})x[{_place('x', depth, 'i')} + {_place('x', deep, 'j')}];")
        + f"\n$stages\ny[{_place('y', depth, 'i')}] = ({ctype(stored)})$result;"
    )
    template = (
        f"static void $name(const {ctype(x.storage)} *x, {ctype(stored)} *y, const int32_t *p$parameters)\n{{\n"
        f"{_sizes(('y', 'x'), depth, 'i')}\n{_sizes(('x',), deep, 'j', 3 * depth)}\n    $prepare\n"
        f"{_nest(depth, 'i', body, 1)}\n}}"
    )
    name = source.function(f"sum{depth}{deep}", (x.storage, a, stored), template, {}, stages)
    plan = source.table([*outer, *to, *from_, *inner, *along], "int32")
    return f"{name}({{x}}, {{y}}, {plan}{passed(stages)});"


def _divide(step: Step, values: Mapping[str, Value], stages: Sequence[Stage], source: Source) -> str:
    """clip(round(x / (count * 2^shift))) where windows differ in their count."""
    op, x, y = _base(step), values[step.inputs[0]], values[step.output]
    count = op.constants["count"].astype(np.int64)
    a, factor, unit = divisor_of(op, x, y, int(count.max()))
    lengths, strides = collapsed(y.shape, strides_of(y.shape), strides_of(count.shape, onto=y.shape))
    depth, rounding = len(lengths), op.attributes["rounding"]
    kind, stored, at = ctype(a), ctype(y.storage), _place("y", depth, "i")
    quotient = f"{source.round_divide(rounding, a)}(({kind})x[{at}] * factor, d[{_place('d', depth, 'i')}])"
    body = f"y[{at}] = ({stored}){source.clip(a)}({quotient}, low, high);"
    template = (
        f"static void $name(const {ctype(x.storage)} *x, {stored} *y, const {kind} *d, {kind} factor, "
        f"{kind} low, {kind} high, const int32_t *p)\n{{\n"
        f"{_sizes(('y', 'd'), depth, 'i')}\n{_nest(depth, 'i', body, 1)}\n}}"
    )
    name = source.function(f"divide{depth}_{rounding}", (x.storage, a, y.storage), template, {})
    least, most = limits(a)
    low, high = op.attributes["low"], op.attributes["high"]
    low, high = max(least, least if low is None else int(low)), min(most, most if high is None else int(high))
    plan = source.table([*lengths, *(n for row in strides for n in row)], "int32")
    return f"{name}({{x}}, {{y}}, {source.table(count * unit, a)}, {factor}, {literal(low)}, {literal(high)}, {plan});"


def _base(step: Step) -> Op:
    assert step.base is not None
    return step.base


_Call = Callable[[Step, Mapping[str, Value], Sequence[Stage], Source], str]
MOVES: dict[str | None, _Call] = {
    None: _map,
    "add": _add,
    "argmax": _argmax,
    "concat": _concat,
    "divide": _divide,
    "gather": _gather,
    "pad": _pad,
    "slice": _slice,
    "sum": _sum,
    "transpose": _transpose,
}
