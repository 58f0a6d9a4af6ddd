"""Clipped quantizers: limits, ties, the inclusive gradient, and the fast path against the plain formula, in bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_lowbit.numerics import clipping
from lightning_lowbit.numerics.clipping import (
    HostLimits,
    Limits,
    clip_quantize,
    clip_quantize_reference,
    clip_saturated,
    limits_of,
)
from lightning_lowbit.numerics.exponent import ceil_log2
from lightning_lowbit.numerics.rounding import Rounding, round_to

# torch 2.13's compiler itself uses what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")

INF, NAN = math.inf, math.nan
FAST = [Rounding.HALF_UP, Rounding.HALF_EVEN, Rounding.HALF_AWAY]
GRIDS = {
    "unsigned": limits_of(torch.tensor([-3.0, 4.0]), False, 8),
    "signed": limits_of(torch.tensor([-3.0, 4.0]), True, 8),
    "unsigned_4": limits_of(torch.tensor([0.0, 0.3]), None, 4),
    "signed_2": limits_of(torch.tensor([-1.0, 200.0]), None, 2),
    "signed_16": limits_of(torch.tensor([-1.0, 1.0]), True, 16),
    "tiny": limits_of(torch.tensor([0.0, 0.0]), None, 8),
    "any_unsigned": limits_of(torch.tensor([0.0, 3.3]), None, 8, power2=False),
    "any_signed": limits_of(torch.tensor([-0.7, 0.3]), None, 8, power2=False),
    "affine": limits_of(torch.tensor([-0.3, 4.0]), None, 8, symmetric=False),
    "any_affine": limits_of(torch.tensor([-0.3, 4.0]), None, 8, power2=False, symmetric=False),
    "positive_affine": limits_of(torch.tensor([0.5, 4.0]), None, 8, symmetric=False),
}


def both(x: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and dL/dx by the fast function, then by the formula."""
    out = []
    for function in (clip_quantize, clip_quantize_reference):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = function(leaf, *args)  # type: ignore[arg-type]  # whatever the test passes
        g = torch.linspace(-1.0, 1.0, x.numel(), dtype=y.dtype).reshape(x.shape)
        out += [y.detach(), torch.autograd.grad(y, leaf, g)[0]]
    return out[0], out[1], out[2], out[3]


def same(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9))
    )


def adversarial(limits: Limits, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes, ties, limits and their neighbors, and what is hard for x + 1/2."""
    step = float(limits.scale.to(dtype).reciprocal())
    codes = (
        torch.arange(-70_000, 70_001, dtype=dtype) if float(limits.qmax) > 300 else torch.arange(-300, 301, dtype=dtype)
    )
    hard = torch.tensor(
        [0.49999997, -0.49999997, 0.50000006, -0.50000006, 0.25, 2.0**22 + 0.5, 2.0**23 - 0.5], dtype=dtype
    )
    hard = torch.cat(
        [hard, torch.tensor([2.0**23 + 1, 2.0**24 + 3, 2.0**-149, 2.0**-126, 3e38, INF, NAN], dtype=dtype)]
    )
    ends = torch.stack([limits.low, limits.high]).to(dtype)
    x = torch.cat([codes * step, (codes / 2) * step, hard * step, -hard * step, hard, -hard, ends])
    around = [torch.nextafter(x, torch.full_like(x, end)) for end in (-INF, INF)]
    random = torch.randn(20_000, generator=torch.Generator().manual_seed(1), dtype=dtype) * float(limits.high)
    return torch.cat([x, *around, random])


@pytest.mark.parametrize("rounding", list(Rounding), ids=[r.value for r in Rounding])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_fast_path_is_the_formula(grid: str, rounding: Rounding) -> None:
    limits = GRIDS[grid]
    for x in (adversarial(limits), adversarial(limits, torch.float64)):
        finite = x[x.abs() < 1e30]  # both ways through backward
        for sample in (x, finite, finite.flip(0)[:1001]):
            y, dx, want_y, want_dx = both(sample, limits, rounding)
            assert same(y, want_y)
            assert same(dx, want_dx)


@pytest.mark.parametrize("rounding", FAST, ids=[r.value for r in FAST])
@pytest.mark.parametrize("grid", ["unsigned", "signed", "any_signed", "any_affine"])
def test_the_formula_step_by_step(grid: str, rounding: Rounding) -> None:
    limits = GRIDS[grid]
    x = adversarial(limits)
    host = limits.to_host()
    code = torch.clamp(round_to(x * host.scale, rounding) + host.zero_point, host.qmin, host.qmax)
    y, dx, _, _ = both(x, limits, rounding)
    assert same(y, (code - host.zero_point) * limits.scale.reciprocal())
    inside = (x >= host.low) & (x <= host.high)
    assert torch.equal(dx != 0, inside & (torch.linspace(-1.0, 1.0, x.numel()) != 0))


@pytest.mark.parametrize("grid", GRIDS)
def test_large_tensors_go_in_slices(grid: str) -> None:
    x = torch.randn(3, 7, 101, 97, generator=torch.Generator().manual_seed(8)) * 3
    for sample in (x, x.to(memory_format=torch.channels_last), x.transpose(1, 3)):
        y, dx, want_y, want_dx = both(sample, GRIDS[grid], Rounding.HALF_UP)
        assert torch.equal(y, want_y)
        assert torch.equal(dx, want_dx)
        assert y.stride() == sample.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_another_value_is_quantized_and_gets_no_gradient(layout: str) -> None:
    g = torch.Generator().manual_seed(9)
    limits = GRIDS["unsigned"]
    x = torch.randn(2, 3, 5, 7, generator=g)
    value = (3 * torch.randn(2, 3, 5, 7, generator=g)).requires_grad_()
    v = value.to(memory_format=torch.channels_last) if layout == "channels_last" else value
    y, dx, want_y, want_dx = both(x, limits, Rounding.HALF_UP, v)
    assert torch.equal(y, want_y)
    assert torch.equal(dx, want_dx)
    assert y.stride() == v.stride()
    assert torch.equal(y, clip_quantize(value.detach(), limits, Rounding.HALF_UP))
    assert torch.equal(dx, both(x, limits, Rounding.HALF_UP)[1])
    leaf = x.clone().requires_grad_()
    torch.autograd.backward(clip_quantize(leaf, limits, Rounding.HALF_UP, v).sum())
    assert value.grad is None
    assert leaf.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat"])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(3)).to(dtype) * 3
    y, dx, want_y, want_dx = both(x, GRIDS["signed"], Rounding.HALF_UP)
    assert same(y, want_y)
    assert same(dx, want_dx)
    assert y.dtype == torch.float32
    assert dx.dtype == dtype
    assert torch.equal(y, clip_quantize(x.float(), GRIDS["signed"], Rounding.HALF_UP))


def test_limits_themselves_pass_gradient() -> None:
    for low, high in ((0.0, 4.0), (-4.0, 4.0)):
        limits = limits_of(torch.tensor([low, high]), None, 8)
        below = torch.nextafter(limits.low, torch.tensor(-INF))
        x = torch.stack([limits.low, limits.high, below, torch.tensor(4.0000005)]).repeat(40)
        for sample in (x, torch.cat([x, torch.tensor([NAN])])):
            passed = both(sample, limits, Rounding.HALF_UP)[1] != 0
            assert passed.tolist() == [True, True, False, False] * 40 + [False] * (len(sample) - 160)


def test_zero_passes_gradient_where_subnormal_numbers_are_flushed() -> None:
    x = torch.zeros(64, requires_grad=True)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        (dx,) = torch.autograd.grad(clip_quantize(x, GRIDS["unsigned"], Rounding.HALF_UP).sum(), x)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(dx, torch.ones(64))


def test_the_gradient_can_be_differentiated() -> None:
    x = torch.tensor([-1.0, 0.5, 9.0], requires_grad=True)
    y = clip_quantize(x, GRIDS["unsigned"], Rounding.HALF_UP)
    (dx,) = torch.autograd.grad((y * x).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    assert ddx.tolist() == [0.0, 2.0, 0.0]


def test_an_infinite_gradient_stays_outside() -> None:
    x = torch.linspace(-9, 9, 400_000).requires_grad_()
    g = torch.full_like(x, math.inf)
    clip_quantize(x, GRIDS["signed"], Rounding.HALF_UP).backward(g)
    assert x.grad is not None
    assert set(x.grad.unique().tolist()) == {0.0, math.inf}


def test_one_byte_a_value_is_kept() -> None:
    kept: list[Tensor] = []
    x = torch.randn(4, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        clip_quantize(x, GRIDS["signed"], Rounding.HALF_UP, torch.randn(4, 5))
    assert [(t.shape, t.dtype) for t in kept] == [(x.shape, torch.int8)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        clip_quantize(torch.randn(4, 5), GRIDS["signed"], Rounding.HALF_UP, torch.randn(4, 5))
    assert len(kept) == 1


@pytest.mark.parametrize("rounding", FAST, ids=[r.value for r in FAST])
def test_a_compiled_graph_is_not_broken(rounding: Rounding) -> None:
    clips = torch.tensor([-3.0, 4.1])

    def quantize(x: Tensor, value: Tensor) -> Tensor:
        return clip_quantize(x * 2, limits_of(clips, None, 8), rounding, value * 3)

    compiled = torch.compile(quantize, backend="aot_eager", fullgraph=True)
    g = torch.Generator().manual_seed(1)
    x, value = torch.randn(2, 3, 50, generator=g, requires_grad=True), torch.randn(2, 3, 50, generator=g)
    upstream = torch.randn(2, 3, 50, generator=g)
    (got, dx), (want, want_dx) = (
        (y.detach(), torch.autograd.grad(y, x, upstream)[0]) for y in (compiled(x, value), quantize(x, value))
    )
    assert torch.equal(got, want)
    assert torch.equal(dx, want_dx)


def test_a_compiled_graph_keeps_no_mask() -> None:
    kept: list[torch.dtype] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.dtype)
        return tensor

    def quantize(x: Tensor) -> Tensor:
        return clip_quantize(x * 2, GRIDS["unsigned"], Rounding.HALF_UP)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        torch.compile(quantize, backend="aot_eager_decomp_partition", fullgraph=True)(
            torch.randn(4, 5, requires_grad=True)
        )
    assert kept
    assert torch.bool not in kept


def limits_reference(c0: float, c1: float, signed: bool | None, bits: int, power2: bool) -> HostLimits:
    signed = c0 < 0 if signed is None else signed
    m = max(abs(c0), abs(c1), 2.0**-16) if signed else max(abs(c1), 2.0**-16)
    a = 2.0 ** int(ceil_log2(torch.tensor(m))) if power2 else m
    if signed:
        return HostLimits(-a, a, 2 ** (bits - 1) / a, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1, 0.0)
    return HostLimits(0.0, a, 2**bits / a, 0.0, 2.0**bits - 1, 0.0)


@pytest.mark.parametrize("signed", [None, True, False], ids=["by_data", "signed", "unsigned"])
@pytest.mark.parametrize("power2", [True, False], ids=["power2", "any"])
def test_symmetric_limits(signed: bool | None, power2: bool) -> None:
    values = [0.0, 1e-9, 2.0**-16, 0.75, 1.0, 1.0000001, 3.9999998, 4.0, 4.0000005, 1e30]
    values = [value for one in values for value in (-one, one)]
    for dtype in (torch.float32, torch.float64):
        for clips in torch.cartesian_prod(torch.tensor(values, dtype=dtype), torch.tensor(values, dtype=dtype)):
            for bits in (8, 4):
                got = limits_of(clips, signed, bits, power2)
                want = limits_reference(float(clips[0]), float(clips[1]), signed, bits, power2)
                assert got.low.dtype == dtype
                assert got.to_host().scale == float(torch.tensor(want.scale, dtype=dtype))
                for name in ("low", "high", "qmin", "qmax", "zero_point"):
                    assert getattr(got.to_host(), name) == getattr(want, name), (clips, name)
                    assert math.copysign(1.0, getattr(got, name)) > 0 or getattr(got, name) < 0  # nowhere -0


@pytest.mark.parametrize("power2", [True, False], ids=["power2", "any"])
@pytest.mark.parametrize(
    "clips", [(-0.3, 4.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0), (-0.001, 1.0), (-7.0, 7.0)], ids=str
)
def test_affine_limits_hold_zero_and_both_ends(clips: tuple[float, float], power2: bool) -> None:
    for signed in (None, False):
        host = limits_of(torch.tensor(clips), signed, 8, power2, symmetric=False).to_host()
        low, high = min(clips[0], 0.0) if signed is None else 0.0, max(clips[1], 2.0**-16)
        step = 1 / host.scale
        assert (host.qmin, host.qmax) == (0.0, 255.0)
        assert host.zero_point == round(host.zero_point)
        assert host.zero_point == min(max(round(-low / step), 0), 255)
        exact = (high - low) / 255
        assert exact * (1 - 1e-6) <= step < (2 * exact if power2 else exact * (1 + 1e-6))
        assert not power2 or math.frexp(step)[0] == 0.5
        assert host.low == pytest.approx(-host.zero_point * step)
        assert host.high == pytest.approx((255 - host.zero_point) * step)
        assert host.low <= low + step / 2
        assert host.high >= high - step / 2 * 1.0001
        ends = torch.tensor([host.low, 0.0, host.high])
        limits = limits_of(torch.tensor(clips), signed, 8, power2, symmetric=False)
        assert torch.equal(clip_quantize(ends, limits, Rounding.HALF_UP), ends)  # they are on the grid


@pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
def test_clips_that_are_not_finite_give_nan(bad: float) -> None:
    x = torch.linspace(-1, 1, 70)
    for power2 in (True, False):
        for symmetric in (True, False):
            limits = limits_of(torch.tensor([-1.0, bad]), None, 8, power2, symmetric)
            y, dx, want_y, want_dx = both(x, limits, Rounding.HALF_UP)
            assert y.isnan().all()
            assert want_y.isnan().all()
            assert torch.equal(dx, want_dx)


def test_the_largest_limit_is_a_number() -> None:
    assert limits_of(torch.tensor([-3.4e38, 1.0]), None, 8).to_host().high == 2.0**127


def test_saturated_codes_are_counted() -> None:
    x = torch.tensor([-1.0, -0.001, 0.0, 3.98, 3.99, 3.995, 4.0, 9.0, INF, NAN])
    limits = limits_of(torch.tensor([0.0, 4.0]), None, 8)
    assert int(clip_saturated(x, limits, Rounding.HALF_UP)) == 5  # 3.995 * 64 rounds to 256
    affine = limits_of(torch.tensor([-1.0, 3.0]), None, 8, symmetric=False)  # to 6.96875
    count = clip_saturated(x, affine, Rounding.HALF_UP)
    assert int(count) == 2
    assert count.dtype == torch.int64
    assert count.dim() == 0


def test_the_slice_is_what_is_tested() -> None:
    assert clipping._SLICE < 3 * 7 * 101 * 97  # the large tensors above have more than one
