"""Fixed-point numbers with a given unit, against exact fractions; the fast passes against the formula, in bits."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.direct import (
    code_dtype,
    direct_quantize,
    direct_quantize_reference,
    fixed_width_codes,
    fixed_width_codes_reference,
    fixed_width_values,
    fixed_width_values_reference,
    rectified_values,
)
from lightning_lowbit.numerics.widths import Format

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)
WIDTHS = [(2, True), (4, True), (8, True), (16, True), (20, True), (24, True), (1, False), (8, False), (16, False)]


def hard(unit: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes, ties and their neighbors, what is large or tiny, and more than one slice of random values."""
    codes = torch.arange(-600, 601, dtype=dtype) * (unit / 2)
    x = torch.cat([codes, torch.tensor([2.0**23 + 1, 3e38, -3e38, 2.0**-149, 0.49999997 * unit, -0.0], dtype=dtype)])
    x = torch.cat([x, *(torch.nextafter(x, torch.full_like(x, end)) for end in (-math.inf, math.inf))])
    random = torch.randn(280_000, generator=torch.Generator().manual_seed(3), dtype=dtype) * (unit * 90)
    return torch.cat([x[x.isfinite()], random])


@given(values=st.lists(FLOATS, max_size=6), bits=st.integers(2, 31), clipped=st.booleans())
def test_direct_follows_exact_fractions(values: list[float], bits: int, clipped: bool) -> None:
    expected = [Fraction(round(Fraction(v) * 2 ** (bits - 1)), 2 ** (bits - 1)) for v in values]
    if clipped:
        most = 1 - Fraction(1, 2 ** (bits - 1))
        expected = [min(max(v, -most), most) for v in expected]
    x = torch.tensor(values, dtype=torch.float64)
    for function in (direct_quantize, direct_quantize_reference):
        assert function(x, bits, clipped=clipped).tolist() == [float(v) for v in expected]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 15, 16, 24, 31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bf16"])
def test_fast_direct_equals_the_formula(bits: int, dtype: torch.dtype) -> None:
    x = hard(2.0 ** (1 - bits)).to(dtype)
    x = x[x.isfinite()]
    for clipped in (False, True) if bits > 1 else (False,):
        y = direct_quantize(x, bits, clipped=clipped)
        assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(y, direct_quantize_reference(x, bits, clipped=clipped))


def test_a_float32_is_exact_at_any_width() -> None:
    x = hard(2.0**-23)
    x = x[x.abs() < 2.0**100]
    for bits in (24, 28):
        assert torch.equal(direct_quantize(x, bits).double(), direct_quantize(x.double(), bits))


def test_from_32_bits_on_nothing_happens() -> None:
    x = torch.tensor([1.7, -3e-30], dtype=torch.float64)
    for function in (direct_quantize, direct_quantize_reference):
        assert torch.equal(function(x, 32, clipped=True), x)


def test_the_gradient_is_that_of_the_identity_where_the_clip_acts() -> None:
    g = torch.tensor([1.0, -2.0, 3.0])
    for function in (direct_quantize, direct_quantize_reference):
        for clipped in (False, True):
            x = torch.tensor([-5.0, 0.3, 5.0], requires_grad=True)
            assert torch.equal(torch.autograd.grad(function(x, 8, clipped=clipped), x, g)[0], g)
    x = torch.tensor([-5.0, 0.3, 5.0], requires_grad=True)
    for function in (fixed_width_values, fixed_width_values_reference):
        assert torch.equal(torch.autograd.grad(function(x, 7, signed=False), x, g)[0], g)


@pytest.mark.parametrize(("bits", "signed"), WIDTHS)
@pytest.mark.parametrize("fraclen", [-3, 0, 7, 12])
def test_fast_fixed_width_equals_the_formula(bits: int, signed: bool, fraclen: int) -> None:
    x = hard(2.0**-fraclen)
    y, codes = (
        fixed_width_values(x, fraclen, bits=bits, signed=signed),
        fixed_width_codes(x, fraclen, bits=bits, signed=signed),
    )
    assert torch.equal(y, fixed_width_values_reference(x, fraclen, bits=bits, signed=signed))
    assert torch.equal(codes, fixed_width_codes_reference(x, fraclen, bits=bits, signed=signed))
    assert codes.dtype == code_dtype(bits, signed)
    assert torch.equal(codes.double() * 2.0**-fraclen, y.double())
    most = 2 ** (bits - int(signed)) - 1
    assert (int(codes.amin()), int(codes.amax())) == (-most if signed else 0, most)


def test_codes_keep_the_memory_format_and_take_half_precision() -> None:
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )
    codes = fixed_width_codes(x, 6)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(codes, fixed_width_codes_reference(x, 6))
    half = x.to(torch.bfloat16)
    assert torch.equal(fixed_width_codes(half, 6), fixed_width_codes_reference(half.float(), 6))
    strided = x.permute(1, 0, 3, 2)[:, :, ::2]
    assert torch.equal(fixed_width_codes(strided, 6), fixed_width_codes_reference(strided, 6))


def test_fraclen_may_be_a_tensor_and_one_per_channel() -> None:
    x = hard(1.0)[:1200].reshape(2, 600)
    for fraclen in (torch.tensor(3), torch.tensor([3.0])):
        assert torch.equal(fixed_width_values(x, fraclen), fixed_width_values(x, 3))
        assert torch.equal(fixed_width_codes(x, fraclen), fixed_width_codes(x, 3))
    each = fixed_width_values(x, torch.tensor([[3], [-2]]))
    assert torch.equal(each, torch.stack([fixed_width_values(x[0], 3), fixed_width_values(x[1], -2)]))
    codes = fixed_width_codes(x, torch.tensor([[3], [-2]]))
    assert torch.equal(codes, torch.stack([fixed_width_codes(x[0], 3), fixed_width_codes(x[1], -2)]))


def test_integer_bits_move_the_largest_value() -> None:
    for integer_bits in (-2, 0, 3):
        top = fixed_width_values(torch.tensor([1e9]), Format(8, integer_bits).fraction, bits=8)
        assert top.item() == 2.0**integer_bits * 127 / 128


def test_nan_inf_and_nothing() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf])
    for function in (direct_quantize, direct_quantize_reference):
        y = function(x, 8)
        assert bool(y[0].isnan())
        assert y[1:].tolist() == [math.inf, -math.inf]
        assert function(x, 8, clipped=True)[1:].tolist() == [127 / 128, -127 / 128]
    assert bool(fixed_width_values(x, 7)[0].isnan())
    empty = torch.zeros(0, 3)
    assert (
        direct_quantize(empty, 8).shape
        == fixed_width_values(empty, 7).shape
        == fixed_width_codes(empty, 7).shape
        == (0, 3)
    )


def test_too_few_bits_are_refused() -> None:
    x = torch.ones(2)
    with pytest.raises(ConfigError, match="bits=1, expected at least 2"):
        direct_quantize(x, 1, clipped=True)
    with pytest.raises(ConfigError, match="bits=0"):
        direct_quantize(x, 0)
    with pytest.raises(ConfigError, match="expected at least 1 for unsigned"):
        fixed_width_codes(x, 0, bits=0, signed=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13's compiler itself uses what torch has deprecated
def test_whole_graphs_equal_eager() -> None:
    def both(x: Tensor, fraclen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = direct_quantize(direct_quantize(x, 8), 4, clipped=True)
        return y, fixed_width_values(x, fraclen, signed=False), fixed_width_codes(x, fraclen)

    x, fraclen = hard(2.0**-7), torch.tensor(7)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(both(x, fraclen), compiled(x, fraclen), strict=True))


@pytest.mark.parametrize("fraction", [-3, 0, 5, 7, 100])
@pytest.mark.parametrize("bits", [1, 8, 10])
def test_rectified_values_are_those_of_the_rectified_tensor(fraction: int, bits: int) -> None:
    x = torch.cat([torch.randn(300_000) * 4, torch.tensor([0.0, -0.0, math.inf, -math.inf, 2.0**-30, 0.5, 1.5])])
    x = torch.cat([x, (torch.arange(-20, 20) + 0.5) * 2.0**-fraction]).reshape(-1, 1, 1)
    for values in (
        x,
        x.double(),
        x.expand(-1, 2, 1),
        x.reshape(-1, 1, 1, 1).contiguous(memory_format=torch.channels_last),
    ):
        y, positive = rectified_values(values, fraction, bits)
        assert torch.equal(y, fixed_width_values(torch.relu(values), fraction, bits=bits, signed=False))
        assert torch.equal(positive, values > 0)
    y, positive = rectified_values(torch.tensor([math.nan, 1.0]), 3, 8)
    assert math.isnan(y[0])
    assert not positive[0]
