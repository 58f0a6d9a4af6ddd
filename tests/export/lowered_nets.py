"""Small networks of every form that fixed-point and merged layers take, and comparison with their programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from export.layered import Net
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from lightning_lowbit import convert

__all__ = ["NETS", "TELLING", "Net", "between", "conv", "differing", "low", "ready"]

IMAGE, SIGNAL, WORDS, VOLUME = (3, 8, 8), (3, 9), (5, 6), (2, 4, 4, 4)


def conv(i: int = 3, o: int = 4, kernel: int = 3, **options: Any) -> nn.Module:
    return nn.Conv2d(i, o, kernel, **options)


def _reused(net: Any, x: Tensor) -> Tensor:
    """A mean that is read, and that leaves the network."""
    pooled = net.pool(F.relu(net.a(x))).flatten(1)
    return torch.cat([net.fc(pooled), pooled], 1)


NETS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "residual": (IMAGE, lambda: Net(
        lambda m, x: m.c(F.relu((y := F.relu(m.n(m.a(x)))) + m.k(m.b(y)))), a=conv(padding=1), n=nn.BatchNorm2d(4),
        b=conv(4, 4, padding="same", bias=False), k=nn.BatchNorm2d(4), c=conv(4, 2),
    )),
    "concat": (IMAGE, lambda: Net(
        lambda m, x: m.c(torch.cat([F.relu(m.a(x)), m.b(x), x], 1)), a=conv(padding=1), b=conv(padding="same"),
        c=conv(11, 2),
    )),
    "stack": (IMAGE, lambda: Net(
        lambda m, x: m.c(torch.stack([m.a(x), F.relu(m.b(x))], 2).flatten(1, 2)), a=conv(), b=conv(), c=conv(8, 2),
    )),
    "depthwise": (IMAGE, lambda: nn.Sequential(
        conv(3, 6, groups=3, padding=1, stride=2), nn.BatchNorm2d(6), nn.ReLU6(), conv(6, 4, 2, groups=2, dilation=2),
    )),
    "border": (IMAGE, lambda: nn.Sequential(
        conv(padding=1, padding_mode="reflect"), nn.ReLU(), conv(4, 2, padding=1, padding_mode="circular"),
    )),
    "transposed": (IMAGE, lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4),
    )),
    "max pools": (IMAGE, lambda: nn.Sequential(
        conv(), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.ReLU(), conv(4, 4, 1), nn.AdaptiveMaxPool2d(3), conv(4, 2, 1),
    )),
    "average pools": (IMAGE, lambda: nn.Sequential(
        conv(padding=1), nn.AvgPool2d(3, 2, 1), conv(4, 3, 1), nn.AvgPool2d(3, 2, 1, True, False), nn.Flatten(),
        nn.Linear(27, 3),
    )),
    "uneven windows": (IMAGE, lambda: Net(
        lambda m, x: m.c(F.adaptive_avg_pool2d(m.b(F.avg_pool2d(m.a(x), 2, divisor_override=7)), (3, 2))),
        a=conv(padding=1), b=conv(4, padding=1), c=conv(4, 2, 1),
    )),
    "largest mean": (IMAGE, lambda: nn.Sequential(conv(), nn.AvgPool2d(3, 1), nn.MaxPool2d(2), conv(4, 2, 1))),
    "mean": (IMAGE, lambda: Net(lambda m, x: m.fc(F.relu(m.a(x)).mean((2, 3))), a=conv(), fc=nn.Linear(4, 3))),
    "mean that leaves": (IMAGE, lambda: Net(_reused, a=conv(), pool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(4, 3))),
    "volume": (VOLUME, lambda: nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.AvgPool3d(2), nn.Conv3d(4, 2, 2),
    )),
    "signal": (SIGNAL, lambda: nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 4, 2, bias=False),
        nn.AvgPool1d(3), nn.Flatten(), nn.Linear(4, 2),
    )),
    "words": (WORDS, lambda: nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Dropout(0.3), nn.Linear(7, 2))),
    "outputs": (IMAGE, lambda: Net(
        lambda m, x: {"a": (y := F.relu(m.a(x))), "b": (m.b(y).mean((2, 3)), m.c(y).argmax(1))},
        a=conv(), b=conv(4), c=conv(4),
    )),
}  # fmt: skip
TELLING = ("residual", "concat", "depthwise", "transposed", "average pools", "uneven windows", "mean that leaves")
"""In which the options of a scheme differ."""


def ready(name: str) -> tuple[nn.Module, Tensor]:
    """A float network with statistics, in evaluation, and seven samples."""
    torch.manual_seed(0)
    shape, make = NETS[name]
    net, x = make().eval(), torch.randn(7, *shape)
    for norm in (module for module in net.modules() if isinstance(module, _BatchNorm)):
        for p in (norm.running_mean, norm.bias):
            nn.init.normal_(p, std=0.3)  # type: ignore[arg-type]
        for p in (norm.running_var, norm.weight):
            nn.init.uniform_(p, 0.4, 2.0)  # type: ignore[arg-type]
    return net, x


def low(net: nn.Module, scheme: Any, x: Tensor) -> Any:
    convert(net, scheme, x)
    return net.eval()


def differing(net: nn.Module, program: Any, x: Tensor) -> list[int]:
    """Batch sizes at which the program gives other numbers."""
    found = []
    for batch in (1, 3, 7):
        with torch.no_grad():
            wanted = [y.numpy() for y in tree_leaves(net(x[:batch]))]
        got = tree_leaves(program.run(x[:batch]))
        same = [a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(got, wanted, strict=True)]
        found += [batch] * (not all(same))
    return found


def between(program: Any) -> list[str]:
    """Paths of floats that an operation reads."""
    read = {name for op in program.ops for name in op.inputs}
    return [op.path for op in program.ops if op.kind in ("dequantize", "island") and op.output in read]
