"""F8Net's golden vectors of integer networks: the toy's own forward on integers, each step by the package's export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lowbit.export.fixed_point import IntegerUnit, add, encode, run_unit, shift_mean

__all__ = ["Fixed", "Products", "integer_network"]


@dataclass(frozen=True)
class Fixed:
    """Integers worth data 2^-label / count; what a toy's forward does with a tensor, it does with these."""

    data: Tensor
    label: int
    count: int = 1

    def __add__(self, other: Fixed) -> Fixed:
        return Fixed(*add(self.data, self.label, other.data, other.label))


class OnData(nn.Module):
    """A function of the integers that leaves their label."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Fixed) -> Fixed:
        return replace(x, data=self.function(x.data))


class Sum(nn.Module):
    """Sums over windows that are their means by a shift, or by the division that the reader makes."""

    def __init__(self, size: int, shift: bool) -> None:
        super().__init__()
        self.size, self.shift = size, shift

    def forward(self, x: Fixed) -> Fixed:
        count = self.size**2
        total = (F.avg_pool2d(x.data.double(), self.size) * count).round().to(torch.int64)
        return Fixed(total, shift_mean(x.label, count)) if self.shift else Fixed(total, x.label, count)


class Products(nn.Module):
    """An integer unit; keeps the codes that it read and the accumulators that it gave."""

    def __init__(self, unit: IntegerUnit) -> None:
        super().__init__()
        self.unit = unit
        self.read = self.gave = torch.empty(0)

    def forward(self, x: Fixed | Tensor) -> Fixed:
        form = self.unit.input
        if isinstance(x, Tensor):
            self.read = encode(x, form)
        else:
            self.read = form.codes(x.data, x.label) if x.count == 1 else form.mean(x.data, x.label, x.count)
        self.gave = run_unit(self.unit, self.read)
        return Fixed(self.gave, self.unit.label)


def integer_network(toy: nn.Module, units: dict[str, IntegerUnit], shift: bool) -> dict[str, Products]:
    """Turn a plain toy into one that computes with integers alone; its forward stays.

    Args:
        toy: a fresh one, changed in place.
        units: of the converted network in evaluation, by path.
        shift: whether means are shifts.
    Returns:
        its layers, by the same paths.
    """
    layers = {}
    for path, module in list(toy.named_modules()):
        parent, _, name = path.rpartition(".")
        instead = _instead(path, module, units, shift)
        if instead is not None:
            setattr(toy.get_submodule(parent), name, instead)
        if isinstance(instead, Products):
            layers[path] = instead
    return layers


def _instead(path: str, module: nn.Module, units: dict[str, IntegerUnit], shift: bool) -> nn.Module | None:
    if path in units:
        return Products(units[path])
    if isinstance(module, nn.BatchNorm2d):
        return nn.Identity()
    if isinstance(module, nn.ReLU):
        return OnData(torch.relu)
    if isinstance(module, nn.MaxPool2d):
        return OnData(lambda acc: module(acc.double()).to(acc.dtype))
    if isinstance(module, nn.AvgPool2d):
        return Sum(int(module.kernel_size), shift)  # type: ignore[arg-type]
    return OnData(lambda acc: acc.flatten(1)) if isinstance(module, nn.Flatten) else None
