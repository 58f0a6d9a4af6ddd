"""Weight gradients in a constant range: exact fractions, fast against slow, integers against floats, and the law."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.constant import (
    constant_codes,
    constant_codes_reference,
    constant_quantize,
    uniform_draws,
)
from lightning_lowbit.numerics.noise import combine
from lightning_lowbit.numerics.shift import host_exponent

CODES = [constant_codes, constant_codes_reference]
UNIFORM = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1 - 2.0**-24]), st.floats(0, 1, exclude_max=True, width=32))


def code(x: int | float, peak: float, u: float | None, dr: int) -> int:
    """The table of ``constant_codes``, on fractions."""
    n = abs(Fraction(x)) * dr / Fraction(2) ** (host_exponent(peak, -149) if peak else 0)
    whole = n.numerator // n.denominator
    rounded = round(n) if u is None else whole + (n - whole > Fraction(u))
    return (1 if x > 0 else -1) * min(rounded, dr - 1)


@given(data=st.data(), dr=st.sampled_from([2, 8, 32, 128, 2**15]), nearest=st.booleans())
def test_floats_follow_exact_fractions(data: st.DataObject, dr: int, nearest: bool) -> None:
    floats = st.floats(width=32, min_value=-(2.0**20), max_value=2.0**20, allow_subnormal=False)
    values = data.draw(st.lists(floats, min_size=1, max_size=8))
    u = None if nearest else data.draw(st.lists(UNIFORM, min_size=len(values), max_size=len(values)))
    peak = max(abs(v) for v in values)
    expected = [code(v, peak, None if u is None else u[i], dr) for i, v in enumerate(values)]
    draws = None if u is None else torch.tensor(u)
    for function in CODES:
        got, finite = function(torch.tensor(values), draws, dr=dr)
        assert got.tolist() == expected
        assert bool(finite)


@given(
    data=st.data(),
    dr=st.sampled_from([2, 8, 32, 128]),
    nearest=st.booleans(),
    reach=st.sampled_from([3, 300, 2**31 - 1]),
)
def test_integers_follow_exact_fractions(data: st.DataObject, dr: int, nearest: bool, reach: int) -> None:
    values = data.draw(st.lists(st.integers(-reach - 1, reach), min_size=1, max_size=8))
    u = None if nearest else data.draw(st.lists(UNIFORM, min_size=len(values), max_size=len(values)))
    peak = float(max(abs(v) for v in values))
    expected = [code(v, peak, None if u is None else u[i], dr) for i, v in enumerate(values)]
    draws = None if u is None else torch.tensor(u)
    for function in CODES:
        for dtype in (torch.int32, torch.int64):
            assert function(torch.tensor(values, dtype=dtype), draws, dr=dr)[0].tolist() == expected


def test_an_integer_that_no_float32_holds() -> None:
    grad = torch.tensor([2**25 + 1, -(2**25) - 1, 2**30], dtype=torch.int32)  # n = 4 + 2^-23
    for function in CODES:
        assert function(grad, torch.zeros(3), dr=128)[0].tolist() == [5, -5, 127]


@pytest.mark.parametrize("dr", [2, 8, 32, 128])
@pytest.mark.parametrize("scale", [40.0, 3e3, 4e6, 3e8])
def test_integers_equal_floats_that_hold_them(dr: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    grad = (torch.randn(150_000, generator=generator) * scale).clamp(-(2**30), 2**30).to(torch.int32)
    draws = uniform_draws(combine(3), grad)
    wide = torch.float64 if scale > 1e6 else torch.float32
    for u in (draws, None):
        expected = constant_codes_reference(grad, u, dr=dr)[0]
        assert torch.equal(constant_codes(grad, u, dr=dr)[0], expected)
        assert torch.equal(constant_codes_reference(grad.to(wide), u, dr=dr)[0], expected)
        assert torch.equal(constant_codes(grad.to(wide), u, dr=dr)[0], expected)


@pytest.mark.parametrize("dr", [2, 8, 32, 128, 2**15])
@pytest.mark.parametrize("size", [2e-4, 1.0, 1e-38, 1e-42, 1e35])
def test_fast_codes_equal_the_formula(dr: int, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(150_000, generator=generator) * torch.exp2(-20 * torch.rand(150_000, generator=generator)) * size
    draws = torch.rand(grad.shape, generator=generator)
    draws[:100] = 0
    for g in (grad, grad.bfloat16(), grad.double(), grad.reshape(3, 50_000)[:, ::2]):
        for u in (None, draws if g.shape == grad.shape else draws[: g.numel()].reshape(g.shape)):
            codes, finite = constant_codes(g, u, dr=dr)
            assert codes.dtype == torch.int16
            assert torch.equal(codes, constant_codes_reference(g, u, dr=dr)[0])
            assert bool(finite)
            assert int(codes.abs().max()) <= dr - 1


def test_the_float_form_is_codes_times_the_unit() -> None:
    grad = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2e-4
    draws = uniform_draws(combine(0), grad)
    codes, _ = constant_codes(grad, draws, dr=32)
    for bits in (8, 15):
        y, finite = constant_quantize(grad, draws, dr=32, bits=bits)
        assert bool(finite)
        assert torch.equal(y, codes.float() * 2.0 ** (1 - bits))


def test_rounding_is_unbiased() -> None:
    # n = 8 x; the mean of 40000 draws stays within five standard errors.
    fractions = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.9])
    grad = torch.cat([(fractions + 3) / 8, -(fractions + 2) / 8, torch.ones(1)]).repeat(40_000, 1)
    codes, _ = constant_codes(grad, uniform_draws(combine(7, 1), grad), dr=8)
    error = (codes.double().mean(0) - 8 * grad[0].double())[:-1]
    assert float(error.abs().max()) < 5 * 0.5 / math.sqrt(40_000)
    assert codes[0, -1] == 7  # the clip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32], ids=["float32", "float64", "int32"])
def test_zeros_and_nothing(dtype: torch.dtype) -> None:
    for shape in ((3, 4), (0, 4), ()):
        zeros = torch.zeros(shape, dtype=dtype)
        for draws in (None, torch.zeros(shape), torch.full(shape, 0.9)):
            for function in CODES:
                codes, finite = function(zeros, draws, dr=128)
                assert torch.equal(codes, torch.zeros(shape, dtype=torch.int16))
                assert bool(finite)
            assert not bool(constant_quantize(zeros, draws, dr=128)[0].any())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "minus_inf"])
def test_what_is_not_finite_has_no_codes_and_a_flag(bad: float) -> None:
    grad = torch.tensor([0.3, bad, -0.7])
    for function in CODES:
        codes, finite = function(grad, torch.zeros(3), dr=8)
        assert codes.tolist() == [0, 0, 0]
        assert not bool(finite)
    y, finite = constant_quantize(grad, None, dr=8)
    assert torch.equal(y.nan_to_num(9.0), grad.nan_to_num(9.0))
    assert not bool(finite)


def test_draws_depend_on_key_and_place_alone() -> None:
    long = uniform_draws(combine(1, 2, 3), torch.zeros(70_000))
    assert torch.equal(uniform_draws(combine(1, 2, 3), torch.zeros(67_000)), long[:67_000])
    four = torch.zeros(10, 7, 10, 100).contiguous(memory_format=torch.channels_last)
    assert torch.equal(uniform_draws(combine(1, 2, 3), four).flatten(), long)
    assert uniform_draws(combine(1, 2, 3), four).is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(uniform_draws(combine(1, 2, 4), long), long)
    assert not torch.equal(long[: 1 << 12], long[1 << 16 :][: 1 << 12])  # rows differ
    assert torch.equal(long * 2**24, (long * 2**24).round())
    assert (float(long.min()) >= 0, float(long.max()) < 1) == (True, True)
    assert abs(float(long.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / 70_000)


def test_channels_last_gradients_take_the_draws_of_their_places() -> None:
    grad = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    last = grad.contiguous(memory_format=torch.channels_last)
    draws = uniform_draws(combine(9), grad)
    for u in (draws, uniform_draws(combine(9), last)):
        assert torch.equal(constant_codes(last, u, dr=128)[0], constant_codes(grad, draws, dr=128)[0])


def test_refusals() -> None:
    grad = torch.ones(3)
    for dr in (0, 1, 3, 100, 2**16):
        with pytest.raises(ConfigError, match=f"dr={dr}, expected a power of two"):
            constant_codes(grad, None, dr=dr)
    with pytest.raises(ConfigError, match="draws of shape"):
        constant_codes(grad, torch.zeros(1), dr=8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13's compiler itself uses what torch has deprecated
def test_whole_graphs_equal_eager() -> None:
    def both(grad: Tensor, integers: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        draws = uniform_draws(key, grad)
        return *constant_quantize(grad, draws, dr=128), *constant_codes(integers, draws, dr=32)

    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(500, generator=generator)
    arguments = grad, (grad * 1e6).to(torch.int32), torch.tensor(combine(5))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(both(*arguments), compiled(*arguments), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
