"""Jacinto's training step in plain torch: no module, no autograd function, no kernel of the package.

Only what the scheme's formulas name: convolution, batch norm, clamp, and the data of a tensor replaced behind them.
Ranges are those of the values on 256 bins, limits their next powers of two, all codes have eight bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Twin"]

BITS, EPS, MOMENTUM, PERCENT = 8, 1e-5, 0.1, 0.01


class Range:
    """A running range and what follows from it."""

    def __init__(self, signed: bool | None) -> None:
        self.signed = signed
        self.clips = torch.tensor([0.0 if signed is False else -8.0, 8.0])
        self.batches = -1

    def follow(self, x: Tensor) -> None:
        self.batches += 1
        share = max(1 / max(self.batches, 1), 0.001)
        self.clips = (1 - share) * self.clips + share * percentile(x)

    @property
    def negative(self) -> bool:
        return bool(self.clips[0] < 0) if self.signed is None else self.signed

    @property
    def limit(self) -> float:
        return ceil2(self.clips.abs().max() if self.negative else self.clips[1].abs())

    def clamp(self, x: Tensor) -> Tensor:
        return x.clamp(-self.limit if self.negative else 0.0, self.limit)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Tensor:
        """Half up."""
        codes = 2.0 ** (BITS - 1 if self.negative else BITS)
        scale = codes / self.limit
        low = -codes if self.negative else 0.0
        return torch.floor(x.double() * scale + 0.5).clamp(low, codes - 1).div(scale).to(x.dtype)


def ceil2(v: Tensor) -> float:
    """At least 2^-16."""
    exponent = -16
    while 2.0**exponent < float(v):
        exponent += 1
    return 2.0**exponent


@torch.no_grad()
def percentile(x: Tensor) -> Tensor:
    """The range without PERCENT of the values at either end, the last bin dropped kept."""
    low, high = x.min(), x.max()
    k = 255 / (high - low)
    counts = torch.bincount(torch.round((x - low) * k).to(torch.int64).flatten(), minlength=256).double()
    below, above = (100 * part.cumsum(0) / x.numel() < PERCENT for part in (counts, counts.flip(0)))
    first, last = max(int(below.sum()) - 1, 0), 255 - max(int(above.sum()) - 1, 0)
    return (torch.stack([first * (1 / k), last * (1 / k)]) + low).clamp(low, high)


def on_own_grid(w: Tensor) -> tuple[Tensor, float]:
    """Weight or bias over its largest magnitude, half away from zero; codes per unit."""
    half = 2.0 ** (BITS - 1)
    scale = half / ceil2(w.abs().max())
    codes = torch.sign(w) * torch.floor(w.abs().double() * scale + 0.5).to(w.dtype)
    return codes.clamp(-half, half - 1) / scale, scale


def saturated(bias: Tensor, bias_scale: float, weight_scale: float, source: Range) -> Tensor:
    """An eight-bit weight times a constant input, in 16 bits."""
    half, negative = 2.0 ** (BITS - 1), source.negative
    products = weight_scale * 2.0 ** (BITS - 1 if negative else BITS) / source.limit
    constant = half - 1 if negative else 2 * half - 1
    if int(products / bias_scale) > constant:
        end = 2.0 ** (2 * BITS - 1)
        units = ((bias * products).clamp(-end, end - 1) / constant).trunc()
        return units.clamp(-half, half - 1) * constant / products
    return (bias * products).trunc() / products


class Twin:
    """Network and state of the file's model.

    Args:
        state: of the float network, by name.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.parameters = {
            name: value.clone().requires_grad_() for name, value in state.items()
            if name.endswith(("weight", "bias"))
        }  # fmt: skip
        self.statistics = {
            f"{name.partition('.')[2]}.{name.partition('.')[0]}": value.clone() for name, value in state.items()
            if "running" in name
        }  # fmt: skip
        self.ranges = {
            name: Range(False if name.startswith("relu") else None)
            for name in ("conv1.activation_in", "relu1", "bn2.activation_q", "relu2", "fc.activation_q")
        }

    def step(self, x: Tensor, target: Tensor, scale: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All results, and all gradients, of one training batch."""
        found = self._forward(x, training=True)
        found["loss"] = F.cross_entropy(scale * found["y"], target)
        names = list(self.parameters)
        gradients = torch.autograd.grad(found["loss"], [self.parameters[name] for name in names])
        self.gradients = dict(zip(names, gradients, strict=True))
        return found, self.gradients

    @torch.no_grad()
    def descend(self, rate: float) -> None:
        for name, parameter in self.parameters.items():
            parameter -= rate * self.gradients[name]

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> Tensor:
        return self._forward(x, training=False)["y"]

    def _forward(self, x: Tensor, training: bool) -> dict[str, Tensor]:
        self.training = training
        found = {}
        found["conv1.activation_in"] = x = self._close("conv1.activation_in", x)
        found["relu1"] = skip = self._convolution("conv1", "bn1", "relu1", x, "conv1.activation_in")
        found["bn2.activation_q"] = x = self._convolution("conv2", "bn2", "bn2.activation_q", skip, "relu1")
        found["relu2"] = x = self._close("relu2", x + skip)
        x = x.mean((2, 3), keepdim=True).flatten(1)
        weight, bias = self.parameters["fc.weight"], self.parameters["fc.bias"]
        with torch.no_grad():  # the mean is on no grid: the bias is on its own
            sums = F.linear(x.detach(), on_own_grid(weight)[0], on_own_grid(bias)[0])
        found["fc.activation_q"] = found["y"] = self._close("fc.activation_q", F.linear(x, weight, bias), sums)
        return found

    def _close(self, name: str, nrm: Tensor, sums: Tensor | None = None) -> Tensor:
        """The clamp of nrm, its data replaced by the quantized sums."""
        own = self.ranges[name]
        if self.training:
            own.follow(nrm.detach())
        y = own.clamp(nrm)
        y.data = own.quantize(nrm.detach() if sums is None else sums)
        return y

    def _convolution(self, conv: str, norm: str, name: str, x: Tensor, source: str) -> Tensor:
        weight = self.parameters[f"{conv}.weight"]
        gamma, beta = self.parameters[f"{norm}.weight"], self.parameters[f"{norm}.bias"]
        mean, var = self.statistics[f"running_mean.{norm}"], self.statistics[f"running_var.{norm}"]
        c = F.conv2d(x, weight, padding=1)
        nrm = F.batch_norm(c, mean, var, gamma, beta, self.training, MOMENTUM, EPS)
        with torch.no_grad():
            s = gamma / torch.sqrt(var + EPS)
            merged, weight_scale = on_own_grid(weight * s.reshape(-1, 1, 1, 1))
            bias = saturated(*on_own_grid(beta - mean * s), weight_scale, self.ranges[source])
            sums = F.conv2d(x.detach(), merged, bias, padding=1)
        return self._close(name, nrm, sums)
