"""Networks written in one line, converted to Jacinto's grids, and steps by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lowbit import lowbit_step
from lightning_lowbit.modules.base import low_bit_modules
from lightning_lowbit.modules.calibrate import calibrate
from lightning_lowbit.modules.clipped import ClipQuantizer
from lightning_lowbit.modules.convert import Report, quantizers
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.plugins.precision import rule_of
from lightning_lowbit.schemes import convert
from lightning_lowbit.schemes.jacinto_training import RangeRule

__all__ = [
    "Wired", "chain", "clips", "converted", "images", "labels", "layers", "merged_by", "off", "on_batches", "reach",
    "report_of", "rule", "seen", "train",
]  # fmt: skip


class Wired(nn.Module):
    """Layers by name, and what is done with them: ``forward(self, x)``."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.__dict__["code"] = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x)


def chain() -> Any:
    """Two convolutions with norms and rectifiers, a mean, a classifier: for images [n, 3, 8, 8]."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def images(*shape: int, seed: int = 0, gain: float = 1.0) -> Tensor:
    return torch.randn(shape or (8, 3, 8, 8), generator=torch.Generator().manual_seed(seed)) * gain


def labels(samples: int = 8, classes: int = 4) -> Tensor:
    return torch.arange(samples) % classes


def seen(net: Any, x: Tensor, seed: int = 0) -> Any:
    """In evaluation mode, its norms with scales and shifts of their own and statistics of ``x``."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
            module.momentum = 0.5
    with torch.no_grad():
        for _ in range(8):
            net.train()(x)
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 0.1
    return net.eval()


def converted(net: Any, x: Tensor | None = None, skip: Sequence[str] = (), **options: Any) -> Any:
    """Norms that have seen ``x``, grids from ``x``."""
    x = images() if x is None else x
    seen(net, x)
    convert(net, "jacinto", x, skip=skip, **options)
    return net


def report_of(net: nn.Module) -> Report:
    report: Report = next(low_bit_modules(net))[1].switch.conversion
    return report


def on_batches(net: nn.Module, batches: Sequence[Tensor]) -> None:
    """Calibrate on several batches."""

    def run() -> int:
        for batch in batches:
            net(batch)
        return len(batches)

    calibrate(net, run)


def clips(net: nn.Module) -> dict[str, ClipQuantizer]:
    return {path: quantizer for path, quantizer in quantizers(net) if isinstance(quantizer, ClipQuantizer)}


def layers(net: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in net.named_modules() if isinstance(module, LowBitLayer)}


def merged_by(net: nn.Module) -> dict[str, str | None]:
    """Layer -> the quantizer that it does the work of, by site."""
    ends = {path: layer.group.end for path, layer in layers(net).items()}
    return {path: None if end is None else end.site.key for path, end in ends.items()}


def rule(net: nn.Module) -> RangeRule:
    found = rule_of(net)
    assert isinstance(found, RangeRule)
    return found


def reach(net: nn.Module, *milestones: str, reached: bool = True) -> None:
    """What a schedule does at a milestone."""
    for what in milestones:
        for _, module in low_bit_modules(net):
            module.milestone(what, reached)
        rule(net).milestone(what, reached, 0)


def train(net: Any, steps: int = 3, lr: float = 0.02, gain: float = 1.0) -> Any:
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        x = images(seed=100 + step, gain=gain)
        F.cross_entropy(net.train()(x), labels()).backward()
        lowbit_step(net, optimizer)
    return net


def off(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|."""
    return float(((got - want).norm() / want.norm()).detach())
