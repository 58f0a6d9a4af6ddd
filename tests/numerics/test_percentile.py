"""Percentile ranges against a walk over the bins, as the formula says it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_lowbit.numerics.percentile import BINS, percentile_range, range_histogram, range_of_histogram

# torch 2.13's compiler itself uses what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")

PERCENTS = (0.0, 0.01, 0.03, 0.1, 0.5, 1.0, 5.0, 25.0)


def percentile_range_reference(x: Tensor, percent: float) -> Tensor:
    """Bin by bin: from each end the last one up to which less than ``percent`` is counted."""
    x = x.reshape(-1).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    low, high = x.min(), x.max()
    ends = torch.stack([low, high])
    k = (BINS - 1) / (high - low)
    if percent == 0 or not 0 < k < math.inf:
        return ends
    counts = [0] * BINS
    for code in torch.round((x - low) * k).to(torch.int64).tolist():
        counts[code] += 1
    reached = torch.stack(
        [torch.tensor(last_dropped(counts, percent)), 255 - torch.tensor(last_dropped(counts[::-1], percent))]
    )
    return (reached.to(x.dtype) * (1 / k) + low).clamp(low, high)


def last_dropped(counts: list[int], percent: float) -> int:
    last, seen = 0, 0
    for j, count in enumerate(counts):
        seen += count
        if 100 * seen / sum(counts) >= percent:
            break
        last = j
    return last


def samples() -> list[tuple[str, Tensor]]:
    g = torch.Generator().manual_seed(5)
    n = 40_000
    gauss = torch.randn(n, generator=g)
    return [
        ("gauss", gauss),
        ("odd", gauss[:33_333] * 3 + 7),
        ("few", gauss[:17]),
        ("relu", gauss.relu()),
        ("negative", -gauss.abs() - 1),
        ("outlier", torch.cat([gauss, torch.tensor([900.0])])),
        ("two_sided", torch.cat([gauss, torch.tensor([900.0] * 5 + [-900.0] * 40)])),
        ("codes", torch.randint(0, 256, (n,), generator=g).float()),
        ("halves", torch.randint(0, 511, (n,), generator=g).float() / 2),
        ("heavy", gauss / torch.rand(n, generator=g).clamp(min=1e-6)),
        ("sorted", gauss.sort().values),
        ("one_row", torch.cat([torch.arange(-64.0, 64.0), torch.zeros(n)])),
        ("tiny", gauss * 1e-30),
        ("zeros", torch.zeros(n)),
        ("constant", torch.full((n,), -3.3)),
        ("single", torch.tensor([2.5])),
        ("huge", torch.tensor([-3e38, 3e38, 0.0]).repeat(9000)),
        ("subnormal", torch.tensor([0.0, 2.0**-149]).repeat(9000)),
        ("double", gauss.double() + 1e-9),
    ]


@pytest.mark.parametrize(("name", "x"), samples(), ids=[name for name, _ in samples()])
def test_it_is_the_walk_over_the_bins(name: str, x: Tensor) -> None:
    for percent in PERCENTS:
        got = percentile_range(x, percent)
        assert got.dtype == (torch.float64 if name == "double" else torch.float32)
        assert torch.equal(got, percentile_range_reference(x, percent)), percent


def test_it_is_the_walk_for_random_sizes() -> None:
    g = torch.Generator().manual_seed(11)
    for _ in range(200):
        n = int(10 ** (5 * torch.rand((), generator=g)))
        x = torch.randn(n, generator=g) * 10 ** (4 * float(torch.rand((), generator=g)) - 2)
        x = x.pow(3) if n % 3 == 0 else (x * 4).round() if n % 3 == 1 else x
        percent = float(torch.rand((), generator=g)) ** 3
        assert torch.equal(percentile_range(x, percent), percentile_range_reference(x, percent)), (n, percent)


def test_exactly_that_percentage_is_kept() -> None:
    x = torch.cat([torch.tensor([-50.0] * 3), torch.zeros(30_000 - 6), torch.tensor([50.0] * 3)])
    low, high = x.aminmax()
    counts = range_histogram(x, low, high)
    for function in (percentile_range, lambda _, percent: range_of_histogram(counts, low, high, percent)):
        assert function(x, 0.01).tolist() == [-50.0, 50.0]  # 3 of 30000 are not less than 0.01 per cent
        first, last = function(x, 0.0101).tolist()
        assert -1 < first < 0 < last < 1


@pytest.mark.parametrize("percent", PERCENTS)
def test_memory_order_does_not_matter(percent: float) -> None:
    x = torch.randn(8, 12, 20, 20, generator=torch.Generator().manual_seed(2))
    want = percentile_range(x.clone(), percent)
    padded = torch.zeros(8, 12, 20, 24)
    padded[..., 1:21] = x
    for other in (x.to(memory_format=torch.channels_last), x.transpose(0, 3), padded[..., 1:21], x.reshape(-1)):
        assert torch.equal(percentile_range(other, percent), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat"])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(3)).to(dtype)
    for percent in PERCENTS:
        assert torch.equal(percentile_range(x, percent), percentile_range(x.float(), percent))


@pytest.mark.parametrize("size", [1, 40_000], ids=["rank_1", "ranks"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "minus_inf"])
def test_what_is_not_finite_has_no_range(bad: float, size: int) -> None:
    for place in (0, -1):
        x = torch.linspace(-1, 1, size + 1)
        x[place] = bad
        for percent in (0.0, 0.01, 20.0):
            assert percentile_range(x, percent).isnan().all()


def test_nothing_has_no_range() -> None:
    assert percentile_range(torch.empty(0, 3), 0.01).isnan().all()
    counts = torch.zeros(BINS, dtype=torch.int64)
    assert range_of_histogram(counts, torch.tensor(0.0), torch.tensor(1.0), 0.01).isnan().all()


@pytest.mark.parametrize("percent", PERCENTS)
def test_summed_histograms_give_the_range_of_all(percent: float) -> None:
    g = torch.Generator().manual_seed(4)
    parts = [torch.randn(n, generator=g) * n**0.25 for n in (70_001, 5000, 300)]
    whole = torch.cat(parts)
    low, high = whole.aminmax()
    counts = torch.stack([range_histogram(part, low, high) for part in parts]).sum(0)
    assert counts.dtype == torch.int64
    assert int(counts.sum()) == whole.numel()
    assert torch.equal(counts, range_histogram(whole, low, high))
    assert torch.equal(range_of_histogram(counts, low, high, percent), percentile_range(whole, percent))


def test_values_beyond_the_ends_count_in_the_end_bins() -> None:
    x = torch.tensor([-math.inf, -9.0, 0.0, 1.0, 255.0, 256.0, math.inf, math.nan])
    counts = range_histogram(x, torch.tensor(0.0), torch.tensor(255.0))
    assert counts[[0, 1, 255]].tolist() == [4, 1, 3]


def test_a_compiled_graph_is_not_broken() -> None:
    def ranges(x: Tensor) -> tuple[Tensor, ...]:
        low, high = x.amin(), x.amax()
        counts = range_histogram(x, low, high)
        return percentile_range(x, 0.05) * 1.0, counts, range_of_histogram(counts, low, high, 0.05)

    x = torch.randn(4, 6, 30, 30, generator=torch.Generator().manual_seed(6))
    compiled = torch.compile(ranges, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(x), ranges(x), strict=True):
        assert torch.equal(got, want)


def test_no_gradient_is_kept() -> None:
    x = torch.randn(100, requires_grad=True)
    assert not percentile_range(x, 0.01).requires_grad
