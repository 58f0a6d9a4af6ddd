"""A batch norm in evaluation as one multiplication and one addition, and its sign as an integer threshold.

Every way to compute a batch norm rounds differently, and where a sum of signs meets the moving mean the result is
exactly 0: one affine function decides those ties alike in the network, compiled or not, and in its packed form.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["affine", "affine_parameters", "sign_thresholds"]


def affine_parameters(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """a = gamma / sqrt(var + eps), b = beta - mean a, each computed in float64 and rounded once to float32.

    Args:
        mean, var: moving statistics, [channels].
        weight, bias: gamma and beta; None are 1 and 0.
        eps: of the norm.
    """
    a = torch.rsqrt(var.double() + eps)
    if weight is not None:
        a = weight.double() * a
    b = -mean.double() * a
    if bias is not None:
        b = bias.double() + b
    return a.float(), b.float()


def affine(x: Tensor, a: Tensor, b: Tensor, axis: int = 1) -> Tensor:
    """x a + b along ``axis``: multiply, round, add, round; float32 (float64 for float64 x)."""
    shape = [1] * x.dim()
    shape[axis] = -1
    x = x if x.dtype == torch.float64 else x.float()
    return x * a.reshape(shape) + b.reshape(shape)


def sign_thresholds(positive: Callable[[Tensor], Tensor], k: int, channels: int) -> tuple[Tensor, Tensor]:
    """What follows a sum of signs, up to the next sign, as two integers a channel.

    The next sign is +1 where (dot >= low) != flip. Found by bisection with the network's own float function, which
    rounding keeps monotone, so that its ties are the threshold's ties.

    Args:
        positive: from dots, int64 [channels], to whether the next sign is +1, bool [channels]; monotone in each.
        k: number of products; a dot lies in [-k, k].
        channels: how many.
    Returns:
        low int32 in [-k + 1, k + 1] (k + 1: the sign is constant) and flip bool, [channels] each.

    >>> sign_thresholds(lambda dot: dot * torch.tensor([1.0, -1.0, 0.0]) + torch.tensor([-2.0, 0.5, -1.0]) >= 0, 5, 3)
    (tensor([2, 1, 6], dtype=torch.int32), tensor([False,  True, False]))
    """
    least = torch.full((channels,), -k, dtype=torch.int64)
    flip = positive(least)
    low, high = least + 1, torch.full_like(least, k + 1)  # the sign has changed at `high` or never does
    while bool((low < high).any()):
        middle = torch.div(low + high, 2, rounding_mode="floor")
        changed = positive(middle.clamp_max(k)) != flip
        high = torch.where((low < high) & changed, middle, high)
        low = torch.where((low < high) & ~changed, middle + 1, low)
    return low.to(torch.int32), flip
