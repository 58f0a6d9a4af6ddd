"""The integer loss against Python's unbounded integers, and against the float loss that it stands for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.integer_loss import ERROR_EXPONENT, cross_entropy_error, extra_bits, wide_error

INT8 = st.integers(-128, 127)
ROWS = st.lists(INT8, min_size=1, max_size=12)


def tdiv(num: int, den: int) -> int:
    return int(math.copysign(abs(num) // den, num))


def twin(row: list[int], s: int, target: int, smallest: int = -25, largest: int = 32, k: int = 0) -> list[int]:
    """The published formulas, one row, with as many bits as they need."""
    if s > -7:
        z = [tdiv(a * 47274, 2**15) for a in row]
        z = [v << min(s, largest) if s >= 0 else tdiv(v, 2**-s) for v in z]
        x = [2 ** max(0, v - max(z) + 10) - 1 for v in z]
    else:
        row = [tdiv(a, 2 ** max(0, smallest - s)) for a in row]
        s = max(s, smallest)
        x = [2 ** (1 - 2 * s) + a * 2 ** (1 - s) + a * a for a in row]
    total = sum(x)
    p = [v * 2 ** (11 + k) // total for v in x]
    p[target] -= sum(p)
    return p


def row_of(values: list[int]) -> Tensor:
    return torch.tensor([values], dtype=torch.int8)


def wide(values: list[int], s: int, target: int) -> list[int]:
    exponent = torch.tensor(s, dtype=torch.int32)
    return wide_error(row_of(values), exponent, torch.tensor([target])).tolist()[0]


@given(row=ROWS, s=st.integers(-60, 60), data=st.data())
@example(row=[127, -128, 0], s=-7, data=None)
@example(row=[127, -128, 0], s=-6, data=None)
@example(row=[127, -128, 126], s=-25, data=None)
@example(row=[127, -128, 126], s=-26, data=None)
@example(row=[127, 126, 125], s=33, data=None)
def test_agrees_with_unbounded_integers(row: list[int], s: int, data: st.DataObject | None) -> None:
    target = data.draw(st.integers(0, len(row) - 1)) if data else 0
    assert wide(row, s, target) == twin(row, s, target)


@given(row=ROWS, s=st.integers(-25, 55))
def test_no_guard_acts_where_the_published_form_fits_int64(row: list[int], s: int) -> None:
    assert wide(row, s, 0) == twin(row, s, 0, smallest=-200, largest=200)


@pytest.mark.parametrize("classes", [1, 2, 10, 1000, 1024, 1025, 5000, 70_000])
@pytest.mark.parametrize("s", [-149, -60, -32, -31, -26, -25, -24, -12, -8, -7, -6, -1, 0, 5, 31, 33, 60, 120])
@pytest.mark.parametrize("logits", ["equal", "zero", "extremes", "random"])
def test_every_row_sums_to_zero_and_none_falls_silent(classes: int, s: int, logits: str) -> None:
    payload = {
        "equal": torch.full((2, classes), -128),
        "zero": torch.zeros(2, classes),
        "extremes": torch.tensor([-128, 127]).repeat(classes)[: 2 * classes].view(2, classes),
        "random": torch.randint(-128, 128, (2, classes), generator=torch.Generator().manual_seed(7)),
    }[logits].to(torch.int8)
    target = torch.tensor([0, classes - 1])
    error = wide_error(payload, torch.tensor(s, dtype=torch.int32), target)
    k = extra_bits(classes)
    assert error.sum(1).tolist() == [0, 0]
    assert error.abs().max() <= 2 ** (11 + k)
    others = error.scatter(1, target[:, None], 0)
    assert (others >= 0).all()
    saturated = s > -7 and logits in ("extremes", "random")
    if classes > 1 and not saturated:
        assert (error.gather(1, target[:, None]) < 0).all()
    if logits in ("equal", "zero") or s <= -12:  # about uniform: every class's probability is visible
        assert (others > 0).sum() == 2 * (classes - 1)


def test_large_numbers_of_classes_get_more_bits() -> None:
    equal = torch.zeros(1, 5000, dtype=torch.int8)
    target = torch.tensor([3])
    assert wide_error(equal, 0, target, extra=0).abs().max() == 0  # the published 11 bits: nothing would train
    assert wide_error(equal, 0, target)[0, :5].tolist() == [3, 3, 3, -3 * 4999, 3]
    error = cross_entropy_error(equal, 0, target, torch.zeros(1, 5000, dtype=torch.int64))
    assert error[0, :5].tolist() == [1, 1, 1, -118, 1]  # 14,997 = 117 * 2^7 + 21 goes up


@pytest.mark.parametrize("s", [-12, -9, -8, -7])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_extra_bits_never_overflow_int64(s: int, k: int) -> None:
    row = [127, -128, 5, 0] * 256 * 2**k
    for exponent in (s, s - 16, s - 30):
        assert wide(row, exponent, 2) == twin(row, exponent, 2, smallest=-25 + (k + 1) // 2, k=k)


@pytest.mark.parametrize("s", [-10, -8, -7, -6, -5, -4])
def test_is_about_softmax_minus_one_hot(s: int) -> None:
    gen = torch.Generator().manual_seed(7)
    payload = torch.randint(-127, 128, (64, 10), dtype=torch.int8, generator=gen)
    target = torch.randint(0, 10, (64,), generator=gen)
    p = torch.softmax(payload.double() * 2.0**s, 1)
    want = p - torch.nn.functional.one_hot(target, 10)
    got = wide_error(payload, s, target) * 2.0**-11
    # Taylor drops a third term below 0.22 of e^v for |v| < 1; the other branch has whole z, so x is off by up to 2.
    bound = 0.1 if s <= -7 else 0.34
    assert (got - want).abs().max() < bound
    assert torch.equal(got.argmin(1), target)


def test_the_final_shift_is_unbiased() -> None:
    gen = torch.Generator().manual_seed(7)
    payload = torch.randint(-20, 20, (1, 10), dtype=torch.int8, generator=gen)
    n, target, s = 40_000, torch.tensor([4]), -4
    want = wide_error(payload, s, target)[0] * 2.0**-4
    noise = torch.randint(0, 2**31, (n, 10), generator=gen)
    drawn = cross_entropy_error(payload.expand(n, 10), s, target.expand(n), noise).double()
    fraction = want - want.floor()
    assert (fraction > 0).sum() >= 5
    sigma = (fraction * (1 - fraction) / n).sqrt()
    assert ((drawn.mean(0) - want).abs() <= 5 * sigma).all()  # five sigma: 6e-6 by chance for ten means


def test_each_of_the_sixteen_numbers_decides_as_its_definition_says() -> None:
    row, target = [3, -2, 1, 0], 1
    error = twin(row, -3, target)
    for r in range(16):
        up = [abs(e) // 16 + (abs(e) % 16 > r) for e in error]
        want = [int(math.copysign(u, e)) for u, e in zip(up, error, strict=True)]
        for high in (0, 1 << 4, -(1 << 40)):  # only the low bits are looked at
            noise = torch.full((1, 4), r + high)
            assert cross_entropy_error(row_of(row), -3, torch.tensor([target]), noise).tolist()[0] == want


def test_the_result_never_leaves_127_and_its_exponent_makes_it_a_probability() -> None:
    certain = row_of([127, -127])
    noise = torch.zeros(1, 2, dtype=torch.int32)
    assert cross_entropy_error(certain, 0, torch.tensor([1]), noise).tolist() == [[127, -127]]
    half = cross_entropy_error(row_of([0, 0]), 0, torch.tensor([1]), noise)
    assert (half * 2.0**ERROR_EXPONENT).tolist() == [[0.5, -0.5]]
    assert half.dtype == torch.int8


def test_an_empty_batch_passes() -> None:
    empty = torch.zeros(0, 3, dtype=torch.int8)
    assert cross_entropy_error(empty, 0, torch.zeros(0, dtype=torch.int64), empty.int()).shape == (0, 3)


def test_other_shapes_and_dtypes_are_refused() -> None:
    row, target, noise = row_of([1, 2]), torch.tensor([0]), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"logits torch\.float32 \(1, 2\), expected torch\.int8 \(N, C\)"):
        wide_error(row.float(), 0, target)
    with pytest.raises(ConfigError, match=r"logits torch\.int8 \(2,\)"):
        wide_error(row[0], 0, target)
    with pytest.raises(ConfigError, match=r"target torch\.float32 \(1, 2\), expected torch\.int64 \(1,\)"):
        wide_error(row, 0, torch.zeros(1, 2))
    with pytest.raises(ConfigError, match=r"noise of shape \(1,\), expected \(1, 2\)"):
        cross_entropy_error(row, 0, target, noise[:, 0])
