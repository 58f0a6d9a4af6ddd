"""Elementwise ops as lines of C, in the narrowest type that provably holds every number on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.export.c99_graph import shifts_of
from lightning_lowbit.export.c99_kernels import Source, Stage, ctype, literal, tag
from lightning_lowbit.export.runtime import Op, Value

__all__ = ["divisor_of", "limits", "passed", "stage_of", "sum_type"]


def sum_type(low: int, high: int) -> str:
    """int32 where it holds the bounds, else int64.

    >>> sum_type(-(2**31), 2**31 - 1), sum_type(0, 2**31)
    ('int32', 'int64')
    """
    return "int32" if low >= -(1 << 31) and high < 1 << 31 else "int64"


def stage_of(op: Op, values: Mapping[str, Value], source: Source) -> Stage:
    """The stage for ``op``; its tables go to ``source``.

    Raises:
        UnsupportedModelError: a number on the way needs more than 64 bits.
    """
    return _STAGES[op.kind](op, values[op.inputs[0]], values[op.output], source)


def _wide(op: Op, what: str, most: int, limit: int = 63) -> None:
    if most >= 1 << limit:
        raise UnsupportedModelError(
            f"{op.path}: {what} of {op.kind} reaches {most}, expected less than 2^{limit}: C has no wider integer. "
            "Fewer bits, or a smaller shift, make it fit."
        )


def _reach(value: Value) -> int:
    return max(-value.low, value.high, 0)


def _clip(op: Op, dtype: str) -> tuple[int, int] | None:
    """The bounds to clip to, as ``dtype`` holds them; None where the op has none."""
    low, high = op.attributes["low"], op.attributes["high"]
    if low is None and high is None:
        return None
    least, most = limits(dtype)
    return (least if low is None else min(max(int(low), least), most)), (
        most if high is None else min(max(int(high), least), most)
    )


def limits(dtype: str) -> tuple[int, int]:
    """Lowest and highest number of a signed type.

    >>> limits("int32")
    (-2147483648, 2147483647)
    """
    half = 1 << (int(dtype[3:]) - 1)
    return -half, half - 1


def _clipped(expression: str, op: Op, dtype: str, source: Source) -> tuple[str, tuple[tuple[str, str], ...], str]:
    """The expression with the op's clip around it, the parameters of that, and what the name says of it."""
    bounds = _clip(op, dtype)
    if bounds is None:
        return expression, (), ""
    kind = ctype(dtype)
    parameters = ((f"{kind} low$k", literal(bounds[0])), (f"{kind} high$k", literal(bounds[1])))
    return f"{source.clip(dtype)}({expression}, low$k, high$k)", parameters, "_clip"


def _requantize(op: Op, x: Value, y: Value, source: Source) -> Stage:
    """clip(round(x / 2^shift)): beyond the bits of x a larger shift changes nothing, a negative one multiplies."""
    rounding, shifts = op.attributes["rounding"], shifts_of(op)
    shifts = tuple(min(s, _reach(x).bit_length() + 1) for s in shifts)
    right, left = max(*shifts, 0), max(*(-s for s in shifts), 0)
    reach = max(_reach(x) << left, _reach(y))
    _wide(op, "a product", reach)
    _wide(op, "a divisor", 1 << right)
    dtype = "int32" if reach < 1 << 31 and right <= 30 else "int64"
    kind, name = ctype(dtype), "keep"
    parameters: list[tuple[str, str]] = []
    prepare: list[str] = []
    expression = f"({kind})$v"
    if right or left:
        name = f"shift_{rounding}" + ("_both" if left else "")
        if len(shifts) > 1:
            parameters.append(("const int8_t *shifts$k", source.table(shifts, "int8")))
            prepare.append("const int32_t shift$k = shifts$k[c];")
            name += "_by_channel"
        else:
            parameters.append(("int32_t shift$k", str(shifts[0])))
        shift = "shift$k"
        if left:
            prepare.append(f"const {kind} factor$k = shift$k < 0 ? ({kind})1 << -shift$k : 1;")
            prepare.append("const int32_t right$k = shift$k < 0 ? 0 : shift$k;")
            expression, shift = f"{expression} * factor$k", "right$k"
        expression = f"{source.round_shift(rounding, dtype)}({expression}, {shift})"
    expression, bounds, clip = _clipped(expression, op, dtype, source)
    return Stage(
        f"{name}{clip}_{tag(dtype)}", (*parameters, *bounds), tuple(prepare), (f"const {kind} $next = {expression};",)
    )


def divisor_of(op: Op, x: Value, y: Value, count: int) -> tuple[str, int, int]:
    """The type, the factor of x and the part of the divisor that the shift gives, for counts up to ``count``."""
    shift = int(op.attributes["shift"])
    factor, unit = 1 << max(-shift, 0), 1 << max(shift, 0)
    reach = max(_reach(x) * factor, _reach(y), count * unit)
    _wide(op, "a numerator or a divisor", reach)
    return "int32" if reach < 1 << 31 else "int64", factor, unit


def _divide(op: Op, x: Value, y: Value, source: Source) -> Stage:
    count = int(op.attributes["count"])
    dtype, factor, unit = divisor_of(op, x, y, count)
    kind, rounding = ctype(dtype), op.attributes["rounding"]
    parameters = ((f"{kind} factor$k", str(factor)), (f"{kind} divisor$k", str(count * unit)))
    expression = f"{source.round_divide(rounding, dtype)}(({kind})$v * factor$k, divisor$k)"
    expression, bounds, clip = _clipped(expression, op, dtype, source)
    name = f"divide_{rounding}{clip}_{tag(dtype)}"
    return Stage(name, (*parameters, *bounds), (), (f"const {kind} $next = {expression};",))


def _threshold(op: Op, x: Value, y: Value, source: Source) -> Stage:
    """((x >= low) != flip) ? 1 : -1; a border outside of x's bounds is as good as the nearest one."""
    dtype = sum_type(x.low, x.high + 1)
    kind = ctype(dtype)
    low = [min(max(int(border), x.low), x.high + 1) for border in op.constants["low"].ravel()]
    return Stage(
        f"threshold_{tag(dtype)}",
        (
            (f"const {kind} *borders$k", source.table(low, dtype)),
            ("const uint8_t *flips$k", source.table(op.constants["flip"].ravel(), "uint8")),
        ),
        (f"const {kind} border$k = borders$k[c];", "const int32_t flip$k = flips$k[c];"),
        (f"const int32_t $next = (({kind})$v >= border$k) != (flip$k != 0) ? 1 : -1;",),
    )


def _normalize(op: Op, x: Value, y: Value, source: Source) -> Stage:
    """gamma * round_half_even((x - mean) / s) + beta in codes of 64 bits."""
    a = op.attributes
    fraction = max(a["fraction_in"], a["mean_fraction"])
    left = a["xhat_fraction"] + a["s_fraction"] - fraction
    units, scale = 1 << (fraction - a["fraction_in"]), 1 << max(left, 0)
    columns: dict[str, list[int]] = {
        key: [int(n) for n in op.constants[key].ravel()] for key in ("mean", "s", "gamma", "beta")
    }
    mean = [m << (fraction - a["mean_fraction"]) for m in columns["mean"]]
    s = [n << max(-left, 0) for n in columns["s"]]
    gamma = [g << (a["out_fraction"] - a["product_fraction"]) for g in columns["gamma"]]
    limit = limits("int64")[1] if a["limit"] is None else int(a["limit"])
    for m, divisor, factor, beta in zip(mean, s, gamma, columns["beta"], strict=True):
        most = (_reach(x) * units + abs(m)) * scale
        _wide(op, "a numerator", max(most, divisor))
        _wide(op, "a result", abs(factor) * min(most // divisor + 1, limit) + abs(beta))
    tables = {"mean": mean, "s": s, "gamma": gamma, "beta": columns["beta"]}
    clip, divide = source.clip("int64"), source.round_divide("half_even", "int64")
    return Stage(
        "normalize",
        (
            *((f"const int64_t *{key}$k", source.table(table, "int64")) for key, table in tables.items()),
            ("int64_t units$k", str(units)),
            ("int64_t scale$k", str(scale)),
            ("int64_t limit$k", str(limit)),
        ),
        (),
        (
            "const int64_t d$k = ((int64_t)$v * units$k - mean$k[c]) * scale$k;",
            f"const int64_t xhat$k = {clip}({divide}(d$k, s$k[c]), -limit$k, limit$k);",
            "const int64_t $next = gamma$k[c] * xhat$k + beta$k[c];",
        ),
    )


_STAGES: dict[str, Callable[[Op, Value, Value, Source], Stage]] = {
    "divide": _divide,
    "normalize": _normalize,
    "requantize": _requantize,
    "threshold": _threshold,
}


def passed(stages: Sequence[Stage]) -> str:
    """What a call passes for its stages, behind everything else."""
    return "".join(f", {given}" for stage in stages for _, given in stage.parameters)
