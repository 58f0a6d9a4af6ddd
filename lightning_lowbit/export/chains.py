"""What follows an integer in floats, channel by channel, where float32 keeps it monotone: then codes can replace it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_lowbit.export.runtime import Op, Value, dequantize
from lightning_lowbit.export.runtime_float import FUNCTIONS

if TYPE_CHECKING:
    from lightning_lowbit.export.builder import Held, ProgramBuilder

__all__ = ["Chain", "again", "chain_of"]

Array = np.ndarray[Any, Any]
_MOVES = frozenset({"reshape", "slice", "transpose", "gather"})
_RISING = frozenset({"relu", "relu6", "clamp", "add", "sub"})  # whatever their constants are
_FACTORS = {"affine": "a", "mul_channels": "a", "mul": "other", "prelu": "slope"}  # by whose signs they rise or fall
_MOST = 1 << 30


@dataclass
class Chain:
    """From an integer of a program to a float: float functions of one value, moves and max pools.

    Attributes:
        value: the integer.
        functions: what is done to each value, the conversion to float first.
        before: moves and pools that the integer may take first.
        behind: those that stand for codes of the result.
        axis: along which the functions have parameters, of tensors in the shape between the two.
        shape: that shape.
    """

    value: Value
    functions: list[Op]
    before: list[Op] = field(default_factory=list)
    behind: list[Op] = field(default_factory=list)
    axis: int = 1
    shape: tuple[int, ...] = ()

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    @property
    def most(self) -> int:
        """The largest magnitude of the integer."""
        return max(-self.value.low, self.value.high, 1)

    def results(self, codes: Array) -> Array:
        """What becomes of codes, int64 [channels, m]: float32 [channels, m], by the functions themselves."""
        x = codes.T.reshape([codes.shape[1], *(n if i == self.axis else 1 for i, n in enumerate(self.shape) if i)])
        with np.errstate(all="ignore"):
            for op in self.functions:
                x = self._applied(op, x)
        return x.reshape(codes.shape[::-1]).T

    def _applied(self, op: Op, x: Array) -> Array:
        a = op.attributes
        if op.kind == "dequantize":
            settings = {"count": a["count"], "factor": a["factor"], "precision": a["precision"]}
            return dequantize(x, self.value.exponent, self.value.axis, **settings)
        return np.asarray(FUNCTIONS[a["function"]](a, op.constants, x), np.float32)

    def slopes(self) -> Array:
        """Of the functions where they clip nothing, float64 [channels]."""
        slope = np.ones(self.channels)
        for op in self.functions:
            if op.kind == "dequantize":
                slope *= np.ldexp((op.attributes["factor"] or 1.0) / (op.attributes["count"] or 1), self.value.exponent)
            elif op.attributes["function"] in ("affine", "mul_channels", "mul"):
                slope *= op.constants[_FACTORS[op.attributes["function"]]].reshape(-1)
        return slope


def chain_of(build: ProgramBuilder, x: Held) -> Chain | None:
    """How x follows from an integer; None where it does otherwise."""
    steps = _steps(build, x)
    if steps is None:
        return None
    axes = [_axis(build, op) for op in steps]
    last = max(i for i, axis in enumerate(axes) if i == 0 or axis is not None)
    chain, pools = Chain(build.values[steps[0].inputs[0]], []), list[Op]()
    for op, axis in zip(steps[: last + 1], axes, strict=False):
        if op.kind == "max_pool" and all(map(_rises, chain.functions)):
            chain.before.append(op)  # the largest integer has the largest result
        elif op.kind == "max_pool":
            pools.append(op)
        elif op.kind in _MOVES:
            if pools or any(_axis(build, function) is not None for function in chain.functions):
                return None
            chain.before.append(op)
        elif pools and not _rises(op):
            return None
        else:
            chain.functions.append(op)
            chain.axis = chain.axis if axis is None else axis
    rest = steps[last + 1 :]
    chain.functions += [op for op in rest if not _places(op)]
    chain.behind = [*pools, *filter(_places, rest)]
    chain.shape = build.values[chain.before[-1].output].shape if chain.before else chain.value.shape
    alike = len({axis for axis in axes if axis is not None}) <= 1
    if not alike or len(chain.shape) < 2 or chain.most >= _MOST:
        return None
    ends = np.full((chain.channels, 2), chain.most, np.int64) * [-1, 1]
    return None if bool(np.isnan(chain.results(ends)).any()) else chain


def _steps(build: ProgramBuilder, x: Held) -> list[Op] | None:
    """From the integer to x, the conversion to float first; None where they are not monotone functions of it."""
    made, steps, name = {op.output: op for op in build.ops}, list[Op](), x.name
    while name in made:
        op = made[name]
        steps.append(op)
        if len(op.inputs) != 1 or _axis(build, op) == -1:
            return None
        if op.kind == "dequantize":
            return steps[::-1] if "count" not in op.constants and (op.attributes["factor"] or 1.0) > 0 else None
        if not (_places(op) or _monotone(op)):
            return None
        name = op.inputs[0]
    return None


def _places(op: Op) -> bool:
    """Whether it moves or selects values, and puts none of its own among them."""
    gathers = "index" in op.constants and bool((op.constants["index"] < 0).any())
    return op.kind == "max_pool" or (op.kind in _MOVES and not gathers)


def _monotone(op: Op) -> bool:
    """Whether a function rises, or falls, all along each channel."""
    name = op.attributes.get("function")
    finite = all(bool(np.isfinite(array).all()) for array in op.constants.values())
    if op.kind != "island" or not finite or op.attributes.get("nearly"):  # torch's own may round otherwise
        return False
    if name == "leaky_relu":
        return bool(op.attributes["slope"] >= 0)
    return name in _RISING or name == "affine" or (name in _FACTORS and _rises(op))


def _rises(op: Op) -> bool:
    name = str(op.attributes.get("function"))
    return name not in _FACTORS or bool((op.constants[_FACTORS[name]] >= 0).all())


def _axis(build: ProgramBuilder, op: Op) -> int | None:
    """Along which axis an operation has parameters: None of one that has none, -1 where they are of several."""
    if op.kind == "dequantize":
        return build.values[op.inputs[0]].axis
    if op.kind != "island" or max((array.size for array in op.constants.values()), default=1) == 1:
        return None
    if "other" not in op.constants:
        return 1
    other = op.constants["other"]
    wide = [axis for axis, size in enumerate(other.shape, len(build.values[op.output].shape) - other.ndim) if size > 1]
    return wide[0] if len(wide) == 1 else -1


def again(build: ProgramBuilder, steps: Sequence[Op], held: Held) -> Held:
    """The moves and pools of floats, of integers."""
    path = build.path
    for op in steps:
        build.path = op.path
        fields: dict[str, Any] = {"low": held.low, "high": held.high, "exponent": held.exponent}
        held = build.emit(op.kind, [held], build.values[op.output].shape, op.attributes, dict(op.constants), **fields)
    build.path = path
    return held
