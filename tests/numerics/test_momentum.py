"""The integer update against plain Python integers and fractions, against its float form, and at its limits."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.momentum import (
    UpdateFormat,
    float_step,
    integer_step,
    integer_step_,
    learning_rate_code,
    learning_rate_notice,
    momentum_code,
    momentum_notice,
    recover,
    store,
)

_PAPER = UpdateFormat()
_OTHERS = {
    "closes": UpdateFormat(gradient=12, momentum=4, accumulator=9, learning_rate=14, weight=25),
    "coarse_accumulator": UpdateFormat(accumulator=8, exact=False),
    "fine_accumulator": UpdateFormat(accumulator=16, exact=False),
    "coarse_weight": UpdateFormat(weight=16, exact=False),
    "fine_weight": UpdateFormat(weight=30, exact=False),
}


def _codes(generator: torch.Generator, bound: int, dtype: torch.dtype, n: int = 64) -> Tensor:
    return torch.randint(-bound, bound + 1, (n,), generator=generator).to(dtype)


def _by_fractions(w: int, acc: int, g: int, lr: int, momentum: int, f: UpdateFormat) -> tuple[int, int]:
    """The update as the paper writes it; Python rounds a fraction half to even."""
    full = Fraction(momentum * acc, 2 ** (f.momentum + f.accumulator - 2)) + Fraction(g, 2 ** (f.gradient - 1))
    weight = Fraction(w, 2 ** (f.weight - 1)) - Fraction(lr, 2 ** (f.learning_rate - 1)) * full
    return round(weight * 2 ** (f.weight - 1)), round(full * 2 ** (f.accumulator - 1))


@pytest.mark.parametrize("acc_dtype", [torch.int16, torch.int32], ids=["int16", "int32"])
@pytest.mark.parametrize("name", ["paper", *_OTHERS])
def test_the_step_is_that_of_fractions(name: str, acc_dtype: torch.dtype) -> None:
    format = _OTHERS.get(name, _PAPER)
    generator = torch.Generator().manual_seed(len(name))
    for lr in (0, 1, 26, (1 << (format.learning_rate - 1)) - 1):
        for momentum in range(1 << (format.momentum - 1)):
            weight = _codes(generator, 2**20, torch.int32)
            acc, grad = _codes(generator, 500, acc_dtype), _codes(generator, 300, torch.int16)
            new, stored, _ = integer_step(weight, acc, grad, lr, momentum, format, bits=None)
            rows = zip(weight.tolist(), acc.tolist(), grad.tolist(), strict=True)
            want = [_by_fractions(w, a, g, lr, momentum, format) for w, a, g in rows]
            assert list(zip(new.tolist(), stored.tolist(), strict=True)) == want
            assert (new.dtype, stored.dtype) == (torch.int32, acc_dtype)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(0, 511), st.integers(0, 3))
def test_both_widths_of_the_arithmetic_agree(seed: int, lr: int, momentum: int) -> None:
    """int16 codes go through int32 and float32, wider ones through int64: also at the ends of int16."""
    generator = torch.Generator().manual_seed(seed)
    weight = _codes(generator, 2**23, torch.int32)
    acc, grad = _codes(generator, 2**15 - 1, torch.int16), _codes(generator, 2**15 - 1, torch.int16)
    narrow = integer_step(weight, acc, grad, lr, momentum, _PAPER)
    wide = integer_step(weight, acc.int(), grad.int(), lr, momentum, _PAPER)
    for n, w in zip(narrow, wide, strict=True):
        assert torch.equal(n, w.to(n.dtype))


def test_a_long_learning_rate_needs_the_wider_arithmetic() -> None:
    """Four times the ends of int16 by a 16-bit learning rate is 2^32: no int32 step."""
    format = UpdateFormat(learning_rate=16, weight=30)
    weight, ends = torch.zeros(2, dtype=torch.int32), torch.tensor([2**15 - 1, -(2**13)], dtype=torch.int16)
    new, _, _ = integer_step(weight, ends, ends, 2**15 - 1, 3, format, bits=None)
    assert new.tolist() == [-(2**30), 2**15 * (2**15 - 1)]


def test_a_short_accumulator_saturates() -> None:
    weight, acc = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int16)
    _, acc, _ = integer_step(weight, acc, torch.tensor([2**20, -(2**20)], dtype=torch.int32), 1, 1, _PAPER)
    assert acc.tolist() == [2**15 - 1, -(2**15)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(0, 511), st.integers(0, 3), st.booleans())
def test_codes_and_values_take_the_same_steps(seed: int, lr: int, momentum: int, clip: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = _codes(generator, _PAPER.stored_limit(), torch.int32)
    acc = torch.zeros_like(codes, dtype=torch.int16)
    values, values_acc = store(codes, _PAPER), torch.zeros(len(codes))
    for _ in range(6):
        grad = _codes(generator, 127, torch.int16)
        codes, acc, beyond = integer_step(codes, acc, grad, lr, momentum, _PAPER, clip)
        given_values = values, values_acc, grad.float() * 2.0**-14
        values, values_acc, values_beyond = float_step(*given_values, lr, momentum, _PAPER, clip)
        assert torch.equal(store(codes, _PAPER), values)
        assert torch.equal(acc.float() * 2.0**-12, values_acc)
        assert beyond == values_beyond


@pytest.mark.parametrize("name", _OTHERS)
def test_codes_and_values_agree_where_widths_do_not_close(name: str) -> None:
    format, generator = _OTHERS[name], torch.Generator().manual_seed(3)
    codes, acc = _codes(generator, 2**20, torch.int32, 4000), _codes(generator, 500, torch.int32, 4000)
    grad = _codes(generator, 300, torch.int32, 4000)
    new, stored, _ = integer_step(codes, acc, grad, 25, 3, format)
    unit, acc_unit, grad_unit = (2.0 ** (1 - bits) for bits in (format.weight, format.accumulator, format.gradient))
    values, values_acc, _ = float_step(
        codes.double() * unit, acc.double() * acc_unit, grad.double() * grad_unit, 25, 3, format
    )
    assert torch.equal(new.double() * unit, values)
    assert torch.equal(stored.double() * acc_unit, values_acc)


def test_the_paper_rounds_nothing_but_the_accumulator() -> None:
    """A sum that is odd in the last two bits moves the weight by all of it, and is stored half to even."""
    weight, acc = torch.zeros(4, dtype=torch.int32), torch.tensor([1, 1, 1, -1], dtype=torch.int16)
    grad = torch.tensor([1, 5, 0, -1], dtype=torch.int16)
    weight, acc, _ = integer_step(weight, acc, grad, 1, 1, _PAPER)
    assert weight.tolist() == [-2, -6, -1, 2]
    assert acc.tolist() == [0, 2, 0, 0]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "scalar", "empty"])
def test_in_place_and_in_slices(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = {"scalar": (), "empty": (0, 3)}.get(layout, (70, 30, 8, 9))
    tensors = [
        torch.randint(-100, 101, shape, generator=generator).to(dtype)
        for dtype in (torch.int32, torch.int16, torch.int16)
    ]
    if layout == "channels_last":
        tensors = [t.to(memory_format=torch.channels_last) for t in tensors]
    weight, acc, grad = tensors
    before = weight.clone(), acc.clone()
    new, stored, saturated = integer_step(weight, acc, grad, 300, 2, _PAPER)
    assert torch.equal(weight, before[0])
    assert torch.equal(acc, before[1])
    assert torch.equal(new, weight - 300 * (2 * acc.int() + grad))
    assert integer_step_(weight, acc, grad, 300, 2, _PAPER) == saturated
    assert torch.equal(weight, new)
    assert torch.equal(acc, stored)


def test_saturated_weights_are_counted_and_held() -> None:
    limit = _PAPER.stored_limit()
    assert limit == 2**23 - 2**16
    weight = torch.tensor([limit - 26, limit - 25, limit, -limit, 0], dtype=torch.int32)
    acc, grad = torch.zeros(5, dtype=torch.int16), torch.tensor([-1, -1, -1, 1, 1], dtype=torch.int16)
    held, _, saturated = integer_step(weight, acc, grad, 26, 0, _PAPER)
    assert held.tolist() == [limit, limit, limit, -limit, -26]
    assert saturated == 4
    free, _, beyond = integer_step(weight, acc, grad, 26, 0, _PAPER, bits=None)
    assert free.tolist() == [limit, limit + 1, limit + 26, -limit - 26, -26]
    assert beyond == 0  # of an end that is far away


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=["int16", "int32"])
def test_nothing_wraps_around(dtype: torch.dtype) -> None:
    ends = torch.iinfo(dtype)
    weight = torch.tensor([2**30, -(2**30)], dtype=torch.int32)
    acc, grad = (torch.tensor([ends.min, ends.max], dtype=dtype) for _ in range(2))
    for _ in range(3):
        integer_step_(weight, acc, grad, 511, 3, _PAPER, bits=None)
        assert weight.tolist() == [2**30, -(2**30)]
        assert acc.tolist() == [ends.min, ends.max]


def test_stored_codes_come_back() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-(2**24), 2**24 + 1, (1000,), generator=generator, dtype=torch.int32)
    parameter = torch.nn.Parameter(torch.zeros(1000))
    assert store(codes, _PAPER, out=parameter) is parameter
    assert parameter.requires_grad
    assert torch.equal(parameter.double() * 2**23, codes.double())
    assert torch.equal(recover(parameter, _PAPER), codes)
    limit = _PAPER.stored_limit()
    assert torch.equal(recover(parameter, _PAPER, bits=8), codes.clamp(-limit, limit))
    assert recover(torch.tensor([float("inf"), -float("inf")]), _PAPER).tolist() == [2**30, -(2**30)]


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 2, allow_subnormal=False), st.integers(2, 16))
def test_learning_rates_are_the_nearest_codes(lr: float, bits: int) -> None:
    format = UpdateFormat(learning_rate=bits, exact=False)
    largest = 2 ** (bits - 1) - 1
    nearest = min(round(Fraction(lr) * 2 ** (bits - 1)), largest)
    code = learning_rate_code(lr, format)
    assert code == (max(nearest, 1) if lr > 0 else 0)
    notice = learning_rate_notice(lr, format)
    assert ("raised" in notice) == (code != nearest)
    assert ("lowered" in notice) == (Fraction(lr) * 2 ** (bits - 1) > largest + Fraction(1, 2))


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 2, allow_subnormal=False))
def test_momentum_has_four_values(momentum: float) -> None:
    code = momentum_code(momentum, _PAPER)
    assert code == min(round(Fraction(momentum) * 4), 3)
    assert (momentum_notice(momentum, _PAPER) == "") == (code / 4 == momentum)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_impossible_coefficients_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"learning rate: got .* expected a finite number >= 0"):
        learning_rate_code(value, _PAPER)
    with pytest.raises(ConfigError, match=r"momentum: got"):
        momentum_code(value, _PAPER)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"momentum": 4}, r"gradient=15 with momentum=4 .* = 16"),
        ({"accumulator": 12}, r"accumulator=12, expected gradient = momentum \+ accumulator - 1 = 14"),
        ({"learning_rate": 11}, r"weight=24 with gradient=15 and learning_rate=11, .* = 25"),
        ({"weight": 23}, r"got weight=23 .* exact=False"),
        ({"weight": 32, "exact": False}, r"got weight=32, expected an integer from 16 to 31"),
        ({"momentum": 1}, r"got momentum=1, expected an integer from 2 to 8"),
        ({"gradient": 15.0}, r"got gradient=15\.0"),
    ],
    ids=["momentum", "accumulator", "learning_rate", "weight", "wide", "one_bit", "float"],
)
def test_formats_that_do_not_close_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UpdateFormat(**fields)  # type: ignore[arg-type]


def test_wrong_tensors_are_refused() -> None:
    codes, acc = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int16)
    with pytest.raises(TypeError, match="float32, expected int32"):
        integer_step_(codes, acc, torch.zeros(3), 1, 1, _PAPER)
    with pytest.raises(TypeError, match=r"weight torch\.int64"):
        integer_step_(codes.long(), acc, acc, 1, 1, _PAPER)
    with pytest.raises(ValueError, match=r"grad \(1,\), expected one shape"):
        integer_step_(codes, acc, acc[:1], 1, 1, _PAPER)
