"""The two ends of a network in C: codes of floats or pixels, and the floats that codes are worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_lowbit.errors import ConfigError, UnsupportedModelError
from lightning_lowbit.export.c99_graph import elements
from lightning_lowbit.export.c99_kernels import Source, ctype, literal
from lightning_lowbit.export.c99_stages import limits, sum_type
from lightning_lowbit.export.runtime import Op, Value, pixel_table

__all__ = ["dequantize_function", "pixel_loop", "quantize_function"]


def quantize_function(name: str, op: Op, y: Value, source: Source) -> str:
    """``name(const float *x, codes)``: the float32 formula of the op, bit for bit; NaN gives the lowest code.

    Raises:
        UnsupportedModelError: float32 does not hold the factor.
    """
    exponent, low, high = int(op.attributes["exponent"]), op.attributes["low"], op.attributes["high"]
    if not -127 <= exponent <= 149:
        raise UnsupportedModelError(
            f"{op.path}: quantize to exponent {exponent}, expected -127..149: float32 has no such factor."
        )
    low, high = y.low if low is None else int(low), y.high if high is None else int(high)
    # One unit beyond the limits, or as far as float32 can tell from them: what is cut there is clipped anyway.
    least, most = np.float32(low - 1), np.float32(high + 1)
    dtype = sum_type(*(2 * bound for bound in (low - 2, high + 2)))
    function, clip = source.round_float(op.attributes["rounding"], dtype), source.clip(dtype)
    if float(least) < limits(dtype)[0] or float(most) > limits(dtype)[1]:
        raise UnsupportedModelError(f"{op.path}: codes {low}..{high} of a float32 input, expected fewer than 63 bits.")
    rounded = f"{function}(x[i], {_float32(2.0**-exponent)}, {_float32(float(least))}, {_float32(float(most))})"
    return f"""void {name}(const float *x, {ctype(y.storage)} *codes)
{{
    for (int32_t i = 0; i < {elements(y.shape)}; ++i) {{
        codes[i] = ({ctype(y.storage)}){clip}({rounded}, {literal(low)}, {literal(high)});
    }}
}}"""


def dequantize_function(name: str, op: Op, x: Value, source: Source) -> str:
    """``name(codes, float *out)``: code * 2^exponent / count * factor, rounded where the op says.

    Raises:
        UnsupportedModelError: a result beyond float32.
    """
    exponents = x.exponent if isinstance(x.exponent, tuple) else (x.exponent,)
    if max(-x.low, x.high, 1).bit_length() + max(exponents) > 127:
        raise UnsupportedModelError(f"{op.path}: codes {x.low}..{x.high} of exponent {max(exponents)} exceed float32.")
    size, count, factor = elements(x.shape), op.attributes.get("count"), op.attributes.get("factor")
    kind, number = ("float", _float32) if op.attributes["precision"] == "float32" else ("double", _float64)
    scale, tables = _float64(2.0 ** exponents[0]), []
    if len(set(exponents)) > 1:
        axis = int(x.axis or 0) % len(x.shape)
        inner, channels = elements(x.shape[axis + 1 :]), x.shape[axis]
        tables.append(_floats("double", "scales", [_float64(2.0**e) for e in exponents]))
        source.flash += 8 * len(exponents)
        scale = f"scales[i / {inner} % {channels}]"
    if kind == "float" and not tables and max(-x.low, x.high) <= 1 << 24 and exponents[0] >= -126:
        lines = [f"float v = (float)codes[i] * {_float32(2.0 ** exponents[0])};"]  # exact, as in double
    else:
        lines = [f"{kind} v = ({kind})((double)codes[i] * {scale});"]
    if "count" in op.constants:
        counts = np.broadcast_to(op.constants["count"], x.shape[1:]).ravel().tolist()
        tables.append(_floats(kind, "counts", [number(float(n)) for n in counts]))
        source.flash += (4 if kind == "float" else 8) * len(counts)
        lines.append(f"v = v / counts[i % {len(counts)}];")
    elif count is not None:
        lines.append(f"v = v / {number(float(count))};")
    if factor is not None:
        lines.append(f"v = v * {number(float(factor))};")
    lines.append("out[i] = v;" if kind == "float" else "out[i] = (float)v;")
    body = "\n".join(f"        {line}" for line in lines)
    head = "".join(f"    {table}\n" for table in tables)
    return f"""void {name}(const {ctype(x.storage)} *codes, float *out)
{{
{head}    for (int32_t i = 0; i < {size}; ++i) {{
{body}
    }}
}}"""


def pixel_loop(op: Op, y: Value, pixels: Any, codes: str, source: Source) -> str:
    """Statements that put the codes of ``pixels``, uint8 [H, W, C], at ``codes``, [C, H, W].

    Args:
        pixels: mean and std for each channel, of pixels in 0..1.

    Raises:
        ConfigError: the input is no image, or mean and std are not of its channels.
    """
    if len(y.shape) != 4 or y.shape[0] != 1:
        raise ConfigError(f"{op.path}: pixels= needs an input [N, C, H, W], got {y.shape}; leave pixels out.")
    _, channels, height, width = y.shape
    try:
        mean, std = (np.broadcast_to(np.float32(part), (channels,)) for part in pixels)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"pixels=: got {pixels!r}, expected (mean, std) with 1 or {channels} numbers each."
        ) from error
    a: Mapping[str, Any] = op.attributes
    table = pixel_table(mean, std, a["exponent"], a["rounding"], a["low"], a["high"])
    return f"""for (int32_t i = 0; i < {height * width}; ++i) {{
    for (int32_t c = 0; c < {channels}; ++c) {{
        {codes}[c * {height * width} + i] = {source.table(table.T, y.storage)}[c * 256 + nhwc[i * {channels} + c]];
    }}
}}"""


def _floats(kind: str, name: str, numbers: Sequence[str]) -> str:
    return f"static const {kind} {name}[{len(numbers)}] = {{{', '.join(numbers)}}};"


def _float64(number: float) -> str:
    return number.hex()


def _float32(number: float) -> str:
    """A number of float32 as C writes it, exactly.

    >>> _float32(0.1)
    '0x1.99999a0000000p-4f'
    """
    rounded = float(np.float32(number))
    if not math.isfinite(rounded):
        raise UnsupportedModelError(f"{number} is beyond float32; a network in C cannot multiply or divide by it.")
    return f"{rounded.hex()}f"
