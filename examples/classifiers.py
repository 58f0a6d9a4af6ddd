"""Four plain networks without batch norm, and the LightningModule that trains them by SGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from recipe import SgdClassifier
from torch import nn


def mlp() -> nn.Sequential:
    """64-64-64-10 for 8x8 digits."""
    hidden = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10))


def cnn() -> nn.Sequential:
    """16c3-32c3-M-10 for 8x8 digits."""
    features = [*conv_relu(1, 16, 3, 1), *conv_relu(16, 32, 3, 1), nn.MaxPool2d(2)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(32 * 4 * 4, 10))


def lenet() -> nn.Sequential:
    """20c5-M-50c5-M-500-10, no padding, for 28x28 digits."""
    features = [*conv_relu(1, 20, 5), nn.MaxPool2d(2), *conv_relu(20, 50, 5), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*features, nn.Linear(50 * 4 * 4, 500), nn.ReLU(), nn.Linear(500, 10))


def vgg_small(width: int = 128) -> nn.Sequential:
    """VGG-small-7 for 32x32 images: 128x2-M-256x2-M-512x2-M, dropout, linear; no biases, Xavier weights (NITI)."""
    layers: list[nn.Module] = []
    channels = 3
    for out in (width, 2 * width, 4 * width):
        layers += [*conv_relu(channels, out, 3, 1, False), *conv_relu(out, out, 3, 1, False), nn.MaxPool2d(2)]
        channels = out
    net = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(channels * 16, 10, bias=False))
    for module in net:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
    return net


def conv_relu(channels: int, out: int, kernel: int, padding: int = 0, bias: bool = True) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, kernel, padding=padding, bias=bias), nn.ReLU()]


NETS: dict[str, Callable[[], nn.Sequential]] = {"mlp": mlp, "cnn": cnn, "lenet": lenet, "vgg_small": vgg_small}


class Classifier(SgdClassifier):
    """One of the networks under SGD with momentum, the rate falling to zero along a cosine, step by step.

    Args:
        net: which one.
        lr: rate of the first step.
        momentum: of SGD.
        weight_decay: on all parameters.
    """

    def __init__(
        self,
        net: Literal["mlp", "cnn", "lenet", "vgg_small"] = "mlp",
        lr: float = 0.02,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__(NETS[net]())
        self.save_hyperparameters()
