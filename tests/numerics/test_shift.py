"""The range of a tensor against exact integers, the shift quantizer against exact fractions and its fast passes."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.exponent import EXPONENT_MIN
from lightning_lowbit.numerics.shift import (
    host_exponent,
    max_abs,
    range_exponent,
    shift_codes,
    shift_codes_reference,
    shift_quantize,
    shift_quantize_reference,
)

NOT_FINITE = [math.nan, math.inf, -math.inf]
BITS = [2, 4, 8, 9, 16]


def errors(peak: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sizes from the peak down to a 2^20th of it, ties of every code of 8 bits, more than one slice in all."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(200_000, generator=generator, dtype=torch.float64)
    x *= torch.exp2(-20 * torch.rand(x.shape, generator=generator, dtype=torch.float64))
    x = (x / x.abs().max()).clamp(-1, 1)
    unit = 2.0 ** (round(math.log2(peak)) - 7) / peak
    ties = torch.arange(-600, 601, dtype=torch.float64) * (unit / 4)
    x = torch.cat([x, ties[ties.abs() <= 1], torch.tensor([1.0, -0.0], dtype=torch.float64)])
    return (x * peak).to(dtype)


@given(st.floats(min_value=5e-324, max_value=1e300, allow_subnormal=True))
def test_range_is_the_nearest_power_on_the_scale_of_logarithms(peak: float) -> None:
    n = int(range_exponent(torch.tensor(peak, dtype=torch.float64), -2000))
    square = Fraction(peak) ** 2
    if n < 127:
        assert square < 2 * Fraction(4) ** n
    assert square > Fraction(4) ** n / 2
    assert host_exponent(peak, -2000) == n


@pytest.mark.parametrize("n", [-149, -127, -126, -60, -1, 0, 1, 60, 126])
def test_range_turns_between_the_neighbors_of_root_two(n: int) -> None:
    root = torch.tensor(math.sqrt(2.0), dtype=torch.float64)  # the float64 above sqrt(2)
    below = torch.nextafter(root, torch.zeros_like(root))
    for value, expected in ((root, n + 1), (below, n)):
        peak = value * 2.0**n
        assert range_exponent(peak).item() == expected
        assert host_exponent(float(peak), EXPONENT_MIN) == expected
    narrow = torch.tensor(1.4142135) * 2.0**n
    if n >= -126:
        assert range_exponent(narrow).item() == n
        assert range_exponent(torch.nextafter(narrow, narrow * 2)).item() == n + 1


def test_range_of_zero_and_of_what_is_not_finite_is_one() -> None:
    assert range_exponent(torch.tensor([0.0, *NOT_FINITE])).tolist() == [0, 0, 0, 0]
    assert host_exponent(0.0, EXPONENT_MIN) == 0
    assert range_exponent(torch.tensor([1e-40, 3e38]), -100).tolist() == [-100, 127]
    assert (host_exponent(1e-40, -100), host_exponent(3e38, -100)) == (-100, 127)


def test_max_abs() -> None:
    assert max_abs(torch.tensor([-3.0, 2.0])).item() == 3
    assert max_abs(torch.tensor([-(2**31), 5], dtype=torch.int32)).item() == 2.0**31
    assert max_abs(torch.zeros(0)).item() == 0
    assert max_abs(torch.tensor([1.0, math.nan])).isnan().item()
    assert max_abs(torch.tensor([1.0, -math.inf])).item() == math.inf


@given(
    values=st.lists(st.floats(width=32, min_value=-(2.0**20), max_value=2.0**20), min_size=1, max_size=8),
    bits=st.integers(2, 16),
    clip_to_one=st.booleans(),
)
def test_shift_follows_exact_fractions(values: list[float], bits: int, clip_to_one: bool) -> None:
    peak = max(abs(v) for v in values)
    n = 0 if peak == 0 else host_exponent(peak, EXPONENT_MIN + bits - 1)
    step = Fraction(2) ** (n - (bits - 1))
    limit = 2 ** (bits - 1) - (0 if clip_to_one else 1)
    codes = [min(max(round(Fraction(v) / step), -limit), limit) for v in values]
    x = torch.tensor(values)
    for function in (shift_quantize, shift_quantize_reference):
        y, finite = function(x, bits, clip_to_one=clip_to_one)
        assert y.tolist() == [float(c * step) for c in codes]
        assert bool(finite)
    if not clip_to_one:
        for codes_of in (shift_codes, shift_codes_reference):
            got, exponent, _ = codes_of(x, bits)
            assert (got.tolist(), int(exponent)) == (codes, n - (bits - 1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("peak", [3e-3, 1.0, 1.4142, 1.4143, 1e-33, 1e-40, 3e38, 1e30])
def test_fast_shift_equals_the_formula(bits: int, peak: float) -> None:
    x = errors(peak)
    for clip_to_one in (False, True):
        y, finite = shift_quantize(x, bits, clip_to_one=clip_to_one)
        expected, also = shift_quantize_reference(x, bits, clip_to_one=clip_to_one)
        assert torch.equal(y, expected)
        assert bool(finite)
        assert bool(also)
    for a, b in zip(shift_codes(x, bits), shift_codes_reference(x, bits), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    codes, exponent, _ = shift_codes(x, bits)
    assert torch.equal(codes.double() * 2.0 ** int(exponent), shift_quantize(x, bits)[0].double())
    assert codes.dtype == (torch.int8 if bits <= 8 else torch.int16)


def test_clip_to_one_reaches_a_code_that_is_no_int8() -> None:
    x = torch.tensor([1.4, -1.4, 0.999])
    assert (shift_quantize(x, 8, clip_to_one=True)[0] * 128).tolist() == [128.0, -128.0, 128.0]
    assert (shift_quantize(x, 8)[0] * 128).tolist() == [127.0, -127.0, 127.0]


@pytest.mark.parametrize("bad", NOT_FINITE, ids=["nan", "inf", "minus_inf"])
def test_what_is_not_finite_is_handed_on_with_a_flag(bad: float) -> None:
    x = torch.tensor([0.3, bad, -0.7])
    for function in (shift_quantize, shift_quantize_reference):
        y, finite = function(x, 8)
        assert not bool(finite)
        assert torch.equal(y.nan_to_num(9.0), x.nan_to_num(9.0))
    for codes_of in (shift_codes, shift_codes_reference):
        codes, _, finite = codes_of(x, 8)
        assert not bool(finite)
        assert codes.tolist() == [0, 0, 0]


def test_zeros_and_nothing() -> None:
    for shape in ((3, 4), (0, 4), ()):
        zeros = torch.zeros(shape)
        for function in (shift_quantize, shift_quantize_reference):
            y, finite = function(zeros, 8)
            assert torch.equal(y, zeros)
            assert bool(finite)
        assert torch.equal(shift_codes(zeros)[0], torch.zeros(shape, dtype=torch.int8))


def test_the_peak_of_several_ranks() -> None:
    x = torch.tensor([0.3, -0.7])
    for function in (shift_quantize, shift_quantize_reference):
        y, _ = function(x, 4, peak=torch.tensor(4.0))
        assert y.tolist() == [0.5, -0.5]
    for codes_of in (shift_codes, shift_codes_reference):
        codes, exponent, _ = codes_of(x, 4, peak=torch.tensor(4.0))
        assert (codes.tolist(), int(exponent)) == ([1, -1], -1)


def test_layouts_and_half_precision() -> None:
    x = errors(0.01)[:840].reshape(2, 3, 10, 14)
    for view in (x.contiguous(memory_format=torch.channels_last), x[:, :, ::2], x.permute(3, 1, 0, 2), x.bfloat16()):
        y, _ = shift_quantize(view)
        assert torch.equal(y, shift_quantize_reference(view.float())[0])
        assert torch.equal(shift_codes(view)[0], shift_codes_reference(view.float())[0])
    assert shift_codes(x.contiguous(memory_format=torch.channels_last))[0].is_contiguous(
        memory_format=torch.channels_last
    )


def test_the_gradient_is_that_of_the_identity() -> None:
    g = torch.tensor([1.0, -2.0, 3.0])
    for function in (shift_quantize, shift_quantize_reference):
        x = torch.tensor([1.4, 0.2, -1.4], requires_grad=True)
        assert torch.equal(torch.autograd.grad(function(x)[0], x, g)[0], g)


def test_bits_out_of_range_are_refused() -> None:
    for bits in (1, 17):
        with pytest.raises(ConfigError, match=rf"bits={bits}, expected 2\.\.16"):
            shift_quantize(torch.ones(2), bits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13's compiler itself uses what torch has deprecated
def test_whole_graphs_equal_eager() -> None:
    def both(x: Tensor) -> tuple[Tensor, ...]:
        return *shift_quantize(x, 8), *shift_codes(x, 8)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for x in (errors(3e-3), torch.tensor([1.0, math.inf, 0.3])):
        for a, b in zip(both(x), compiled(x), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
