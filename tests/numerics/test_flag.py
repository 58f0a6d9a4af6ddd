"""Two units in one tensor: exact fractions, the fast passes against the formula, and planes that add up."""

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
from lightning_lowbit.numerics.flag import (
    FlagPlanes,
    flag_planes,
    flag_planes_reference,
    flag_quantize,
    flag_quantize_reference,
)
from lightning_lowbit.numerics.shift import host_exponent

FUNCTIONS = [flag_quantize, flag_quantize_reference]
PLANES = [flag_planes, flag_planes_reference]
BITS = [2, 4, 8, 9, 16]


def errors(peak: float, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sizes down to a 2^30th of the peak; ties of both units and their neighbors; more than one slice in all."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(200_000, generator=generator, dtype=torch.float64)
    x *= torch.exp2(-30 * torch.rand(x.shape, generator=generator, dtype=torch.float64))
    x *= peak / x.abs().max()
    unit = 2.0 ** (round(math.log2(peak)) - (bits - 1))
    halves = torch.arange(-300, 301, dtype=torch.float64) / 2
    last = torch.tensor([1 - 2.0**-bits, 1.0], dtype=torch.float64) * unit  # where the units meet
    ties = torch.cat([halves * unit, halves * unit * 2.0 ** (1 - bits), last, -last]).to(dtype)
    ties = torch.cat([ties, *(torch.nextafter(ties, torch.full_like(ties, end)) for end in (-math.inf, math.inf))])
    ties = ties[ties.abs() <= peak]
    return torch.cat([x.to(dtype), ties, torch.tensor([peak, -0.0], dtype=dtype)])


def value(planes: FlagPlanes) -> Tensor:
    big, small = planes.big.double() * 2.0 ** int(planes.exponent_big), planes.small.double()
    return big + small * 2.0 ** int(planes.exponent_small)


@given(
    values=st.lists(st.floats(width=32, min_value=-(2.0**20), max_value=2.0**20), min_size=1, max_size=8),
    bits=st.integers(2, 16),
)
def test_flag_follows_exact_fractions(values: list[float], bits: int) -> None:
    peak = max(abs(v) for v in values)
    n = host_exponent(peak, EXPONENT_MIN + 2 * (bits - 1))
    unit = Fraction(2) ** (n - (bits - 1))
    limit = 2 ** (bits - 1) - 1
    expected = []
    for v in (Fraction(value) / unit for value in values):
        code = min(max(round(v), -limit), limit) if abs(v) >= 1 else Fraction(round(v * 2 ** (bits - 1)), limit + 1)
        expected.append(float(code * unit))
    x = torch.tensor(values)
    for function in FUNCTIONS:
        y, finite = function(x, bits)
        assert y.tolist() == expected
        assert bool(finite)
    for split in PLANES:
        assert value(split(x, bits)).tolist() == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("peak", [3e-3, 1.0, 1.4142, 1.4143, 1e-20, 1e-33, 1e-40, 1e30, 3e38])
def test_fast_flag_equals_the_formula(bits: int, peak: float) -> None:
    x = errors(peak, bits)
    y = flag_quantize(x, bits)[0]
    assert torch.equal(y, flag_quantize_reference(x, bits)[0])
    fast, slow = flag_planes(x, bits), flag_planes_reference(x, bits)
    for a, b in zip(fast, slow, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert torch.equal(value(fast), y.double())


@pytest.mark.parametrize("bits", BITS)
def test_planes_fit_their_bits_and_never_overlap(bits: int) -> None:
    planes = flag_planes(errors(1.41, bits), bits)
    most = 2 ** (bits - 1) - 1
    for plane in planes[:2]:
        assert plane.dtype == (torch.int8 if bits <= 8 else torch.int16)
        assert (int(plane.amin()), int(plane.amax())) == (-most, most)
    assert not bool(((planes.big != 0) & (planes.small != 0)).any())
    assert int(planes.exponent_big) - int(planes.exponent_small) == bits - 1


def test_what_rounds_to_one_unit_is_code_one_of_the_big_plane() -> None:
    unit = 2.0**-7
    tie = (1 - 2.0**-8) * unit  # 127.5 small units go to 128, the even one
    below = torch.nextafter(torch.tensor(tie), torch.zeros(()))
    x = torch.tensor([1.0, tie, -tie, float(below)])
    for split in PLANES:
        planes = split(x, 8)
        assert planes.big.tolist() == [127, 1, -1, 0]
        assert planes.small.tolist() == [0, 0, 0, 127]
    for function in FUNCTIONS:
        assert (function(x, 8)[0] / unit * 128).tolist() == [127 * 128.0, 128.0, -128.0, 127.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "minus_inf"])
def test_what_is_not_finite_is_handed_on_with_a_flag(bad: float) -> None:
    x = torch.tensor([0.3, bad, -0.7])
    for function in FUNCTIONS:
        y, finite = function(x, 8)
        assert not bool(finite)
        assert torch.equal(y.nan_to_num(9.0), x.nan_to_num(9.0))
    for split in PLANES:
        planes = split(x, 8)
        assert not bool(planes.finite)
        assert planes.big.tolist() == planes.small.tolist() == [0, 0, 0]


def test_zeros_and_nothing() -> None:
    for shape in ((3, 4), (0, 4), ()):
        zeros = torch.zeros(shape)
        for function in FUNCTIONS:
            y, finite = function(zeros)
            assert torch.equal(y, zeros)
            assert bool(finite)
        for split in PLANES:
            assert torch.equal(value(split(zeros)), zeros.double())


def test_float64_layouts_and_half_precision() -> None:
    wide = errors(0.01, 8, torch.float64)
    assert torch.equal(flag_quantize(wide)[0], flag_quantize_reference(wide)[0])
    assert torch.equal(value(flag_planes(wide)), flag_quantize(wide)[0])
    x = errors(0.01, 8)[:840].reshape(2, 3, 10, 14)
    for view in (x.contiguous(memory_format=torch.channels_last), x[:, :, ::2], x.permute(3, 1, 0, 2), x.bfloat16()):
        assert torch.equal(flag_quantize(view)[0], flag_quantize_reference(view.float())[0])
        assert torch.equal(flag_planes(view).big, flag_planes_reference(view.float()).big)
        assert torch.equal(flag_planes(view).small, flag_planes_reference(view.float()).small)


def test_the_peak_of_several_ranks() -> None:
    x = torch.tensor([0.3, -0.7, 0.04])
    for function in FUNCTIONS:
        assert function(x, 3, peak=torch.tensor(2.0))[0].tolist() == [0.25, -0.5, 0.0]
    for split in PLANES:
        planes = split(x, 3, peak=torch.tensor(2.0))
        assert (planes.big.tolist(), planes.small.tolist()) == ([0, -1, 0], [2, 0, 0])


def test_the_gradient_is_that_of_the_identity() -> None:
    g = torch.tensor([1.0, -2.0, 3.0])
    for function in FUNCTIONS:
        x = torch.tensor([1.4, 0.002, -1.4], requires_grad=True)
        assert torch.equal(torch.autograd.grad(function(x)[0], x, g)[0], g)


def test_bits_out_of_range_are_refused() -> None:
    for function in (*FUNCTIONS, *PLANES):
        with pytest.raises(ConfigError, match=r"bits=1, expected 2\.\.16"):
            function(torch.ones(2), 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13's compiler itself uses what torch has deprecated
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_whole_graphs_equal_eager(backend: str) -> None:
    def both(x: Tensor) -> tuple[Tensor, ...]:
        return *flag_quantize(x, 8), *flag_planes(x, 8)

    compiled = torch.compile(both, fullgraph=True, backend=backend)
    for x in (errors(3e-3, 8)[-4000:], torch.tensor([1.0, math.inf, 0.3])):
        try:
            got = compiled(x)
        except torch._inductor.exc.InductorError as error:
            pytest.skip(f"no working C++ compiler: {error}")
        for a, b in zip(both(x), got, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
