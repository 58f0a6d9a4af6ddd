"""Batch norm walked in blocks: every layout and size of block gives the bits of the formula, in any unit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_lowbit.numerics import normalize_blocks
from lightning_lowbit.numerics.normalize import NormFormat, batch_norm, norm_constants, normalize, running_update
from lightning_lowbit.numerics.normalize_blocks import Columns, Rows, blocks_of, dense

_PAPER = NormFormat()
_SHAPES = [(37, 5), (7, 5, 3, 3), (9, 6, 8, 8), (3, 130, 9, 11), (2, 2, 70, 100), (2, 3, 4, 3, 5), (1, 1)]
_IDS = ["linear", "small", "maps", "channels", "large", "volumes", "one"]


def _last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _swapped(x: Tensor) -> Tensor:
    """Neither contiguous nor channels last."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"contiguous": Tensor.contiguous, "last": _last, "swapped": _swapped}


def _values(shape: tuple[int, ...], seed: int, fraction: int = 14) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randn(2, 1, shape[1], *[1] * (len(shape) - 2), generator=generator)
    x = torch.randn(shape, generator=generator) * channels[0].exp() + channels[1]
    return torch.round(x * 2**fraction) * 2.0**-fraction


def _forward(x: Tensor, gamma: Tensor, beta: Tensor, format: NormFormat) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas, one float64 tensor per symbol; float32 keeps 24 bits, the last set where one was lost."""

    def on_grid(v: Tensor, bits: int) -> Tensor:
        return v if bits >= 32 else torch.round(v * 2.0 ** (bits - 1)) * 2.0 ** (1 - bits)

    axes = [axis for axis in range(x.dim()) if axis != 1]
    v, shape = x.double(), [1, -1, *[1] * (x.dim() - 2)]
    mean = v.sum(axes) / (v.numel() // len(gamma))
    mean_q = on_grid(mean, format.mean)
    squares = (v - mean_q.reshape(shape)).square().sum(axes)
    var = (squares / (v.numel() // len(gamma)) - (mean - mean_q).square()).clamp(min=0.0)
    s = on_grid(var.sqrt(), format.deviation) + 2.0**format.eps_exponent
    xhat = on_grid((v - mean_q.reshape(shape)) / s.reshape(shape), format.xhat)
    gamma, beta = on_grid(gamma.double(), format.gamma), on_grid(beta.double(), format.beta)
    bits = (gamma.reshape(shape) * xhat + beta.reshape(shape)).view(torch.int64)
    lost = (bits & (2**29 - 1)) != 0
    return ((bits >> 29 << 29) | (lost.long() << 29)).view(torch.float64).float(), mean, var


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("shape", _SHAPES, ids=_IDS)
@pytest.mark.parametrize("size", [1 << 8, 1 << 12, 1 << 17])
def test_blocks_change_no_bit(monkeypatch: pytest.MonkeyPatch, layout: str, shape: tuple[int, ...], size: int) -> None:
    """Blocks of part of a map, of some channels, of some samples, and of all."""
    monkeypatch.setattr(normalize_blocks, "_SLICE", size)
    monkeypatch.setattr(normalize_blocks, "_LARGE", size)
    x = _LAYOUTS[layout](_values(shape, 1)).requires_grad_()
    gamma, beta = _values((2, shape[1]), 2).requires_grad_()
    y, mean, var = batch_norm(x, gamma, beta, _PAPER)
    for got, want in zip((y, mean, var), _forward(x.detach(), gamma.detach(), beta.detach(), _PAPER), strict=True):
        assert torch.equal(got, want)
    if layout != "swapped":
        assert y.stride() == x.stride()
    grad = _values(shape, 3)
    got = torch.autograd.grad(y, (x, gamma, beta), grad)
    wide = [t.detach().double().requires_grad_() for t in (x, gamma, beta)]
    want = torch.autograd.grad(batch_norm(*wide, _PAPER)[0], wide, grad.double())
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("gamma", "few"), [(127 / 128, True), (31 / 128, True), (6 + 1 / 128, False)], ids=["some", "none", "many"]
)
def test_numbers_beyond_float32_are_odd_wherever_they_are(gamma: float, few: bool) -> None:
    """|y| >= 4 does not fit float32: found in groups where it is rare, done throughout where not."""
    x = _values((16, 8, 16, 16), 4)
    factor, beta = torch.full((8,), gamma), torch.linspace(-0.2, 0.2, 8)
    want, _, _ = _forward(x, factor, beta, _PAPER)
    groups = (want.abs() > 4).view(64, -1).any(0).double().mean()
    assert (groups < 0.25) == few
    assert (groups > 0) == (gamma > 0.5)
    assert torch.equal(batch_norm(x, factor, beta, _PAPER)[0], want)


def test_without_a_grid_every_number_may_be_odd() -> None:
    """However small: no power of two bounds what float32 holds."""
    x, gamma, format = _values((16, 8, 16, 16), 17), torch.full((8,), 1e-9), NormFormat(gamma=32)
    want, _, _ = _forward(x, gamma, torch.zeros(8), format)
    assert torch.equal(batch_norm(x, gamma, None, format)[0], want)


def test_a_mean_far_from_zero_cancels_nothing() -> None:
    """Sums around 0 would lose 2^-53 * (mean / deviation)^2 of the variance: all of it here."""
    x = _values((64, 2, 8, 8), 5, 20).double() * 2.0**-10 + torch.tensor([3e4, 0.0]).reshape(1, 2, 1, 1)
    _, mean, var = batch_norm(x, None, None, _PAPER)
    assert torch.equal(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(var, x.var((0, 2, 3), correction=0), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("exponent", [-3, 1, 5])
@pytest.mark.parametrize("integer_bits", [None, 1], ids=["unclipped", "clipped"])
def test_another_unit_is_another_power_of_two_before_the_norm(exponent: int, integer_bits: int | None) -> None:
    """y and the parameters' gradients are those of x 2^-e, bit for bit; the rest is in x's own units."""
    format, scale = NormFormat(integer_bits=integer_bits), 2.0**exponent
    values = _values((20, 6, 7, 7), 6) * 4
    gamma, beta = _values((2, 6), 7)
    grad = _values((20, 6, 7, 7), 8)
    results = []
    for x, unit in ((values, exponent), (values / scale, 0)):
        leaves = [t.clone().requires_grad_() for t in (x, gamma, beta)]
        y, mean, var = batch_norm(*leaves, format, exponent=unit)
        results.append((y.detach(), mean, var, *torch.autograd.grad(y, leaves, grad)))
    (y, mean, var, dx, *others), (want, scaled_mean, scaled_var, scaled_dx, *wanted) = results
    assert torch.equal(y, want)
    assert torch.equal(mean, scaled_mean * scale)
    assert torch.equal(var, scaled_var * scale**2)
    assert torch.equal(dx, scaled_dx / scale)
    assert all(torch.equal(one, other) for one, other in zip(others, wanted, strict=True))
    assert not torch.equal(y, batch_norm(values, gamma, beta, format)[0])


@pytest.mark.parametrize("exponent", [-4, 0, 3])
def test_integers_count_in_the_unit_of_the_network(exponent: int) -> None:
    codes = torch.randint(-(2**17), 2**17, (30, 4, 5), generator=torch.Generator().manual_seed(9))
    mean, beta = _values((2, 4), 10) * 2
    var, gamma = (_values((2, 4), 11).abs() + 0.1) * 2.0**exponent
    x = codes.double() * 2.0**-14
    exact, _, _ = batch_norm(x, gamma, beta, _PAPER, (mean, var), exponent=exponent)
    constants = norm_constants(mean, var, gamma, beta, _PAPER, exponent)
    integers = normalize(codes, 14, constants, _PAPER, exponent)
    assert torch.equal(exact * 2.0**_PAPER.fraction, integers.double())


def test_running_statistics_move_on_the_grid_of_the_unit() -> None:
    value = torch.tensor([1.37, -0.4])
    for exponent in (-2, 3):
        running, other = torch.tensor([0.5, -2.0]), torch.tensor([0.5, -2.0]) * 2.0**-exponent
        running_update(running, value, 0.9, 8, exponent)
        running_update(other, value * 2.0**-exponent, 0.9, 8)
        assert torch.equal(running, other * 2.0**exponent)


@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_what_is_not_finite_stays_in_its_channel(bad: float, layout: str) -> None:
    """The values of the other channels, those beyond float32 too, are what they are without it."""
    x = _values((16, 3, 32, 32), 12)
    gamma, beta = torch.tensor([127.0, 255.0, 129.0]) / 128, torch.tensor([0.0, 0.5, -0.5])
    clean, _, _ = batch_norm(x, gamma, beta, _PAPER)
    x[3, 1, 4, 5] = bad
    x = _LAYOUTS[layout](x).requires_grad_()
    y, mean, var = batch_norm(x, gamma, beta, _PAPER)
    assert y[:, 1].isnan().all()
    assert not mean[1].isfinite()
    assert var[1].isnan()
    assert torch.equal(y[:, ::2], clean[:, ::2])
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx[:, ::2].isfinite().all()
    norm_constants(mean, var, gamma, beta, _PAPER)


def test_a_process_without_samples_takes_part() -> None:
    """It adds nothing to the sums, and asks for as many of them as the others."""
    asked: list[list[Tensor]] = [[], []]
    for process, x in enumerate((torch.randn(4, 3, 5), torch.zeros(0, 3, 5))):
        x.requires_grad_()

        def reduce(sums: Tensor, process: int = process) -> Tensor:
            asked[process].append(sums)
            return sums if process == 0 else sums + asked[0][len(asked[1]) - 1]

        y, mean, _ = batch_norm(x, torch.ones(3), None, _PAPER, reduce=reduce)
        y.backward(torch.ones_like(y))
        assert mean.isfinite().all()
        assert x.grad is not None
    assert [sums.shape for sums in asked[0]] == [sums.shape for sums in asked[1]]
    assert all(not sums.any() for sums in asked[1])


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x, gamma, beta = _values((8, 3, 4), 13), torch.ones(3), torch.zeros(3)
    every = [t.clone().requires_grad_() for t in (x, gamma, beta)]
    grad = _values((8, 3, 4), 14)
    wanted = torch.autograd.grad(batch_norm(*every, _PAPER)[0], every, grad)
    for place in range(3):
        leaves = [t.clone() for t in (x, gamma, beta)]
        leaves[place].requires_grad_()
        (got,) = torch.autograd.grad(batch_norm(*leaves, _PAPER)[0], leaves[place], grad)
        assert torch.equal(got, wanted[place])


def test_a_gradient_in_another_layout_is_the_same_gradient() -> None:
    grad = _values((6, 5, 9, 9), 15)
    found = []
    for layout in (Tensor.contiguous, _last):
        x = _last(_values((6, 5, 9, 9), 16)).requires_grad_()
        (dx,) = torch.autograd.grad(batch_norm(x, None, None, _PAPER)[0], x, layout(grad))
        found.append(dx)
    assert torch.equal(*found)


def test_layouts_are_walked_as_they_lie_in_memory() -> None:
    x = torch.randn(4, 20, 8, 8)
    assert isinstance(blocks_of(x), Rows)
    assert isinstance(blocks_of(_last(x)), Columns)
    assert isinstance(blocks_of(torch.randn(4, 20)), Columns)
    assert dense(_last(x)).stride() == _last(x).stride()
    assert dense(_swapped(x)).is_contiguous()
    for t in (x, _last(x)):
        assert all(block.data_ptr() >= t.data_ptr() and block.is_contiguous() for block in blocks_of(t).of(t))
