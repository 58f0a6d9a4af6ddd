"""Signs, their noise and the gradients that pass them: every rule at its ties and extremes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_lowbit.numerics.binary import (
    STES,
    binarize,
    binary_sign,
    channel_mean,
    probability_sign,
    scaled_sign,
    swish_slope,
)

EXTREMES = torch.tensor([-math.inf, -2.0, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 2.0, math.inf, math.nan])


def gradient(x: Tensor, ste: str, progress: float | None = None) -> Tensor:
    x = x.clone().requires_grad_()
    given = None if progress is None else torch.tensor(progress)
    binarize(x, ste, given).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_zero_and_nan_are_plus_one_in_every_dtype(dtype: torch.dtype) -> None:
    y = binary_sign(torch.tensor([-1.0, -0.0, 0.0, math.nan, math.inf, -math.inf], dtype=dtype))
    assert y.dtype == dtype
    assert y.tolist() == [-1, 1, 1, 1, 1, -1]


def test_subnormals_keep_their_sign() -> None:
    assert binary_sign(EXTREMES).tolist() == [-1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("ste", STES)
def test_all_estimators_give_the_sign_at_their_end(ste: str) -> None:
    assert torch.equal(binarize(EXTREMES, ste, torch.tensor(1.0)), binary_sign(EXTREMES))
    assert torch.equal(binarize(EXTREMES, ste), binary_sign(EXTREMES))


def test_the_window_is_closed_and_infinity_is_outside() -> None:
    outside = [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert gradient(EXTREMES, "htanh").tolist() == outside


def test_the_gradient_s_own_size_is_not_clamped() -> None:
    """The derivative masks by the input; clamping the gradient's values is another rule, and a wrong one."""
    x = torch.tensor([9.0, 0.2], requires_grad=True)
    y = binarize(x)
    (g,) = torch.autograd.grad(y, x, torch.tensor([-7.0, 5.0]))
    assert g.tolist() == [0.0, 5.0]


def test_the_triangle_is_the_derivative_of_its_quadratic() -> None:
    x = torch.linspace(-1.5, 1.5, 301, dtype=torch.float64).requires_grad_()
    quadratic = torch.where(x < -1, -1.0, torch.where(x < 0, 2 * x + x * x, torch.where(x < 1, 2 * x - x * x, 1.0)))
    (want,) = torch.autograd.grad(quadratic.sum(), x)
    torch.testing.assert_close(gradient(x.detach(), "approx"), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_swish_is_finite_where_cosh_is_not(dtype: torch.dtype) -> None:
    x = torch.tensor([-math.inf, -6e4, -20.0, 0.0, 20.0, 6e4, math.inf], dtype=dtype)
    slopes = swish_slope(x)
    assert bool(torch.isfinite(slopes).all())
    assert slopes[3] == 5.0
    assert bool((slopes[[0, 1, 2, 4, 5, 6]].abs() < 1e-6).all())
    assert float(swish_slope(torch.tensor(0.6))) < 0  # |5 x| > 2.4


def test_annealing_sharpens_the_window() -> None:
    x = torch.tensor([0.0, 0.5])
    first, last = gradient(x, "annealed", 0.0), gradient(x, "annealed", 1.0)
    torch.testing.assert_close(first, torch.tensor([1.0, 1 - math.tanh(0.05) ** 2]))  # t = 0.1, k = 10
    torch.testing.assert_close(last, torch.tensor([10.0, 10 * (1 - math.tanh(5) ** 2)]))


def test_progress_narrows_the_ramp_of_the_progressive_sign() -> None:
    x = torch.tensor([-2.0, -0.125, 0.0, 0.125])
    assert binarize(x, "progressive", torch.tensor(0.0)).tolist() == [-1.0, -0.125, 0.0, 0.125]
    assert binarize(x, "progressive", torch.tensor(0.1)).tolist() == [-1.0, -0.5, 0.0, 0.5]
    assert binarize(x, "progressive", torch.tensor(1.0)).tolist() == [-1.0, -1.0, 1.0, 1.0]


@pytest.mark.parametrize("ste", ["identity", "htanh", "approx", "swish", "annealed"])
def test_a_second_derivative_exists(ste: str) -> None:
    x = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(binarize(x, ste), x, g, create_graph=True)
    (again,) = torch.autograd.grad(first.sum(), g)
    torch.testing.assert_close(again, gradient(x.detach(), ste))


def test_noise_decides_within_the_window_only() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.25, 1.0, 3.0]).expand(20_000, 7)
    signs = probability_sign(x, torch.rand(x.shape, generator=generator))
    share = (signs > 0).float().mean(0)
    p = ((x[0] + 1) / 2).clamp(0, 1)
    deviation = (p * (1 - p) / len(x)).sqrt()
    assert bool(((share - p).abs() <= 5 * deviation).all())


def test_a_scale_of_zero_gives_zeros_not_nan() -> None:
    w = torch.zeros(2, 3, requires_grad=True)
    for scale in (channel_mean(w), w.detach().abs().amax()):
        for u in (None, torch.full((2, 3), 0.7)):
            q = scaled_sign(w, scale, u=u)
            assert q.detach().abs().tolist() == [[0, 0, 0], [0, 0, 0]]
    q.sum().backward()
    assert bool(torch.isfinite(w.grad).all())  # type: ignore[arg-type]


def test_the_full_gradient_is_the_derivative_of_a_scale_that_moves() -> None:
    torch.manual_seed(0)
    w = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 4, 2, dtype=torch.float64)
    signs, window = binary_sign(w.detach()), (w.detach().abs() <= 1).double()
    moving = w.abs().mean((1, 2), keepdim=True)
    (through_scale,) = torch.autograd.grad((moving * signs * g).sum(), w)
    (got,) = torch.autograd.grad(scaled_sign(w, channel_mean(w), "htanh", "full"), w, g)
    torch.testing.assert_close(got, through_scale + channel_mean(w) * window * g)


@pytest.mark.parametrize(("grad", "factor"), [("unit", 1.0), ("alpha", 0.5)])
def test_unit_and_alpha_differ_by_the_scale(grad: str, factor: float) -> None:
    w = torch.tensor([[0.25, -0.75]], requires_grad=True)
    (got,) = torch.autograd.grad(scaled_sign(w, channel_mean(w), "identity", grad), w, torch.tensor([[1.0, 1.0]]))
    assert got.tolist() == [[factor, factor]]


# torch 2.13's compiler itself uses what torch has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("ste", ["htanh", "approx", "annealed", "identity"])
def test_compiles_without_a_break(ste: str) -> None:
    def step(x: Tensor) -> Tensor:
        return binarize(x, ste, torch.tensor(0.5)) * 2

    x = torch.randn(17, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ya, yb = step(a), compiled(b)
    ya.sum().backward()
    yb.sum().backward()
    assert torch.equal(ya, yb)
    assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
