"""A power-of-two grid that follows the largest magnitude: of a weight as it is, of a tensor as it lately was."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lowbit.modules.base import Site
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.exponent import ceil_log2, clamp_exponent, pow2
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.observers import AllReduce
from lightning_lowbit.numerics.ste import fake_quantize

__all__ = ["RunningRange"]

_MOMENTUM = 0.1  # torch's, of the moving statistics of a batch norm


class RunningRange(Quantizer):
    """Signed codes with the least power-of-two step that holds the range.

    A tensor's range is a moving average over training batches, frozen in evaluation; its processes share the largest.
    A weight's range is that of its present values.

    Args:
        site: where it stands.
        bits: width of a code.
    """

    largest: Tensor

    def __init__(self, site: Site, bits: int = 8) -> None:
        super().__init__(site)
        self.bits = bits
        self.register_buffer("largest", torch.zeros(()))
        self.__dict__["seen"] = None

    @property
    def qmax(self) -> int:
        return int(2 ** (self.bits - 1)) - 1

    def exponent(self) -> Tensor:
        return clamp_exponent(ceil_log2(self.largest.double() / self.qmax))

    def grid(self) -> Grid:
        return Grid(self.bits, int(self.exponent()), narrow=True)

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        if self.site.role == "weight":
            self.largest.copy_(x.detach().abs().amax())
        elif self.training:
            seen = x.detach().abs().amax().to(self.largest.dtype)
            seen = torch.where(torch.isfinite(seen), seen, self.largest)  # one bad batch must not end all averages
            self.largest.lerp_(self.switch.run.reduce_max(seen), _MOMENTUM)
        return fake_quantize(x, self.exponent(), qmin=-self.qmax, qmax=self.qmax)

    def saturated(self, x: Tensor) -> Tensor:
        return (x.detach().abs() > (self.qmax + 0.5) * pow2(self.exponent())).sum()

    def observe(self, x: Tensor) -> None:
        seen = x.abs().amax().float()
        self.__dict__["seen"] = seen if self.__dict__["seen"] is None else torch.maximum(self.__dict__["seen"], seen)

    def forget(self) -> None:
        self.__dict__["seen"] = None

    def commit(self, all_reduce: AllReduce) -> None:
        seen = self.__dict__["seen"]
        largest = all_reduce(torch.zeros_like(self.largest) if seen is None else seen.to(self.largest.device), "max")
        self.require_finite(int(not bool(torch.isfinite(largest))))
        self.largest.copy_(largest)
        self.set_ready(bool(largest > 0))
