"""The range that most of a tensor lies in: extremes after a percentage of the values is dropped at each side.

On 256 bins over [min, max] a range reaches to the last bin dropped, so that it errs by less than a bin, outward.
A bin is found from the rank of a value; the histogram itself is needed for large percentages and sums over ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lowbit.numerics.dtypes import compute_dtype
from lightning_lowbit.numerics.ste import eager_cpu, slices

__all__ = ["BINS", "percentile_range", "range_histogram", "range_of_histogram"]

BINS = 256
_LAST = BINS - 1
_SLICE = 1 << 15  # elements per thread: value, code and index stay in the L2 cache
_NARROWEST, _WIDEST = 32, 128  # elements that share one extreme; narrower rows are not reduced as vectors
_WORTH = 16  # finding ranks is faster than counting while it looks into less than one in so many values


@torch.no_grad()
def percentile_range(x: Tensor, percent: float) -> Tensor:
    """(min, max) of x after ``percent`` per cent of its values is dropped at each side.

    With k = 255 / (max - min), code = round_half_even((x - min) * k), c_j the count of codes <= j of n values:

        low bin    the last j with 100 c_j / n < percent, 0 where there is none
        high bin   the same from the other end
        range      bin * (1 / k) + min, not beyond min and max

    The last bin dropped is kept: between it and the one before the rank is not known.

    Args:
        x: float tensor, any shape; half-precision types are computed in float32.
        percent: of the values, at each side, 0 to 50; 0 gives min and max themselves.
    Returns:
        float32 [2] on the device of x (float64 for float64 x). A constant tensor gives (min, max), and so does one
        whose max - min is beyond the numbers; where x is empty or not finite, both are NaN.

    >>> x = torch.tensor([0.0, 255.0] + [100.0] * 998)  # one of 1000 values is 0.1 per cent
    >>> for percent in (0.0, 0.1, 0.2):
    ...     print(percent, percentile_range(x, percent).tolist())
    0.0 [0.0, 255.0]
    0.1 [0.0, 255.0]
    0.2 [99.0, 101.0]
    """
    x = x.detach()
    if torch.compiler.is_compiling():  # one call in the graph: ranks are not for a compiler
        result: Tensor = torch.ops.lightning_lowbit.percentile_range(x, percent)
        return result
    return _percentile_range(x, percent)


def _percentile_range(x: Tensor, percent: float) -> Tensor:
    n = x.numel()
    dtype = compute_dtype(x)
    if n == 0:
        return x.new_full((2,), math.nan, dtype=dtype)
    flat = _flat(x)
    rank = _rank(n, percent)
    if rank <= 1:
        low, high = (end.to(dtype) for end in (flat.amin(), flat.amax()))
        return _finite(low, high) if percent <= 0 else _between(low, high, low, high)
    width = _width(n, rank)
    if rank * width > n // _WORTH:
        low, high = (end.to(dtype) for end in (flat.amin(), flat.amax()))
        return range_of_histogram(range_histogram(x, low, high), low, high, percent)
    low, first = (end.to(dtype) for end in _smallest(flat, rank, width))
    high, last = (end.to(dtype) for end in _smallest(flat, rank, width, largest=True))
    return _between(low, high, first, last)


def _rank(n: int, percent: float) -> int:
    """The fewest values that are not less than ``percent`` per cent of n.

    >>> _rank(10_000, 0.01), _rank(10_000, 0.0101), _rank(7, 0.0)
    (1, 2, 0)
    """
    rank = max(math.floor(percent * n / 100) - 1, 0)
    while 100 * rank / n < percent:
        rank += 1
    return min(rank, n)


def _width(n: int, rank: int) -> int:
    """A power of two near sqrt(n / rank), where the rows' extremes and the rows looked into are equally many."""
    return min(max(1 << (n // rank).bit_length() // 2, _NARROWEST), _WIDEST)


def _smallest(flat: Tensor, rank: int, width: int, largest: bool = False) -> tuple[Tensor, Tensor]:
    """The smallest and the ``rank``-th smallest value, or the largest ones; 0-dim.

    The ``rank`` rows of the smallest minima hold ``rank`` values that are no larger than anything elsewhere.
    """
    rows = flat.numel() // width
    body, rest = flat[: rows * width].view(rows, width), flat[rows * width :]
    extremes = body.amax(1) if largest else body.amin(1)
    chosen = extremes.topk(rank, largest=largest, sorted=False).indices
    candidates = torch.cat([body.index_select(0, chosen).view(-1), rest])
    tail = candidates.topk(rank, largest=largest, sorted=False).values  # a NaN is the largest
    return (tail.amax(), tail.amin()) if largest else (tail.amin(), tail.amax())


def _between(low: Tensor, high: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """The range of :func:`percentile_range` whose first and last value of a bin not dropped are given."""
    k = _LAST / (high - low)
    return _values(low, high, k, _codes(first, low, k) - 1, _codes(last, low, k) + 1)


def _codes(x: Tensor, low: Tensor, k: Tensor) -> Tensor:
    return ((x - low) * k).round()


def _values(low: Tensor, high: Tensor, k: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """The values of two bins, within [low, high]; low and high themselves where there are no bins."""
    reached = torch.stack([first, last]).clamp(0, _LAST) * k.reciprocal() + low
    reached = torch.where((k > 0) & k.isfinite(), reached.clamp(low, high), torch.stack([low, high]))
    return torch.where(low.isfinite() & high.isfinite(), reached, math.nan)


def _finite(low: Tensor, high: Tensor) -> Tensor:
    return torch.where(low.isfinite() & high.isfinite(), torch.stack([low, high]), math.nan)


@torch.no_grad()
def range_histogram(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How many values of x have each code of :func:`percentile_range` over [low, high]; waits for no device.

    Args:
        x: float tensor, any shape. Values beyond the range count in the end bins, NaN in the first.
        low, high: 0-dim, the extremes of x, or of all tensors whose histograms are summed.
    Returns:
        int64 [256] on the device of x; sums over tensors and ranks are exact.

    >>> x = torch.tensor([0.0, 1.0, 1.0, 255.0])
    >>> range_histogram(x, x.amin(), x.amax())[:3].tolist()
    [1, 2, 0]
    """
    x, dtype = x.detach(), compute_dtype(x)
    low, high = (torch.as_tensor(end, dtype=dtype, device=x.device) for end in (low, high))
    k = _LAST / (high - low)
    counts = torch.zeros(BINS, dtype=torch.int64, device=x.device)
    eager = eager_cpu(x)
    for part in slices(x, _SLICE * torch.get_num_threads()) if eager else (x.reshape(-1),):
        codes = _codes(part.to(dtype), low, k).nan_to_num(0.0).clamp(0, _LAST)
        if eager:
            counts += torch.bincount(codes.to(torch.uint8).view(-1), minlength=BINS)
        else:  # bincount waits for the device to learn the largest code
            index = codes.to(torch.int64)
            counts.index_add_(0, index, torch.ones_like(index))
    return counts


@torch.no_grad()
def range_of_histogram(counts: Tensor, low: Tensor, high: Tensor, percent: float) -> Tensor:
    """The range of :func:`percentile_range` from the counts of the codes.

    Args:
        counts: int64 [256], of values within [low, high].
        low, high: 0-dim float32 or float64.
        percent: of the counts, at each side, 0 to 50.
    Returns:
        [2], dtype and device of ``low``; NaN where nothing was counted or the ends are not finite.
    """
    n = counts.sum()
    low, high = (torch.where(n > 0, end, math.nan) for end in (low, high))
    if percent <= 0:
        return _finite(low, high)
    share = torch.stack([counts.cumsum(0), counts.flip(0).cumsum(0)]).to(torch.float64) * 100 / n
    low_bin, high_bin = ((share < percent).sum(1) - 1).clamp(min=0).to(low.dtype).unbind()
    return _values(low, high, _LAST / (high - low), low_bin, _LAST - high_bin)


def _flat(x: Tensor) -> Tensor:
    """The values in any order, without a copy where x is dense."""
    dense = type(x) in (Tensor, torch.nn.Parameter) and torch.ops.aten.is_non_overlapping_and_dense(x)
    return x.as_strided((x.numel(),), (1,)) if dense else x.reshape(-1)


_operator = torch.library.custom_op(
    "lightning_lowbit::percentile_range",
    _percentile_range,
    mutates_args=(),
    schema="(Tensor x, float percent) -> Tensor",
)


@_operator.register_fake
def _shape(x: Tensor, percent: float) -> Tensor:
    return x.new_empty(2, dtype=compute_dtype(x))
