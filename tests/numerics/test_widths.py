"""Formats, their integer bits by each criterion, and the widths of sums, against the rules written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.observers import RangeObserver, RangeStats
from lightning_lowbit.numerics.ranges import threshold_klj
from lightning_lowbit.numerics.widths import (
    CRITERIA,
    Criterion,
    Format,
    Policy,
    accumulator_bits,
    bits_of_sum,
    choose_format,
    fixed_unit,
    fixed_width,
    integer_bits,
    integer_bits_of_max,
)

BITS = [(2, True), (4, True), (8, True), (16, True), (1, False), (4, False), (8, False), (16, False)]
formats = st.sampled_from(BITS)
magnitudes = st.floats(2.0**-60, 2.0**60)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(x: Tensor, form: Format) -> Tensor:
    """clip(round(x 2^f)) 2^-f in float64."""
    low, high = form.limits
    return torch.round(x.double() * 2.0**form.fraction).clamp(low, high) * 2.0**-form.fraction


def observed(x: Tensor, signed: bool) -> RangeObserver:
    site = RangeObserver(signed)
    site.observe(x)
    site.second_pass()
    site.observe(x)
    return site


@given(formats, st.integers(-40, 40))
def test_a_format_and_its_grid_say_the_same(bits: tuple[int, bool], integer: int) -> None:
    form = fixed_width(*bits[:1], integer, bits[1])
    grid = form.grid()
    assert form.total == form.fraction + form.integer + int(form.signed)
    assert (grid.qmin, grid.qmax) == form.limits
    assert grid.step == form.step == 2.0**-form.fraction
    assert form.limits[1] * form.step < 2.0**integer <= (form.limits[1] + 1) * form.step
    assert form.grid() == Grid(form.total, -form.fraction, signed=form.signed, narrow=form.signed)


@pytest.mark.parametrize(
    ("k", "integer", "signed", "total", "fraction"),
    [(8, 3, True, 11, 7), (8, 3, False, 10, 7), (8, 0, True, 8, 7), (4, -1, True, 3, 3)],
)
def test_a_fixed_unit_moves_the_width(k: int, integer: int, signed: bool, total: int, fraction: int) -> None:
    form = fixed_unit(k, integer, signed)
    assert (form.total, form.fraction) == (total, fraction)


@pytest.mark.parametrize(
    "fields", [(1, 0, True), (0, 0, False), (54, 0, True), (8, 200, True), (8, -200, True), (8.0, 0, True)], ids=str
)
def test_a_format_that_no_grid_can_say_is_refused(fields: tuple[int, int, bool]) -> None:
    with pytest.raises(ConfigError, match=r"Format: got total=.*expected"):
        Format(*fields)


@settings(max_examples=300)
@given(magnitudes, formats)
def test_max_takes_the_fewest_bits_that_clip_nothing(value: float, bits: tuple[int, bool]) -> None:
    """The least i from ceil(log2 max) on whose greatest code is not passed."""
    width, signed = bits
    i = int(integer_bits_of_max(torch.tensor(value, dtype=torch.float64), width, signed))
    mantissa, exponent = math.frexp(value)
    first = exponent - (mantissa == 0.5)

    def fits(i: int) -> bool:
        return round(math.ldexp(value, width - signed - i)) < 1 << (width - signed)

    assert i == (first if fits(first) else first + 1)
    assert fits(i)


@given(magnitudes, st.integers(0, 15), st.booleans())
def test_max_with_a_fixed_unit(value: float, fraction: int, signed: bool) -> None:
    """The codes up to round(max 2^f) are held, and one magnitude bit at least."""
    i = int(integer_bits_of_max(torch.tensor(value, dtype=torch.float64), 8, signed, fraction))
    code = round(math.ldexp(value, fraction))
    assert code <= 2 ** (fraction + i) - 1
    assert fraction + i >= 1
    assert fraction + i == 1 or math.ldexp(value, 1 - i) > 1 or code > 2 ** (fraction + i - 1) - 1


@pytest.mark.parametrize(("bits", "signed"), [(8, True), (8, False), (4, True)])
def test_the_round_up_rule(bits: int, signed: bool) -> None:
    """The last value that stays is half a step below the power of two, ties going up to the even code."""
    half = 2.0 ** -(bits - signed + 1)
    edge = torch.tensor([1 - half - 2.0**-30, 1 - half, 1.0, 1 + 2.0**-30], dtype=torch.float64)
    assert integer_bits_of_max(edge, bits, signed).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("nothing", [torch.zeros(7, 3), torch.zeros(0)], ids=["zeros", "empty"])
@pytest.mark.parametrize("fraction", [None, 7])
def test_a_zero_tensor_has_none(criterion: Criterion, nothing: Tensor, fraction: int | None) -> None:
    assert integer_bits(nothing, criterion, 8, fraction=fraction) == 0
    assert integer_bits(observed(nothing, True), criterion, 8, fraction=fraction) == 0


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale", [2.0**-30, 0.06, 1.0, 21.0])
def test_mse_takes_the_best_of_five(bits: int, signed: bool, scale: float) -> None:
    x = (randn(4000) * torch.where(randn(4000, seed=1) > 2.5, 6.0, 1.0)).double() * scale
    x = x if signed else x.relu()
    first = integer_bits(x, "max", bits, signed)
    errors = [float((quantized(x, fixed_width(bits, first - j, signed)) - x).square().sum().double()) for j in range(5)]
    best = integer_bits(x, "mse", bits, signed)
    assert best == first - errors.index(min(errors))
    assert best == integer_bits(observed(x, signed), "mse", bits, signed)
    if bits == 4:
        assert best < first


def test_mse_goes_no_lower_than_four_below_max() -> None:
    x = torch.tensor([1.0] + [0.04] * 100_000)  # a step of 2^-5 would serve most of them better
    assert integer_bits(x, "max", 2) == 1
    assert integer_bits(x, "mse", 2) == -3


def test_percentile_leaves_outliers_out() -> None:
    x = torch.cat([torch.linspace(-0.9, 0.9, 9990), torch.full((10,), 30.0)])
    for data in (x, observed(x, True)):
        assert integer_bits(data, "max") == 5
        assert integer_bits(data, "percentile", percent=99.8) == 0
        assert integer_bits(data, "percentile", percent=100.0) == 5
        assert integer_bits(data, "percentile", percent=99.8, fraction=7) == 0
    assert integer_bits(torch.tensor([1.0]), "percentile", percent=100.0) == 1


def test_kl_j_is_the_threshold_of_least_divergence() -> None:
    site = observed(randn(20_000) * torch.where(randn(20_000, seed=1) > 3, 20.0, 1.0), True)
    assert site.histogram is not None
    t = float(threshold_klj(site.histogram.magnitudes(), site.histogram.bin_width, 4))
    assert integer_bits(site, "kl_j", 4) == math.ceil(math.log2(t)) < integer_bits(site, "max", 4)


def test_a_fixed_unit_gains_nothing_by_clipping() -> None:
    x = randn(1000) * 3
    assert integer_bits(x, "mse", fraction=3) == integer_bits(x, "kl_j", fraction=3) == integer_bits(x, fraction=3)


def test_unsigned_tensors_count_from_zero_up() -> None:
    x = torch.tensor([-50.0, 0.1, 0.9])
    assert integer_bits(x, "max", 8, signed=False) == 0
    for criterion in CRITERIA:
        assert integer_bits(x, criterion, 8, False) == integer_bits(observed(x, False), criterion, 8, False) <= 0
    assert integer_bits(x, "max", 8) == 6


def test_what_cannot_be_chosen_is_refused() -> None:
    stats = RangeStats()
    stats.observe(torch.ones(3))
    assert integer_bits(stats, "max", 8) == 1
    with pytest.raises(ConfigError, match="second_pass"):
        integer_bits(stats, "mse", 8)
    with pytest.raises(ConfigError, match="criterion='kl'"):
        integer_bits(torch.ones(3), "kl", 8)  # type: ignore[arg-type]  # what a user may write
    with pytest.raises(ConfigError, match="bits=1, expected at least 2"):
        integer_bits(torch.ones(3), "max", 1)
    with pytest.raises(ConfigError, match="policy='float'"):
        choose_format(torch.ones(3), "float")  # type: ignore[arg-type]  # what a user may write


@pytest.mark.parametrize("policy", ["fixed_unit", "fixed_width"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("scale", [0.01, 0.7, 4.0, 300.0])
def test_a_chosen_format_clips_nothing_and_wastes_no_bit(policy: Policy, signed: bool, scale: float) -> None:
    x = randn(500) * scale
    x = x if signed else x.relu()
    form = choose_format(x, policy, 8, signed)
    assert float((quantized(x, form) - x).abs().max()) <= form.step / 2
    assert torch.round(x.abs().max() * 2.0**form.fraction) > form.limits[1] / 2 or form.fraction + form.integer == 1
    assert form.total == 8 if policy == "fixed_width" else form.fraction == 7


def test_the_round_up_rule_looks_at_the_policys_unit() -> None:
    x = torch.tensor([0.998])
    assert choose_format(x, "fixed_unit", 8, signed=False) == Format(8, 1, signed=False)
    assert choose_format(x, "fixed_width", 8, signed=False) == Format(8, 0, signed=False)


@pytest.mark.parametrize("fan_in", [1, 2, 3, 64, 65, 1040])
def test_the_worst_case_holds_every_sum_and_the_measured_one_just_its_own(fan_in: int) -> None:
    extreme = fan_in * 255 * 127
    assert accumulator_bits(8, 8, fan_in) == 16 + math.ceil(math.log2(fan_in))
    assert extreme < 2 ** (accumulator_bits(8, 8, fan_in) - 1)
    w = torch.full((3, fan_in), -127, dtype=torch.int8)
    measured = bits_of_sum(w, 255)
    assert 2 ** (measured - 2) <= extreme < 2 ** (measured - 1)
    assert measured <= accumulator_bits(8, 8, fan_in)
    assert bits_of_sum(w, 255, torch.full((3,), 2**30)) == 32


def test_sums_of_what_is_not_finite_are_refused() -> None:
    with pytest.raises(ConfigError, match="nan"):
        bits_of_sum(torch.tensor([[math.nan]]), 1)
    with pytest.raises(ConfigError, match="fan_in=0"):
        accumulator_bits(8, 8, 0)
