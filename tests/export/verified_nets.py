"""Small networks with their programs, without and with a float island."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from export.random_graphs import random_batch
from torch import Tensor, nn

from lightning_lowbit import IntegerProgram, convert, lower

__all__ = ["Gated", "Net", "images", "made"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.conv2(x) + x)
        return self.fc(x.mean((2, 3)))


class Gated(Net):
    """A float function between two layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(torch.sigmoid(self.conv1(x))).mean((2, 3)))


def images(samples: int, seed: int = 0) -> Tensor:
    return random_batch((3, 6, 6), samples, seed)


def made(net: nn.Module | None = None, scheme: str = "tqt") -> tuple[nn.Module, IntegerProgram]:
    torch.manual_seed(0)
    net = Net() if net is None else net
    convert(net.eval(), scheme, images(8))
    return net, lower(net, images(1))
