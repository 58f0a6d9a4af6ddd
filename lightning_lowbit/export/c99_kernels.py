"""C99 functions of integer arithmetic, written once for each combination of types that a network needs.

Nothing here is undefined or left to the compiler: no shift of a negative number, no sum beyond its type (the bounds of
the values are proved), no cast of a number that the type does not hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lowbit.errors import InvariantError

__all__ = ["Source", "Stage", "ctype", "indented", "literal", "tag"]

_TAGS = {"int8": "i8", "uint8": "u8", "int16": "i16", "uint16": "u16", "int32": "i32", "uint32": "u32", "int64": "i64"}


def tag(dtype: str) -> str:
    """What names a type in the name of a function, as in ``i8``."""
    return _TAGS[dtype]


def ctype(dtype: str) -> str:
    """The name that <stdint.h> has for it."""
    return f"{dtype}_t"


def literal(number: int) -> str:
    """An integer constant of C; the lowest of 64 bits has no digits of its own.

    >>> literal(-128), literal(-(2**63))
    ('-128', '(-9223372036854775807 - 1)')
    """
    return "(-9223372036854775807 - 1)" if number == -(1 << 63) else str(number)


def indented(text: str, depth: int) -> str:
    """Each line ``depth`` levels in."""
    return "\n".join("    " * depth + line if line else "" for line in text.strip("\n").split("\n"))


@dataclass(frozen=True)
class Stage:
    """Arithmetic on one element, placed inside the loop of any function.

    Args:
        name: says which arithmetic and types, for the function's name.
        parameters: what the function takes for it (C declarations) and what a call passes.
        prepare: lines that run once for each channel ``c``.
        lines: what makes ``$next`` of ``$v``; ``$k`` is the stage's place.
    """

    name: str
    parameters: tuple[tuple[str, str], ...]
    prepare: tuple[str, ...]
    lines: tuple[str, ...]


@dataclass
class Source:
    """The functions and tables of a file, each once."""

    helpers: dict[str, str] = field(default_factory=dict)
    functions: dict[str, str] = field(default_factory=dict)
    tables: dict[tuple[str, bytes], tuple[str, str]] = field(default_factory=dict)
    flash: int = 0

    def table(self, numbers: Any, dtype: str | None = None) -> str:
        """A constant array; its own dtype unless another is given. Equal ones are stored once."""
        array: NDArray[Any] = np.ascontiguousarray(numbers)
        array = array.astype(dtype) if dtype else array
        key = (array.dtype.name, array.tobytes())
        if key not in self.tables:
            name = f"table_{len(self.tables)}"
            self.flash += array.nbytes
            head = f"static const {ctype(array.dtype.name)} {name}[{array.size}]"
            self.tables[key] = (name, f"{head} = {{\n{_rows(array.ravel().tolist())}\n}};")
        return self.tables[key][0]

    def window(self, fields: Sequence[Sequence[int]]) -> str:
        """A ``struct window``: counts (batch, inputs, outputs, groups) and six triples."""
        numbers = np.array([n for row in fields for n in row], np.int32)
        key = ("window", numbers.tobytes())
        if key not in self.tables:
            name = f"window_{len(self.tables)}"
            self.flash += numbers.nbytes
            counts, *triples = (", ".join(map(str, row)) for row in fields)
            rows = ", ".join(f"{{{triple}}}" for triple in triples)
            self.tables[key] = (name, f"static const struct window {name} = {{{counts}, {rows}}};")
            self.helpers.setdefault("window", _WINDOW)
        return self.tables[key][0]

    def clip(self, dtype: str) -> str:
        """Name of the function that limits a number."""
        return self._helper(f"clip_{tag(dtype)}", _CLIP, T=ctype(dtype))

    def round_shift(self, rounding: str, dtype: str) -> str:
        """Name of the function that gives round(v / 2^n), for n of 0 to 30 or 62."""
        body = _SHIFT_EXACT if rounding == "floor" else Template(_SHIFT_ROUNDED).substitute(up=_UP_SHIFT[rounding])
        return self._helper(f"round_shift_{rounding}_{tag(dtype)}", _SHIFT + body, T=ctype(dtype))

    def round_divide(self, rounding: str, dtype: str) -> str:
        """Name of the function that gives round(v / d), for d > 0."""
        return self._helper(f"round_divide_{rounding}_{tag(dtype)}", _DIVIDE[rounding], T=ctype(dtype))

    def round_float(self, rounding: str, dtype: str) -> str:
        """Name of the function that gives round(x * scale) between two limits, NaN as the lower one."""
        return self._helper(f"round_float_{rounding}_{tag(dtype)}", _FLOAT + _ROUND_FLOAT[rounding], T=ctype(dtype))

    def significant(self) -> str:
        """Name of the function that rounds an integer as float32 does, to 24 significant bits."""
        return self._helper("significant", _SIGNIFICANT, round=self.round_shift("half_even", "int64"))

    def function(
        self,
        kind: str,
        types: Sequence[str],
        template: str,
        names: Mapping[str, str],
        stages: Sequence[Stage] = (),
        blocks: Mapping[str, str] | None = None,
    ) -> str:
        """Name of the function made of ``template`` for these types and stages.

        In the template stand $name, $parameters, $prepare and $stages (each a line of its own), where ``v0`` is the
        element and $result what the stages make of it, ``blocks`` (of lines) and ``names``. The block
        ``channel``, which declares c, is left out where no stage reads it.
        """
        name = "_".join([kind, *(tag(t) for t in types), *(stage.name for stage in stages)])
        inline, lines = _joined(stages)
        used = any("[c]" in line for rows in lines.values() for line in rows)
        for key, text in (blocks or {}).items():
            template = _placed(template, key, text.strip("\n").split("\n") if used or key != "channel" else [])
        for key, rows in lines.items():
            template = _placed(template, key, rows)
        text = Template(template).substitute(names, name=name, **inline).strip("\n")
        if self.functions.setdefault(name, text) != text:
            raise InvariantError(f"{name}: two functions of one name. Please report this network.")
        return name

    def _helper(self, name: str, template: str, **names: str) -> str:
        self.helpers.setdefault(name, Template(template).substitute(names, name=name).strip("\n"))
        return name


def _placed(template: str, key: str, lines: Sequence[str]) -> str:
    """Lines instead of the one that says $key, as deep as it stands."""
    pattern = re.compile(rf"^( *)\${key}\n", re.MULTILINE)
    return pattern.sub(lambda found: "".join(f"{found[1]}{line}\n" for line in lines), template)


def _joined(stages: Sequence[Stage]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """What stands for $parameters and $result, and the lines for $prepare and $stages."""
    parameters, prepare, lines = "", list[str](), list[str]()
    for k, stage in enumerate(stages):
        names = {"k": str(k), "v": f"v{k}", "next": f"v{k + 1}"}
        parameters += "".join(f", {Template(declared).substitute(names)}" for declared, _ in stage.parameters)
        prepare += [Template(line).substitute(names) for line in stage.prepare]
        lines += [Template(line).substitute(names) for line in stage.lines]
    return {"parameters": parameters, "result": f"v{len(stages)}"}, {"prepare": prepare, "stages": lines}


def _rows(numbers: list[int], most: int = 110) -> str:
    rows, row = [], ""
    for number in numbers:
        text = f"{literal(number)},"
        if len(row) + len(text) > most:
            rows.append(row)
            row = ""
        row += text
    return "\n".join([*rows, row]).rstrip(",")


_WINDOW = """
struct window {
    int32_t batch, inputs, outputs, groups;
    int32_t in[3], out[3], kernel[3], stride[3], before[3], dilation[3];
};
""".strip()

_CLIP = """
static $T $name($T v, $T low, $T high)
{
    return v < low ? low : v > high ? high : v;
}
"""

# q = floor(v / 2^n); -1 - v is not negative where v is.
_SHIFT = """
static $T $name($T v, int32_t n)
{
    const $T q = v >= 0 ? v >> n : -1 - ((-1 - v) >> n);
"""
_SHIFT_EXACT = "    return q;\n}"
_SHIFT_ROUNDED = """    const $$T unit = ($$T)1 << n;
    const $$T r = v - q * unit;
    return q + (($up) ? 1 : 0);
}"""
_UP_SHIFT = {
    "half_even": "2 * r > unit || (2 * r == unit && q % 2 != 0)",
    "half_up": "2 * r >= unit",
    "half_away": "2 * r > unit || (2 * r == unit && v >= 0)",
    "truncate": "r != 0 && v < 0",
}

_DIVIDE_FLOOR = """
static $T $name($T v, $T d)
{
    $T q = v / d;
    $T r = v % d;
    if (r < 0) {
        q -= 1;
        r += d;
    }
"""
_DIVIDE = {
    "half_even": _DIVIDE_FLOOR + "    return q + ((r > d - r || (r == d - r && q % 2 != 0)) ? 1 : 0);\n}",
    "half_up": _DIVIDE_FLOOR + "    return q + (r >= d - r ? 1 : 0);\n}",
    "half_away": _DIVIDE_FLOOR + "    return q + ((r > d - r || (r == d - r && v >= 0)) ? 1 : 0);\n}",
    "floor": "static $T $name($T v, $T d)\n{\n    return v / d - (v % d < 0 ? 1 : 0);\n}",
    "truncate": "static $T $name($T v, $T d)\n{\n    return v / d;\n}",
}

_SIGNIFICANT = """
static int64_t $name(int64_t v)
{
    const int64_t a = v < 0 ? -v : v;
    int32_t n = 0;
    while (a / ((int64_t)1 << n) >= (int64_t)1 << 24) {
        n += 1;
    }
    return $round(v, n) * ((int64_t)1 << n);
}
"""

# The limits come before the cast, which would be undefined beyond its type; NaN gives the lower one.
_FLOAT = """
static $T $name(float x, float scale, float least, float most)
{
    float v = x * scale;
    if (!(v > least)) {
        v = least;
    }
    if (v > most) {
        v = most;
    }
"""
_FLOAT_FLOOR = """    $T q = ($T)v;
    if ((float)q > v) {
        q -= 1;
    }
"""
_FLOAT_MAGNITUDE = """    const float a = v < 0.0f ? -v : v;
    $T q = ($T)a;
    const float r = a - (float)q;
"""
_ROUND_FLOAT = {
    "half_even": _FLOAT_MAGNITUDE
    + "    q += (r > 0.5f || (r >= 0.5f && q % 2 != 0)) ? 1 : 0;\n    return v < 0.0f ? -q : q;\n}",
    "half_away": _FLOAT_MAGNITUDE + "    q += r >= 0.5f ? 1 : 0;\n    return v < 0.0f ? -q : q;\n}",
    "half_up": _FLOAT_FLOOR + "    return q + (v - (float)q >= 0.5f ? 1 : 0);\n}",
    "floor": _FLOAT_FLOOR + "    return q;\n}",
    "truncate": "    return ($T)v;\n}",
}
