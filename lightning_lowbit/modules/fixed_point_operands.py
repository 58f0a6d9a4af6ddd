"""What stands beside a fixed-point layer's input: the unit of its result, its weight and its bias (F8Net)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lowbit.modules.base import Mode, Site
from lightning_lowbit.modules.fraclen import FraclenInput, beyond, grid_of, tell_range
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.modules.thresholds import BiasQuantizer
from lightning_lowbit.numerics.exponent import ceil_log2, pow2
from lightning_lowbit.numerics.fraclen import fix_quant, largest_code, largest_fraclen
from lightning_lowbit.numerics.fraclen_choice import choose, measure
from lightning_lowbit.numerics.grid import Grid

__all__ = ["EvaluationBias", "FraclenWeight", "ResultUnit"]

_WIDE = 48
_MOST_BEYOND = 16  # bits behind the point more than a code holds


class ResultUnit(Quantizer):
    """Counts a layer's result in the unit of the tensor's readers: divides weight and bias by it.

    It reads the unit of the last reader that stands before it in the tie.
    """

    has_grid = False

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        unit = None if self.reader is None else self.reader.unit()
        if unit is None:
            return x
        return x / (unit if unit.dim() == 0 else unit.reshape(-1, *[1] * (x.dim() - 1)))

    @property
    def reader(self) -> FraclenInput | None:
        """Whose unit the result is in; None where that is 1."""
        found = None
        for member in self.group:
            if member is self:
                return found
            found = member if isinstance(member, FraclenInput) else found
        return None

    def exponent(self) -> Tensor:
        return torch.zeros((), dtype=torch.int32)

    def grid(self) -> Grid:
        return Grid(bits=32, exponent=0)


class FraclenWeight(Quantizer):
    """A layer's effective weight: its fraclen is chosen anew from every weight, in training and evaluation (section 3).

    Args:
        site: where it stands.
        bits, select, ste: as of inputs; signed.
        small: whether weights that are all below 1/2 may have more bits behind the point than their codes hold, which
            costs integers nothing; published formats end at bits - 1.
        per_channel: one fraclen an output channel, by a closed form.
    """

    layer: Any

    def __init__(
        self, site: Site, bits: int = 8, select: str = "grid", ste: str = "strict", per_channel: bool = False,
        small: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(site)
        self.bits, self.select, self.ste, self.per_channel, self.small = bits, select, ste, per_channel, small
        self.observed = False
        self.fraclen: Tensor | None = None  # of the weight that was quantized last: follows from it, hence not saved

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        if self.per_channel:
            self.fraclen = choose(measure(x, self.select, self.bits, True, axis=0), self.select, self.bits, True)
        elif self.small and x.numel():  # counted from the power of two that holds them all
            more = (-ceil_log2(x.detach().abs().amax())).clamp(0, _MOST_BEYOND)
            sums = measure(x, self.select, self.bits, True, unit=pow2(more, torch.float64))
            self.fraclen = more + choose(sums, self.select, self.bits, True)
        else:
            self.fraclen = choose(measure(x, self.select, self.bits, True), self.select, self.bits, True)
        return fix_quant(x, self.fraclen, bits=self.bits, ste=self.ste, axis=0)

    def observe(self, x: Tensor) -> None:
        high = float(x.abs().max()) if x.numel() else 0.0
        if high > 0 and not self.observed:  # once, not in both passes
            self.observed = True
            most = largest_fraclen(self.bits, True) + (_MOST_BEYOND if self.small else 0)
            tell_range(self.site.key, high, high > largest_code(self.bits, True) + 0.5, most, self.bits, True)

    def exponent(self) -> Tensor:
        if self.fraclen is None:
            self.quantize(self.layer.in_evaluation()[0])
        assert self.fraclen is not None
        return -self.fraclen.to(torch.int32)

    def grid(self) -> Grid:
        return grid_of(self.exponent(), self.bits, True, axis=0)

    def saturated(self, x: Tensor) -> Tensor:
        return beyond(x.detach(), self.exponent(), largest_code(self.bits, True), True, axis=0)


class EvaluationBias(BiasQuantizer):
    """int32 on the grid of the products in evaluation; float while training.

    Args:
        site: where it stands.
        bits: of an input's and a weight's code together: above 16 their sums, and so the bias, need more than 32.
    """

    def __init__(self, site: Site, bits: int = 16) -> None:
        super().__init__(site, 32 if bits <= 16 else _WIDE, own=False)

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        if self.training and self.switch.mode is Mode.LOWBIT:
            return x
        unit = self._unit(x)
        return x if unit is None or unit.numel() > 1 else super().quantize(x, rectify)
