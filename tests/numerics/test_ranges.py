"""Thresholds against their formulas written out, streams against the whole, ranks against one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError, InvariantError
from lightning_lowbit.numerics.ranges import (
    Histogram,
    RangeObserver,
    RangeStats,
    abs_histogram,
    exponent_candidates,
    klj_divergences,
    mse_by_exponent,
    threshold_3sd,
    threshold_klj,
    threshold_max,
    threshold_mse_exponent,
    threshold_percentile,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def samples() -> dict[str, Tensor]:
    n, u = randn(60_000), torch.rand(60_000, generator=torch.Generator().manual_seed(1))
    return {
        "normal": n,
        "relu": n.relu(),
        "relu6": (4 * n).clamp(0, 6),
        "image": (u * 256).floor() / 255,
        "heavy": (1.5 * n).exp(),
        "outliers": torch.where(u < 0.999, n.relu(), 30 * n.relu()),
        "asymmetric": torch.where(n < 0, n, 0.1 * n),
    }


def two_passes(batches: list[Tensor], signed: bool = True) -> RangeObserver:
    site = RangeObserver(signed)
    for batch in batches:
        site.observe(batch)
    site.second_pass()
    for batch in batches:
        site.observe(batch)
    return site


def test_stream_statistics_equal_those_of_the_whole() -> None:
    x = randn(7, 3, 5) * 2 + 1
    stats = RangeStats()
    for batch in x.split(2):
        stats.observe(batch)
    assert float(stats.count) == x.numel()
    torch.testing.assert_close(stats.mean, x.double().mean())
    torch.testing.assert_close(stats.std, x.double().std(correction=0))
    assert (float(stats.low), float(stats.high)) == (float(x.min()), float(x.max()))


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    site = two_passes([torch.tensor([1.0, math.nan, -2.0]), torch.tensor([math.inf, -math.inf, 0.5])])
    assert float(site.stats.nonfinite) == 3
    assert float(site.stats.count) == 3
    assert float(site.abs_max) == 2.0
    assert site.histogram is not None
    assert float(site.histogram.magnitudes().sum()) == 3


def test_halves_and_integers_are_taken_in() -> None:
    for x in (torch.tensor([1, -3]), torch.tensor([1.0, -3.0]).bfloat16(), torch.tensor([1.0, -3.0]).half()):
        assert float(threshold_max(x)) == 3.0


@pytest.mark.parametrize("nothing", [torch.zeros(0), torch.zeros(4, 4), torch.tensor([math.nan])])
def test_nothing_to_go_by_gives_no_threshold(nothing: Tensor) -> None:
    site = two_passes([nothing])
    assert site.histogram is not None
    counts, width = abs_histogram(nothing)
    marks = [
        threshold_max(nothing),
        threshold_3sd(nothing),
        threshold_3sd(nothing, population=False),
        threshold_klj(counts, width, bits=8),
        threshold_percentile(site.histogram, 99.9),
        site.abs_max,
    ]
    assert [float(t) for t in marks] == [0.0] * len(marks)
    candidates = exponent_candidates(site.abs_max)
    for data in (nothing, site.histogram):
        assert threshold_mse_exponent(candidates, mse_by_exponent(data, candidates, -8, 7, 3)) is None


def test_unsigned_sites_look_at_positive_values_only() -> None:
    x = torch.tensor([-100.0, 0.0, 1.0, 2.0])
    site = two_passes([x], signed=False)
    assert float(site.abs_max) == 2.0
    assert site.histogram is not None
    assert float(site.histogram.magnitudes(signed=False).sum()) == 3
    assert float(RangeStats().abs_max(signed=False)) == 0.0
    assert float(two_passes([-x.abs() - 1], signed=False).abs_max) == 0.0


def test_ranks_are_combined_by_sum_and_max() -> None:
    parts = [randn(50, seed=2), 3 * randn(70, seed=3), torch.zeros(0)]
    ranks = [RangeObserver() for _ in parts]
    whole = two_passes([torch.cat(parts)])

    def run_pass() -> None:
        for rank, part in zip(ranks, parts, strict=True):
            rank.observe(part)
        calls: list[list[tuple[Tensor, str]]] = []
        for rank in ranks:  # what each rank would hand to its collectives, in order
            sent: list[tuple[Tensor, str]] = []
            state = rank.stats if rank.histogram is None else rank.histogram
            saved = dict(vars(state))
            rank.reduce(lambda t, op, sent=sent: (sent.append((t, op)), t)[1])  # type: ignore[misc]
            vars(state).update(saved)
            calls.append(sent)
        combined = []
        for step in zip(*calls, strict=True):
            tensors = torch.stack([t for t, _ in step])
            combined.append(tensors.sum(0) if step[0][1] == "sum" else tensors.amax(0))
        for rank in ranks:
            answers = iter(combined)
            rank.reduce(lambda t, op, answers=answers: next(answers))  # type: ignore[misc]

    run_pass()
    for rank in ranks:
        rank.second_pass()
    run_pass()
    for rank in ranks:
        assert float(rank.abs_max) == float(whole.abs_max)
        torch.testing.assert_close(rank.stats.std, whole.stats.std)
        assert rank.histogram is not None
        assert whole.histogram is not None
        assert torch.equal(rank.histogram.counts, whole.histogram.counts)
        torch.testing.assert_close(rank.histogram.squares, whole.histogram.squares)


def test_tied_sites_merge_over_one_range() -> None:
    a, b = RangeObserver(), RangeObserver()
    a.observe(torch.tensor([1.0]))
    b.observe(torch.tensor([4.0]))
    high = torch.maximum(a.abs_max, b.abs_max)
    for site, x in ((a, 1.0), (b, 4.0)):
        site.second_pass(high)
        site.observe(torch.tensor([x]))
    assert a.histogram is not None
    assert b.histogram is not None
    a.histogram.merge(b.histogram)
    assert float(a.histogram.counts.sum()) == 2
    with pytest.raises(InvariantError, match="ties need one range"):
        a.histogram.merge(Histogram.empty(torch.tensor(1.0)))


@pytest.mark.parametrize("shape", [(64, 8, 8), (3, 7, 7, 11), (4096,)])
def test_thinning_keeps_its_bound_and_prefers_no_position(shape: tuple[int, ...]) -> None:
    columns = (torch.arange(shape[-1]) + 0.5).expand(shape) / shape[-1]
    hist = Histogram.empty(torch.tensor(1.0), shape[-1], max_values=columns.numel() // 7)
    hist.observe(columns)
    counts = hist.magnitudes()
    assert 0 < float(counts.sum()) <= columns.numel() // 7
    if len(shape) > 1:
        assert float(counts.max() - counts.min()) <= 0.4 * float(counts.mean()) + 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", samples())
def test_histogram_search_agrees_with_the_data_itself(name: str, bits: int) -> None:
    x = samples()[name]
    signed = bool((x < 0).any())
    qmin, qmax, point = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, bits - 1) if signed else (0, 2**bits - 1, bits)
    site = two_passes([x], signed)
    candidates = exponent_candidates(site.abs_max)
    exact = mse_by_exponent(x, candidates, qmin, qmax, point)
    assert site.histogram is not None
    approximate = mse_by_exponent(site.histogram, candidates, qmin, qmax, point)
    torch.testing.assert_close(approximate, exact, rtol=0.005, atol=0)
    assert threshold_mse_exponent(candidates, approximate) == threshold_mse_exponent(candidates, exact)


def test_mse_is_the_sum_of_the_quantizer_s_squared_errors() -> None:
    x = torch.tensor([-1.3, 0.2, 0.9, 2.6])
    for k in (2, 1, 0, -1):
        s = 2.0 ** (k - 3)
        want = sum((min(max(round(v / s), -8), 7) * s - v) ** 2 for v in x.double().tolist())
        got = mse_by_exponent(x, torch.tensor([k]), -8, 7, 3)
        assert float(got) == pytest.approx(want, rel=1e-12)


def test_errors_of_tied_members_add_up_to_one_choice() -> None:
    wide, narrow = randn(1000) * 8, randn(1000, seed=5) / 8
    candidates = exponent_candidates(threshold_max(torch.cat([wide, narrow])))
    summed = sum(mse_by_exponent(x, candidates, -8, 7, 3) for x in (wide, narrow))
    assert isinstance(summed, Tensor)
    torch.testing.assert_close(summed, mse_by_exponent(torch.cat([wide, narrow]), candidates, -8, 7, 3))


def test_three_sigma_and_percentile() -> None:
    x = randn(500) + 2
    assert float(threshold_3sd(x)) == pytest.approx(float(x.mean() + 3 * x.std(correction=0)), rel=1e-6)
    assert float(threshold_3sd(x, population=False)) == pytest.approx(float(x.mean() + 3 * x.std()), rel=1e-6)
    hist = Histogram.empty(torch.tensor(1.0))
    hist.observe(torch.linspace(0, 1, 100_001))
    for q in (0.5, 50.0, 99.9):
        assert float(threshold_percentile(hist, q)) == pytest.approx(q / 100, abs=1e-3)
    with pytest.raises(ConfigError, match=r"q=0, expected a percentage"):
        threshold_percentile(hist, 0)


def klj_reference(counts: list[float], bits: int, n: int) -> dict[int, float]:
    """Section 6 of the scheme, element by element."""
    total, cdf, run = sum(counts), [], 0.0
    for c in counts:
        run += c
        cdf.append(run / total)

    def read(row: list[float], position: float) -> float:
        low = min(int(position), len(row) - 2)
        return row[low] + (position - low) * (row[low + 1] - row[low])

    result = {}
    for i in range(n + 1, len(counts) + 1):
        clipped = [p if j < i - 1 else 1.0 for j, p in enumerate(cdf)]
        coarse = [read(clipped[:i], j * (i - 1) / (n - 1)) for j in range(n)]
        q = [read(coarse, min(j * (n - 1) / (i - 1), n - 1)) for j in range(i)] + clipped[i:]
        result[i] = sum((p - q_j) * math.log2(p / q_j) for p, q_j in zip(cdf, q, strict=True) if p > 0 and q_j > 0)
    return result


@pytest.mark.parametrize(("bits", "signed", "n"), [(3, True, 4), (4, True, 8), (4, False, 16)])
def test_klj_equals_its_formula(bits: int, signed: bool, n: int) -> None:
    counts, width = abs_histogram(randn(4000), 60)
    want = klj_reference(counts.tolist(), bits, n)
    candidates, divergence = klj_divergences(counts, bits, signed)
    assert candidates.tolist() == list(want)
    torch.testing.assert_close(divergence, torch.tensor(list(want.values()), dtype=torch.float64))
    best = min(want, key=want.__getitem__)
    assert float(threshold_klj(counts, width, bits, signed)) == pytest.approx((best + 0.5) * float(width))


def test_klj_with_few_bins_or_at_the_last_candidate() -> None:
    counts, width = abs_histogram(randn(200), "sqrt")
    assert counts.numel() == math.ceil(math.sqrt(200))
    assert float(threshold_klj(counts, width, 8)) == pytest.approx(float(randn(200).abs().max()))
    flat = torch.ones(9)
    assert float(threshold_klj(flat, 1.0, 4)) == 9.0
    assert float(threshold_klj(flat, 1.0, 4, cap=False)) == 9.5
    with pytest.raises(ConfigError, match="bins='log'"):
        abs_histogram(flat, "log")


def test_candidates_start_at_the_exponent_that_clips_nothing() -> None:
    assert exponent_candidates(torch.tensor(4.0)).tolist() == [2, 1, 0, -1, -2, -3, -4]
    assert exponent_candidates(torch.tensor(4.1), 2).tolist() == [3, 2]
    assert exponent_candidates(torch.tensor(0.0), 1).tolist() == [-24]
