"""Weights and biases as layers multiply with them, of parameters that are stored with more bits (WAGEUBN)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lowbit.modules.base import Site
from lightning_lowbit.modules.planes import Operand, digits
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.direct import direct_quantize, fixed_width_codes, fixed_width_values
from lightning_lowbit.numerics.exponent import ceil_log2
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.observers import AllReduce
from lightning_lowbit.numerics.widths import choose_format

__all__ = ["StoredBias", "StoredWeight", "WeightRange"]

WeightRange = Literal["one", "fit", "room"]
_ROOM = 2  # bits of growth that weights have from the start
_MOST_POWER = 30


class StoredWeight(Quantizer):
    """W = clip(round(w 2^(k-1-p)), -M, M) 2^(p-k+1), M = 2^(k-1) - 1; the gradient goes straight to w, everywhere.

    A layer's weights lie in +-2^p. With another p than 0 the layer is what rescaling by a power of two makes of it,
    without a parameter being touched: a batch norm behind it counts in units of 2^p.

        range    p
        one      0 (published): larger weights are clipped
        fit      the least that holds the largest weight: all codes are used
        room     2 more than that, but only where weights are small: not above 0

    Args:
        site: where it stands.
        bits: k, of a code.
        range: how p is found, once, when quantization begins.
    """

    layer: Any
    scale: Tensor
    whole = ("scale",)

    def __init__(self, site: Site, bits: int, range: WeightRange) -> None:
        super().__init__(site)
        self.bits, self.range = bits, range
        self.power = 0
        self.largest = 0.0
        self.register_buffer("scale", torch.zeros(()))  # p

    @property
    def most(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def fraction(self) -> int:
        return self.bits - 1 - self.power

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        return fixed_width_values(x, self.fraction, bits=self.bits)

    def operand(self, weight: Tensor) -> Operand:
        return Operand(digits(fixed_width_codes(weight, self.fraction, bits=self.bits), self.most), -self.fraction)

    def exponent(self) -> Tensor:
        return torch.full((), -self.fraction, dtype=torch.int32)

    def grid(self) -> Grid:
        return Grid(self.bits, -self.fraction, narrow=True)

    def saturated(self, x: Tensor) -> Tensor:
        """Weights at the end of their range: the stored ones go no further."""
        return (x.detach().abs() >= self.most * 2.0**-self.fraction).sum()

    def observe(self, x: Tensor) -> None:
        self.require_finite(int((~torch.isfinite(x)).sum()))
        self.largest = float(x.abs().max()) if x.numel() else 0.0

    def commit(self, all_reduce: AllReduce) -> None:
        members = [member for member in self.group if isinstance(member, StoredWeight)]
        largest = max(member.largest for member in members)
        share = self.most / (self.most + 1)
        fit = int(ceil_log2(torch.tensor(largest / share, dtype=torch.float64))) if largest > 0 else 0
        fit = max(-_MOST_POWER, min(_MOST_POWER, fit))
        power = {"one": 0, "fit": fit, "room": min(fit + _ROOM, max(0, fit))}[self.range]
        for member in members:
            member.scale.fill_(power)
            member.power = power
        self.set_ready()

    def refresh(self) -> None:
        super().refresh()
        self.power = round(float(self.scale))


class StoredBias(Quantizer):
    """b = round(b 2^(k-1)) 2^-(k-1), as wide as it needs to be: it is added to sums that are wider.

    Args:
        site: where it stands.
        bits: k.
    """

    layer: Any

    def __init__(self, site: Site, bits: int) -> None:
        super().__init__(site)
        self.bits = bits

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        return direct_quantize(x, self.bits)

    def exponent(self) -> Tensor:
        return torch.full((), 1 - self.bits, dtype=torch.int32)

    def grid(self) -> Grid:
        return choose_format(self.layer.bias, "fixed_unit", self.bits).grid()

    def observe(self, x: Tensor) -> None:
        self.require_finite(int((~torch.isfinite(x)).sum()))
