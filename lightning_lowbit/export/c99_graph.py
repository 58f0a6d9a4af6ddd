"""An integer program made ready for C: one sample, no floats inside, sums rescaled where they arise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lightning_lowbit.errors import UnsupportedModelError, listed
from lightning_lowbit.export.runtime import Op, Program, Value, quantize

__all__ = ["Step", "channel_axis", "elements", "integers_inside", "one_sample", "shifts_of", "steps_of"]

_MOVES = ("concat", "gather", "max_pool", "pad", "reshape", "slice", "transpose")
_SUMS = ("add", "conv", "conv_transpose", "linear", "sum", "sum_pool")
_STAGES = ("divide", "normalize", "requantize", "threshold")


@dataclass(frozen=True, eq=False)
class Step:
    """What one C function computes: ``base``, then ``stages`` on every element before it is stored.

    Args:
        base: an op that is no stage, or None where the stages read ``inputs[0]`` itself.
        stages: elementwise ops, each on what the one before it gives.
        inputs: the values that are read.
        output: the value that is stored.
    """

    base: Op | None
    stages: tuple[Op, ...]
    inputs: tuple[str, ...]
    output: str

    @property
    def path(self) -> str:
        """Where in the network it comes from."""
        return (self.base or self.stages[0]).path


def integers_inside(program: Program) -> Program:
    """The same function with every quantize directly behind an input and every dequantize last.

    Ops that only move numbers change places with the quantize behind them and with the dequantize before them; what no
    output needs is left out.

    Raises:
        UnsupportedModelError: an island, or another float stretch that is no mere move.
    """
    islands = [op.path for op in program.ops if op.kind == "island"]
    if islands:
        raise UnsupportedModelError(
            f"{islands[0]}: a float island has no integer form in C; got {len(islands)} ({listed(islands)}), expected "
            f"none.{_reason(program)} Choose layers and options without islands, or run the program with numpy "
            "(program.run, runtime.py): ONNX refuses islands too."
        )
    return _pruned(_dequantize_last(_quantize_first(program)))


def _reason(program: Program) -> str:
    """Why layers that a scheme quantizes may be islands."""
    parts = program.note.get("not_followed", [])
    if not parts:
        return ""
    return f" Not followed: {listed(parts, 2)}. Layers called there stay float."


def _quantize_first(program: Program) -> Program:
    makers = {op.output: op for op in program.ops}
    values, ops, renamed = dict(program.values), list[Op](), dict[str, str]()
    done: dict[tuple[Any, ...], str] = {}

    def codes_of(name: str, op: Op, output: str) -> str:
        """The value that holds ``op`` of the float value ``name``; a new one is called ``output``."""
        key = (name, *(op.attributes[field] for field in ("exponent", "rounding", "low", "high")))
        if key in done:
            return done[key]
        done[key] = output
        bounds = program.values[op.output]
        values[output] = replace(bounds, name=output, shape=program.values[name].shape)
        if name in program.inputs:
            ops.append(replace(op, inputs=(name,), output=output))
            return output
        maker = makers[name]
        if maker.kind not in _MOVES:
            raise UnsupportedModelError(
                f"{op.path}: it quantizes what {maker.kind} of {maker.path} gives as floats; C takes floats at the "
                "network's inputs only. Run the program with numpy (program.run, runtime.py)."
            )
        inputs = tuple(codes_of(i, op, f"{output}_{k}") for k, i in enumerate(maker.inputs))
        attributes: Mapping[str, Any] = maker.attributes
        if maker.kind == "pad":
            attributes = {
                **attributes,
                "value": int(quantize(np.array([attributes["value"]], np.float32), *key[1:])[0]),
            }
        ops.append(replace(maker, inputs=inputs, output=output, attributes=attributes))
        return output

    for op in program.ops:
        if op.kind == "quantize":
            renamed[op.output] = codes_of(op.inputs[0], op, op.output)
        elif not (op.kind in _MOVES and _behind_input(op, makers, program)):
            ops.append(replace(op, inputs=tuple(renamed.get(i, i) for i in op.inputs)))
    outputs = tuple(renamed.get(o, o) for o in program.outputs)
    return Program(tuple(ops), values, program.inputs, outputs, program.structure, program.note)


def _behind_input(op: Op, makers: Mapping[str, Op], program: Program) -> bool:
    """Whether ``op`` moves floats that no dequantize made."""
    if program.values[op.output].dtype != "float32":
        return False
    first = op.inputs[0]
    return first in program.inputs or _behind_input(makers[first], makers, program)


def _dequantize_last(program: Program) -> Program:
    values, ops, last = dict(program.values), list[Op](), dict[str, Op]()
    for op in program.ops:
        sources = [last[name] for name in op.inputs if name in last]
        if op.kind == "dequantize":
            last[op.output] = op
        elif not sources:
            ops.append(op)
            continue
        elif op.kind == "argmax" and _plain(sources[0], values):
            ops += [op] if op.inputs[0] in program.outputs else [sources[0], op]
            continue
        else:
            moved = _moved(op, sources, values)
            codes = f"{op.output}_codes"
            bounds = [values[source.inputs[0]] for source in sources]
            values[codes] = replace(
                bounds[0],
                name=codes,
                shape=values[op.output].shape,
                low=min(0, *(b.low for b in bounds)),
                high=max(0, *(b.high for b in bounds)),
            )
            ops.append(replace(moved, output=codes))
            last[op.output] = replace(sources[0], inputs=(codes,), output=op.output)
        if op.output in program.outputs:
            ops.append(last[op.output])
    return Program(tuple(ops), values, program.inputs, program.outputs, program.structure, program.note)


def _moved(op: Op, sources: list[Op], values: Mapping[str, Value]) -> Op:
    """``op`` on the codes from which ``sources`` made its floats."""
    first = sources[0]
    exponents = {values[source.inputs[0]].exponent for source in sources}
    plain = len(exponents) == 1 and isinstance(values[first.inputs[0]].exponent, int)
    same = all(not s.constants and dict(s.attributes) == dict(first.attributes) for s in sources)
    if op.kind not in _MOVES or len(sources) != len(op.inputs) or not plain or not same or op.attributes.get("value"):
        raise UnsupportedModelError(
            f"{op.path}: {op.kind} of floats, behind the dequantize of {first.path}, has no integer form in C. "
            "Run the program with run() or ONNX, or lower the network up to that layer."
        )
    return replace(op, inputs=tuple(source.inputs[0] for source in sources))


def _plain(op: Op, values: Mapping[str, Value]) -> bool:
    """Whether the floats of a dequantize are its codes by a power of two, rounded to float32."""
    a, exponent = op.attributes, values[op.inputs[0]].exponent
    scaled = a.get("factor") is not None or a.get("count") is not None or op.constants
    return isinstance(exponent, int) and -126 <= exponent <= 63 and not scaled


def _pruned(program: Program) -> Program:
    needed, kept = set(program.outputs), list[Op]()
    for op in reversed(program.ops):
        if op.output in needed:
            needed.update(op.inputs)
            kept.append(op)
    values = {name: value for name, value in program.values.items() if name in needed or name in program.inputs}
    return Program(tuple(kept[::-1]), values, program.inputs, program.outputs, program.structure, program.note)


def one_sample(values: Mapping[str, Value]) -> dict[str, Value]:
    """The values of a batch of 1: dimension -k is k.

    Raises:
        UnsupportedModelError: a value with no elements, with 2^31 of them, or whose codes need more than 64 bits.
    """
    single = {}
    for name, value in values.items():
        shape = tuple(-n if n < 0 else n for n in value.shape)
        size = elements(shape)
        if not 0 < size < 1 << 31:
            raise UnsupportedModelError(f"{name}: shape {shape} has {size} elements, expected 1 to 2^31 - 1 for C.")
        if value.dtype == "int" and not -(1 << 63) <= value.low <= value.high < 1 << 63:
            raise UnsupportedModelError(f"{name}: codes {value.low}..{value.high} do not fit 64 bits, the widest in C.")
        single[name] = replace(value, shape=shape)
    return single


def elements(shape: tuple[int, ...]) -> int:
    """Number of elements.

    >>> elements((2, 3)), elements(())
    (6, 1)
    """
    size = 1
    for n in shape:
        size *= n
    return size


def channel_axis(op: Op, values: Mapping[str, Value]) -> int | None:
    """The axis along which the constants of a stage differ, or of which a base knows the channel; None: no axis."""
    rank = len(values[op.output].shape)
    if op.kind in ("conv", "conv_transpose", "normalize", "sum_pool"):
        return 1
    if op.kind == "linear":
        return rank - 1
    if op.kind == "threshold" or (op.kind == "requantize" and len(shifts_of(op)) > 1):
        axis = op.attributes["axis"]
        return int(axis) % rank
    return None


def shifts_of(op: Op) -> tuple[int, ...]:
    """The shifts of a requantize: one for each channel, or a single one where they are all the same."""
    shift = op.attributes["shift"]
    shifts = tuple(int(s) for s in shift) if isinstance(shift, (list, tuple)) else (int(shift),)
    return shifts[:1] if len(set(shifts)) == 1 else shifts


def steps_of(program: Program, values: Mapping[str, Value]) -> list[Step]:
    """The ops between quantize and dequantize, elementwise ones joined to the op whose only reader they are."""
    readers = Counter(name for op in program.ops for name in op.inputs)
    readers.update(program.outputs)
    codes = {op.output: op.inputs[0] for op in program.ops if op.kind == "dequantize"}
    steps: list[Step] = []
    makers: dict[str, int] = {}
    for op in program.ops:
        if op.kind in ("quantize", "dequantize"):
            continue
        is_stage = op.kind in _STAGES and "count" not in op.constants
        place = makers.get(op.inputs[0]) if is_stage and readers[op.inputs[0]] == 1 else None
        if place is not None and _joins(steps[place], op, values):
            steps[place] = replace(steps[place], stages=(*steps[place].stages, op), output=op.output)
            makers[op.output] = place
            continue
        makers[op.output] = len(steps)
        if is_stage:
            steps.append(Step(None, (op,), op.inputs, op.output))
        else:
            # argmax of floats reads their codes, and rounds them itself
            inputs = tuple(codes.get(name, name) for name in op.inputs)
            steps.append(Step(op, (), inputs, op.output))
    return steps


def _joins(step: Step, stage: Op, values: Mapping[str, Value]) -> bool:
    if step.base is not None and step.base.kind not in _SUMS:
        return False
    axis = channel_axis(stage, values)
    if axis is None:
        return True
    if step.base is not None:
        return channel_axis(step.base, values) == axis
    return {channel_axis(op, values) for op in step.stages} <= {axis, None}
