"""Small networks of every shape that a fixed-point network may have, with a batch for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NETS", "Overwritten", "batch", "wide_layer"]


def conv(planes_in: int, planes: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(planes_in, planes, kernel, stride, kernel // 2, groups=groups, bias=False)


def unit(planes_in: int, planes: int, *shape: int, act: type[nn.Module] | None = nn.ReLU) -> list[nn.Module]:
    layers: list[nn.Module] = [conv(planes_in, planes, *shape), nn.BatchNorm2d(planes)]
    return layers if act is None else [*layers, act()]


class Basic(nn.Module):
    """ResNet's block with a convolution as shortcut where sizes change."""

    def __init__(self, planes_in: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(planes_in, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes), nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(*unit(planes_in, planes, 1, stride, act=None)) if stride > 1 else nn.Identity()
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return self.relu(out)


class OptionA(nn.Module):
    """The block of CIFAR's ResNets: the shortcut slices and pads."""

    def __init__(self, planes_in: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(planes_in, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes), nn.BatchNorm2d(planes)
        self.grow = planes - planes_in

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.grow:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grow // 2, self.grow - self.grow // 2), "constant", 0)
        return F.relu(out + x)


class Bottleneck(nn.Module):
    def __init__(self, planes_in: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *unit(planes_in, 4, 1), *unit(4, 4, 3, stride), *unit(4, planes, 1, act=None)
        )  # fmt: skip
        self.shortcut = (
            nn.Sequential(*unit(planes_in, planes, 1, stride, act=None)) if planes != planes_in else nn.Identity()
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class Inverted(nn.Module):
    """MobileNetV2's block: its result is not rectified."""

    def __init__(self, planes_in: int, planes: int, stride: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *unit(planes_in, 8, 1, act=act), *unit(8, 8, 3, stride, 8, act=act), *unit(8, planes, 1, act=None)
        )  # fmt: skip
        self.skip = stride == 1 and planes_in == planes

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.skip else self.conv(x)


class PooledShortcut(nn.Module):
    """ResNet-D's shortcut: a mean, then a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(*unit(4, 8, 3, 2), *unit(8, 8, act=None))
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), *unit(4, 8, 1, act=None))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class PooledSum(nn.Module):
    """A mean that is added, not multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(*unit(4, 4, 3, 2, act=None))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + F.avg_pool2d(x, 2))


class Joined(nn.Module):
    """Branches side by side, one of them read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Sequential(*unit(4, 3, 1)), nn.Sequential(*unit(4, 5))
        self.three = nn.Sequential(*unit(8, 4, act=None))

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.one(x), self.two(x)], 1)
        return torch.cat([self.three(joined), joined[:, :4]], 1)


class Overwritten(nn.Module):
    """A sum in the place of its first operand, which is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(4, 4), conv(4, 4), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x.add_(self.b(F.relu(x)))
        return x + self.c(F.relu(x))


def images(*body: nn.Module, planes: int, pool: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(
        *unit(3, 4), *body, pool or nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(planes, 5)
    )  # fmt: skip


def separable(planes_in: int, planes: int, stride: int) -> list[nn.Module]:
    return [*unit(planes_in, planes_in, 3, stride, planes_in), *unit(planes_in, planes, 1)]


def mobilenet_v2(act: type[nn.Module]) -> nn.Module:
    blocks = [Inverted(4, 6, 2, act), Inverted(6, 6, 1, act), Inverted(6, 6, 1, act)]
    return nn.Sequential(
        *unit(3, 4, act=act), *blocks, *unit(6, 8, 1, act=act), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(8, 5),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 12 * 12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
        nn.Linear(16, 5, bias=False),
    )  # fmt: skip


def signals() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(2), nn.Conv1d(3, 6, 5, 2, padding=2), nn.BatchNorm1d(6), nn.ReLU(),
        nn.Conv1d(6, 6, 3, padding="same", dilation=2), nn.ReLU(), nn.AvgPool1d(4), nn.Flatten(), nn.Linear(108, 5),
    )  # fmt: skip


NETS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: images(nn.MaxPool2d(3, 2, 1), Basic(4, 4), Basic(4, 8, 2), Basic(8, 8), planes=8),
    "option-a": lambda: images(OptionA(4, 4), OptionA(4, 8, 2), OptionA(8, 8), planes=8),
    "bottleneck": lambda: images(Bottleneck(4, 8), Bottleneck(8, 8), Bottleneck(8, 12, 2), planes=12),
    "mobilenet-v1": lambda: images(*separable(4, 8, 2), *separable(8, 8, 1), planes=8, pool=nn.AvgPool2d(6)),
    "mobilenet-v2": lambda: mobilenet_v2(nn.ReLU),
    "mobilenet-v2-relu6": lambda: mobilenet_v2(nn.ReLU6),
    "mlp": mlp,
    "signals": signals,
    "pooled-shortcut": lambda: images(PooledShortcut(), planes=8),
    "pooled-sum": lambda: images(PooledSum(), *unit(4, 4), planes=4),
    "windows": lambda: images(nn.AvgPool2d(5, 5), *unit(4, 4), planes=4),
    "overlapping": lambda: images(
        nn.AvgPool2d(3, 2, 1), *unit(4, 4), nn.AvgPool2d(3, 1, 1, count_include_pad=False), *unit(4, 4, 3, 3), planes=4
    ),
    "last-norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 8), nn.ReLU(), nn.Linear(8, 5), nn.BatchNorm1d(5)),
    "joined": lambda: images(Joined(), *unit(8, 8), planes=8),
    "overwritten": lambda: images(Overwritten(), *unit(4, 4), planes=4),
}  # fmt: skip


def batch(seed: int, size: int = 16) -> Tensor:
    return torch.randn(size, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def wide_layer(channels: int, least: float) -> nn.Module:
    """Its second layer sums 9 * channels products, of positive tensors and of weights from ``least`` to 1.

    The first of its outputs has positive weights only.
    """
    net = nn.Sequential(
        nn.Conv2d(3, channels, 1), nn.ReLU(), nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    first, wide = net[0], net[2]
    with torch.no_grad():
        first.weight.mul_(0.1)
        first.bias.uniform_(1, 2)
        wide.weight.uniform_(least, 1)
        wide.weight[1:] *= torch.randint(0, 2, wide.weight[1:].shape) * 2 - 1
    return net
