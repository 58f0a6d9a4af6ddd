"""Networks whose norms have seen data, converted to fixed point, and steps by hand, for the tests of F8Net."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from graph import unit_nets
from torch import Tensor, nn

from lightning_lowbit import convert, lowbit_step
from lightning_lowbit.modules.base import low_bit_modules
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.fraclen import FraclenInput
from lightning_lowbit.plugins.precision import rule_of
from lightning_lowbit.schemes.f8net_training import FraclenRule

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": unit_nets.basic_resnet,
    "mobilenet_v2": lambda: unit_nets.MobileNetV2(nn.ReLU),
    "mobilenet_v2_six": unit_nets.MobileNetV2,
}
SIZE = 10  # of images: the last maps have 9 or 100 pixels, so that means are no shifts


def images(seed: int = 0, samples: int = 16, gain: float = 1.0) -> Tensor:
    return torch.randn(samples, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * gain


def unit_of(quantizer: FraclenInput) -> float:
    unit = quantizer.unit()
    return 1.0 if unit is None else float(unit.detach())


def labels(seed: int = 0, samples: int = 16) -> Tensor:
    return torch.randint(0, 3, (samples,), generator=torch.Generator().manual_seed(seed))


def seen(network: str | nn.Module, seed: int = 2, gamma: float = 1.0) -> nn.Module:
    """In evaluation mode; norms with scales and shifts that have seen 20 batches, no dropout."""
    torch.manual_seed(seed)
    net = NETWORKS[network]() if isinstance(network, str) else network
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5 * gamma, 1.5 * gamma)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for batch in range(20):
            net.train()(images(1000 + batch))
    return net.eval()


def converted(network: str | nn.Module, seed: int = 2, **options: Any) -> nn.Module:
    net = seen(network, seed)
    convert(net, "f8net", images(), **options)
    return net


def train(net: nn.Module, steps: int = 3, lr: float = 0.02, gain: float = 1.0) -> nn.Module:
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(images(100 + step, gain=gain)), labels(100 + step)).backward()  # type: ignore[no-untyped-call]  # torch does not type it
        lowbit_step(net, optimizer)
    return net


def reach(net: nn.Module, *milestones: str) -> nn.Module:
    """What a schedule does at a milestone."""
    for what in milestones:
        for _, module in low_bit_modules(net):
            module.milestone(what, True)
        rule(net).milestone(what, True, 0)
    return net


def rule(net: nn.Module) -> FraclenRule:
    found = rule_of(net)
    assert isinstance(found, FraclenRule)
    return found


def inputs(net: nn.Module) -> dict[str, FraclenInput]:
    """By the path of the layer that reads."""
    found = {path: q for path, q in quantizers(net) if isinstance(q, FraclenInput)}
    return {path.removesuffix(".lowbit_input"): quantizer for path, quantizer in found.items()}


def fraclens(net: nn.Module) -> dict[str, Tensor]:
    return {path: quantizer.fraclen.clone() for path, quantizer in inputs(net).items()}


def alphas(net: nn.Module) -> dict[int, nn.Parameter]:
    return {id(q.alpha): q.alpha for q in inputs(net).values() if q.alpha is not None}


def widen(net: nn.Module) -> nn.Module:
    """Clips that are no powers of two, and a little larger, so that no value meets one."""
    with torch.no_grad():
        for number, alpha in enumerate(alphas(net).values()):
            alpha.mul_(1.1 + 0.07 * number)
    return net


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def outputs(net: nn.Module, seed: int = 0) -> Tensor:
    return copy.deepcopy(net).eval()(images(seed))  # type: ignore[no-any-return]  # a module's call is not typed
