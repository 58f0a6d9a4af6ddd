"""Ranges, codes and one-off corrections of merged weights."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lowbit.numerics.exponent import pow2
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.merged import (
    TINY,
    constrain_weight,
    covered_range,
    inside,
    quantize_weight,
    unmerge,
    weight_scale,
)
from lightning_lowbit.numerics.rounding import Rounding, round_to

FINITE = st.floats(-(2.0**20), 2.0**20, width=32)
WEIGHTS = st.lists(FINITE, min_size=1, max_size=20).map(torch.tensor)
BITS = st.integers(2, 8)


def plain(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    codes = round_to(w * scale, Rounding.HALF_AWAY).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes * scale.reciprocal()


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_covered_range_on_and_beside_every_power_of_two(dtype: torch.dtype) -> None:
    k = torch.arange(-15, 127)
    a = pow2(k, dtype)
    assert torch.equal(covered_range(a), a)
    assert torch.equal(covered_range(torch.nextafter(a, 2 * a)), 2 * a)
    assert torch.equal(covered_range(torch.nextafter(a, 0 * a)), a)
    assert torch.equal(covered_range(torch.nextafter(a, 2 * a), power2=False), torch.nextafter(a, 2 * a))


@pytest.mark.parametrize("power2", [True, False])
def test_a_weight_that_is_not_finite_leaves_no_range(power2: bool) -> None:
    w = torch.tensor([1.0, math.nan, -2.0])
    assert quantize_weight(w, weight_scale(w, 8, power2=power2), 8).isnan().all()
    w = torch.tensor([1.0, -math.inf])
    assert quantize_weight(w, weight_scale(w, 8, power2=power2), 8).isnan().any()


@given(w=WEIGHTS, bits=BITS)
def test_the_range_is_the_least_power_of_two_that_covers(w: Tensor, bits: int) -> None:
    a = 2.0 ** (bits - 1) / float(weight_scale(w, bits))
    largest = max(float(w.abs().max()), TINY)
    assert a / 2 < largest <= a
    assert math.frexp(a)[0] == 0.5


def test_without_powers_of_two_the_range_is_the_largest_weight() -> None:
    w = uniform(4, 3)
    assert torch.equal(weight_scale(w, 8, power2=False), 128 / w.abs().max())
    per_channel = weight_scale(w, 4, power2=False, per_channel=True)
    assert torch.equal(per_channel, 8 / w.abs().amax(1, keepdim=True))


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3), (6, 1, 3, 3), (6, 2, 3, 3, 3)], ids=len)
def test_one_scale_per_output(shape: tuple[int, ...]) -> None:
    w = uniform(*shape) * 2.0 ** -torch.arange(6.0).reshape(-1, *[1] * (len(shape) - 1))
    scale = weight_scale(w, 8, per_channel=True)
    assert scale.shape == (6, *[1] * (len(shape) - 1))
    assert scale.flatten().tolist() == [float(weight_scale(channel, 8)) for channel in w]


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_transposed_convolution_keeps_its_outputs_on_axis_1(groups: int) -> None:
    w = uniform(6, 4, 2, 2) * 0.5 ** (2 * torch.arange(4) + torch.arange(6).reshape(6, 1) // 3).reshape(6, 4, 1, 1)
    scale = weight_scale(w, 8, per_channel=True, out_axis=1, groups=groups)
    rows = 6 // groups
    for g in range(groups):
        for o in range(4):
            part = slice(g * rows, (g + 1) * rows)
            want = weight_scale(w[part, o], 8)
            assert (scale.expand(6, 4, 1, 1)[part, o] == want).all()
    assert quantize_weight(w, scale, 8).shape == w.shape


def test_a_channel_gains_at_most_eight_bits_over_its_layer() -> None:
    w = torch.tensor([[1.0], [2.0**-8], [2.0**-9], [0.0]])
    assert weight_scale(w, 8, per_channel=True).flatten().tolist() == [128.0, 2.0**15, 2.0**15, 2.0**15]
    per_channel = weight_scale(0.75 * w, 8, per_channel=True, power2=False)
    assert torch.equal(per_channel.flatten(), torch.tensor([128, 2**15, 2**15, 2**15]) / 0.75)


def test_a_shrunk_or_capped_range_clips_the_tail_only() -> None:
    w = uniform(100, 100)
    w[0, 0], w[50, 50] = 300.0, -300.0
    assert float(weight_scale(w, 8)) == 0.25
    shrunk = weight_scale(w, 8, percent=0.1)
    assert float(shrunk) > 0.25
    assert float(weight_scale(w, 8, cap=4.0)) == 32.0
    assert float(weight_scale(w, 8, cap=4.0, power2=False)) == 32.0
    assert float(weight_scale(w.clamp(-1, 1), 8, cap=4.0)) == 128.0
    per_channel = weight_scale(w, 8, per_channel=True, cap=4.0)
    assert per_channel.flatten().tolist() == [32.0 if i in (0, 50) else 128.0 for i in range(100)]
    per_channel = weight_scale(w, 8, per_channel=True, percent=0.1)
    assert torch.equal(per_channel[0], shrunk[None])
    assert int((inside(w, shrunk, 8) == 0).sum()) == 2


@given(v=st.lists(st.integers(-600, 600), min_size=1).map(lambda q: torch.tensor(q) / 4), bits=BITS)
def test_quarters_of_a_step_round_as_fractions_do(v: Tensor, bits: int) -> None:
    scale = torch.tensor(2.0**5)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    for x, got in zip(v.tolist(), (quantize_weight(v / scale, scale, bits) * scale).tolist(), strict=True):
        away = math.floor(abs(Fraction(x)) + Fraction(1, 2)) * (1 if x > 0 else -1)
        assert got == min(max(away, low), high)


@given(w=WEIGHTS, bits=BITS, power2=st.booleans())
def test_quantized_is_the_plain_formula_on_the_grid_and_stays(w: Tensor, bits: int, power2: bool) -> None:
    scale = weight_scale(w, bits, power2=power2)
    got = quantize_weight(w, scale, bits)
    assert torch.equal(got, plain(w, scale, bits))
    assert torch.equal(got, quantize_weight(got, scale, bits))
    assert Grid(bits, scale=float(scale.reciprocal())).contains(got)


@pytest.mark.parametrize("code", [0, 1, 5, 62, 127])
def test_beside_a_tie_nothing_rounds_up(code: int) -> None:
    tie = torch.tensor(code + 0.5)
    below = torch.nextafter(tie, torch.tensor(0.0))
    one = torch.tensor(1.0)
    assert quantize_weight(torch.stack([tie, below, -below, -tie]), one, 9).tolist() == [
        code + 1,
        code,
        -code,
        -code - 1,
    ]
    tie, one = tie.double(), one.double()
    below = torch.nextafter(tie, 0 * tie)
    assert quantize_weight(torch.stack([tie, below, -tie]), one, 9).tolist() == [code + 1, code, -code - 1]


@pytest.mark.parametrize("layout", ["rows", "channels_last", "transposed", "one row", "double"])
@pytest.mark.parametrize("per_channel", [False, True], ids=["layer", "channels"])
def test_large_weights_go_in_slices_that_nobody_sees(layout: str, per_channel: bool) -> None:
    w = uniform(67, 64, 9, 9)
    if layout == "channels_last":
        w = w.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        w = w.transpose(0, 1)
    elif layout == "one row":
        w = w.reshape(1, -1, 1, 1)
    elif layout == "double":
        w = w.double()
    w[0, 0, 0, 0] = math.nan
    scale = weight_scale(w.nan_to_num(), 5, per_channel=per_channel, power2=False)
    got = quantize_weight(w, scale, 5)
    assert torch.equal(got.nan_to_num(99.0), plain(w, scale, 5).nan_to_num(99.0))
    assert (got.dtype, got.stride()) == (w.dtype, torch.empty_like(w).stride())


def test_types_and_gradients() -> None:
    w = uniform(4, 4).requires_grad_()
    half = w.detach().bfloat16()
    assert weight_scale(half, 8).dtype == torch.float32
    assert torch.equal(quantize_weight(half, weight_scale(half, 8), 8), plain(half.float(), weight_scale(half, 8), 8))
    assert weight_scale(w.double(), 8).dtype == torch.float64
    scale = weight_scale(w, 8)
    results = scale, quantize_weight(w, scale, 8), inside(w, scale, 8), constrain_weight(w), unmerge(w, w, 1e-5, w)
    assert not any(result.requires_grad for result in results)


@given(w=WEIGHTS, bits=BITS, power2=st.booleans())
def test_a_range_of_the_largest_weight_leaves_nothing_outside(w: Tensor, bits: int, power2: bool) -> None:
    assert inside(w, weight_scale(w, bits, power2=power2), bits).all()


def test_the_limits_are_inside_and_their_neighbors_are_not() -> None:
    a = torch.tensor([-0.5, 0.5])
    scale = weight_scale(a, 8)
    assert inside(a, scale, 8).tolist() == [True, True]
    assert inside(torch.nextafter(a, 2 * a), scale, 8).tolist() == [False, False]
    assert inside(torch.tensor([math.nan, math.inf]), scale, 8).tolist() == [False, False]


@pytest.mark.parametrize(
    ("largest", "median", "limit"),
    [(40.0, 0.5, 7.5), (40.0, 0.6, 15.0), (-40.0, 1.0, 15.0), (40.0, 2.4, 60.0), (32.0, 2.0, None), (15.0, 0.1, None)],
    ids=str,
)
def test_outliers_are_clipped_to_120_of_128_codes(largest: float, median: float, limit: float | None) -> None:
    w = torch.full((3, 3), median)
    w[1, 1] = largest
    want = w.clone()
    if limit is not None:
        want[1, 1] = math.copysign(min(abs(largest), limit), largest)
    assert torch.equal(constrain_weight(w), want)


@pytest.mark.parametrize("rest", [0.0, math.nan], ids=["pruned", "nan"])
def test_a_median_that_tells_nothing_clips_nothing(rest: float) -> None:
    w = torch.tensor([40.0, 0.5, rest, rest, rest])
    assert torch.equal(constrain_weight(w).nan_to_num(), w.nan_to_num())


def test_unmerge_undoes_a_merge_where_it_can() -> None:
    w, factor = uniform(5, 3), torch.tensor([2.0, -0.25, 1e-5, 1e-9, 0.0])[:, None]
    eps = float(factor[2])
    back = unmerge(w * factor, factor, eps, w + 1)
    assert torch.equal(back[:2], w[:2])
    assert torch.equal(back[2:], w[2:] + 1)
    back = unmerge(w * factor, factor, eps, w + 1, floor=True)
    assert torch.equal(back[:2], w[:2])
    assert torch.allclose(back[2], w[2])
    assert torch.allclose(back[3], w[3] * 1e-4)
    assert back[4].eq(0).all()
    assert unmerge(torch.ones(1), torch.tensor([-1e-9]), 0.5, torch.ones(1), floor=True).item() == -2.0


def test_no_value_is_read() -> None:
    """Meta tensors have none."""
    w = torch.empty(6, 4, 3, 3, device="meta")
    for per_channel in (False, True):
        scale = weight_scale(w, 8, per_channel=per_channel, out_axis=1, groups=2, cap=4.0)
        assert quantize_weight(w, scale, 8).shape == inside(w, scale, 8).shape == w.shape
    assert constrain_weight(w).shape == unmerge(w, w, 1e-5, w).shape == w.shape


def test_traces_as_one_graph() -> None:
    def both(w: Tensor) -> Tensor:
        scale = weight_scale(w, 8, per_channel=True)
        return quantize_weight(constrain_weight(w), scale, 8) * inside(w, scale, 8)

    w = uniform(512, 300)
    assert torch.equal(torch.compile(both, backend="eager", fullgraph=True)(w), both(w))
