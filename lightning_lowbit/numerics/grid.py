"""A number format as one printable value: which codes exist and what a code is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.exponent import EXPONENT_MAX, EXPONENT_MIN

__all__ = ["Grid"]

_MAX_BITS = 53
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Grid:
    """Codes qmin..qmax; a code is worth (code - zero_point) * step.

    Args:
        bits: width of a code; signed 2..53, unsigned 1..53 (float64 counts no further).
        exponent: log2 of the step, one integer or, with ``axis``, one per channel.
        scale: the step itself where it is not a power of two. Give exponent or scale; neither means that the
            position is not known yet.
        zero_point: the code that is worth 0.
        signed: two's complement range.
        narrow: leave out the most negative code of a signed range (±127). Unsigned ranges have no such code.
        axis: the channel axis that per-channel exponents or scales follow.
        binary: the codes are -1 and +1 and nothing between; bits is 1.

    Raises:
        ConfigError: a field out of range, or fields that contradict each other.

    >>> print(Grid(8, -5)); print(Grid(8, -5, narrow=True)); print(Grid(4, -2, signed=False))
    int8·2^-5 [-4, 3.97]
    int8·2^-5 [-3.97, 3.97]
    uint4·2^-2 [0, 3.75]
    >>> print(Grid(8, (-7, -3), axis=0)); print(Grid(16))
    int8·2^(-7..-3)@0 [-16, 15.9]
    int16·?
    >>> print(Grid(8, scale=0.1, zero_point=128, signed=False))
    uint8·0.1 (zero 128) [-12.8, 12.7]
    >>> print(Grid(1, 0, binary=True))
    ±1 [-1, 1]
    """

    bits: int
    exponent: int | tuple[int, ...] | None = None
    scale: float | tuple[float, ...] | None = None
    zero_point: int = 0
    signed: bool = True
    narrow: bool = False
    axis: int | None = None
    binary: bool = False

    def __post_init__(self) -> None:
        least = 2 if self.signed and not self.binary else 1
        _require(not self.binary or self.bits == 1, f"bits={self.bits!r} of a binary grid, expected 1")
        _require(
            _is_int(self.bits) and least <= self.bits <= _MAX_BITS,
            f"bits={self.bits!r}, expected an integer in {least}..{_MAX_BITS} for "
            f"{'signed' if self.signed else 'unsigned'} codes",
        )
        _require(self.exponent is None or self.scale is None, "both exponent and scale, expected one of them")
        per_channel = isinstance(self.exponent, tuple) or isinstance(self.scale, tuple)
        _require(
            per_channel == (self.axis is not None),
            f"axis={self.axis} with {'per-channel' if per_channel else 'per-tensor'} steps; "
            "per-channel steps (a tuple) and axis go together",
        )
        for e in _as_tuple(self.exponent):
            _require(
                _is_int(e) and EXPONENT_MIN <= e <= EXPONENT_MAX,
                f"exponent={e!r}, expected an integer in {EXPONENT_MIN}..{EXPONENT_MAX}; use clamp_exponent",
            )
        for s in _as_tuple(self.scale):
            _require(0 < s < float("inf"), f"scale={s!r}, expected a positive finite number")
        _require(
            _is_int(self.zero_point) and self.qmin <= self.zero_point <= self.qmax,
            f"zero_point={self.zero_point!r}, expected a code in {self.qmin}..{self.qmax} so that 0 is exact",
        )

    @property
    def qmin(self) -> int:
        """Least code."""
        if self.binary:
            return -1
        return -(1 << (self.bits - 1)) + int(self.narrow) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Greatest code."""
        if self.binary:
            return 1
        return (1 << (self.bits - int(self.signed))) - 1

    @property
    def steps(self) -> tuple[float, ...]:
        """The worth of one code, one entry per channel (one in all without ``axis``)."""
        if self.exponent is not None:
            return tuple(2.0**e for e in _as_tuple(self.exponent))
        if self.scale is not None:
            return tuple(float(s) for s in _as_tuple(self.scale))
        raise ConfigError(f"Grid {self}: no exponent and no scale yet, so no step; calibrate first.")

    @property
    def step(self) -> float:
        """The worth of one code; ConfigError for per-channel grids, which have ``steps``."""
        steps = self.steps
        if self.axis is not None:
            raise ConfigError(f"Grid {self}: {len(steps)} steps, not one; use Grid.steps.")
        return steps[0]

    @property
    def fraclen(self) -> int:
        """Fraction bits, -exponent; ConfigError where there is no single exponent."""
        if not isinstance(self.exponent, int):
            raise ConfigError(f"Grid {self}: fraclen needs one exponent, got exponent={self.exponent}.")
        return -self.exponent

    @property
    def low(self) -> float:
        """Least value (over all channels)."""
        return (self.qmin - self.zero_point) * max(self.steps)

    @property
    def high(self) -> float:
        """Greatest value (over all channels)."""
        return (self.qmax - self.zero_point) * max(self.steps)

    def contains(self, x: Tensor) -> bool:
        """Whether every value of x is the worth of a code; no tolerance, and NaN and inf are outside.

        With an exponent the test is exact in float64. With a scale the worth of a code is what a carrier of
        x's dtype holds: code times scale, rounded once to that dtype.

        >>> grid = Grid(8, -5)
        >>> [grid.contains(torch.tensor(v)) for v in (-4.0, 3.96875, 4.0, 0.01, float("nan"))]
        [True, True, False, False, False]
        """
        steps = torch.tensor(self.steps, dtype=torch.float64, device=x.device)
        if self.scale is not None and x.dtype.is_floating_point:
            steps = steps.to(x.dtype).to(torch.float64)  # the scale as the carrier's dtype multiplies it
        if self.axis is not None:
            if x.shape[self.axis] != len(self.steps):
                raise ConfigError(
                    f"Grid {self}: {len(self.steps)} channels along axis {self.axis}, got a tensor of shape "
                    f"{tuple(x.shape)}."
                )
            shape = [1] * x.dim()
            shape[self.axis] = -1
            steps = steps.reshape(shape)
        value = x.detach().to(torch.float64)
        code = torch.round(value / steps)
        worth = code * steps
        if self.scale is not None and x.dtype.is_floating_point:
            worth = worth.to(x.dtype).to(torch.float64)
        code = code + self.zero_point
        exists = (code >= self.qmin) & (code <= self.qmax)
        if self.binary:
            exists &= code != 0
        return bool(((worth == value) & exists).all())

    def __str__(self) -> str:
        if self.binary and self.exponent == 0:
            return "±1 [-1, 1]"
        name = "±1" if self.binary else f"{'int' if self.signed else 'uint'}{self.bits}"
        if self.exponent is not None:
            step = "2^" + _span(_as_tuple(self.exponent), str)
        elif self.scale is not None:
            step = _span(_as_tuple(self.scale), "{:.3g}".format)
        else:
            return f"{name}·?"
        axis = "" if self.axis is None else f"@{self.axis}"
        zero = f" (zero {self.zero_point})" if self.zero_point else ""
        return f"{name}·{step}{axis}{zero} [{self.low:.3g}, {self.high:.3g}]"


def _span(values: tuple[_Number, ...], show: Callable[[_Number], str]) -> str:
    if len(values) == 1:
        return show(values[0])
    return f"({show(min(values))}..{show(max(values))})"


def _as_tuple(value: _Number | tuple[_Number, ...] | None) -> tuple[_Number, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition: bool, got: str) -> None:
    if not condition:
        raise ConfigError(f"Grid: got {got}.")
