"""Streaming statistics and histograms of what passes a site, for calibration in two passes.

The first pass learns count, moments and extremes, the second a histogram over [0, max]. The state stays on
the device of the data, is reduced over ranks by plain SUM and MAX, and draws no random number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_lowbit.errors import InvariantError

__all__ = ["BINS", "AllReduce", "Histogram", "RangeObserver", "RangeStats", "finite_values"]

AllReduce = Callable[[Tensor, str], Tensor]
"""Combine a tensor over ranks: (tensor, "sum" or "max") -> tensor of the same shape."""

BINS = 2048
MAX_VALUES = 2**18
_POINTS = 8


def finite_values(x: Tensor) -> tuple[Tensor, int]:
    """The finite elements of x as a flat float tensor, and how many are not."""
    x = x.detach().reshape(-1)
    if x.dtype not in (torch.float32, torch.float64):
        x = x.to(torch.float32)
    keep = torch.isfinite(x)
    bad = x.numel() - int(keep.sum())
    return (x[keep] if bad else x), bad


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@dataclass
class RangeStats:
    """Count, moments and extremes of a stream of tensors; 0-dim float64 tensors on the device of the data.

    NaN and inf enter ``nonfinite`` and nothing else.

    >>> stats = RangeStats()
    >>> stats.observe(torch.tensor([-1.0, 3.0])); stats.observe(torch.tensor([4.0, float("nan")]))
    >>> [float(v) for v in (stats.count, stats.nonfinite, stats.mean, stats.low, stats.high)]
    [3.0, 1.0, 2.0, -1.0, 4.0]
    """

    count: Tensor = field(default_factory=lambda: _scalar(0.0))
    nonfinite: Tensor = field(default_factory=lambda: _scalar(0.0))
    total: Tensor = field(default_factory=lambda: _scalar(0.0))
    total_square: Tensor = field(default_factory=lambda: _scalar(0.0))
    low: Tensor = field(default_factory=lambda: _scalar(math.inf))
    high: Tensor = field(default_factory=lambda: _scalar(-math.inf))

    def observe(self, x: Tensor) -> None:
        """Take in one tensor of any shape and float or integer dtype."""
        values, bad = finite_values(x)
        part = RangeStats(**{name: getattr(self, name).new_zeros((), device=x.device) for name in _SUMS})
        part.count += values.numel()
        part.nonfinite += bad
        if values.numel():
            part.total = values.sum(dtype=torch.float64)
            part.total_square = torch.linalg.vector_norm(values, dtype=torch.float64).square()
            part.low, part.high = values.amin().to(torch.float64), values.amax().to(torch.float64)
        self.merge(part)

    def merge(self, other: RangeStats) -> None:
        """Take in what another one has seen."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name).to(getattr(other, name).device) + getattr(other, name))
        self.low = torch.minimum(self.low.to(other.low.device), other.low)
        self.high = torch.maximum(self.high.to(other.high.device), other.high)

    def reduce(self, all_reduce: AllReduce) -> None:
        """Combine over ranks: two collectives, the same on every rank whatever it has seen."""
        sums = all_reduce(torch.stack([getattr(self, name) for name in _SUMS]), "sum")
        for name, value in zip(_SUMS, sums.unbind(), strict=True):
            setattr(self, name, value)
        ends = all_reduce(torch.stack([-self.low.to(self.high.device), self.high]), "max")
        self.low, self.high = -ends[0], ends[1]

    def abs_max(self, signed: bool = True) -> Tensor:
        """max|x|, for unsigned tensors the largest x; 0 where there is none."""
        reach = torch.maximum(self.high, -self.low) if signed else self.high
        return reach.clamp(min=0.0) if bool(self.count > 0) else torch.zeros_like(self.count)

    @property
    def mean(self) -> Tensor:
        """Mean; 0 where nothing was seen."""
        return self.total / self.count.clamp(min=1)

    @property
    def std(self) -> Tensor:
        """Population standard deviation; 0 where nothing was seen."""
        return (self.total_square / self.count.clamp(min=1) - self.mean.square()).clamp(min=0).sqrt()


_SUMS = ("count", "nonfinite", "total", "total_square")


@dataclass
class Histogram:
    """|x| over [0, high] in equal bins, negatives apart, with the first two moments of each bin.

    The moments are what makes 2048 bins enough for 8-bit searches: an unsigned 8-bit step is only 8 bins
    wide, and the zeros of a ReLU or the 256 levels of an image are not spread over their bins.

    Args:
        counts, sums, squares: float64 [2, bins]: number, sum of |x|, sum of x^2; rows x < 0, x >= 0.
        high: upper end of the last bin, 0-dim float64. Values beyond it count in the last bin.
        max_values: per ``observe`` call a larger tensor is thinned by a stride that shares no factor with its
            size, so that no column or channel is preferred.
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor
    high: Tensor
    max_values: int = MAX_VALUES

    @classmethod
    def empty(cls, high: Tensor, bins: int = BINS, max_values: int = MAX_VALUES) -> Histogram:
        """A histogram over [0, high] that has seen nothing, on high's device."""
        high = high.detach().to(torch.float64)
        zeros = torch.zeros(2, bins, dtype=torch.float64, device=high.device)
        return cls(zeros, zeros.clone(), zeros.clone(), high, max_values)

    @property
    def bin_width(self) -> Tensor:
        """Width of a bin, 0-dim float64; 0 for an all-zero tensor."""
        return self.high / self.counts.shape[1]

    def observe(self, x: Tensor) -> None:
        """Take in one tensor of any shape and dtype; NaN and inf are left out."""
        flat = x.detach().reshape(-1)
        stride = -(flat.numel() // -self.max_values) if flat.numel() > self.max_values else 1
        while math.gcd(stride, flat.numel()) > 1 and stride > 1:
            stride += 1
        values = finite_values(flat[::stride])[0].to(torch.float64)
        if values.numel() == 0 or not bool(self.high > 0):
            return
        bins = self.counts.shape[1]
        magnitude = values.abs()
        index = (magnitude * (bins / self.high)).clamp(max=bins - 1).to(torch.int64) + (values >= 0) * bins
        # index_add_, not a weighted bincount: on CUDA the latter is refused under deterministic algorithms.
        for table, add in ((self.counts, torch.ones_like(magnitude)), (self.sums, magnitude)):
            table.view(-1).index_add_(0, index, add)
        self.squares.view(-1).index_add_(0, index, magnitude.square())

    def merge(self, other: Histogram) -> None:
        """Take in what another histogram over the same range has seen (a tied site, for example)."""
        if self.counts.shape != other.counts.shape or not bool(self.high == other.high):
            raise InvariantError(
                f"Histogram.merge: {self.counts.shape[1]} bins over [0, {float(self.high):g}] and "
                f"{other.counts.shape[1]} over [0, {float(other.high):g}]; ties need one range."
            )
        for name in ("counts", "sums", "squares"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def reduce(self, all_reduce: AllReduce) -> None:
        """Combine over ranks: one collective; the range must be the same on all of them."""
        tables = all_reduce(torch.stack([self.counts, self.sums, self.squares]), "sum")
        self.counts, self.sums, self.squares = tables.unbind()

    def magnitudes(self, signed: bool = True) -> Tensor:
        """Counts of |x| per bin, float64 [bins]; for unsigned tensors of x >= 0 only."""
        return self.counts.sum(0) if signed else self.counts[1]

    def points(self) -> tuple[Tensor, Tensor]:
        """Values and weights that stand for the data: equidistant points with each bin's moments."""
        n = self.counts.clamp(min=1)
        mean = self.sums / n
        std = (self.squares / n - mean.square()).clamp(min=0).sqrt()
        u = torch.arange(1 - _POINTS, _POINTS, 2, dtype=torch.float64, device=n.device)
        u = u / u.square().mean().sqrt()  # mean 0, variance 1
        sign = torch.tensor([-1.0, 1.0], dtype=torch.float64, device=n.device)[:, None, None]
        values = sign * (mean[..., None] + std[..., None] * u)
        return values.reshape(-1), (self.counts[..., None] / _POINTS).expand_as(values).reshape(-1)


class RangeObserver:
    """Two passes over a site's tensors: ``observe`` feeds statistics, after ``second_pass`` the histogram.

    >>> site = RangeObserver(signed=False)
    >>> site.observe(torch.tensor([0.0, 1.0, 2.0]))
    >>> site.second_pass()
    >>> site.observe(torch.tensor([0.0, 1.0, 2.0]))
    >>> float(site.abs_max), int(site.histogram.magnitudes(signed=False).sum())
    (2.0, 3)
    """

    def __init__(self, signed: bool = True, bins: int = BINS, max_values: int = MAX_VALUES) -> None:
        self.signed = signed
        self.bins = bins
        self.max_values = max_values
        self.stats = RangeStats()
        self.histogram: Histogram | None = None

    @property
    def abs_max(self) -> Tensor:
        """max|x|, or max x where only x >= 0 counts; 0 where there is none."""
        return self.stats.abs_max(self.signed)

    def observe(self, x: Tensor) -> None:
        """Take in one tensor, in whichever pass this is."""
        (self.stats if self.histogram is None else self.histogram).observe(x)

    def second_pass(self, high: Tensor | None = None) -> None:
        """Begin the histogram over [0, high]; tied sites pass the largest abs_max among them."""
        self.histogram = Histogram.empty(self.abs_max if high is None else high, self.bins, self.max_values)

    def reduce(self, all_reduce: AllReduce) -> None:
        """Combine this pass over ranks; call it at the end of each pass."""
        (self.stats if self.histogram is None else self.histogram).reduce(all_reduce)
