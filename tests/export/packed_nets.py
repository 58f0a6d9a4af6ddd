"""Networks to pack, with values that a packed network gets wrong first: ties, zeros, turned and constant channels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lowbit.modules.binary import LatentSign, Rectifier, SignInput
from lightning_lowbit.schemes import convert

BINARY = {"first": "binary", "last": "binary"}


class Residual(nn.Module):
    """Sums of numbers between binary convolutions, and an average pool: nothing folds but the inner pair."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.down = nn.Conv2d(channels, 2 * channels, 1, stride=2, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * channels)
        self.head = nn.Linear(2 * channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn2(self.conv2(F.hardtanh(self.bn1(self.conv1(x)))))
        x = F.hardtanh(x + y)
        x = self.bn3(self.down(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Functional(nn.Module):
    """Everything between the layers as functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 70, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(70)
        self.conv2 = nn.Conv2d(70, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc1 = nn.Linear(6 * 9, 11)
        self.bn3 = nn.BatchNorm1d(11)
        self.fc2 = nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.bn1(F.max_pool2d(self.conv1(x), 2)))
        x = F.dropout(x, 0.5, self.training)
        x = self.bn2(F.max_pool2d(self.conv2(x), 3, stride=2, padding=1)).clamp(-1, 1)
        x = x.contiguous().view(x.size(0), -1)
        x = torch.clamp(self.bn3(self.fc1(x)), min=-1, max=1)
        return self.fc2(x)


def mlp(*widths: int, norm: bool = True, act: Callable[[int], nn.Module] | None = None, bias: bool = True) -> nn.Module:
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layers.append(nn.Linear(inputs, outputs, bias=bias))
        if i < len(widths) - 2:
            layers += [nn.BatchNorm1d(outputs)] if norm else []
            layers += [act(outputs) if act else nn.Hardtanh()]
    return nn.Sequential(*layers)


def converted(net: nn.Module, x: Tensor, seed: int = 0, **options: Any) -> nn.Module:
    """A calibrated network in evaluation mode whose values are drawn anew."""
    convert(net.train(), "bnn", x, **options)
    randomize(net, seed)
    return net.eval()


@torch.no_grad()
def randomize(net: nn.Module, seed: int) -> None:
    """Latents, statistics, slopes and shifts, as no short training would make them."""
    generator = torch.Generator().manual_seed(seed)

    def pick(count: int, *values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (count,), generator=generator)]

    for module in net.modules():
        if isinstance(module, LatentSign):
            weight = module.layer.weight
            weight.uniform_(-1, 1, generator=generator)
            weight[0] = 0.0  # an output whose scale is 0
            if module.layer.bias is not None:
                bias = module.layer.bias
                bias.copy_(pick(len(bias), 0.0, -0.0, 1.0, -2.0, 0.3, -0.7))
        elif isinstance(module, SignInput) and module.shift is not None:
            module.shift.copy_(pick(len(module.shift), 0.0, 0.5, -0.5, 1.0, -1.5))
        elif isinstance(module, Rectifier) and module.slope is not None:
            module.slope.copy_(pick(len(module.slope), 0.0, 0.25, 1.0, 2.0))
            if module.before is not None and module.after is not None:
                module.before.copy_(pick(len(module.before), 0.0, 0.5, -1.0))
                module.after.copy_(pick(len(module.after), 0.0, 0.5, -1.0))
        elif isinstance(module, _BatchNorm):
            count = module.num_features
            module.running_mean.copy_(pick(count, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 0.5))  # ties with sums of signs
            module.running_var.copy_(pick(count, 0.0, 1e-3, 1.0, 7.0, 100.0))
            if module.weight is not None:
                module.weight.copy_(pick(count, 1.0, -1.0, 0.0, 0.3, -0.3, 1e-3))
                module.bias.copy_(pick(count, 0.0, 0.0, -0.0, 0.1, -0.1, 2.0))


@torch.no_grad()
def agree(net: nn.Module, packed: nn.Module, *inputs: Tensor) -> bool:
    """Whether both give the same bits."""
    expected, found = net(*inputs), packed(*inputs)
    return expected.dtype == found.dtype and torch.equal(expected, found)


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    """Inputs with zeros of both signs, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-4, 5, shape, generator=generator) / 4
    dice = torch.randint(40, shape, generator=generator)
    for i, odd in enumerate((-0.0, -0.0, torch.nan, torch.inf, -torch.inf)):
        x = torch.where(dice == i, odd, x)
    return x
