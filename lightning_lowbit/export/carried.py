"""Integers that need more than the 24 bits of float32, in which evaluation carries them all the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_lowbit.modules.lowering import refuse

__all__ = ["HELD", "Carried", "carried_on"]

HELD = 1 << 24
"""Float32 holds integers up to here."""
_PASSED = frozenset({"reshape", "slice", "transpose", "pad", "gather", "concat", "max_pool"})
_SAME = {"nearest": frozenset({"dequantize", "threshold"}), "odd": frozenset({"requantize", "threshold"})}


@dataclass(frozen=True)
class Carried:
    """How float32 rounds what it does not hold.

    Attributes:
        how: "nearest", as a conversion of the integer to float32 does; or to "odd", so that whoever rounds to a coarser
            grid gets what the integer gives.
        instead: what the user can do where that is not the integer.
    """

    how: Literal["nearest", "odd"]
    instead: str


def carried_on(kind: str, attributes: Mapping[str, Any], inputs: Sequence[Carried | None], path: str) -> Carried | None:
    """How an operation's result is carried.

    Raises:
        UnsupportedModelError: evaluation computes with the rounded values, and has another result than the integers.

    >>> carried_on("max_pool", {}, [Carried("odd", "")], "").how, carried_on("requantize", {"shift": 4}, [None], "")
    ('odd', None)
    """
    found = {x for x in inputs if x is not None}
    if not found:
        return None
    first = min(found, key=str)
    clips = kind == "requantize" and isinstance(attributes["shift"], int) and attributes["shift"] <= 0
    if len(found) == 1 and (kind in _PASSED or clips):
        return first
    if len(found) == 1 and kind in _SAME[first.how]:
        return None
    raise refuse(path, "it reads sums that need more than the 24 bits of float32", first.instead)
