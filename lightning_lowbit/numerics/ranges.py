"""How far a tensor reaches: the threshold initializations of TQT.

Every ``threshold_*`` function that returns a tensor returns 0 where there is nothing to go by (no value, or
only zeros), ``threshold_mse_exponent`` None, so that the caller leaves its quantizer uninitialized.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.exponent import LOG2_T_MIN, ceil_log2, pow2
from lightning_lowbit.numerics.observers import (
    BINS,
    AllReduce,
    Histogram,
    RangeObserver,
    RangeStats,
    finite_values,
)
from lightning_lowbit.numerics.rounding import Rounding, round_to

__all__ = [
    "AllReduce",
    "Histogram",
    "RangeObserver",
    "RangeStats",
    "abs_histogram",
    "exponent_candidates",
    "klj_divergences",
    "mse_by_exponent",
    "threshold_3sd",
    "threshold_klj",
    "threshold_max",
    "threshold_mse_exponent",
    "threshold_percentile",
]


def threshold_max(x: Tensor | RangeStats) -> Tensor:
    """MAX: t = max|x|, 0-dim float64.

    >>> float(threshold_max(torch.tensor([-3.0, 2.0]))), float(threshold_max(torch.zeros(0)))
    (3.0, 0.0)
    """
    return _stats(x).abs_max()


def threshold_3sd(x: Tensor | RangeStats, population: bool = True) -> Tensor:
    """3SD: t = |mean| + 3 std, with the population's or (``population=False``) the sample's std.

    >>> float(threshold_3sd(torch.tensor([-1.0, 1.0]))), float(threshold_3sd(torch.zeros(5)))
    (3.0, 0.0)
    """
    stats = _stats(x)
    std = stats.std
    if not population:
        std = std * (stats.count / (stats.count - 1).clamp(min=1)).sqrt()
    return stats.mean.abs() + 3 * std


def _stats(x: Tensor | RangeStats) -> RangeStats:
    if isinstance(x, RangeStats):
        return x
    stats = RangeStats()
    stats.observe(x)
    return stats


def abs_histogram(x: Tensor, bins: int | str = BINS) -> tuple[Tensor, Tensor]:
    """Counts of |x| over [0, max|x|] (float64 [bins]) and the bin width; ``bins="sqrt"`` takes ceil(sqrt(N)).

    >>> abs_histogram(torch.tensor([0.0, -1.0, 3.0, 4.0]), "sqrt")[0].tolist()
    [2.0, 2.0]
    """
    if isinstance(bins, str):
        if bins != "sqrt":
            raise ConfigError(f"abs_histogram: got bins={bins!r}, expected an integer or 'sqrt'.")
        bins = max(1, math.ceil(math.sqrt(x.numel())))
    hist = Histogram.empty(_stats(x).abs_max(), bins, max_values=max(1, x.numel()))
    hist.observe(x)
    return hist.magnitudes(), hist.bin_width


def _levels(bits: int, signed: bool) -> int:
    return 1 << (bits - int(signed))


def klj_divergences(counts: Tensor, bits: int, signed: bool = True) -> tuple[Tensor, Tensor]:
    """J divergence between the CDF and its clipped and quantized form, for each place to clip.

    P is the CDF of |x|, n the number of levels (2^(b-1) signed, 2^b unsigned), i = n+1..B the candidates. Qc
    is P with 1 from entry i-1 on; Q replaces its first i entries by n equidistant samples joined by straight
    lines. D_i = sum over P > 0 of (P - Q) log2(P / Q).

    Args:
        counts: [B], histogram of |x|.
        bits: width of a code.
        signed: whether one bit is the sign.

    Returns:
        The candidates i (int64) and D_i (float64); both empty where B <= n.
    """
    size, n = counts.numel(), _levels(bits, signed)
    candidates = torch.arange(n + 1, max(n, size) + 1, device=counts.device)
    cdf = counts.to(torch.float64).cumsum(0)
    cdf = cdf / cdf[-1]
    k = torch.arange(size, device=counts.device)
    parts = [_klj_chunk(cdf, k, i[:, None], n) for i in torch.split(candidates, 128)]
    return candidates, torch.cat(parts) if parts else cdf.new_zeros(0)


def _klj_chunk(cdf: Tensor, k: Tensor, i: Tensor, n: int) -> Tensor:
    clipped = torch.where(k >= i - 1, 1.0, cdf)  # [candidates, B]
    samples = torch.arange(n, device=k.device, dtype=torch.float64) / (n - 1) * (i - 1)
    coarse = _interpolate(clipped, samples)
    back = (k.to(torch.float64) / (i - 1) * (n - 1)).clamp(max=n - 1)
    q = torch.where(k < i, _interpolate(coarse, back), 1.0)
    return torch.where(cdf > 0, (cdf - q) * torch.log2(cdf / q), 0.0).sum(1)


def _interpolate(rows: Tensor, position: Tensor) -> Tensor:
    """Read each row at fractional positions, linearly."""
    low = position.floor().clamp(0, rows.shape[1] - 2)
    left, right = rows.gather(1, low.long()), rows.gather(1, low.long() + 1)
    return left + (position - low) * (right - left)


def threshold_klj(
    counts: Tensor, bin_width: Tensor | float, bits: int, signed: bool = True, cap: bool = True
) -> Tensor:
    """KL-J: t = (i + 1/2) bin widths at the least divergence, at most the maximum if ``cap``; 0-dim float64.

    With no more bins than levels there is nothing to choose and t is the maximum.
    """
    width = torch.as_tensor(bin_width, dtype=torch.float64, device=counts.device)
    if not bool(counts.sum() > 0):
        return torch.zeros_like(width)
    high = counts.numel() * width
    candidates, divergence = klj_divergences(counts, bits, signed)
    if candidates.numel() == 0:
        return high
    t = (candidates[divergence.argmin()] + 0.5) * width
    return torch.minimum(t, high) if cap else t


def threshold_percentile(hist: Histogram, q: float, signed: bool = True) -> Tensor:
    """Value below which q percent of |x| lie, linear inside a bin; 0-dim float64.

    >>> hist = Histogram.empty(torch.tensor(100.0), bins=100); hist.observe(torch.arange(100.0))
    >>> float(threshold_percentile(hist, 99.0)), float(threshold_percentile(hist, 100.0))
    (99.0, 100.0)
    """
    if not 0 < q <= 100:
        raise ConfigError(f"threshold_percentile: got q={q}, expected a percentage in (0, 100].")
    counts = hist.magnitudes(signed)
    cdf = counts.cumsum(0)
    if not bool(cdf[-1] > 0):
        return torch.zeros_like(hist.high)
    want = cdf[-1] * (q / 100)
    i = torch.searchsorted(cdf, want).clamp(max=counts.numel() - 1)
    inside = 1 - (cdf[i] - want) / counts[i].clamp(min=1)
    return (i + inside) * hist.bin_width


def exponent_candidates(t_max: Tensor, count: int = 7) -> Tensor:
    """k0, k0 - 1, ... with k0 = ceil(log2 max(t_max, 2^-24)); int32 [count]; only exponents act.

    >>> exponent_candidates(torch.tensor(3.0), 3).tolist()
    [2, 1, 0]
    """
    k0 = ceil_log2(t_max.clamp(min=2.0**LOG2_T_MIN))
    return k0 - torch.arange(count, dtype=torch.int32, device=t_max.device)


def mse_by_exponent(
    data: Tensor | Histogram,
    candidates: Tensor,
    qmin: int,
    qmax: int,
    point: int,
    rounding: Rounding = Rounding.HALF_EVEN,
) -> Tensor:
    """Summed squared error of quantizing with s = 2^(k - point), for each candidate k; float64.

    Sums, not means, so that tied quantizers and ranks add theirs before the argmin.

    Args:
        data: a tensor (exact, for weights) or a Histogram (within a few percent, for activations).
        candidates: integers, any number.
        qmin: first code.
        qmax: last code.
        point: b - 1 for signed codes, b for unsigned.
        rounding: the rule of the quantizer.
    """
    if isinstance(data, Histogram):
        x, weight = data.points()
    else:
        x, weight = finite_values(data)[0].to(torch.float64), None
    errors = []
    for s in pow2(candidates.to(x.device) - point, torch.float64).unbind():
        square = (round_to(x / s, rounding).clamp(qmin, qmax) * s - x).square()
        errors.append(square.sum() if weight is None else (square * weight).sum())
    return torch.stack(errors)


def threshold_mse_exponent(candidates: Tensor, errors: Tensor) -> int | None:
    """The candidate with the least error; among equals the largest, which clips least.

    None where no candidate errs at all: the data is zero, since the lowest of ``exponent_candidates`` clips
    the maximum of anything else.

    >>> threshold_mse_exponent(torch.tensor([1, 0, -1]), torch.tensor([2.0, 0.5, 0.5]))
    0
    """
    if not bool(errors.any()):
        return None
    return int(candidates[errors == errors.min()].max())
