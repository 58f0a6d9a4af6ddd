"""The header of a network in C: how many codes its ends have, what a code is worth there, and its functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_lowbit.export.runtime import Op, Value

__all__ = ["FIRST", "exponent_of", "header"]

FIRST = "/* Written by lightning_lowbit"  # how a header begins that may be written over


def exponent_of(value: Value, end: Op | None = None) -> int | None:
    """The e of codes that are worth code * 2^e; None where a code is worth something else.

    Args:
        value: the codes.
        end: the dequantize behind them.
    """
    exponents = {value.exponent} if isinstance(value.exponent, int) else set(value.exponent)
    divided = end is not None and (
        end.attributes.get("factor") is not None or end.attributes.get("count") is not None or "count" in end.constants
    )
    return None if value.dtype != "int" or len(exponents) > 1 or divided else int(min(exponents))


def header(name: str, numbers: Mapping[str, int], prototypes: Sequence[str]) -> str:
    """Declarations behind a guard, so that the file that holds them too can be compiled beside them.

    Args:
        name: what the names begin with.
        numbers: constants of the enum.
        prototypes: of the functions, without their semicolons.
    """
    guard = f"LOWBIT_{name.upper()}_H"
    lines = [f"    {name}_{label} = {number}" for label, number in numbers.items()]
    return _HEADER.format(
        guard=guard, numbers=",\n".join(lines), prototypes="\n".join(f"{prototype};" for prototype in prototypes)
    )


_HEADER = """#ifndef {guard}
#define {guard}

#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

enum {{ /* size: how many codes; exponent: a code c is worth c * 2^exponent */
{numbers}
}};

{prototypes}

#ifdef __cplusplus
}}
#endif

#endif"""
