"""Small networks whose tensors are added, joined, gated and looked at, for the tests of units."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lowbit.graph.ops import BATCH_NORMS


def conv(planes_in: int, planes: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(planes_in, planes, kernel, stride, kernel // 2, groups=groups, bias=False)


class Basic(nn.Module):
    def __init__(self, planes_in: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(planes_in, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(conv(planes_in, planes, 1, stride), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, planes_in: int, planes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(planes_in, 4), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4, 3), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = conv(4, planes), nn.BatchNorm2d(planes)
        self.shortcut = conv(planes_in, planes) if planes != planes_in else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(torch.add(self.bn3(self.conv3(out)), self.shortcut(x)))


class ResNet(nn.Module):
    """Stem, max pool, two stages, pool, classifier."""

    def __init__(self, *stages: nn.Module, planes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 4, 3), nn.BatchNorm2d(4)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1, self.layer2 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(planes, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


def basic_resnet() -> nn.Module:
    return ResNet(
        nn.Sequential(Basic(4, 4), Basic(4, 4)), nn.Sequential(Basic(4, 8, 2), Basic(8, 8)), planes=8
    )  # fmt: skip


def bottleneck_resnet() -> nn.Module:
    return ResNet(nn.Sequential(Bottleneck(4, 8)), nn.Sequential(Bottleneck(8, 8)), planes=8)


def mobilenet_v1() -> nn.Module:
    def separable(planes_in: int, planes: int) -> list[nn.Module]:
        depthwise = [conv(planes_in, planes_in, 3, groups=planes_in), nn.BatchNorm2d(planes_in), nn.ReLU()]
        return [*depthwise, conv(planes_in, planes), nn.BatchNorm2d(planes), nn.ReLU()]

    stem = [conv(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*stem, *separable(4, 8), *separable(8, 8), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(8, 3))


class Inverted(nn.Module):
    """MobileNetV2's block: the result is not rectified."""

    def __init__(self, planes_in: int, planes: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.expand, self.bn1, self.act1 = conv(planes_in, 8), nn.BatchNorm2d(8), activation()
        self.depthwise, self.bn2, self.act2 = conv(8, 8, 3, groups=8), nn.BatchNorm2d(8), activation()
        self.project, self.bn3 = conv(8, planes), nn.BatchNorm2d(planes)
        self.skip = planes_in == planes

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.expand(x)))
        out = self.bn3(self.project(self.act2(self.bn2(self.depthwise(out)))))
        return x + out if self.skip else out


class MobileNetV2(nn.Module):
    def __init__(self, activation: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        self.stem, self.bn, self.act = conv(3, 4, 3), nn.BatchNorm2d(4), activation()
        self.blocks = nn.Sequential(
            Inverted(4, 6, activation), Inverted(6, 6, activation), Inverted(6, 6, activation)
        )  # fmt: skip
        self.tail = nn.Sequential(conv(6, 8), nn.BatchNorm2d(8), activation())
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tail(self.blocks(self.act(self.bn(self.stem(x)))))
        return self.fc(self.dropout(x.mean([2, 3])))


class Dense(nn.Module):
    """Each layer reads all results before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = conv(3, 4, 3), conv(4, 4, 3), conv(8, 4, 3)
        self.transition = conv(12, 6)
        self.pool = nn.AvgPool2d(2)
        self.head = conv(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.relu(self.first(x))], 1)
        x = torch.cat([x, F.relu(self.second(x))], 1)
        return self.head(self.pool(F.relu(self.transition(x))))


class Excite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = conv(4, 2), conv(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        return x * torch.sigmoid(self.excite(gate))


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(True), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(True),
            nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Linear(64, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Chain(nn.Module):
    """Three layers ``a``, ``b``, ``c``, and in between what a test is about."""

    def __init__(self, **between: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(4, 4), conv(4, 3)
        for name, value in between.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.c(self.middle(F.relu(self.b(F.relu(self.a(x))))))

    def middle(self, x: Tensor) -> Tensor:
        between = getattr(self, "between", None)
        return x if between is None else between(x)


class Auxiliary(Chain):
    def forward(self, x: Tensor) -> Any:
        middle = F.relu(self.b(F.relu(self.a(x))))
        return {"logits": self.c(middle), "features": middle}


class Twice(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        return self.c(F.relu(self.b(x)))


class Positioned(Chain):
    def __init__(self) -> None:
        super().__init__(position=nn.Parameter(torch.randn(4, 1, 1)))

    def middle(self, x: Tensor) -> Tensor:
        return x + self.position


class Extended(Chain):
    """A learned channel is joined to the others."""

    def __init__(self) -> None:
        super().__init__(extra=nn.Parameter(torch.randn(4, 1, 8, 8)))
        self.c = conv(5, 3)

    def middle(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.extra], 1)


class Branching(nn.Module):
    """A forward that torch.fx cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Tap(nn.Module):
    """Hands on what it is given: a place to hang a hook on."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Six(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x)


class TwoPools(nn.Module):
    """One classifier behind two pools, one pool in front of two layers, and one that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.own, self.free = conv(3, 4, 3), nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.relu(self.stem(x))
        first, second, third = F.avg_pool2d(x, 8).flatten(1), x.mean((2, 3)), F.adaptive_avg_pool2d(x, 1)
        third = third.view(third.size(0), -1)
        return self.shared(first), self.shared(second), self.own(second), self.free(third)


def settle(net: nn.Module) -> nn.Module:
    """Norms with statistics of their own, so that none is the identity."""
    torch.manual_seed(3)
    for module in net.modules():
        if isinstance(module, BATCH_NORMS):
            for value in (module.weight.data, module.running_var):
                value.uniform_(0.5, 1.5)
            for value in (module.bias.data, module.running_mean):
                value.uniform_(-1.0, 1.0)
    return net.eval()
