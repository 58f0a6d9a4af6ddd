"""Biases on their own grid and on that of the products."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lowbit.graph.fold import per_channel
from lightning_lowbit.numerics.merged import quantize_weight, weight_scale
from lightning_lowbit.numerics.merged_bias import (
    own_scale,
    products_bias,
    quantize_bias,
    reduce_weight_scale,
    saturate_bias,
)

BITS = st.integers(2, 8)
EXPONENT = st.integers(-6, 6)


def saturated_by_hand(code: int, own: int, products: int, signed: bool, bits: int) -> Fraction:
    """The bias code / 2^own as the accelerator holds it, in units of 2^-products, by integers alone."""
    half = 1 << (bits - 1)
    constant = half - 1 if signed else 2 * half - 1
    exact = Fraction(code) * Fraction(2) ** (products - own)  # in units of the products
    if math.trunc(Fraction(2) ** (products - own)) > constant:
        limited = min(max(exact, Fraction(-2 * half * half)), Fraction(2 * half * half - 1))
        t = min(max(math.trunc(limited / constant), -half), half - 1) * constant
    else:
        t = math.trunc(exact)
    return t / Fraction(2) ** products


@given(
    code=st.integers(-128, 127), own=EXPONENT, high=EXPONENT, weight=EXPONENT, signed=st.booleans(), bits=BITS,
    act_bits=BITS,
)  # fmt: skip
def test_saturation_is_that_of_integers(
    code: int, own: int, high: int, weight: int, signed: bool, bits: int, act_bits: int
) -> None:
    code = min(max(code, -(1 << (bits - 1))), (1 << (bits - 1)) - 1)
    limits = torch.tensor(-(2.0**high) if signed else 0.0), torch.tensor(2.0**high)
    bias, own_scale = torch.tensor([code * 2.0**-own]), torch.tensor(2.0**own)
    got = saturate_bias(bias, own_scale, *limits, torch.tensor(2.0**weight), bits, act_bits)
    products = act_bits - int(signed) - high + weight
    assert Fraction(got.item()) == saturated_by_hand(code, own, products, signed, bits)


def test_a_large_input_range_keeps_the_bias_and_a_tiny_one_does_not() -> None:
    bias, own, weight = torch.tensor([0.875, -0.5]), torch.tensor(128.0), torch.tensor(128.0)

    def saturated(high: float) -> Tensor:
        return saturate_bias(bias, own, torch.tensor(0.0), torch.tensor(high), weight, 8, 8)

    assert torch.equal(saturated(256.0), bias)
    assert saturated(2.0**-6).tolist() == [127 * 255 / 2.0**21, -128 * 255 / 2.0**21]


def test_the_constant_holds_up_to_its_own_code() -> None:
    """Only off powers of two does r meet q = 127 (inputs from below 0, at one code per unit)."""
    bias, own, low, high = torch.tensor([3.0]), torch.tensor(1.0), torch.tensor(-1.0), torch.tensor(128.0)
    for j, t in ((127.5, 382), (128.5, 3 * 127)):
        assert saturate_bias(bias, own, low, high, torch.tensor(j), 8, 8).item() == pytest.approx(t / j, rel=1e-6)


@pytest.mark.parametrize("rule", ["saturate", "products"])
@pytest.mark.parametrize("groups", [0, 1, 2, 6], ids=["conv", "transposed", "grouped", "depthwise"])
def test_every_output_channel_follows_its_own_weight_scale(rule: str, groups: int) -> None:
    generator = torch.Generator().manual_seed(5)
    low, high, own = torch.tensor(0.0), torch.tensor(0.25), torch.tensor(64.0)

    def apply(bias: Tensor, scale: Tensor) -> Tensor:
        if rule == "products":
            return products_bias(bias, scale, bits=12)
        return saturate_bias(bias, own, low, high, scale, 8, 8)

    w = torch.rand(6, 4, 3, 3, generator=generator) * 0.5 ** (
        2 * torch.arange(4) + torch.arange(6).reshape(6, 1) // 3
    ).reshape(6, 4, 1, 1)
    if groups == 0:
        scale = weight_scale(w, 8, per_channel=True)
        per_output = scale.flatten().tolist()
    else:
        scale = weight_scale(w, 8, per_channel=True, out_axis=1, groups=groups)
        full = scale.expand(6, 4, 1, 1)
        per_output = [float(full[g * 6 // groups, o, 0, 0]) for g in range(groups) for o in range(4)]
    bias = quantize_bias(torch.rand(len(per_output), generator=generator) * 2 - 1, own, 8)
    want = [apply(bias[i], torch.tensor(scale_i)).item() for i, scale_i in enumerate(per_output)]
    assert len(set(per_output)) > 1
    assert per_channel(scale, int(groups > 0), max(groups, 1)).tolist() == per_output
    assert apply(bias, torch.tensor(per_output)).tolist() == want


@pytest.mark.parametrize("power2", [True, False])
def test_the_own_grid_is_that_of_weights(power2: bool) -> None:
    b = torch.tensor([0.3, -0.7, 0.0])
    scale = own_scale(b, 4, power2)
    assert scale.item() == pytest.approx(8.0 if power2 else 8 / 0.7)
    assert torch.equal(quantize_bias(b, scale, 4), quantize_weight(b, scale, 4))
    assert own_scale(torch.zeros(3), 8).item() == 2.0**23
    assert own_scale(b.bfloat16(), 8).dtype == torch.float32


@given(
    bias=st.lists(st.floats(-(2.0**10), 2.0**10, width=32), min_size=1, max_size=8).map(torch.tensor),
    high=EXPONENT, weight=EXPONENT, signed=st.booleans(), bits=BITS,
)  # fmt: skip
def test_reduced_weights_leave_room_for_the_bias(bias: Tensor, high: int, weight: int, signed: bool, bits: int) -> None:
    limits = torch.tensor(-1.0 if signed else 0.0), torch.tensor(2.0**high)
    before = torch.tensor(2.0**weight)
    after = reduce_weight_scale(before, bias, *limits, bits, 8)
    s_x = 2.0 ** (8 - int(signed) - high)
    room = 2 ** (2 * bits - 1)
    assert after <= before
    assert float(bias.abs().max()) * s_x * float(after) <= room
    if after < before and float(bias.abs().max()) > 2.0**-16:  # no more than needed
        assert float(bias.abs().max()) * s_x * float(after) > room / 2


@given(
    b=st.floats(-(2.0**20), 2.0**20, width=32), quarters=st.integers(-40, 40), exponent=st.integers(-4, 30),
    bits=st.integers(2, 32),
)  # fmt: skip
def test_a_bias_among_the_products_rounds_away_and_fits_its_bits(
    b: float, quarters: int, exponent: int, bits: int
) -> None:
    products_follow_fractions(b, exponent, bits)
    products_follow_fractions(math.ldexp(quarters, -2 - exponent), exponent, bits)


def products_follow_fractions(b: float, exponent: int, bits: int) -> None:
    most = (1 << (bits - 1)) - 1
    exact = Fraction(b) * Fraction(2) ** exponent
    shift = next(n for n in range(64) if abs(exact) <= most << n)
    code = math.floor(abs(exact) / 2**shift + Fraction(1, 2)) * (1 if exact > 0 else -1)
    for dtype in (torch.float32, torch.float64):
        got = products_bias(torch.tensor([b], dtype=dtype), torch.tensor(2.0**exponent), bits)
        assert got.dtype == dtype
        assert Fraction(got.item()) * Fraction(2) ** exponent == code << shift
        assert abs(code) <= most


def test_products_of_any_scale_give_the_code_back() -> None:
    j = torch.tensor(1234.567)
    codes = torch.arange(-(2**21), 2**21, 4099, dtype=torch.float64)
    got = products_bias((codes / j.double()).float(), j)
    assert torch.equal((got.double() * j.double()).round(), codes)
    b = (torch.rand(100, generator=torch.Generator().manual_seed(1)) - 0.5) * 2**13  # codes of 24 bits
    away = [math.floor(abs(Fraction(x) * Fraction(j.item())) + Fraction(1, 2)) for x in b.tolist()]
    want = torch.tensor(away, dtype=torch.float64).copysign(b) * (1 / j.double()).float()
    assert torch.equal(products_bias(b, j), want.float())
    assert products_bias(torch.tensor([math.nan]), j).isnan().all()
    assert products_bias(torch.ones(1, dtype=torch.bfloat16), j).dtype == torch.float32


def test_no_value_is_read() -> None:
    """Meta tensors have none."""
    bias, scalar = torch.empty(4, device="meta"), torch.empty((), device="meta")
    for scale in (scalar, torch.empty(4, device="meta")):
        assert saturate_bias(bias, own_scale(bias, 8), scalar, scalar, scale, 8, 8).shape == bias.shape
        assert reduce_weight_scale(scale, bias, scalar, scalar, 8, 8).shape == scale.shape
        assert products_bias(bias, scale).shape == bias.shape
