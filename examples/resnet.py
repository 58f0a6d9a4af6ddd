"""ResNets for CIFAR-10 (He et al. 2016, sec. 4.2) under the names of their public checkpoints, in Lightning.

The shortcut where the resolution halves has no parameters (option A): every second pixel, and zero channels
on both sides. Plain functional code on purpose: somebody else's network, not one written for quantization.
"""

from __future__ import annotations

from pathlib import Path

import torch
from recipe import SgdClassifier
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the identity; [N, in, H, W] to [N, out, H / stride, W / stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.grows = stride != 1
        self.pad = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.grows:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet(nn.Module):
    """Depth 6n + 2: ``blocks`` = 3 is ResNet-20, 5 is -32, 9 is -56. Input [N, 3, 32, 32], output logits."""

    def __init__(self, blocks: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits: Tensor = self.linear(x)
        return logits


class LitResNet(SgdClassifier):
    """A CIFAR ResNet fine-tuned by SGD with momentum, the rate falling to zero along a cosine, step by step.

    Args:
        blocks: residual blocks per stage; 3 is ResNet-20.
        lr: rate of the first step.
        momentum: of SGD.
        weight_decay: on all parameters.
    """

    def __init__(self, blocks: int = 3, lr: float = 0.01, momentum: float = 0.9, weight_decay: float = 1e-4) -> None:
        super().__init__(ResNet(blocks))
        self.save_hyperparameters()


def load_public(model: LitResNet, checkpoint: str | Path) -> None:
    """Load a ``.th`` file of the public CIFAR ResNets; its keys carry the prefix of DataParallel."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    model.net.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
