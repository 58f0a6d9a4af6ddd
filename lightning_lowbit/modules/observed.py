"""Calibration by what passed a tensor: statistics, then a histogram, pooled over the members of a tie."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from lightning_lowbit.modules.base import Site
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.observers import AllReduce, RangeObserver

__all__ = ["ObservedQuantizer"]


class ObservedQuantizer(Quantizer):
    """Base of quantizers whose first grid follows from the values seen in calibration.

    Args:
        site: where it stands.

    Attributes:
        histogram: whether a second pass takes one.
        same_grid: members of its tie share the sign too.
    """

    histogram: bool = True
    same_grid: bool = False

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.observer: RangeObserver | None = None

    def observe(self, x: Tensor) -> None:
        if self.observer is None:
            self.observer = RangeObserver()
        self.observer.observe(x)

    def forget(self) -> None:
        self.observer = None

    def observed(self) -> list[tuple[Self, RangeObserver]]:
        """Members of its kind that take part in finding the grid, with what they saw, if anything."""
        members = [m for m in self.group if isinstance(m, ObservedQuantizer)]
        for member in members:
            member.observer = member.observer or RangeObserver()
        return [(m, m.observer) for m in members if m.observer is not None]  # type: ignore[misc]  # of one scheme

    def close_pass(self, all_reduce: AllReduce) -> bool:
        seen = self.observed()
        for member, observer in seen:
            observer.reduce(all_reduce)
            member.require_finite(int(observer.stats.nonfinite))
            if member.site.signed is None:
                member.set_signed(bool(observer.stats.low < 0))
        if self.same_grid and any(member.signed for member, _ in seen):
            for member, _ in seen:
                member.set_signed(True)
        if not self.histogram:
            return False
        high = torch.stack([observer.stats.abs_max(member.signed) for member, observer in seen]).max()
        for _, observer in seen:
            observer.second_pass(high)
        return True
