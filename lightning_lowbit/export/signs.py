"""Signs and codes of a program's floats, as integer operations wherever these floats follow from an integer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_lowbit.export.chains import Chain, again, chain_of
from lightning_lowbit.export.runtime import quantize
from lightning_lowbit.numerics.affine import sign_thresholds

if TYPE_CHECKING:
    from lightning_lowbit.export.builder import Held, ProgramBuilder

__all__ = ["line", "signs"]

Array = np.ndarray[Any, Any]
_BITS, _SHIFT = 58, 40  # of a line's products, and of its slope behind the point
_MOST_CODES = 1 << 13
_NONE = 1 << 62


def signs(build: ProgramBuilder, x: Held) -> Held:
    """-1 where a value is negative, else +1.

    Of floats that follow from an integer it is a threshold on that, found with their own functions; of other floats
    the floor, cut to -1 and 0, says it.
    """
    if x.name not in build.signs:
        build.signs[x.name] = (x.is_float and _threshold(build, x)) or _compared(build, x)
    return build.signs[x.name]


def _compared(build: ProgramBuilder, x: Held) -> Held:
    if x.is_float:
        attributes = {"exponent": 0, "rounding": "floor", "low": -1, "high": 0}
        x = build.emit("quantize", [x], x.shape, attributes, low=-1, high=0)
    zeros = torch.zeros(x.shape[1], dtype=torch.int32)
    return build.threshold(replace(x, count=None), zeros, zeros.bool())  # a mean has the sign of its sum


def _threshold(build: ProgramBuilder, x: Held) -> Held | None:
    chain = chain_of(build, x)
    if chain is None:
        return None

    def positive(sums: Tensor) -> Tensor:
        return torch.from_numpy(~(chain.results(sums.numpy()[:, None])[:, 0] < 0))

    low, flip = sign_thresholds(positive, chain.most, chain.channels)
    held = again(build, chain.before, replace(x, value=chain.value))
    return again(build, chain.behind, build.threshold(held, low, flip, axis=chain.axis))


def line(build: ProgramBuilder, x: Held, exponent: int, rounding: str, low: int, high: int) -> Held | None:
    """clip(round(x / 2^exponent), low, high) of floats that follow from an integer n: clip(round((A n + B) / 2^s)).

    A and B of each channel are such that every n has the code that the float functions give it. None where there are
    none: the functions are no line.
    """
    chain = chain_of(build, x) if high - low < _MOST_CODES else None
    found = None if chain is None else _line(chain, exponent, rounding, low, high)
    if chain is None or found is None:
        return None
    slopes, offsets, shift, low, high = found
    held = again(build, chain.before, replace(x, value=chain.value))
    carried = build.carried.pop(held.name, None)  # its rounding is in the line
    held = build.move(held, lambda t: t.transpose(1, chain.axis))
    if bool((slopes != 1).any()) or bool(offsets.any()):  # more than a shift
        one = torch.ones(chain.channels, dtype=torch.int64)
        constants = {"mean": 0 * one, "s": one, "gamma": slopes, "beta": offsets}
        names = ("fraction_in", "mean_fraction", "s_fraction", "xhat_fraction", "out_fraction", "product_fraction")
        held = build.normalize(held, {**dict.fromkeys(names, 0), "limit": None}, constants, shift - exponent)
    if carried is not None:
        build.carried[chain.value.name] = carried
    ends = {"shift": shift, "axis": None, "rounding": rounding, "low": low, "high": high}
    held = build.emit("requantize", [held], held.shape, ends, low=low, high=high, exponent=exponent)
    return again(build, chain.behind, build.move(held, lambda t: t.transpose(1, chain.axis)))


def _line(
    chain: Chain, exponent: int, rounding: str, low: int, high: int
) -> tuple[Tensor, Tensor, int, int, int] | None:
    """A, B, s, and the ends of the codes that there are; None where no line has them all."""

    def coded(sums: Array) -> Array:
        return quantize(chain.results(sums), exponent, rounding, low, high)

    k = chain.most
    ends = coded(np.full((chain.channels, 2), k, np.int64) * [-1, 1])
    turn = np.where(ends[:, 1] < ends[:, 0], -1, 1)[:, None]  # so that all rise
    wanted = np.arange(ends.min() + 1, ends.max() + 1)
    slope = np.ldexp(np.abs(chain.slopes()), -exponent)  # in codes
    shift = min(_SHIFT, _BITS - math.frexp(max(float(slope.max()) * k, *np.abs(ends).reshape(-1), 1.0))[1])
    if shift < 1:
        return None
    first = _first(lambda sums: coded(turn * sums) >= wanted, k, (chain.channels, len(wanted)))
    a, unit = (
        np.rint(np.ldexp(slope, shift)).astype(np.int64)[:, None],
        _least(wanted.astype(np.int64), shift, rounding),
    )
    # From the first n on that has a code, A n + B reaches it; one before, it does not.
    least = np.where(first <= k, unit - a * first, -_NONE).max(1, initial=-_NONE)
    most = np.where(first > -k, unit - a * (first - 1), _NONE).min(1, initial=_NONE)
    if bool((least >= most).any()):
        return None
    offsets = np.clip(0, least, most - 1)
    twos = _common_twos(np.concatenate([a[:, 0], offsets]), shift)  # a shift alone needs no wide products
    slopes, offsets = turn[:, 0] * (a[:, 0] >> twos), offsets >> twos
    return torch.from_numpy(slopes), torch.from_numpy(offsets), shift - twos, int(ends.min()), int(ends.max())


def _common_twos(numbers: Array, most: int) -> int:
    """How often 2 divides all of the numbers, at most so often.

    >>> _common_twos(np.array([8, 0, -12]), 5), _common_twos(np.array([0]), 5)
    (2, 5)
    """
    bits = int(np.bitwise_or.reduce(np.abs(numbers)))
    return most if bits == 0 else min(most, (bits & -bits).bit_length() - 1)


def _least(codes: Array, shift: int, rounding: str) -> Array:
    """The least integers n with round(n / 2^shift) >= code.

    >>> {kind: _least(np.array([-1, 0, 1, 2]), 2, kind).tolist() for kind in ("half_even", "half_away", "truncate")}
    {'half_even': [-5, -2, 3, 6], 'half_away': [-5, -1, 2, 6], 'truncate': [-7, -3, 4, 8]}
    """
    unit, half = codes << shift, 1 << (shift - 1)
    return {
        "floor": unit, "truncate": np.where(codes > 0, unit, unit - 2 * half + 1), "half_up": unit - half,
        "half_even": unit - half + (codes & 1), "half_away": unit - half + (codes <= 0),
    }[rounding]  # fmt: skip


def _first(reached: Callable[[Array], Array], k: int, shape: tuple[int, ...]) -> Array:
    """The least n in [-k, k] from which on ``reached`` is true, k + 1 where there is none."""
    low, high = np.full(shape, -k, np.int64), np.full(shape, k + 1, np.int64)
    while bool((low < high).any()):
        middle = (low + high) // 2
        up = reached(np.minimum(middle, k))
        low, high = np.where((low < high) & ~up, middle + 1, low), np.where((low < high) & up, middle, high)
    return low
