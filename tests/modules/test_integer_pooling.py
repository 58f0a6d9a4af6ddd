"""Max pools and means of codes against torch on float64 values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules.integer_twin import Watch, carrier, codes, grad_of, half_away, low, op_of, send_back, values, width
from torch import Tensor, nn

from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.carrier import Carrier
from lightning_lowbit.modules.elementwise import LowBitAvgPool

POOLS: dict[str, dict[str, Any]] = {
    "2/2": {"kernel_size": 2},
    "3/2/1 overlapping": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3/1 overlapping": {"kernel_size": 3, "stride": 1},
    "uneven": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    "ceil": {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    "ceil padded": {"kernel_size": 2, "stride": 2, "padding": 1, "ceil_mode": True},
    "dilated": {"kernel_size": 2, "stride": 1, "dilation": 3},
    "dilated, strided": {"kernel_size": 2, "stride": 2, "padding": 1, "dilation": 2},
    "gaps": {"kernel_size": 2, "stride": 3},
}


@pytest.mark.parametrize("few", [True, False], ids=["many ties", "few ties"])
@pytest.mark.parametrize("shape", [(2, 3, 8, 7), (2, 3, 7, 9)], ids=str)
@pytest.mark.parametrize("name", POOLS)
def test_max_pool_and_its_ties(name: str, shape: tuple[int, ...], few: bool) -> None:
    payload = codes(*shape, low=-128, high=-126 if few else 127).contiguous(memory_format=torch.channels_last)
    x = carrier(payload, -4, grad=True)
    y = F.max_pool2d(x, **POOLS[name])
    # torch's float pool takes the first of equals too, in row-major order.
    x64 = values(x).requires_grad_()
    want = F.max_pool2d(x64, **POOLS[name])
    assert type(y) is Carrier
    assert (y.payload.dtype, int(y.exponent)) == (torch.int8, -4)
    assert torch.equal(values(y), want.detach())
    err = codes(*y.shape, seed=1)
    send_back(y, err, -9)
    want.backward(err.double() * 2.0**-9)
    assert torch.equal(grad_of(x), x64.grad)  # type: ignore[arg-type]


def test_errors_of_overlapping_windows_add_up_and_are_rounded_once() -> None:
    kept: list[Any] = []
    x = carrier(torch.zeros((1, 1, 3, 3), dtype=torch.int8), grad=True)
    y = F.max_pool2d(Watch.apply(x, kept), 2, 1)
    send_back(y, torch.full((1, 1, 2, 2), 127, dtype=torch.int8), -9)
    assert kept[0].payload.dtype is torch.int32
    y = F.max_pool2d(Watch.apply(x, kept), 3, 1, 1)
    send_back(y, torch.full((1, 1, 3, 3), 127, dtype=torch.int8), -9)
    # The window of the corner, its neighbors' and that of the middle all find their first zero at [0, 0].
    assert kept[1].payload.flatten().tolist() == [4 * 127, 2 * 127, 0, 2 * 127, 127, 0, 0, 0, 0]


@pytest.mark.parametrize("setting", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}], ids=str)
def test_max_pool_of_signals(setting: dict[str, Any]) -> None:
    x = carrier(codes(2, 3, 11), -4, grad=True)
    x64 = values(x).requires_grad_()
    y, want = nn.MaxPool1d(**setting)(x), nn.MaxPool1d(**setting)(x64)
    assert torch.equal(values(y), want.detach())
    send_back(y, codes(*y.shape, seed=1), 0)
    want.backward(codes(*y.shape, seed=1).double())
    assert torch.equal(grad_of(x), x64.grad)  # type: ignore[arg-type]


def test_indices_and_unbatched_inputs_are_left_to_float_code() -> None:
    x = carrier(codes(1, 3, 4, 4))
    assert type(F.max_pool2d(x, 2, return_indices=True)[0]) is Tensor
    assert torch.equal(F.max_pool2d(x[0], 2), F.max_pool2d(x.plain()[0], 2))


# -- means -----------------------------------------------------------------------------------------------------
MEANS: dict[str, tuple[Any, Any]] = {
    "mean((2, 3))": (lambda a, b: a.mean((2, 3)), {"dim": (2, 3)}),
    "mean keepdim": (lambda a, b: a.mean([-1, -2], keepdim=True), {"dim": [-1, -2], "keepdim": True}),
    "mean of an axis": (lambda a, b: torch.mean(a, 2), {"dim": 2}),
    "global pool": (lambda a, b: F.adaptive_avg_pool2d(a, 1), {"output_size": 1}),
    "adaptive": (lambda a, b: F.adaptive_avg_pool2d(a, (2, 3)), {"output_size": (2, 3)}),
    "adaptive, one axis": (lambda a, b: F.adaptive_avg_pool2d(a, (None, 3)), {"output_size": (None, 3)}),
    "windows": (lambda a, b: F.avg_pool2d(a, 2), {"kernel_size": 2}),
    "windows of 9": (lambda a, b: F.avg_pool2d(a, 3), {"kernel_size": 3}),
    "windows of 6": (lambda a, b: F.avg_pool2d(a, (2, 3)), {"kernel_size": (2, 3)}),
    "overlapping": (lambda a, b: F.avg_pool2d(a, 3, 2, 1), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "divisor": (lambda a, b: F.avg_pool2d(a, 2, divisor_override=3), {"kernel_size": 2, "divisor_override": 3}),
}


def pool_of(name: str) -> tuple[Any, Any]:
    """The module that stands for a mean, and the same on float64 values."""
    function, settings = MEANS[name]
    op = op_of(LowBitAvgPool, function, conv=True)
    return op, lambda x: op.function(x, **{"dim": None} | settings if op.kind is None else settings)


@pytest.mark.parametrize("exponent", [-30, -7, 3])
@pytest.mark.parametrize("name", MEANS)
def test_means_are_exact_to_half_a_code(name: str, exponent: int) -> None:
    op, twin = pool_of(name)
    settings = MEANS[name][1]
    x = carrier(codes(2, 4, 6, 6).contiguous(memory_format=torch.channels_last), exponent, grad=True)
    y = op(x, **settings)
    assert type(y) is Carrier
    x64 = values(x).requires_grad_()
    want = twin(x64)
    unit = 2.0 ** int(y.exponent)
    assert torch.equal(values(y), (half_away(want.detach() / unit * (1 + 1e-15)) * unit).clamp(-127 * unit, 127 * unit))
    assert unit <= 2.0**exponent or float(want.detach().abs().max()) > 31 * unit  # of 7 bits at most one is idle
    err = codes(*y.shape, seed=1)
    send_back(y, err, -9)
    want.backward(err.double() * 2.0**-9)
    # 1 / n with 8 bits more than the error's code; overlapping windows add several of them.
    torch.testing.assert_close(grad_of(x), x64.grad, atol=9 * 2.0**-18, rtol=0)


def test_powers_of_two_go_back_exactly() -> None:
    op, twin = pool_of("windows")
    x = carrier(codes(2, 4, 6, 6), -7, grad=True)
    y = op(x, kernel_size=2)
    err = codes(*y.shape, seed=1)
    send_back(y, err, -9)
    x64 = values(x).requires_grad_()
    twin(x64).backward(err.double() * 2.0**-9)
    assert torch.equal(grad_of(x), x64.grad)  # type: ignore[arg-type]


def test_a_mean_of_equal_codes_is_that_code() -> None:
    op, _ = pool_of("windows of 9")
    for code in (1, 5, 63, -63):
        y = op(carrier(torch.full((1, 4, 3, 3), code, dtype=torch.int8), -7), kernel_size=3)
        assert (values(y) == code * 2.0**-7).all(), code


def test_evaluation_keeps_the_range_that_training_found() -> None:
    op, _ = pool_of("global pool")
    x = carrier(codes(2, 4, 6, 6))
    y = op(x, output_size=1)
    op.lowbit_accumulator.settle(reset=True)
    op.eval()
    assert torch.equal(values(op(x, output_size=1)), values(y))
    quiet = op(carrier(x.payload // 32), output_size=1)
    assert int(quiet.exponent) == int(y.exponent)
    assert width(quiet.payload) < width(y.payload)


@pytest.mark.parametrize("settings", [
    {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}, {"kernel_size": 4, "ceil_mode": True},
], ids=["padding that does not count", "ceil mode"])  # fmt: skip
def test_windows_of_unequal_size_are_float_and_let_gradients_through(settings: dict[str, Any]) -> None:
    op = op_of(LowBitAvgPool, lambda a, b: F.avg_pool2d(a, **settings), conv=True)
    x = carrier(codes(2, 4, 6, 6), -7, grad=True)
    x64 = values(x).requires_grad_()
    y, want = op(x, **settings), F.avg_pool2d(x64, **settings)
    unit = 2.0 ** int(y.exponent)
    assert (values(y) - want.detach()).abs().max() <= unit
    err = codes(*y.shape, seed=1)
    send_back(y, err, -9)
    want.backward(err.double() * 2.0**-9)
    torch.testing.assert_close(grad_of(x), x64.grad, atol=2.0**-12, rtol=0)


def test_an_adaptive_pool_that_does_not_divide_is_float_and_lets_gradients_through() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.fc = nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveAvgPool2d(3), nn.Linear(18, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(self.pool(self.conv(x)).flatten(1))
            return y

    net = low(Net(), torch.randn(2, 1, 8, 8))
    F.cross_entropy(net(torch.randn(2, 1, 8, 8)), torch.tensor([0, 1])).backward()
    assert net.conv.gathered["weight"][0].any()  # type: ignore[union-attr, index]
    assert switch_of(net).run.float_errors == {"conv"}  # said in the report
