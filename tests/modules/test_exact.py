"""Evaluation where float32 does not hold a sum: the integers, and for others the network's own dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_lowbit import Tqt, convert, lower

HEADS: dict[str, Callable[[Tensor], Any]] = {
    "sums": lambda x: x,
    "rectified": torch.relu,
    "class": lambda x: torch.relu(x).argmax(1),
    "moved": lambda x: torch.relu(x.flip(1)).reshape(-1, 2, 4),
}


class Wide(nn.Module):
    def __init__(self, head: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(20000, 8), head

    def forward(self, x: Tensor) -> Any:
        return self.head(self.fc(x))


@pytest.mark.parametrize("head", HEADS)
def test_heads_of_wide_layers(head: str) -> None:
    torch.manual_seed(0)
    net, x = Wide(HEADS[head]).eval(), torch.rand(16, 20000)
    net.fc.weight.data.uniform_(0.99, 1.0)
    convert(net, Tqt(act_init="max", weight_init="max"), x)
    program, y = lower(net, x), net(x).detach()
    assert max(value.high for value in program.values.values() if value.dtype == "int") > 2**24
    assert y.dtype in (torch.float32, torch.int64)
    assert np.array_equal(program.run(x), y.numpy())


def test_a_rectifier_that_was_dead_in_calibration() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2000, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    net[0].weight.data.uniform_(-1.0, -0.9)
    net[0].bias.data.fill_(-1.0)
    x = torch.rand(8, 2000)
    convert(net, Tqt(act_init="max", weight_init="max"), x)
    assert net(-x).dtype == torch.float32
