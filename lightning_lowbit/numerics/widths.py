"""How wide a fixed-point tensor is, and how wide its sums are (WAGEUBN).

The k bits of arXiv:1909.02384 fix a unit, 2^-(k-1), not a width. A Format says both, from the range of the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.exponent import ceil_log2, pow2
from lightning_lowbit.numerics.fraclen import largest_code, largest_fraclen
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.guards import accumulator_bound
from lightning_lowbit.numerics.observers import Histogram, RangeObserver, RangeStats
from lightning_lowbit.numerics.ranges import (
    mse_by_exponent,
    threshold_klj,
    threshold_mse_exponent,
    threshold_percentile,
)

__all__ = [
    "ACCUMULATOR_BITS",
    "CRITERIA",
    "POLICIES",
    "Criterion",
    "Format",
    "Policy",
    "accumulator_bits",
    "bits_of_sum",
    "check_bits",
    "choose_format",
    "fixed_unit",
    "fixed_width",
    "integer_bits",
    "integer_bits_of_max",
]

Criterion = Literal["max", "percentile", "mse", "kl_j"]
CRITERIA: tuple[Criterion, ...] = ("max", "percentile", "mse", "kl_j")
Policy = Literal["fixed_unit", "fixed_width"]
POLICIES: tuple[Policy, ...] = ("fixed_unit", "fixed_width")

ACCUMULATOR_BITS = 31
"""Sums that need more are reported: an int32 has no bit left for a bias or a second sum."""

_MSE_CANDIDATES = 5


@dataclass(frozen=True)
class Format:
    """A fixed-point format: fraction = total - signed - integer; a code is worth code * 2^-fraction.

    Signed codes are +-(2^(total-1) - 1), unsigned ones 0..2^total - 1. Given in full it is the policy "explicit".

    Args:
        total: bits of a code, the sign among them; signed 2..53, unsigned 1..53.
        integer: bits before the point; negative where the largest value is below 1/2.
        signed: whether one bit is the sign.

    >>> print(Format(8, 1)); print(Format(8, 0, signed=False)); print(fixed_unit(8, 3, signed=False))
    int8·2^-6 [-1.98, 1.98] 1 integer, 6 fraction bits
    uint8·2^-8 [0, 0.996] 0 integer, 8 fraction bits
    uint10·2^-7 [0, 7.99] 3 integer, 7 fraction bits
    """

    total: int
    integer: int
    signed: bool = True

    def __post_init__(self) -> None:
        try:
            self.grid()
        except (ConfigError, TypeError) as error:
            raise ConfigError(
                f"Format: got total={self.total!r}, integer={self.integer!r}, signed={self.signed!r}: {error}"
            ) from error

    @property
    def fraction(self) -> int:
        """Bits behind the point; negative where the step is above 1."""
        return self.total - int(self.signed) - self.integer

    @property
    def step(self) -> float:
        """The worth of one code, 2^-fraction."""
        return 2.0**-self.fraction

    @property
    def limits(self) -> tuple[int, int]:
        """Least and greatest code.

        >>> Format(8, 0).limits, Format(8, 0, signed=False).limits
        ((-127, 127), (0, 255))
        """
        most = largest_code(self.total, self.signed)
        return (-most if self.signed else 0), most

    def grid(self) -> Grid:
        """The same as the value that layers, export and reports exchange."""
        return Grid(self.total, -self.fraction, signed=self.signed, narrow=self.signed)

    def __str__(self) -> str:
        return f"{self.grid()} {self.integer} integer, {self.fraction} fraction bits"


def fixed_unit(k: int, integer: int, signed: bool = True) -> Format:
    """The publication's unit 2^-(k-1); the width follows from the range: k + integer, one less unsigned.

    >>> fixed_unit(8, 3).total, fixed_unit(8, 3, signed=False).total, fixed_unit(8, 0).fraction
    (11, 10, 7)
    """
    return Format(k - 1 + integer + int(signed), integer, signed)


def fixed_width(k: int, integer: int, signed: bool = True) -> Format:
    """k bits in all; the unit follows from the range: fraction = k - signed - integer.

    >>> fixed_width(8, 3).fraction, fixed_width(8, 3, signed=False).fraction
    (4, 5)
    """
    return Format(k, integer, signed)


def integer_bits_of_max(reach: Tensor, bits: int, signed: bool = True, fraction: int | None = None) -> Tensor:
    """Fewest integer bits i with which no value up to ``reach`` is clipped; waits for no device.

    i = ceil(log2 reach), one more where round(reach * 2^f) > 2^(f+i) - 1; f = bits - signed - i, or ``fraction``.

        reach            0    0.06   0.99    0.998   1    2.85
        signed 8 bits    0    -4     0       1       1    2
        unsigned 8 bits  0    -4     0       0       1    2
        fraction 7       0    -3     0       1       1    2

    Args:
        reach: largest magnitudes, any shape.
        bits: of a code; not used with ``fraction``.
        signed: whether one bit is the sign.
        fraction: a fixed unit 2^-fraction. At least one bit of magnitude is then left: i >= 1 - fraction.
    Returns:
        int32, shape of reach; 128 or more where it is not finite.

    >>> reach = torch.tensor([0, 0.06, 0.99, 0.998, 1, 2.85])
    >>> for row in ((8, True), (8, False), (8, True, 7)): print(integer_bits_of_max(reach, *row).tolist())
    [0, -4, 0, 1, 1, 2]
    [0, -4, 0, 0, 1, 2]
    [0, -3, 0, 1, 1, 2]
    """
    check_bits(bits, signed)
    i = ceil_log2(reach)
    if fraction is None:
        f = largest_fraclen(bits, signed) - i
    else:
        i = i.clamp(min=1 - fraction)
        f = torch.full_like(i, fraction)
    code = torch.round(reach.detach().to(torch.float64) * pow2(f, torch.float64))
    more = code >= pow2(f + i, torch.float64)  # whole numbers: as > 2^(f+i) - 1, and exact above 2^53
    return torch.where(reach == 0, 0, i + more.to(torch.int32))


def integer_bits(
    data: Tensor | RangeStats | Histogram | RangeObserver,
    criterion: Criterion = "max",
    bits: int = 8,
    signed: bool = True,
    percent: float = 99.99,
    fraction: int | None = None,
) -> int:
    """How many integer bits a tensor gets, by a criterion.

        max         no value is clipped
        percentile  nor is any below the value under which ``percent`` per cent of the magnitudes lie
        mse         least squared error among five, from that of max downward; the largest among equals
        kl_j        nor is any below the threshold of least J divergence

    With the unit fixed, clipping more gains no resolution: mse and kl_j are then max.

    Args:
        data: a tensor (exact), or what was observed of one. Statistics know the maximum only; of a histogram, the
            error is within a few per cent. Of unsigned tensors only x >= 0 counts, as in the observers.
        criterion: one of CRITERIA.
        bits, signed, fraction: as of :func:`integer_bits_of_max`.
        percent: in (0, 100].
    Returns:
        The integer bits; 0 for a zero or empty tensor.

    >>> x = torch.tensor([0.1] * 9999 + [8.0])
    >>> [integer_bits(x, c, 4) for c in CRITERIA], integer_bits(x, "percentile", 4, percent=99.0)
    ([4, -3, 0, 0], -3)
    """
    check_bits(bits, signed)
    if criterion not in CRITERIA:
        raise ConfigError(f"integer_bits: got criterion={criterion!r}, expected one of {list(CRITERIA)}.")
    if fraction is not None and criterion in ("mse", "kl_j"):
        criterion = "max"
    if criterion == "max":
        return int(integer_bits_of_max(_reach(data, signed), bits, signed, fraction))
    if criterion == "mse":
        return _least_error(data, bits, signed)
    histogram = _histogram(data, signed)
    if criterion == "percentile":
        reach = threshold_percentile(histogram, percent, signed)
    else:
        reach = threshold_klj(histogram.magnitudes(signed), histogram.bin_width, bits, signed)
    return int(integer_bits_of_max(reach, bits, signed, fraction))


def choose_format(
    data: Tensor | RangeStats | Histogram | RangeObserver,
    policy: Policy = "fixed_width",
    k: int = 8,
    signed: bool = True,
    criterion: Criterion = "max",
    percent: float = 99.99,
) -> Format:
    """The format that a policy gives a tensor.

    Args:
        policy: one of POLICIES.
        k: the publication's bits: the width, or one more than the fraction bits.
        data, signed, criterion, percent: as of :func:`integer_bits`.

    >>> x = torch.tensor([0.0, 4.2])
    >>> for policy in POLICIES: print(choose_format(x, policy, 8, signed=False))
    uint10·2^-7 [0, 7.99] 3 integer, 7 fraction bits
    uint8·2^-5 [0, 7.97] 3 integer, 5 fraction bits
    """
    if policy == "fixed_width":
        return fixed_width(k, integer_bits(data, criterion, k, signed, percent), signed)
    if policy == "fixed_unit":
        return fixed_unit(k, integer_bits(data, criterion, k, signed, percent, fraction=k - 1), signed)
    raise ConfigError(f"choose_format: got policy={policy!r}, expected one of {list(POLICIES)}.")


def _least_error(data: Tensor | RangeStats | Histogram | RangeObserver, bits: int, signed: bool) -> int:
    first = integer_bits_of_max(_reach(data, signed), bits, signed)
    # Not exponent_candidates: it stops at 2^-24, and a small tensor has a small unit here.
    candidates = first - torch.arange(_MSE_CANDIDATES, dtype=torch.int32, device=first.device)
    low, high = fixed_width(bits, 0, signed).limits
    source = data if isinstance(data, Tensor) else _histogram(data, signed)
    errors = mse_by_exponent(source, candidates, low, high, largest_fraclen(bits, signed))
    chosen = threshold_mse_exponent(candidates, errors)
    return int(first) if chosen is None else chosen


def _reach(data: Tensor | RangeStats | Histogram | RangeObserver, signed: bool) -> Tensor:
    if isinstance(data, RangeObserver):
        data = data.stats
    if isinstance(data, Histogram):
        return torch.where(data.magnitudes(signed).sum() > 0, data.high, 0.0)
    if isinstance(data, Tensor):
        stats = RangeStats()
        stats.observe(data)
        data = stats
    return data.abs_max(signed)


def _histogram(data: Tensor | RangeStats | Histogram | RangeObserver, signed: bool) -> Histogram:
    if isinstance(data, RangeObserver) and data.histogram is not None:
        data = data.histogram
    if isinstance(data, Tensor):
        histogram = Histogram.empty(_reach(data, signed), max_values=max(1, data.numel()))
        histogram.observe(data)
        return histogram
    if not isinstance(data, Histogram):
        raise ConfigError(
            f"integer_bits: got {type(data).__name__} without a histogram, which every criterion but 'max' needs; "
            "observe the data a second time after RangeObserver.second_pass()."
        )
    return data


def check_bits(bits: int, signed: bool) -> None:
    """ConfigError where no bit of magnitude is left."""
    if bits < 1 + int(signed):
        raise ConfigError(f"integer bits: got bits={bits}, expected at least {1 + int(signed)} (signed={signed}).")


def accumulator_bits(bits_a: int, bits_w: int, fan_in: int) -> int:
    """Width of a sum of ``fan_in`` products that holds whatever the codes are: bits_a + bits_w + ceil(log2 fan_in).

    >>> accumulator_bits(8, 8, 1), accumulator_bits(8, 8, 576), accumulator_bits(8, 8, 2**15) > ACCUMULATOR_BITS
    (16, 26, False)
    """
    if fan_in < 1:
        raise ConfigError(f"accumulator_bits: got fan_in={fan_in}, expected at least 1.")
    return bits_a + bits_w + (fan_in - 1).bit_length()


def bits_of_sum(weight_int: Tensor, x_max: float | Tensor, bias_int: Tensor | None = None, out_axis: int = 0) -> int:
    """The same measured: the width, sign included, that the sums with these very weights need.

    Args:
        weight_int, x_max, bias_int, out_axis: as of :func:`~lightning_lowbit.numerics.guards.accumulator_bound`.

    >>> bits_of_sum(torch.tensor([[1, -2], [3, 4]]), 127), bits_of_sum(torch.zeros(1, 3), 255)
    (11, 1)
    """
    bound = accumulator_bound(weight_int, x_max, bias_int, out_axis)
    if not math.isfinite(bound):
        raise ConfigError(f"bits_of_sum: got a bound of {bound}, expected finite weights, inputs and biases.")
    return int(bound).bit_length() + 1
