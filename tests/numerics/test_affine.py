"""One affine function for a batch norm in evaluation, and its sign as a threshold on integers."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_lowbit.numerics.affine import affine, affine_parameters, sign_thresholds


def test_parameters_are_rounded_once() -> None:
    mean, var = torch.tensor([3.0, -7.0]), torch.tensor([2.0, 0.0])
    gamma, beta = torch.tensor([0.3, -1.5]), torch.tensor([0.1, 0.0])
    a, b = affine_parameters(mean, var, gamma, beta, 1e-5)
    exact = gamma.double() / torch.sqrt(var.double() + 1e-5)
    assert torch.equal(a, exact.float())
    assert torch.equal(b, (beta.double() - mean.double() * exact).float())
    plain, shift = affine_parameters(mean, var, None, None, 1e-5)
    assert torch.equal(plain, torch.rsqrt(var.double() + 1e-5).float())
    assert torch.equal(shift, (-mean.double() * torch.rsqrt(var.double() + 1e-5)).float())


def test_it_is_the_batch_norm_up_to_rounding() -> None:
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(5).eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()  # type: ignore[union-attr]
    x = torch.randn(2, 5, 3, 3)
    a, b = affine_parameters(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)  # type: ignore[arg-type]
    torch.testing.assert_close(affine(x, a, b), norm(x))
    assert torch.equal(affine(x.movedim(1, -1), a, b, axis=-1), affine(x, a, b).movedim(1, -1))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 130), st.integers(0, 2**31 - 1))
def test_thresholds_equal_the_function_at_every_sum(k: int, seed: int) -> None:
    """Exhaustive over all sums, ties by construction: integer means, no shift, gamma of both signs and zero."""
    generator = torch.Generator().manual_seed(seed)
    channels = 12
    mean = torch.randint(-k, k + 1, (channels,), generator=generator).float()
    var = torch.rand(channels, generator=generator) * k + 1e-3
    gamma = torch.randn(channels, generator=generator) * torch.randint(0, 2, (channels,), generator=generator)
    beta = torch.randn(channels, generator=generator) * torch.randint(0, 2, (channels,), generator=generator)
    a, b = affine_parameters(mean, var, gamma, beta, 1e-5)

    def positive(dot: Tensor) -> Tensor:
        return ~(affine(dot.float()[None], a, b)[0] < 0)

    low, flip = sign_thresholds(positive, k, channels)
    dots = torch.arange(-k, k + 1)
    want = torch.stack([positive(dot.expand(channels)) for dot in dots])
    assert torch.equal((dots[:, None] >= low) != flip, want)
    assert bool((low > -k).all())
    assert bool((low <= k + 1).all())


def test_nan_parameters_are_plus_one() -> None:
    low, flip = sign_thresholds(lambda dot: ~(dot * torch.tensor([float("nan")]) < 0), 9, 1)
    assert ((torch.arange(-9, 10) >= low) != flip).all()
