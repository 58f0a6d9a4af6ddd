"""Whether the operations of an integer program fit together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_lowbit.export.runtime import KINDS, ROUNDINGS, Op, Program, ProgramError, Value
from lightning_lowbit.export.runtime_float import FUNCTIONS, PRODUCTS

__all__ = ["check"]

MOST = 1 << 62
"""No code, partial sum or numerator of a division may lie beyond: the runtime computes with int64."""

_CLIP = "rounding low high"
_WINDOW = "kernel stride padding"
# kind -> attributes, constants and how many inputs; None: any number, at least one
_NEEDED: dict[str, tuple[str, str, int | None]] = {
    "quantize": (f"exponent {_CLIP}", "", 1),
    "conv": ("stride padding dilation groups", "weight", 1),
    "conv_transpose": ("stride padding output_padding dilation groups", "weight", 1),
    "linear": ("", "weight", 1),
    "requantize": (f"shift axis {_CLIP}", "", 1),
    "add": ("left", "", None),
    "concat": ("axis", "", None),
    "max_pool": (f"{_WINDOW} dilation", "", 1),
    "sum_pool": (_WINDOW, "", 1),
    "sum": ("axes keepdims", "", 1),
    "divide": (f"shift {_CLIP}", "", 1),
    "pad": ("padding value", "", 1),
    "slice": ("starts stops steps", "", 1),
    "reshape": ("shape", "", 1),
    "transpose": ("permutation", "", 1),
    "gather": ("", "index", 1),
    "threshold": ("axis", "low flip", 1),
    "normalize": (
        "fraction_in mean_fraction s_fraction xhat_fraction out_fraction product_fraction limit",
        "mean s gamma beta",
        1,
    ),
    "argmax": ("axis keepdims", "", 1),
    "dequantize": ("factor precision", "", 1),
    "island": ("function", "", None),
}


def check(program: Program) -> None:
    """Look at every operation and value, before any of them runs.

    Raises:
        ProgramError: an unknown kind, rounding or function, a tensor that nothing made, a missing attribute or
            constant, or integers that int64 does not hold; by operation and path.
    """
    if set(KINDS) != set(_NEEDED):
        raise AssertionError(f"kinds of the runtime without a rule here: {sorted(set(KINDS) ^ set(_NEEDED))}")
    for name, value in program.values.items():
        wrong = _wrong_value(name, value)
        if wrong:
            raise ProgramError(f"value {name}: {wrong}")
    made = set(program.inputs)
    if made - set(program.values):
        raise ProgramError(f"inputs {sorted(made - set(program.values))}: expected a value of that name.")
    for index, op in enumerate(program.ops):
        wrong = next(_wrong_op(op, made, program), None)
        if wrong:
            raise ProgramError(f"operation {index}, {op.path} ({op.kind}): {wrong}")
        made.add(op.output)
    if set(program.outputs) - made:
        raise ProgramError(f"outputs {sorted(set(program.outputs) - made)}: nothing makes them.")
    if set(program.values) - made:
        raise ProgramError(f"values {sorted(set(program.values) - made)}: nothing makes them; leave them out.")
    if sorted(_leaves(program.structure)) != list(range(len(program.outputs))):
        raise ProgramError(
            f"structure: got {program.structure}, expected each of {len(program.outputs)} outputs once, as a leaf."
        )


def _wrong_value(name: str, value: Value) -> str | None:
    if value.name != name:
        return f"got the name {value.name!r}."
    if value.dtype not in ("int", "float32", "int64"):
        return f"got dtype {value.dtype!r}, expected int, float32 or int64."
    if value.dtype == "int" and not -MOST <= value.low <= value.high <= MOST:
        return f"got bounds {value.low}..{value.high}, expected them in order and within 2^62."
    if isinstance(value.exponent, tuple) and value.axis is None:
        return "got an exponent for each channel, expected an axis with them."
    return None


def _wrong_op(op: Op, made: set[str], program: Program) -> Iterator[str]:
    if op.kind not in _NEEDED:
        yield f"unknown kind, expected one of {', '.join(_NEEDED)}."
        return
    attributes, constants, inputs = _NEEDED[op.kind]
    if not op.inputs or (inputs is not None and len(op.inputs) != inputs):
        yield f"got {len(op.inputs)} inputs, expected {'some' if inputs is None else inputs}."
    for name in op.inputs:
        if name not in made:
            yield f"reads {name}, which nothing before it makes."
    if op.output in made or op.output not in program.values:
        yield f"makes {op.output}, expected a value that nothing else makes."
    missing = [name for name in attributes.split() if name not in op.attributes]
    missing += [name for name in constants.split() if name not in op.constants]
    if missing:
        yield f"lacks {', '.join(missing)}."
        return
    if op.attributes.get("rounding", ROUNDINGS[0]) not in ROUNDINGS:
        yield f"got rounding {op.attributes['rounding']!r}, expected one of {', '.join(ROUNDINGS)}."
    function = op.attributes.get("function")
    if op.kind == "island" and function not in FUNCTIONS and function not in PRODUCTS:
        yield f"unknown function {function!r}, expected one of {', '.join((*PRODUCTS, *FUNCTIONS))}."
    if op.kind == "add" and len(op.attributes["left"]) != len(op.inputs) + len(op.constants):
        yield f"got {len(op.attributes['left'])} left shifts, expected {len(op.inputs) + len(op.constants)}."
    if op.kind == "divide" and op.attributes.get("count") is None and "count" not in op.constants:
        yield "lacks count."
    first = program.values[op.inputs[0]]
    if first.dtype == "int" and _numerator(op, max(-first.low, first.high)) > MOST:
        yield "its numerators leave int64; expected them within 2^62."


def _numerator(op: Op, most: int) -> int:
    """How large what is divided can become, for inputs up to ``most``."""
    a: dict[str, int] = dict(op.attributes)
    if op.kind == "divide":
        return most << max(-a["shift"], 0)
    if op.kind != "normalize":
        return most
    f = max(a["fraction_in"], a["mean_fraction"])
    mean = max((abs(int(m)) for m in op.constants["mean"].flat), default=0)
    return ((most << (f - a["fraction_in"])) + (mean << (f - a["mean_fraction"]))) << max(
        a["xhat_fraction"] + a["s_fraction"] - f, 0
    )


def _leaves(structure: Any) -> Iterator[int]:
    try:
        ((kind, inside),) = structure.items()
        if kind == "leaf":
            yield inside
        else:
            for item in inside.values() if kind == "dict" else inside if kind in ("list", "tuple") else [None]:
                yield from _leaves(item)
    except (AttributeError, TypeError, ValueError):
        yield -1
