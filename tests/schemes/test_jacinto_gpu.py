"""Jacinto on an accelerator: the same codes, and a training step that waits for no value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from schemes.jacinto_nets import chain, converted, images, labels

from lightning_lowbit import lowbit_step
from lightning_lowbit.numerics.clipping import clip_quantize, limits_of
from lightning_lowbit.numerics.percentile import percentile_range
from lightning_lowbit.numerics.rounding import Rounding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever reads a value from the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("percent", [0.0, 0.01, 1.0])
def test_ranges_are_those_of_the_cpu(percent: float, no_waiting: None) -> None:
    x = torch.randn(64, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    found = percentile_range(x.cuda(), percent)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), percentile_range(x, percent))


@pytest.mark.parametrize("rounding", list(Rounding), ids=[rounding.value for rounding in Rounding])
def test_a_clip_gives_the_same_bits(rounding: Rounding) -> None:
    clips, x = torch.tensor([-1.3, 2.0]), torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 2
    results = []
    for device in ("cpu", "cuda"):
        leaf = x.detach().to(device).requires_grad_()
        y = clip_quantize(leaf, limits_of(clips.to(device), None, 8), rounding)
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        results.append((y.detach().cpu(), grad.cpu()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    "options",
    [{}, {"ste_weights": "quantized"}, {"ste_weights": "folded"}, {"bn_value": "batch"}, {"preset": "reference"}],
    ids=["float", "quantized", "folded", "batch", "reference"],
)
def test_a_training_step_waits_for_nothing(options: dict[str, Any]) -> None:
    net = converted(chain(), **options).cuda().train()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    x, y = images().cuda(), labels().cuda()
    for step in range(3):
        if step:
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            lowbit_step(net, optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_evaluation_gives_the_codes_of_the_cpu() -> None:
    net = converted(chain())
    x = images(seed=3)
    with torch.no_grad():
        expected = net(x)
        assert torch.equal(net.cuda()(x.cuda()).cpu(), expected)
