"""Two programs of one network side by side: the first operation, constant or attribute in which they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.export.program import Op, Program, Value
from lightning_lowbit.export.verify_report import Difference

__all__ = ["parting"]


def parting(program: Program, fresh: Program) -> Difference | None:
    """The first difference of ``program`` from ``fresh``, in the order of operations.

    Args:
        fresh: what the network lowers to now.
    Raises:
        ConfigError: the programs do not consist of the same operations, so that one is of another network.
    """
    _require_one_network(program, fresh)
    return next(_differences(program, fresh), None)


def _require_one_network(program: Program, fresh: Program) -> None:
    ours, theirs = ([(op.kind, op.path, op.output) for op in each.ops] for each in (program, fresh))
    again = "It is of another network, or of other weights: lower the network again."
    for number, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            raise ConfigError(
                f"the program's operation {number} is {a[0]} of {a[1]}, the network's is {b[0]} of {b[1]}. {again}"
            )
    if len(ours) != len(theirs):
        raise ConfigError(f"the program has {len(ours)} operations, the network lowers to {len(theirs)}. {again}")


def _differences(program: Program, fresh: Program) -> Iterator[Difference]:
    for name in ("inputs", "outputs", "structure"):
        got, expected = getattr(program, name), getattr(fresh, name)
        if got != expected and not _same_json(got, expected):
            yield Difference(-1, "program", "program", "", name, str(got), str(expected))
    for name in ("scheme", "model"):  # what a certificate says of itself
        if program.note.get(name) != fresh.note.get(name):
            told, found = str(program.note.get(name)), str(fresh.note.get(name))
            yield Difference(-1, "program", "program", "", f"note {name}", told, found)
    for name in program.inputs:
        for what, got, expected, index in _of_values(program.values[name], fresh.values[name]):
            yield Difference(-1, "input", name, name, what, got, expected, index)
    for number, (op, other) in enumerate(zip(program.ops, fresh.ops, strict=True)):
        for what, got, expected, index in (
            *_of_ops(op, other),
            *_of_values(program.values[op.output], fresh.values[op.output]),
        ):
            yield Difference(number, op.kind, op.path, op.output, what, got, expected, index)


Part = tuple[str, Any, Any, tuple[int, ...] | None]


def _of_ops(op: Op, other: Op) -> Iterator[Part]:
    if op.inputs != other.inputs:
        yield "inputs", ", ".join(op.inputs), ", ".join(other.inputs), None
    for name in _names(op.attributes, other.attributes):
        got, expected = op.attributes.get(name), other.attributes.get(name)
        if not _same_json(got, expected):
            yield f"attribute {name}", _plain(got), _plain(expected), None
    for name in _names(op.constants, other.constants):
        if name not in op.constants or name not in other.constants:
            yield f"constant {name}", _state(name in op.constants), _state(name in other.constants), None
        else:
            yield from _of_arrays(f"constant {name}", op.constants[name], other.constants[name])


def _of_arrays(what: str, got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> Iterator[Part]:
    if got.shape != expected.shape:
        yield f"shape of {what}", str(got.shape), str(expected.shape), None
        return
    apart = got != expected
    if apart.any():
        index = tuple(int(i) for i in np.argwhere(apart)[0])
        yield what, got[index].item(), expected[index].item(), index


def _of_values(value: Value, other: Value) -> Iterator[Part]:
    for name in (field.name for field in fields(value)):
        got, expected = getattr(value, name), getattr(other, name)
        if got != expected and not _same_json(got, expected):
            yield f"its result's {name}", _plain(got), _plain(expected), None


def _names(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys([*a, *b]))


def _state(there: bool) -> str:
    return "there" if there else "missing"


def _same_json(a: Any, b: Any) -> bool:
    """Whether two attributes say the same: lists and tuples are one, as a file makes them, 1 and True are not."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same_json, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_json(a[key], b[key]) for key in a)
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
