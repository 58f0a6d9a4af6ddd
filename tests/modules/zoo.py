"""Small networks of every kind that users bring, with a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 4


class OptionA(nn.Module):
    """ResNet-20's block: the shortcut slices and pads, the rectifier is a function."""

    def __init__(self, planes_in: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(planes_in, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.grow = planes - planes_in

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.grow:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grow // 2, self.grow - self.grow // 2), "constant", 0)
        out += x
        return F.relu(out)


class ResNet20(nn.Module):
    def __init__(self, depth: int = 3, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks, planes = [], width
        for stage in range(3):
            for block in range(depth):
                blocks.append(OptionA(planes, width * 2**stage, 2 if stage and not block else 1))
                planes = width * 2**stage
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(planes, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layers(out)
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        return self.linear(out)


class SharedReluBlock(nn.Module):
    """torchvision's BasicBlock: one nn.ReLU(inplace=True), called twice."""

    def __init__(self, planes: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        self.downsample = nn.Sequential(nn.Conv2d(planes, planes, 1, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def basic_blocks() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        SharedReluBlock(), SharedReluBlock(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


class Inverted(nn.Module):
    def __init__(self, planes_in: int, planes: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = planes_in * expand
        self.use_res_connect = stride == 1 and planes_in == planes
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [
                nn.Conv2d(planes_in, hidden, 1, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU6(inplace=True),
            ]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True), nn.Conv2d(hidden, planes, 1, bias=False), nn.BatchNorm2d(planes),
        ]  # fmt: skip
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(inplace=True)),
            Inverted(4, 4, 1, 1), Inverted(4, 6, 2, 3), Inverted(6, 6, 1, 3), Inverted(6, 6, 1, 3),
            nn.Sequential(nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(inplace=True)),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class DenseLayer(nn.Module):
    """BN and ReLU before the convolution, several inputs side by side."""

    def __init__(self, planes: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(planes), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(planes, 2 * growth, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(2 * growth), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, inputs: Any) -> Tensor:
        features = [inputs] if isinstance(inputs, Tensor) else inputs
        out = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(out)))


class DenseBlock(nn.ModuleDict):
    def __init__(self, layers: int, planes: int, growth: int) -> None:
        super().__init__()
        for i in range(layers):
            self[f"denselayer{i + 1}"] = DenseLayer(planes + i * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.norm0, self.relu0 = (
            nn.Conv2d(3, 4, 3, 1, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
        )
        self.block1 = DenseBlock(2, 4, 2)
        self.transition = nn.Sequential(
            nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1, bias=False), nn.AvgPool2d(2, 2)
        )
        self.block2 = DenseBlock(2, 4, 2)
        self.norm5, self.classifier = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu0(self.norm0(self.conv0(x)))
        x = self.block2(self.transition(self.block1(x)))
        x = F.relu(self.norm5(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class PreActivation(nn.Module):
    """The shortcut of the in-place kind: what is added was rectified in place before."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=inplace)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.conv1(self.relu(x))
        x = torch.add(x, h)
        y = self.conv2(F.relu(self.bn(x)))
        return self.head(x.add(y).mean(dim=(2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.1))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.SiLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.bn = nn.BatchNorm2d(4)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x)
        deep = self.bn(self.up(self.down2(skip), output_size=skip.shape[2:]))
        return self.out(torch.cat([skip, deep], dim=1))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.one, self.three = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 3, 1, 1)
        self.bn_one, self.bn_three = nn.BatchNorm2d(2), nn.BatchNorm2d(3)
        self.pooled = nn.Conv2d(4, 2, 1)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        branches = [
            torch.sigmoid(self.bn_one(self.one(x))),
            F.relu(self.bn_three(self.three(x)), inplace=True),
            self.pooled(F.avg_pool2d(x, 3, 1, 1)),
        ]
        out = torch.cat(branches, 1)
        return self.head(F.max_pool2d(out, 2).mean((2, 3)))


class Mixed(nn.Module):
    """a + b + c, a concat of a concat, an add of a concat, one sign and two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv1d(2, 3, 3, padding=1) for _ in range(3))
        self.prelu = nn.PReLU(3)
        self.wide = nn.Conv1d(9, 9, 1)
        self.last = nn.Conv1d(9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = torch.relu(self.a(x)), self.prelu(self.b(x)), self.c(x)
        total = a + b + c
        joined = torch.cat([torch.cat([total, a], 1), c], 1)
        out = joined + self.wide(joined)
        return self.last(out).mean(-1)


class Twice(nn.Module):
    """A layer, a container and a rectifier called twice; tensors that fork."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.shared = nn.Linear(6, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = F.relu(self.first(x))
        y = self.shared(torch.relu(self.shared(x)))
        z = self.block(self.block(x))
        return {"logits": self.last(y + z), "pair": (y, z)}


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv3d(1, 4, 3, padding=1, groups=1), nn.BatchNorm3d(4)
        self.up, self.up_bn = nn.ConvTranspose3d(4, 2, 2, 2, groups=2, bias=False), nn.BatchNorm3d(2)
        self.out = nn.Conv3d(2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu6(self.up_bn(self.up(F.avg_pool3d(F.relu(self.bn(self.conv(x))), 2)))))


class Sequence1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(2, 4, 3, stride=2), nn.BatchNorm1d(4, momentum=None)
        self.up, self.up_bn = nn.ConvTranspose1d(4, 4, 3, stride=2, groups=2), nn.BatchNorm1d(4)
        self.fc, self.fc_bn = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn(self.conv(x)))
        x = torch.relu(self.up_bn(self.up(x)))
        return F.leaky_relu(self.fc_bn(self.fc(F.adaptive_avg_pool1d(x, 1).flatten(1))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=src_key_padding_mask)[:, 0])


class Flags(nn.Module):
    """Default arguments of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        flag: bool = False,
        *rest: Tensor,
        times: int = 2,
        **extra: Any,
    ) -> Tensor:
        h = torch.relu(self.a(x))
        for _ in range(times):
            h = h + self.b(h)
        if flag:
            h = -h
        return h if mask is None else h * mask


def images(size: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(BATCH, channels, size, size)


def shared_rectifier() -> nn.Module:
    """One nn.ReLU object at two places of an nn.Sequential."""
    relu = nn.ReLU()
    return nn.Sequential(nn.Linear(6, 5), relu, nn.Linear(5, 5), relu, nn.Linear(5, 3))


ZOO: dict[str, tuple[Callable[..., nn.Module], Callable[[], Tensor]]] = {
    "resnet20": (ResNet20, images),
    "basic_blocks": (basic_blocks, lambda: images(16)),
    "mobilenet_v2": (MobileNetV2, lambda: images(16)),
    "densenet": (DenseNet, images),
    "preactivation": (lambda: PreActivation(False), images),
    "preactivation_in_place": (lambda: PreActivation(True), images),
    "unet": (UNet, images),
    "inception": (Inception, images),
    "mixed": (Mixed, lambda: torch.randn(BATCH, 2, 7)),
    "shared_rectifier": (shared_rectifier, lambda: torch.randn(BATCH, 6)),
    "twice": (Twice, lambda: torch.randn(BATCH, 6)),
    "volume": (Volume, lambda: torch.randn(BATCH, 1, 4, 4, 4)),
    "sequence": (Sequence1d, lambda: torch.randn(BATCH, 2, 11)),
    "flags": (Flags, lambda: torch.randn(BATCH, 4)),
}


def build(name: str, seed: int = 0, **options: int) -> tuple[nn.Module, Tensor]:
    """A network whose norms have moved from their initial state, and a batch.

    Args:
        options: of the network's class.
    """
    torch.manual_seed(seed)
    make, batch = ZOO[name]
    net = make(**options)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return net, batch()


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a nested result, in order."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [tensor for item in values for tensor in tensors(item)]
