"""Rectifiers, sums and concats of codes against their twin on values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules.integer_twin import carrier, codes, grad_of, half_away, low, op_of, send_back, to_codes, values, width
from torch import Tensor, nn

from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.carrier import Carrier
from lightning_lowbit.modules.elementwise import LowBitAdd, LowBitCat, LowBitReLU


def rectifier(six: bool) -> Any:
    return op_of(LowBitReLU, (lambda a, b: F.relu6(a) + b) if six else (lambda a, b: F.relu(a) + b))


def test_relu_keeps_the_exponent_and_passes_errors_of_positive_codes() -> None:
    x = carrier(torch.tensor([[-127, -1, 0, 1, 127]], dtype=torch.int8), -3, grad=True)
    y = rectifier(False)(x)
    assert (y.payload.tolist(), int(y.exponent)) == ([[0, 0, 0, 1, 127]], -3)
    send_back(y, torch.full((1, 5), 5, dtype=torch.int8), -9)
    assert grad_of(x).tolist() == [[0, 0, 0, 5 * 2.0**-9, 5 * 2.0**-9]]


@pytest.mark.parametrize(("exponent", "six"), [(-20, 127), (-5, 127), (-4, 96), (0, 6), (1, 3), (2, 1), (3, 0)])
def test_relu6_stops_at_the_largest_code_below_six(exponent: int, six: int) -> None:
    x = carrier(torch.arange(-128, 128).to(torch.int8)[None], exponent, grad=True)
    y = rectifier(True)(x)
    assert y.payload.tolist() == x.payload.clamp(0, six).tolist()
    send_back(y, torch.ones((1, 256), dtype=torch.int8), 0)
    inside = (x.payload > 0) & (x.payload < six)
    assert torch.equal(grad_of(x).bool(), inside)


@pytest.mark.parametrize("gap", range(0, 41, 4))
@pytest.mark.parametrize("swapped", [False, True])
def test_a_sum_of_two_exponents_is_exact_and_rounded_once(gap: int, swapped: bool) -> None:
    add = op_of(LowBitAdd, lambda a, b: a + b)
    a, b = carrier(codes(3, 40), -20, grad=True), carrier(codes(3, 40, seed=1), -20 + gap, grad=True)
    y = add(b, a) if swapped else add(a, b)
    # Beyond 22 bits between them the finer one gives up bits first: they lie below the last bit of the sum.
    common = max(-20, -20 + gap - 22)
    total = half_away(values(a) / 2.0**common) + values(b) / 2.0**common
    want, shift = to_codes(total)
    assert torch.equal(y.payload.double(), want)
    assert int(y.exponent) == common + shift
    assert (values(y) - values(a) - values(b)).abs().max() <= 2.0 ** int(y.exponent)

    err = codes(3, 40, seed=2)
    send_back(y, err, -9)
    assert torch.equal(grad_of(a), err * 2.0**-9)
    assert torch.equal(grad_of(b), err * 2.0**-9)


def test_a_sum_with_another_shape_or_a_number_is_float() -> None:
    net = low(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    y = net(torch.randn(2, 4))
    assert type(y + 1) is Tensor
    assert type(y + y[:1]) is Tensor


@pytest.mark.parametrize("exponents", [(-9, -9, -9), (-12, -9, -5), (-40, 0, -3)])
def test_a_concat_stands_on_the_coarsest_exponent(exponents: tuple[int, ...]) -> None:
    cat = op_of(LowBitCat, lambda a, b: torch.cat([a, b, a], 1))
    parts = [carrier(codes(2, n, seed=n), e, grad=True) for n, e in zip((3, 5, 1), exponents, strict=True)]
    y = cat(parts, 1)
    coarsest = max(exponents)
    want = torch.cat([half_away(values(part) / 2.0**coarsest) for part in parts], 1)
    assert torch.equal(y.payload.double(), want)
    assert int(y.exponent) == coarsest
    err = codes(2, 9, seed=9)
    send_back(y, err, -11)
    for part, back in zip(parts, err.split([3, 5, 1], 1), strict=True):
        assert torch.equal(grad_of(part), back * 2.0**-11)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_stack_is_a_concat_on_a_new_axis(dim: int) -> None:
    stack = op_of(LowBitCat, lambda a, b: torch.stack([a, b]))
    a, b = carrier(codes(2, 3), -9, grad=True), carrier(codes(2, 3, seed=1), -7, grad=True)
    y = stack([a, b], dim)
    assert torch.equal(y.payload.double(), torch.stack([half_away(values(a) * 2**7), values(b) * 2**7], dim))
    err = codes(*y.shape, seed=2)
    send_back(y, err, 0)
    assert torch.equal(grad_of(a), err.unbind(dim)[0].double())
    assert torch.equal(grad_of(b), err.unbind(dim)[1].double())


def test_sums_of_errors_are_rounded_once_where_the_tensor_was_made() -> None:
    """Three readers of one tensor: their errors add up exactly, and only the sum is rounded."""

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Any:
            y = self.fc(x)
            return y.flip(1), y.view(4, 2), y.unsqueeze(0)

    net = low(Fork(), torch.randn(2, 4))
    outputs = net(carrier(codes(2, 4)))
    errs = [codes(*y.shape, seed=n) for n, y in enumerate(outputs)]
    torch.autograd.backward(outputs, [carrier(e, x) for e, x in zip(errs, (-7, -15, -9), strict=True)])
    total = errs[0].double().flip(1) * 2**8 + errs[1].double().view(2, 4) + errs[2].double()[0] * 2**6
    assert width(total) > 7
    want, shift = to_codes(total)
    x = codes(2, 4).double()
    found, exponent = net.fc.gathered["weight"]  # type: ignore[union-attr, index]
    assert torch.equal(found.double(), want.T @ x)
    assert int(exponent) == -15 + shift - 7
    assert switch_of(net).run.float_errors == set()


def test_the_same_tensor_twice_doubles() -> None:
    add = op_of(LowBitAdd, lambda a, b: a + b)
    x = carrier(codes(2, 4), -7, grad=True)
    y = add(x, x)
    assert torch.equal(values(y), 2 * values(x))
    send_back(y, codes(2, 4, seed=3), -7)
    assert torch.equal(grad_of(x), 2 * codes(2, 4, seed=3).double() * 2.0**-7)


def test_what_was_not_followed_adds_exactly_and_enters_the_next_layer() -> None:
    """A sum that conversion could not see: wider than int8, and rounded by whoever reads it."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) + self.b(x)
            if float(x.sum()) > 1e9:  # nobody can follow this
                y = y * 2
            out: Tensor = self.c(y)
            return out

    x = torch.randn(3, 4)
    net = low(Hidden(), x)
    y = net(x)
    assert type(y) is Carrier
    assert y.payload.dtype is torch.int8
    F.cross_entropy(y, torch.tensor([0, 1, 0])).backward()
    assert net.a.gathered.keys() == {"weight", "bias"}  # type: ignore[union-attr, operator]
    want = F.linear(F.linear(x, net.a.weight, net.a.bias) + F.linear(x, net.b.weight, net.b.bias), net.c.weight)  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(y.plain(), want + net.c.bias, atol=0.05, rtol=0.05)  # type: ignore[union-attr]
