"""A depthwise network with a channel that died in training keeps its accuracy, calibrated and fine-tuned."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lowbit.demos import DigitsData
from lightning_lowbit.modules.calibrate import calibrate
from lightning_lowbit.plugins.precision import lowbit_step
from lightning_lowbit.schemes import convert

WIDTH = 24


class Separable(nn.Module):
    """Stem, two depthwise-separable blocks as in MobileNet, mean and classifier."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU6()]
        for stride in (2, 1):
            layers += [
                nn.Conv2d(WIDTH, WIDTH, 3, stride, padding=1, groups=WIDTH, bias=False), nn.BatchNorm2d(WIDTH),
                nn.ReLU6(), nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU6(),
            ]  # fmt: skip
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.pool(self.features(x)).flatten(1))
        return y


def batches(data: DigitsData, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(epochs):
        yield from data.train_dataloader()


def accuracy(net: nn.Module, data: DigitsData) -> float:
    net.eval()
    with torch.no_grad():
        right = [(net(x).argmax(1) == y).float() for x, y in data.val_dataloader()]
    return 100 * float(torch.cat(right).mean())


@pytest.fixture(scope="module")
def data() -> DigitsData:
    found = DigitsData()
    found.setup()
    return found


@pytest.fixture(scope="module")
def trained(data: DigitsData) -> Separable:
    """Trained in float with one rectifier that never opens: the variance of the depthwise channel behind it is 0."""
    torch.manual_seed(0)
    net = Separable()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    with torch.no_grad():
        net.features[1].bias[5] = -100.0
    for x, y in batches(data, 8):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    norm = net.features[4]
    assert float(norm.running_var[5]) < 1e-6 * float(norm.running_var.median())
    return net


def calibrated(net: Separable, data: DigitsData, **options: object) -> nn.Module:
    low = copy.deepcopy(net)
    convert(low, "jacinto", **options)
    xs = [x for x, _ in batches(data, 1)][:8]
    calibrate(low, lambda: len([low(x) for x in xs]))
    return low


@pytest.mark.filterwarnings("ignore:.*have no variance behind them")
def test_a_dead_channel_costs_no_accuracy(trained: Separable, data: DigitsData) -> None:
    reached = accuracy(trained, data)
    assert reached > 90
    low = calibrated(trained, data)
    assert accuracy(low, data) > reached - 1
    assert accuracy(calibrated(trained, data, dead_channels="merge", constrain_weights=False), data) < reached - 5
    optimizer = torch.optim.SGD(low.parameters(), lr=0.01, momentum=0.9)
    low.train()
    for x, y in batches(data, 1):
        loss = F.cross_entropy(low(x), y)
        optimizer.zero_grad()
        loss.backward()
        lowbit_step(low, optimizer)
    assert accuracy(low, data) > reached - 1


def test_a_dead_channel_is_named(trained: Separable, data: DigitsData) -> None:
    with pytest.warns(UserWarning, match=r"features.3: 1 of 24 channels have no variance"):
        calibrated(trained, data)
