"""Batch norm between integers against F.batch_norm in float64, within half a code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules.integer_twin import carrier, codes, grad_of, low, send_back, values
from torch import Tensor, nn

from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.carrier import Carrier

SHAPES = {"2d": (4, 3, 5, 5), "1d": (8, 3), "1d with length": (4, 3, 7), "one pixel": (6, 3, 1, 1)}


def norm_of(shape: tuple[int, ...], **options: Any) -> Any:
    """A batch norm that stands between two low-bit layers."""
    torch.manual_seed(0)
    if len(shape) == 2:
        net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, **options), nn.Linear(3, 2))
        x = torch.randn(4, 3)
    elif len(shape) == 3:
        net = nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3, **options), nn.Conv1d(3, 2, 1))
        x = torch.randn(4, 3, 5)
    else:
        net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, **options), nn.Conv2d(3, 2, 1))
        x = torch.randn(4, 3, 5, 5)
    norm: Any = low(net, x, norms="island")[1]  # type: ignore[index]
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([0.7, -1.3, 2.0]))
            norm.bias.copy_(torch.tensor([0.2, 0.0, -0.4]))
    return norm


def in_float64(norm: Any, x: Tensor, training: bool) -> tuple[Tensor, tuple[Tensor | None, ...], tuple[Tensor, ...]]:
    affine = tuple(None if p is None else p.detach().double().requires_grad_() for p in (norm.weight, norm.bias))
    moving = (norm.running_mean.double().clone(), norm.running_var.double().clone())
    momentum = 1.0 / (int(norm.num_batches_tracked) + 1) if norm.momentum is None else norm.momentum
    return F.batch_norm(x, *moving, *affine, training, momentum, norm.eps), affine, moving


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None, "eps": 1e-3}], ids=str)
@pytest.mark.parametrize("exponent", [-40, -6, 10])
@pytest.mark.parametrize("name", SHAPES)
def test_training(name: str, exponent: int, options: dict[str, Any]) -> None:
    norm, shape = norm_of(SHAPES[name], **options), SHAPES[name]
    x = carrier(codes(*shape, low=-128), exponent, grad=True)
    x64 = values(x).requires_grad_()
    want, affine, moving = in_float64(norm, x64, True)
    y = norm(x)
    assert type(y) is Carrier
    unit = 2.0 ** int(y.exponent)
    assert ((values(y) - want.detach()).abs() <= unit * 0.501).all() or int(y.payload.abs().max()) == 127
    assert int(y.payload.abs().max()) >= 64
    torch.testing.assert_close(norm.running_mean.double(), moving[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_var.double(), moving[1], rtol=1e-6, atol=0)
    assert int(norm.num_batches_tracked) == 1

    err = codes(*shape, seed=1)
    send_back(y, err, -9)
    want.backward(err.double() * 2.0**-9)
    back = x.grad.plain().double() if isinstance(x.grad, Carrier) else grad_of(x)
    assert x64.grad is not None
    largest = x64.grad.abs().max()
    assert ((back - x64.grad).abs() <= largest / 63 * 0.501).all()
    for parameter, expected in zip((norm.weight, norm.bias), affine, strict=True):
        if expected is not None:
            torch.testing.assert_close(parameter.grad.double(), expected.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_evaluation(name: str) -> None:
    norm, shape = norm_of(SHAPES[name]), SHAPES[name]
    x = carrier(codes(*shape), -6)
    for _ in range(3):
        norm(x)
    norm.lowbit_accumulator.settle(reset=True)
    norm.eval()
    before = norm.running_mean.clone()
    want, *_ = in_float64(norm, values(x), False)
    y = norm(x)
    unit = 2.0 ** int(y.exponent)
    bound = want.clamp(-127 * unit, 127 * unit)
    assert ((values(y) - bound).abs() <= unit * 0.501).all()
    assert torch.equal(norm.running_mean, before)
    assert torch.equal(values(norm(carrier(x.payload[:1], -6))), values(y)[:1])  # alone or in company


def test_without_moving_statistics_the_batch_s_are_used_in_evaluation_too() -> None:
    norm = norm_of((4, 3, 5, 5), track_running_stats=False).eval()
    x = carrier(codes(4, 3, 5, 5), -6)
    want = F.batch_norm(values(x), None, None, norm.weight.double(), norm.bias.double(), True)
    y = norm(x)
    limit = 127 * 2.0 ** int(y.exponent)
    assert ((values(y) - want.detach().clamp(-limit, limit)).abs() <= 2.0 ** (int(y.exponent) - 1) * 1.002).all()


def test_a_constant_channel_has_no_variance_and_no_crash() -> None:
    norm = norm_of((4, 3, 5, 5))
    x = carrier(torch.full((4, 3, 5, 5), 7, dtype=torch.int8), -6, grad=True)
    y = norm(x)
    want, *_ = in_float64(norm, values(x), True)
    assert ((values(y) - want.detach()).abs() <= 2.0 ** int(y.exponent)).all()
    send_back(y, codes(4, 3, 5, 5, seed=1), -9)
    assert torch.isfinite(grad_of(x)).all()
    assert torch.isfinite(norm.weight.grad).all()


def test_folded_where_it_has_seen_data_and_an_island_elsewhere() -> None:
    def net(seen: bool) -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
        if seen:
            made(torch.randn(4, 3, 5, 5))
        return low(made, torch.randn(4, 3, 5, 5))

    fresh, old = net(False), net(True)
    assert (fresh[1].island, old[1].island) == (True, False)  # type: ignore[index]
    assert switch_of(fresh).conversion.layers[0].batch_norm is None
    assert switch_of(old).conversion.layers[0].batch_norm == "1"
    # What is left of a folded one is the identity with the merged bias.
    old.eval()
    kept = old[0](torch.randn(2, 3, 5, 5))  # type: ignore[index, operator]
    torch.testing.assert_close(old[1].op(kept.plain()), kept.plain() + old[1].bias[:, None, None])  # type: ignore[index, operator]
