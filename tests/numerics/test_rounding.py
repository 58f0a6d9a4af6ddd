"""Each rounding against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_lowbit.numerics.rounding import (
    Rounding,
    divide_rounded,
    round_to,
    saturate,
    shift_right_rounded,
)

INT32 = st.integers(-(2**31), 2**31 - 1)
EDGES32 = st.sampled_from([-(2**31), -(2**31) + 1, -1, 0, 1, 2**30, 2**31 - 1])


def exact(value: Fraction, rounding: Rounding) -> int:
    """The definition, in rationals."""
    half = Fraction(1, 2)
    floor, fraction = math.floor(value), value - math.floor(value)
    ties_up = {
        Rounding.HALF_EVEN: floor % 2 == 1,
        Rounding.HALF_UP: True,
        Rounding.HALF_AWAY: value > 0,
        Rounding.DPU: value < 0 or floor % 2 == 1,
    }
    if rounding is Rounding.FLOOR:
        return floor
    if rounding is Rounding.TRUNCATE:
        return math.trunc(value)
    return floor + int(fraction > half or (fraction == half and ties_up[rounding]))


# Where floor(x + 0.5) goes wrong: just below a half, and odd values whose neighbors are one apart.
@example(x=0.49999997, rounding=Rounding.HALF_UP)
@example(x=-0.49999997, rounding=Rounding.HALF_AWAY)
@example(x=2.0**23 + 1, rounding=Rounding.HALF_UP)
@given(x=st.floats(width=32, allow_nan=False, allow_infinity=False), rounding=st.sampled_from(Rounding))
def test_round_to_is_exact_for_every_float(x: float, rounding: Rounding) -> None:
    for dtype in (torch.float32, torch.float64):
        assert round_to(torch.tensor(x, dtype=dtype), rounding).item() == exact(Fraction(x), rounding)


@given(quarters=st.integers(-(2**24), 2**24), rounding=st.sampled_from(Rounding))
def test_round_to_on_ties(quarters: int, rounding: Rounding) -> None:
    x = quarters / 4
    assert round_to(torch.tensor(x), rounding).item() == exact(Fraction(x), rounding)


@pytest.mark.parametrize("rounding", list(Rounding))
def test_round_to_passes_what_is_not_finite_and_keeps_zero(rounding: Rounding) -> None:
    out = round_to(torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0]), rounding)
    assert out[:2].tolist() == [math.inf, -math.inf]
    assert out[2].isnan()
    assert out[3:].tolist() == [0.0, 0.0]


@given(acc=INT32 | EDGES32, shift=st.integers(0, 40), rounding=st.sampled_from(Rounding))
def test_shift_right_never_overflows_an_int32(acc: int, shift: int, rounding: Rounding) -> None:
    want = exact(Fraction(acc, 2**shift), rounding)
    for given_shift in (shift, torch.tensor(shift, dtype=torch.int32)):
        out = shift_right_rounded(torch.tensor(acc, dtype=torch.int32), given_shift, rounding)
        assert out.dtype == torch.int32
        assert out.item() == want


@given(acc=st.integers(-(2**61) + 1, 2**61 - 1), shift=st.integers(0, 70), rounding=st.sampled_from(Rounding))
def test_shift_right_of_int64_inside_its_bound(acc: int, shift: int, rounding: Rounding) -> None:
    assert shift_right_rounded(torch.tensor(acc), shift, rounding).item() == exact(Fraction(acc, 2**shift), rounding)


@given(acc=st.integers(-(2**20), 2**20), shift=st.integers(0, 10), rounding=st.sampled_from(Rounding))
def test_negative_shift_multiplies(acc: int, shift: int, rounding: Rounding) -> None:
    assert shift_right_rounded(torch.tensor(acc, dtype=torch.int32), -shift, rounding).item() == acc * 2**shift


def test_shift_per_channel_broadcasts() -> None:
    acc = torch.tensor([[5, 5], [-5, -5]], dtype=torch.int32)
    assert shift_right_rounded(acc, torch.tensor([1, 2])).tolist() == [[2, 1], [-2, -1]]


# Twice the rest leaves int64 here.
@example(num=2**63 - 2, den=2**63 - 1, rounding=Rounding.HALF_EVEN)
@example(num=2**62, den=2**63 - 1, rounding=Rounding.HALF_UP)
@settings(max_examples=200)
@given(
    num=st.integers(-(2**63) + 1, 2**63 - 1) | st.integers(-200, 200),
    den=st.integers(1, 2**63 - 1) | st.integers(1, 64),
    rounding=st.sampled_from(Rounding),
)
def test_divide_rounded_is_exact_for_every_int64(num: int, den: int, rounding: Rounding) -> None:
    want = exact(Fraction(num, den), rounding)
    assert divide_rounded(torch.tensor(num), den, rounding).item() == want
    assert divide_rounded(torch.tensor(num), torch.tensor(den), rounding).item() == want


@given(acc=INT32, shift=st.integers(0, 30), rounding=st.sampled_from(Rounding))
def test_shift_division_and_float_rounding_agree(acc: int, shift: int, rounding: Rounding) -> None:
    x = torch.tensor(acc)
    shifted = shift_right_rounded(x, shift, rounding)
    assert torch.equal(shifted, divide_rounded(x, 2**shift, rounding))
    assert shifted.item() == round_to(x.double() / 2**shift, rounding).item()


def test_floats_and_signs_are_refused() -> None:
    with pytest.raises(TypeError, match="use round_to for floats"):
        shift_right_rounded(torch.tensor(1.0), 1)
    with pytest.raises(TypeError, match="use round_to for floats"):
        divide_rounded(torch.tensor(True), 1)
    with pytest.raises(ZeroDivisionError, match="expected an integer >= 1"):
        divide_rounded(torch.tensor(1), -2)
    with pytest.raises(ValueError, match="half_odd"):
        round_to(torch.tensor(1.0), "half_odd")


def test_a_rounding_is_known_by_its_name() -> None:
    assert round_to(torch.tensor(0.5), "half_up").item() == 1.0
    assert f"{Rounding.HALF_EVEN}" == "half_even"


def test_saturate_takes_tensors_as_ends() -> None:
    x = torch.tensor([[-9, 9], [-9, 9]])
    assert saturate(x, torch.tensor([[-2], [-4]]), torch.tensor([[1], [3]])).tolist() == [[-2, 1], [-4, 3]]
