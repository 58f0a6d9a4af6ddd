"""Width, rounding shift and common exponent, against Python's integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lowbit.numerics.block import MAX_SHIFT, ShiftRounding, align, align_all, bit_width, shift_round

ROUNDINGS = list(ShiftRounding)
INT64S = st.one_of(st.integers(-(2**63) + 1, 2**63 - 1), st.integers(-300, 300))


def rounded(x: int, s: int, rounding: ShiftRounding, r: int = 0, noise_bits: int = MAX_SHIFT) -> int:
    """The table of ``shift_round``, on Python's integers."""
    if s < 1:
        return x
    if s > MAX_SHIFT:
        return 0
    a = abs(x)
    f = a % 2**s
    if rounding is ShiftRounding.HALF_AWAY:
        up = 2 * f >= 2**s
    elif rounding is ShiftRounding.PSEUDO_STOCHASTIC:
        h = s // 2
        low = f % 2**h
        up = f // 2**h > (2 * low if s % 2 else low)
    else:
        up = f // 2 ** max(s - noise_bits, 0) > r % 2 ** min(s, noise_bits)
    return (a // 2**s + up) * (1 if x > 0 else -1)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@given(values=st.lists(INT64S, max_size=8), s=st.integers(-3, 70), seed=st.integers(0, 2**62 - 1))
def test_shift_round_follows_its_table(rounding: ShiftRounding, values: list[int], s: int, seed: int) -> None:
    x = torch.tensor(values, dtype=torch.int64)
    noise = torch.full_like(x, seed)
    expected = [rounded(v, s, rounding, seed) for v in values]
    assert shift_round(x, s, rounding, noise).tolist() == expected
    assert shift_round(x, torch.tensor(s, dtype=torch.int32), rounding, noise).tolist() == expected


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_shift_round_keeps_the_dtype_to_its_ends(rounding: ShiftRounding, dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    x = torch.tensor([info.min, info.min + 1, -1, 0, 1, info.max - 1, info.max], dtype=dtype)
    for s in range(1, 40):
        got = shift_round(x, s, rounding, torch.zeros_like(x, dtype=torch.int64))
        assert got.dtype == dtype
        assert got.tolist() == [rounded(v, s, rounding) for v in x.tolist()]


@pytest.mark.parametrize("s", range(1, 11))
def test_stochastic_goes_up_for_exactly_the_dropped_part_of_all_noise(s: int) -> None:
    r = torch.arange(2**s)
    for f in (0, 1, 2**s // 2, 2**s - 1):
        for sign in (1, -1):
            x = torch.full_like(r, sign * (3 * 2**s + f))
            moved = shift_round(x, s, "stochastic", r)
            assert int((moved - 3 * sign).abs().sum()) == f


def test_int32_noise_counts_as_31_bits() -> None:
    noise = torch.tensor([-1, -(2**31), 2**31 - 1, 0, 5], dtype=torch.int32)
    x = torch.full((5,), 2**40 + 2**34, dtype=torch.int64)
    for s in (3, 31, 32, 36, 41, 45):
        got = shift_round(x, s, "stochastic", noise).tolist()
        assert got == [rounded(2**40 + 2**34, s, ShiftRounding.STOCHASTIC, r, 31) for r in noise.tolist()]


@pytest.mark.parametrize(("s", "share"), [(1, 1 / 2), (2, 1 / 4), (3, 1 / 2), (4, 3 / 8), (6, 7 / 16), (8, 15 / 32)])
def test_the_bias_of_pseudo_stochastic_is_as_documented(s: int, share: float) -> None:
    assert float(shift_round(torch.arange(2**s), s, "pseudo_stochastic").double().mean()) == share


def test_stochastic_asks_for_noise() -> None:
    with pytest.raises(TypeError, match="noise"):
        shift_round(torch.tensor([1]), 1, "stochastic")


@given(values=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5))
def test_bit_width_of_int64(values: list[int]) -> None:
    peak = max((abs(v) for v in values), default=0)
    width = bit_width(torch.tensor(values, dtype=torch.int64))
    assert width.dtype == torch.int32
    assert width.shape == ()
    assert width.item() == (max(peak, 1) - 1).bit_length()


@pytest.mark.parametrize("k", range(1, 31))
@pytest.mark.parametrize("sign", [1, -1])
def test_bit_width_turns_just_above_a_power_of_two(k: int, sign: int) -> None:
    for peak, width in ((2**k - 1, k if k > 1 else 0), (2**k, k), (2**k + 1, k + 1)):
        for dtype in (torch.int32, torch.int64, torch.float64):
            assert bit_width(torch.tensor([0, sign * peak], dtype=dtype)).item() == width
        if peak < 2**24:
            assert bit_width(torch.tensor([sign * peak], dtype=torch.float32)).item() == width


def test_bit_width_of_the_least_int32_of_bytes_and_of_nothing() -> None:
    assert bit_width(torch.tensor([-(2**31)], dtype=torch.int32)).item() == 31
    assert bit_width(torch.tensor([-128, 127], dtype=torch.int8)).item() == 7
    assert bit_width(torch.tensor([255], dtype=torch.uint8)).item() == 8
    assert bit_width(torch.zeros(0, 3, dtype=torch.int32)).item() == 0


def check_aligned(payloads: list[Tensor], exponents: list[int], room: int, word: torch.dtype) -> None:
    aligned, exponent = align_all(payloads, [torch.tensor(e, dtype=torch.int32) for e in exponents])
    e = max(min(exponents), max(exponents) - room)
    assert exponent.dtype == torch.int32
    assert exponent.item() == e
    for before, own, after in zip(payloads, exponents, aligned, strict=True):
        assert after.dtype == word
        if own >= e:
            assert after.tolist() == [v * 2 ** (own - e) for v in before.tolist()]
        else:
            assert after.tolist() == [rounded(v, e - own, ShiftRounding.HALF_AWAY) for v in before.tolist()]


@given(
    a=st.lists(st.integers(-128, 127), min_size=4, max_size=4),
    b=st.lists(st.integers(-128, 127), min_size=4, max_size=4),
    ea=st.integers(-149, 120),
    gap=st.integers(-60, 60),
)
def test_align_int8(a: list[int], b: list[int], ea: int, gap: int) -> None:
    x, y = torch.tensor(a, dtype=torch.int8), torch.tensor(b, dtype=torch.int8)
    check_aligned([x, y], [ea, ea + gap], 22, torch.int32)
    p, q, e = align(x, ea, y, ea + gap)
    if 0 <= gap <= 22:
        assert e.item() == ea
        assert (p + q).tolist() == [u + v * 2**gap for u, v in zip(a, b, strict=True)]


@given(
    values=st.lists(st.integers(-(2**31), 2**31), min_size=2, max_size=2),
    exponents=st.lists(st.integers(-149, 120), min_size=2, max_size=2),
)
def test_align_wide(values: list[int], exponents: list[int]) -> None:
    payloads = [torch.tensor([v], dtype=torch.int64) for v in values]
    check_aligned(payloads, exponents, 30, torch.int64)
    (p, q), _ = align_all(payloads, exponents)
    assert (p + q).item() == p.item() + q.item()  # within int64


def test_four_aligned_int8_payloads_add_up_within_int32() -> None:
    coarse = [torch.tensor([v, v], dtype=torch.int8) for v in (127, 127, 127)]
    aligned, _ = align_all([*coarse, torch.tensor([127, -128], dtype=torch.int8)], [22, 22, 22, 0])
    total = torch.stack(aligned).to(torch.int64).sum(0)
    assert torch.equal(sum(aligned[1:], aligned[0]).to(torch.int64), total)
    least, _ = align_all([torch.tensor([-128], dtype=torch.int8)] * 5, [22, 22, 22, 22, 0])
    assert sum(least[:4], torch.zeros_like(least[0])).item() == -(2**31)


def test_int8_beside_a_wide_payload_is_wide() -> None:
    a, b, _ = align(torch.tensor([1], dtype=torch.int8), 5, torch.tensor([1], dtype=torch.int32), -20)
    assert a.dtype == b.dtype == torch.int64
    assert a.item() == 2**25
