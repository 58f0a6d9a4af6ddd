"""Powers of two are exact, and so are their logarithms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_lowbit.numerics.exponent import (
    EXPONENT_MAX,
    EXPONENT_MIN,
    ceil_log2,
    clamp_exponent,
    log2_threshold,
    pow2,
)

POSITIVE32 = st.floats(min_value=2.0**-149, width=32, allow_infinity=False, exclude_min=False)


def test_pow2_is_exact_over_the_whole_range() -> None:
    for dtype, low, high in ((torch.float32, -149, 127), (torch.float64, -1074, 1023)):
        e = torch.arange(low, high + 1)
        want = torch.tensor([math.ldexp(1.0, k) for k in e.tolist()], dtype=torch.float64).to(dtype)
        for kind in (e, e.to(torch.int32), e.to(torch.float32)):
            assert torch.equal(pow2(kind, dtype), want)
        assert pow2(torch.tensor([low - 1, low - 900]), dtype).tolist() == [0.0, 0.0]
        assert pow2(torch.tensor([high + 1, high + 900]), dtype).tolist() == [math.inf, math.inf]


def test_pow2_of_other_types_is_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.bfloat16"):
        pow2(3, torch.bfloat16)


def test_an_int8_carrier_is_exact_at_both_ends() -> None:
    codes = torch.arange(-128, 128, dtype=torch.float64)
    for e in (EXPONENT_MIN, EXPONENT_MAX):
        carrier = codes.float() * pow2(e)
        assert torch.equal(carrier.double(), codes * pow2(e, torch.float64))
        assert torch.equal(clamp_exponent(torch.tensor(e)), torch.tensor(e))


@given(t=POSITIVE32)
def test_ceil_log2_is_the_smallest_exponent_that_covers(t: float) -> None:
    k = int(ceil_log2(torch.tensor(t)))
    assert math.ldexp(1.0, k) >= t > math.ldexp(1.0, k - 1)
    assert int(ceil_log2(torch.tensor(t, dtype=torch.float64))) == k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ceil_log2_on_and_beside_every_power_of_two(dtype: torch.dtype) -> None:
    k = torch.arange(-126, 127, dtype=torch.int32)
    t = pow2(k, torch.float64).to(dtype)
    assert torch.equal(ceil_log2(t), k)
    assert torch.equal(ceil_log2(torch.nextafter(t, torch.full_like(t, math.inf))), k + 1)
    assert torch.equal(ceil_log2(torch.nextafter(t, torch.zeros_like(t))), k)


@given(t=st.floats(0, 2.0**31, width=32))
def test_ceil_of_log2_threshold_is_ceil_log2(t: float) -> None:
    x = torch.tensor(t)
    log2_t = log2_threshold(x)
    assert log2_t.dtype == torch.float32
    assert int(torch.ceil(log2_t)) == int(ceil_log2(x.clamp(min=2.0**-24)))
    assert abs(float(log2_t) - math.log2(max(t, 2.0**-24))) < 4e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log2_threshold_beside_every_power_of_two(dtype: torch.dtype) -> None:
    k = torch.arange(-23, 40)
    t = pow2(k, torch.float64).to(dtype)
    above, below = torch.nextafter(t, 2 * t), torch.nextafter(t, 0 * t)
    assert torch.equal(log2_threshold(t), k.float())
    assert torch.equal(torch.ceil(log2_threshold(above)), k + 1.0)
    assert torch.equal(torch.ceil(log2_threshold(below)), k.float())


def test_what_has_no_logarithm_is_pinned() -> None:
    assert ceil_log2(torch.tensor([-1.0, 0.0, math.inf, math.nan])).tolist() == [-149, -149, 128, 128]
    assert ceil_log2(torch.tensor([3, 4, 5])).tolist() == [2, 2, 3]
