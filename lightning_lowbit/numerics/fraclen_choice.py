"""How many of a number's bits are behind the point: read off what a tensor is like (F8Net sections 3.1 and 3.2).

A fraclen is learned in two steps, ``measure`` and ``choose``: the first gives sums, which micro-batches and processes
add up, the second reads the fraclen off them. Neither waits for the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.fraclen import largest_code, largest_fraclen
from lightning_lowbit.numerics.ste import eager_cpu, slices

__all__ = [
    "METRICS", "SELECTORS", "choose", "fraclen_by_metric", "fraclen_of", "measure", "metric_of", "quantization_errors",
]  # fmt: skip

METRICS: tuple[str, ...] = ("std", "mae", "rms")
SELECTORS: tuple[str, ...] = (*METRICS, "grid", "histogram")

# c of fraclen = floor(log2(c / metric)), by (metric, signed): where the best fraclen of a Gaussian changes.
_CONSTANTS = {
    ("std", True): 40.0,
    ("mae", True): 30.0,
    ("rms", True): 40.0,
    ("std", False): 70.0,
    ("mae", False): 30.0,
    ("rms", False): 50.0,
}
_CLOSED_FORM_BITS = 8

_DOUBLE_SLICE = 1 << 16  # elements per thread: as float64 they stay in the L2 cache
_GRID_SLICE = 1 << 16
_EXACT = 1 << 14  # up to here every value is quantized; more are binned: a bin's values spread evenly
_BIN_BITS = 8  # leading mantissa bits of a bin: 256 to an octave, at 8 bits none is wider than half a step
_OCTAVES_BELOW, _OCTAVES_ABOVE = 8, 6  # of bins, below the finest step and above the largest code of fraclen 0


@torch.no_grad()
def measure(
    x: Tensor, select: str, bits: int = 8, signed: bool = True, axis: int | None = None, unit: Tensor | None = None
) -> Tensor:
    """What ``choose`` needs to know of x (of x times ``unit``), as sums that add up over micro-batches and processes.

    With m = |x| signed, relu(x) unsigned, all float64:

        select       sums
        std          count, sum x, sum x^2       of x before it is rectified, unsigned too
        mae          count, 0, sum m
        rms          count, 0, sum m^2
        grid         count, then the summed squared error of m for every fraclen 0, 1, ... largest
        histogram    the same; of large tensors within a fraction of a percent, in one pass

    All are 0 where nothing can be learned: x is empty, zero, not finite (as m is), or has nothing positive for
    unsigned codes.

    Args:
        x: float tensor, any shape.
        select: one of SELECTORS.
        bits, signed: the codes.
        axis: std, mae and rms only: sums for each index of it.
        unit: a positive factor, 0-dim.
    Returns:
        float64 [K], or [C, K] along ``axis``.

    >>> measure(torch.tensor([-2.0, 1.0]), "rms").tolist(), measure(torch.tensor([-2.0, 1.0]), "rms", 8, False).tolist()
    ([2.0, 0.0, 5.0], [2.0, 0.0, 1.0])
    """
    _check(select)
    if axis is not None and select not in METRICS:
        raise ConfigError(f"measure: got axis={axis} with select={select!r}, expected one of {list(METRICS)}.")
    x, unit = x.detach(), None if unit is None else unit.detach()
    if torch.compiler.is_compiling():  # one call in the graph: its many passes over slices are not for a compiler
        result: Tensor = torch.ops.lightning_lowbit.fraclen_sums(x, select, bits, signed, axis, unit)
        return result
    return _sums(x, select, bits, signed, axis, unit)


def _sums(x: Tensor, select: str, bits: int, signed: bool, axis: int | None, unit: Tensor | None) -> Tensor:
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    x = x if unit is None or select in METRICS else x * unit.to(x.dtype)
    if axis is not None:
        x = x.movedim(axis, 0)
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    count = x.numel() if axis is None else x.shape[1]
    if x.numel() == 0:
        return x.new_zeros(*x.shape[: 0 if axis is None else 1], _width(select, bits, signed), dtype=torch.float64)
    if axis is not None:
        sums = _moments(x.to(torch.float64, copy=True), select, signed)
    elif select in METRICS:
        sums = _added([_moments(z, select, signed) for z, _ in _copies(x, _DOUBLE_SLICE, torch.float64)])
    elif select == "grid" or count <= _EXACT:
        signal, *sums = _added([_errors(z, spare, bits, signed) for z, spare in _copies(x, _GRID_SLICE, x.dtype)])
    else:
        signal, *sums = _binned_errors(x, bits, signed)
    if select in METRICS:
        rectified = select == "std" and not signed
        signal = sums[-1] if not rectified else _highest(x) if axis is None else x.amax(1)
    if unit is not None and select in METRICS:
        u = unit.to(torch.float64)
        sums = [sums[0] * u, sums[1] * (u if select == "mae" else u * u)]
    row = torch.stack([torch.full_like(sums[0], count), *sums], -1)
    learned = (signal > 0) & row.isfinite().all(-1)
    return torch.where(learned.unsqueeze(-1), row, 0.0)


def _width(select: str, bits: int, signed: bool) -> int:
    return 3 if select in METRICS else 2 + largest_fraclen(bits, signed)


_SCHEMA = "(Tensor x, str select, int bits, bool signed, int? axis, Tensor? unit) -> Tensor"
_operator = torch.library.custom_op("lightning_lowbit::fraclen_sums", _sums, mutates_args=(), schema=_SCHEMA)


@_operator.register_fake
def _shape(x: Tensor, select: str, bits: int, signed: bool, axis: int | None, unit: Tensor | None) -> Tensor:
    return x.new_empty(*(() if axis is None else (x.shape[axis],)), _width(select, bits, signed), dtype=torch.float64)


def choose(sums: Tensor, select: str, bits: int = 8, signed: bool = True) -> Tensor:
    """The fraclen that the (added up) sums of ``measure`` ask for; where they are all 0 the result says nothing.

    By the least error (the smallest fraclen of equal ones), or by the closed form of :func:`fraclen_by_metric`.
    A constant has no spread: fraclens of ``std`` are also kept from clipping the rms to less than half.

    Args:
        sums: float64 [..., K].
        select, bits, signed: as measured.
    Returns:
        int64 [...].

    >>> x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    >>> [int(choose(measure(x, select), select)) for select in SELECTORS]
    [5, 5, 5, 5, 5]
    """
    _check(select)
    if select not in METRICS:
        return sums[..., 1:].argmin(-1)
    if bits != _CLOSED_FORM_BITS:
        raise ConfigError(
            f"choose: got bits={bits} with select={select!r}, expected {_CLOSED_FORM_BITS}: the closed forms are "
            f"fitted to {_CLOSED_FORM_BITS} bits; select='grid' serves any number."
        )
    fraclen = fraclen_by_metric(metric_of(sums, select), select, signed)
    if select == "std":
        rms = (sums[..., 2] / sums[..., 0].clamp(min=1)).sqrt()
        fraclen = torch.minimum(fraclen, _largest_below(rms, 2 * largest_code(bits, signed), signed))
    return fraclen


def fraclen_of(x: Tensor, select: str, bits: int = 8, signed: bool = True, axis: int | None = None) -> Tensor:
    """The fraclen for x alone, int64 0-dim, or [C] along ``axis``; 0 or the largest where nothing can be learned."""
    return choose(measure(x, select, bits, signed, axis), select, bits, signed)


def metric_of(sums: Tensor, metric: str) -> Tensor:
    """Unbiased std, mean magnitude or root mean square from the sums of ``measure``; float64 [...].

    >>> sums = measure(torch.tensor([1.0, 3.0]), "std") + measure(torch.tensor([5.0, 7.0]), "std")
    >>> round(float(metric_of(sums, "std")) ** 2, 9)  # (9 + 1 + 1 + 9) / 3
    6.666666667
    """
    count = sums[..., 0].clamp(min=1)
    if metric == "std":
        spread = sums[..., 2] - sums[..., 1].square() / count
        return (spread.clamp(min=0) / (count - 1).clamp(min=1)).sqrt()
    mean = sums[..., 2] / count
    return mean if metric == "mae" else mean.sqrt()


def fraclen_by_metric(value: Tensor, metric: str, signed: bool) -> Tensor:
    """clip(floor(log2(c / value)), 0, 8 - signed): the best fraclen of a Gaussian of that statistic, at 8 bits.

        metric    c signed    c unsigned    of
        std       40          70            the values before they are rectified
        mae       30          30            (unsigned) rectified values
        rms       40          50            (unsigned) rectified values

    By comparisons of value 2^k with c, which are exact: a float logarithm errs at the powers of two.

    >>> fraclen_by_metric(torch.tensor([0.3125, 0.31251, 20.0, 20.01, 0.0]), "std", True).tolist()
    [7, 6, 1, 0, 7]
    """
    return _largest_below(value, _CONSTANTS[metric, signed], signed)


def _largest_below(value: Tensor, bound: float, signed: bool) -> Tensor:
    """The largest fraclen f of 8 bits for which value 2^f <= bound, or 0."""
    k = torch.arange(1, largest_fraclen(_CLOSED_FORM_BITS, signed) + 1, device=value.device)
    return (value.unsqueeze(-1) * (1 << k) <= bound).sum(-1)


def quantization_errors(x: Tensor, bits: int = 8, signed: bool = True) -> Tensor:
    """Root mean square of m - fix_quant(m) for every fraclen from 0 on, float64 [fraclens]; m = x, relu(x) unsigned.

    An unsigned format is judged by what it can hold, not by the negative part that it drops.
    """
    z = x.detach().clone()
    return (torch.stack(_errors(z, torch.empty_like(z), bits, signed)[1:]) / x.numel()).sqrt()


def _check(select: str) -> None:
    if select not in SELECTORS:
        raise ConfigError(f"fraclen: got select={select!r}, expected one of {list(SELECTORS)}.")


def _parts(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """What fits the caches one after the other; elsewhere than on an eager CPU one piece, for one kernel."""
    return slices(x, size * torch.get_num_threads()) if eager_cpu(x) else (x,)


def _copies(x: Tensor, size: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """x part by part, each a flat copy to work in and a spare of its size; the next part takes the same room."""
    parts = _parts(x, size)
    room = torch.empty(2, parts[0].numel(), dtype=dtype, device=x.device)  # fresh memory costs as much as a sum
    for part in parts:
        z, spare = room[:, : part.numel()]
        yield z.copy_(part.reshape(-1)), spare


def _magnitude_(z: Tensor, signed: bool) -> Tensor:
    """The part of z that has codes, in place; signed codes are symmetric, so that the sign does not matter."""
    return z.abs_() if signed else z.clamp_(min=0)


def _added(parts: list[list[Tensor]]) -> list[Tensor]:
    """The sum over the parts, of each of their 0-dim tensors; float64."""
    rows = torch.stack([number for part in parts for number in part]).to(torch.float64)
    return list(rows.reshape(len(parts), -1).sum(0).unbind())


def _moments(z: Tensor, select: str, signed: bool) -> list[Tensor]:
    """Over the last axis of float64 values, which it overwrites: sum x (std) or 0, and sum x^2 or sum m."""
    if select == "std":
        return [z.sum(-1), z.square_().sum(-1)]
    if select == "mae":
        moment = _magnitude_(z, signed).sum(-1)
    else:
        moment = (z if signed else z.clamp_(min=0)).square_().sum(-1)
    return [torch.zeros_like(moment), moment]


def _highest(x: Tensor) -> Tensor:
    """max x, 0-dim; of several parts the first maximum above 0 will do."""
    *parts, last = _parts(x, _DOUBLE_SLICE)
    for part in parts:  # only on an eager CPU, where a comparison waits for nothing
        if (high := part.amax()) > 0:
            return high
    return last.amax()


def _errors(z: Tensor, code: Tensor, bits: int, signed: bool) -> list[Tensor]:
    """Sum m^2, then the summed squared error of m for every fraclen: 0-dim float64; overwrites both arguments.

    In codes, v = m 2^f, one doubling after the other: exact, as are the factors 4^-f.
    """
    most = largest_code(bits, signed)
    v = _magnitude_(z, signed)
    norms = [torch.linalg.vector_norm(v)]
    for f in range(largest_fraclen(bits, signed) + 1):
        torch.round(v, out=code).clamp_(max=most).sub_(v)
        norms.append(torch.linalg.vector_norm(code) * 2.0**-f)
        v.mul_(2)
    return list(torch.stack(norms).to(torch.float64).square().unbind())


def _binned_errors(x: Tensor, bits: int, signed: bool) -> list[Tensor]:
    """The same from how many values lie between floats of ``_BIN_BITS`` mantissa bits."""
    build = _bin_errors if torch.compiler.is_compiling() else _cached_bin_errors
    table, first = build(bits, signed, x.device)
    bins = table.shape[1]
    counts, norms = torch.zeros(bins, dtype=torch.int64, device=x.device), []
    eager = eager_cpu(x)
    for z, _ in _copies(x, _GRID_SLICE, torch.float32):
        m = _magnitude_(z, signed)
        norms.append(torch.linalg.vector_norm(m))  # not finite, or 0, where m is
        index = m.view(torch.int32).bitwise_right_shift_(23 - _BIN_BITS).sub_(first).clamp_(0, bins - 1)
        if eager:
            counts += torch.bincount(index, minlength=bins)
        else:  # bincount would read its range on the host
            counts.index_add_(0, index, torch.ones_like(index, dtype=torch.int64))
    signal = torch.stack(norms).sum().to(torch.float64)
    errors = torch.where(signal.isfinite(), (table * counts).sum(1), signal)
    return [signal, *errors.unbind()]


def _bin_errors(bits: int, signed: bool, device: torch.device) -> tuple[Tensor, int]:
    """Mean squared error of each bin for every fraclen, float64 [fraclens, bins], and the first bin's bit pattern.

    A bin holds the magnitudes that share sign, exponent and leading mantissa bits, thought to spread evenly:
    with E(v) = integral of (u - round(u))^2 from 0 to v, the mean from a to b is (E(b) - E(a)) / (b - a). The
    first bin also holds all that is smaller, the zeros above all: no error.
    """
    most, points = largest_code(bits, signed), largest_fraclen(bits, signed)
    low, high = -(points + _OCTAVES_BELOW), bits + _OCTAVES_ABOVE
    first = (127 + low) << _BIN_BITS
    patterns = torch.arange(first, (127 + high) << _BIN_BITS, dtype=torch.int32, device=device)
    ends = [(patterns + i << (23 - _BIN_BITS)).view(torch.float32).double() for i in (0, 1)]
    rows = []
    for f in range(points + 1):
        a, b = (end * 2.0**f for end in ends)
        rows.append((_integral(b, most) - _integral(a, most)) / (b - a) * 4.0**-f)
    table = torch.stack(rows)
    table[:, 0] = 0
    return table, first


_cached_bin_errors = functools.cache(_bin_errors)  # torch.compile objects to caches


def _integral(v: Tensor, most: int) -> Tensor:
    """Of the squared error of codes up to ``most``: 1/12 for every code passed, (u^3)/3 within one and beyond."""
    code = torch.round(v).clamp(max=most)
    return code / 12 + (v - code) ** 3 / 3
