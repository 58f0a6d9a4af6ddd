"""Every small mistake that an operation of a program can hold, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from lightning_lowbit.export.program import Op

__all__ = ["faults"]

_OTHER_TIES = {"half_even": "half_up", "half_up": "half_away", "half_away": "half_even", "floor": "truncate"}
_BY_ONE = (
    "exponent", "low", "high", "count", "value", "fraction_in", "mean_fraction", "s_fraction", "xhat_fraction",
    "out_fraction", "product_fraction", "limit", "alpha", "slope", "eps",
)  # fmt: skip
_LISTS = ("left", "starts", "stops", "dilation", "stride", "output_padding", "kernel", "shape")


def faults(op: Op) -> Iterator[tuple[str, Op]]:
    """A name and the operation with that mistake; not all of them change a result, and some cannot run."""
    for name, value in op.attributes.items():
        for label, other in _attribute(name, value):
            yield f"{name}{label}", replace(op, attributes={**op.attributes, name: other})
    for name, array in op.constants.items():
        for label, changed in _constant(name, array):
            yield f"{name}{label}", replace(op, constants={**op.constants, name: changed})
    if "bias" in op.constants:
        yield "no-bias", replace(op, constants={n: array for n, array in op.constants.items() if n != "bias"})
    if len(op.inputs) > 1 and op.inputs[0] != op.inputs[1]:
        yield "inputs-swapped", replace(op, inputs=(op.inputs[1], op.inputs[0], *op.inputs[2:]))


def _attribute(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if name == "rounding":
        yield "-tie", _OTHER_TIES[value]
        yield "-floor", "truncate" if value == "floor" else "floor"
    elif name == "shift":
        for step in (1, -1):
            yield f"{step:+}", [value[0] + step, *value[1:]] if isinstance(value, list) else value + step
    elif name == "padding":
        yield "-border", [*value[:-1], _longer(value[-1])]
        yield "-class", [*value[:-1], _moved(value[-1])]
    elif name == "permutation":
        yield "-swapped", [*value[:-2], value[-1], value[-2]]
    elif name == "axes":
        yield "-other", [value[0] - 1, *value[1:]] if value[0] > 1 else [value[0] + 1, *value[1:]]
    elif name == "axis" and isinstance(value, int):
        yield "-other", value + 1
    elif name == "factor":
        yield "-other", 1.5 if value is None else value * 2
    elif name == "precision":
        yield "-other", "float64" if value == "float32" else "float32"
    elif name == "keepdims":
        yield "-other", not value
    elif name in _LISTS:
        last = [i for i, n in enumerate(value) if isinstance(n, int)]
        yield "+1", [n + 1 if i == last[-1] else n for i, n in enumerate(value)]
    elif name in _BY_ONE and isinstance(value, (int, float)):
        yield "+1", value + 1
        yield "-1", value - 1


def _longer(side: Any) -> Any:
    return side + 1 if isinstance(side, int) else [side[0] + 1, side[1]]


def _moved(side: Any) -> Any:
    """The border before instead of behind: shapes stay."""
    return side + 1 if isinstance(side, int) else [side[0] + 1, side[1] - 1]


def _constant(name: str, array: np.ndarray[Any, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    wide = np.float32 if array.dtype.kind == "f" else np.int64
    for label, place in (("[first]", 0), ("[last]", array.size - 1)):
        changed = array.astype(wide).copy()
        flat = changed.reshape(-1)
        flat[place] = 1 - flat[place] if name == "flip" else flat[place - 1] if name == "index" else flat[place] + 1
        if not np.array_equal(changed, array):
            yield label, changed
