"""Batch statistics: torch's batch-norm kernel against its float64 formula, gradients included."""

from __future__ import annotations

import pytest
import torch

from lightning_lowbit.graph.fold import batch_statistics


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((8, 3), torch.contiguous_format),
        ((4, 5, 7), torch.contiguous_format),
        ((4, 6, 5, 3), torch.contiguous_format),
        ((4, 6, 5, 3), torch.channels_last),
        ((2, 3, 4, 3, 2), torch.contiguous_format),
        ((1, 2, 1, 1), torch.contiguous_format),
    ],
)
def test_statistics_and_their_gradients_equal_float64(
    shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    y = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 2 + 1
    y = y.contiguous(memory_format=memory_format)
    weights = torch.linspace(-1, 2, shape[1]), torch.linspace(3, 1, shape[1])
    results = []
    for x in (y.clone().requires_grad_(), y.double().requires_grad_()):
        mean, var, unbiased = batch_statistics(x)
        ((mean * weights[0]).sum() + (var * weights[1]).sum()).backward()
        results.append((mean.detach(), var.detach(), unbiased, x.grad))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
    count = y.numel() // y.shape[1]
    torch.testing.assert_close(results[0][2], results[0][1] * (count / max(count - 1, 1)))
