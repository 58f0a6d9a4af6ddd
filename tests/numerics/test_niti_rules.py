"""NITI's rules against exact rational arithmetic, from subnormal to the largest float."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_lowbit.numerics.exponent import EXPONENT_MAX, EXPONENT_MIN
from lightning_lowbit.numerics.niti_rules import (
    act_shift,
    decayed,
    grad_shift,
    input_codes,
    weight_codes_maxnorm,
)

SUBNORMAL = 2.0**-149
LARGEST = float(torch.finfo(torch.float32).max)
FLOATS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=6)


def ceil_log2(value: Fraction) -> int:
    k = value.numerator.bit_length() - value.denominator.bit_length()
    return next(e for e in range(k - 1, k + 2) if Fraction(2) ** e >= value)


def exact_codes(values: list[float], range_exponent: int | None, narrow: bool) -> tuple[list[int], int]:
    """The input rule in rationals."""
    largest = max(abs(Fraction(v)) for v in values)
    b = range_exponent
    if b is None:
        b = ceil_log2(largest) if largest else 0
    s = min(max(b - 7, EXPONENT_MIN), EXPONENT_MAX)
    codes = [round(Fraction(v) / Fraction(2) ** s) for v in values]  # Python rounds halves to even
    return [max(-127 if narrow else -128, min(127, c)) for c in codes], s


@given(values=FLOATS, b=st.none() | st.integers(-160, 140), narrow=st.booleans())
@example(values=[SUBNORMAL, -SUBNORMAL], b=None, narrow=False)
@example(values=[2.0**-142, SUBNORMAL], b=None, narrow=False)
@example(values=[2.0**-127, 3 * SUBNORMAL, 2.0**-135], b=None, narrow=False)
@example(values=[LARGEST, -LARGEST, 1.0], b=None, narrow=False)
@example(values=[2.0**119, 2.0**-149], b=None, narrow=True)
@example(values=[1.0, 0.5 / 128, 1.5 / 128, -2.5 / 128], b=None, narrow=False)
@example(values=[0.0, -0.0], b=None, narrow=False)
def test_inputs_are_exact_for_every_float(values: list[float], b: int | None, narrow: bool) -> None:
    static = None if b is None else torch.tensor(b, dtype=torch.int32)
    codes, exponent = input_codes(torch.tensor(values), static, narrow)
    assert (codes.tolist(), exponent.item()) == exact_codes(values, b, narrow)
    assert (codes.dtype, exponent.dtype, exponent.shape) == (torch.int8, torch.int32, ())


def test_inputs_of_other_dtypes_are_scaled_as_they_are() -> None:
    tie = torch.tensor([1.0, 2.5 / 128, 2.5 / 128 + 2.0**-40], dtype=torch.float64)
    assert input_codes(tie)[0].tolist() == [127, 2, 3]  # in float32 the third would be a tie as well
    for dtype in (torch.bfloat16, torch.float16):
        codes, exponent = input_codes(torch.tensor([2.0**-14, -(2.0**-15)], dtype=dtype))
        assert (codes.tolist(), exponent.item()) == ([127, -64], -21)


def test_an_empty_input_counts_as_zeros() -> None:
    codes, exponent = input_codes(torch.zeros(0, 3))
    assert (codes.shape, exponent.item()) == ((0, 3), -7)


def test_a_frozen_range_is_no_function_of_the_batch() -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(7))
    whole, _ = input_codes(x, 1)
    assert torch.equal(whole, torch.cat([input_codes(row[None], 1)[0] for row in x]))
    assert not torch.equal(whole, torch.cat([input_codes(row[None])[0] for row in x]))


def test_rules_leave_their_arguments_alone_and_cut_the_graph() -> None:
    x = torch.randn(8, requires_grad=True)
    before = x.detach().clone()
    for codes, exponent in (input_codes(x), weight_codes_maxnorm(x), input_codes(x.detach())):
        assert not codes.requires_grad
        assert not exponent.requires_grad
    assert torch.equal(x, before)


@given(values=FLOATS)
@example(values=[SUBNORMAL])
@example(values=[LARGEST, -LARGEST / 2])
@example(values=[0.0])
def test_drawn_weights_reach_127_and_stay_within_a_code(values: list[float]) -> None:
    codes, exponent = weight_codes_maxnorm(torch.tensor(values))
    largest = max(abs(Fraction(v)) for v in values)
    if largest == 0:
        assert (codes.tolist(), exponent.item()) == ([0] * len(values), -7)
        return
    assert codes.abs().max() == 127
    assert exponent == min(max(ceil_log2(largest) - 7, EXPONENT_MIN), EXPONENT_MAX)
    for code, value in zip(codes.tolist(), values, strict=True):
        assert abs(code - Fraction(value) / largest * 127) <= Fraction(1, 2) + Fraction(1, 2**16)


@pytest.mark.parametrize("mu", [5, 4, 0, -1, -4])
def test_a_gradient_is_brought_to_mu_bits(mu: int) -> None:
    width = torch.arange(0, 40, dtype=torch.int32)
    shift = grad_shift(width, mu)
    assert torch.equal(shift, grad_shift(width, torch.tensor(mu, dtype=torch.int32)))
    assert shift.tolist() == [0 if w == 0 or w - mu < 1 else w - mu for w in range(40)]
    assert shift.dtype == torch.int32


def test_an_activation_is_never_shifted_left() -> None:
    assert act_shift(torch.arange(0, 12, dtype=torch.int32)).tolist() == [0] * 8 + [1, 2, 3, 4]


@given(top=st.integers(0, 2**40), w=st.integers(-127, 127))
def test_decay_truncates_toward_zero_and_never_overflows(top: int, w: int) -> None:
    bits = (top - 1).bit_length() if top else 0
    term = Fraction(w) * Fraction(2) ** (bits - 15)
    got = decayed(torch.tensor([top, -top]), torch.tensor([w, w], dtype=torch.int8))
    assert got.tolist() == [top + math.trunc(term), -top + math.trunc(term)]


def test_decay_of_int32_accumulators_is_wide() -> None:
    top = torch.tensor([2**31 - 1], dtype=torch.int32)
    assert decayed(top, torch.tensor([127], dtype=torch.int8)).item() == 2**31 - 1 + 127 * 2**16
