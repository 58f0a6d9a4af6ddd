"""Quantizers of a binarized network: what a layer reads, its latent weight, and what takes a rectifier's place."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError, InvariantError
from lightning_lowbit.modules.base import Scheme, Site
from lightning_lowbit.modules.integer_rounding import random_bits
from lightning_lowbit.modules.lowering import Builder
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.binary import binarize, binary_sign, channel_mean, leaky, scaled_sign
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.observers import AllReduce

__all__ = ["LatentSign", "Rectifier", "Replacement", "SignInput"]

Replacement = Literal["keep", "hardtanh", "prelu", "rprelu"]
_SLOPE = 0.25  # of a PReLU at first, as in torch


class _Binary(Quantizer):
    """What both binarizers share: values +-1, noise that is a function of (seed, batch, site, sample)."""

    scheme: Scheme  # placed by the scheme that made it

    @property
    def path(self) -> str:
        return self.site.key

    def exponent(self) -> Tensor:
        return torch.zeros((), dtype=torch.int32, device=self.initialized.device)

    def grid(self) -> Grid:
        return Grid(1, 0, binary=True)

    def noise(self, x: Tensor, shared: bool) -> Tensor:
        """Uniform numbers in [0, 1) of the shape of x; ``shared`` ones are equal on all processes."""
        samples = 1 if shared or x.dim() < 2 else x.shape[0]
        bits = random_bits(self, "sign", samples, x.numel() // max(samples, 1), x.device, shared=shared)
        return (bits >> 7).reshape(x.shape).float() * 2.0**-24  # 24 bits are all that float32 tells apart


class SignInput(_Binary):
    """The sign of what a layer reads, with a window for the errors that come back (spec of the STEs: numerics.binary).

    Args:
        site: where it stands.
        ste: the stand-in for the sign's derivative.
        stochastic: draw the signs in training.
        shift: learn a shift per channel in front of the sign (RSign, arXiv:2003.03488 eq. 3), from "zero" or from
            minus the channel's "mean" in calibration; None without.
        detect_nan: raise where a NaN would become +1 in training.
    """

    progress: Tensor
    shift: nn.Parameter | None

    def __init__(self, site: Site, ste: str, stochastic: bool, shift: str | None, detect_nan: bool) -> None:
        super().__init__(site)
        self.ste, self.stochastic, self.detect_nan = ste, stochastic, detect_nan
        self.anneals = ste in ("annealed", "progressive")
        if self.anneals:
            self.register_buffer("progress", torch.zeros(()))
        self.shift = nn.Parameter(torch.zeros(site.channels)) if shift and site.channels else None
        self.centered = shift == "mean"
        self.__dict__["seen"] = []  # sums and counts of calibration
        self.__dict__["below"] = None  # whether the network's input has a negative value, 0-dim

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        if self.detect_nan and self.training and bool(torch.isnan(x).any()):
            raise ConfigError(
                f"{self.site.key}: got NaN, which would pass as +1. Look at the batch, the learning rate and the "
                "layers before it; Bnn(detect_nan=False) lets it pass."
            )
        x = self.shifted(x)
        if not self.training:
            return binarize(x, "htanh" if self.anneals else self.ste)
        u = self.noise(x, shared=False) if self.stochastic else None
        return binarize(x, self.ste, self.progress if self.anneals else None, u)

    def shifted(self, x: Tensor) -> Tensor:
        """x + b_c, what the sign is taken of."""
        return x if self.shift is None else x + along(self.shift, x, self.site)

    def lower(self, build: Builder, x: Any) -> Any:
        """The sign of evaluation in a program, +-1."""
        if self.shift is not None:
            x = build.island("add", x, constants={"other": self.shift.reshape(shape_along(x.shape, self.site))})
        return build.sign(x)

    def observe(self, x: Tensor) -> None:
        if self.site.first:
            below = (x < 0).any().float()
            known = self.__dict__["below"]
            self.__dict__["below"] = below if known is None else torch.maximum(below, known)
        if self.shift is not None and self.centered:
            x = x.movedim(-1 - behind(x.dim(), self.site), -1)
            flat = x.reshape(-1, x.shape[-1]).double()
            self.__dict__["seen"].append(torch.cat([flat.sum(0), flat.new_tensor([len(flat)])]))

    def forget(self) -> None:
        self.__dict__["seen"], self.__dict__["below"] = [], None

    @torch.no_grad()
    def commit(self, all_reduce: AllReduce) -> None:
        below = self.__dict__["below"]
        if below is not None and not self.centered and not bool(all_reduce(below, "max")):
            warnings.warn(
                f"{self.site.key}: the network's input has no negative value in calibration, so that every sign is +1. "
                "Center the data, or keep that layer's input with Bnn(first='int8') or 'float_input'.",
                stacklevel=2,
            )
        if self.shift is not None and self.centered:
            empty = self.shift.new_zeros(len(self.shift) + 1, dtype=torch.float64)
            *total, count = all_reduce(torch.stack([empty, *self.__dict__["seen"]]).sum(0), "sum")
            self.shift.copy_(-torch.stack(total) / count.clamp_min(1))
        self.set_ready()

    def saturated(self, x: Tensor) -> Tensor:
        """Values outside [-1, 1]: through most windows their gradient is 0."""
        return (self.shifted(x.detach()).abs() > 1).sum()


class LatentSign(_Binary):
    """The sign of a latent weight, times nothing, its largest magnitude, or each output's mean magnitude.

    In evaluation it gives the bare signs: the layer multiplies its sums with the scale.

    Args:
        site: where it stands.
        ste: the stand-in for the sign's derivative.
        scale: none, max or channel_mean.
        scale_grad: unit, alpha or full: what the scale does to the latent's gradient.
        stochastic: draw the signs in training, the same on all processes.
        waits: the weight stays float until the rule of the scheme says so, not only until calibration.
    """

    layer: Any
    gain: Tensor

    def __init__(
        self, site: Site, ste: str, scale: str, scale_grad: str, stochastic: bool, waits: bool = False
    ) -> None:
        super().__init__(site)
        self.ste, self.scaling, self.scale_grad = ste, scale, scale_grad
        self.stochastic, self.waits = stochastic, waits
        self.register_buffer("gain", torch.ones(()))

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        u = self.noise(x, shared=True) if self.stochastic and self.training else None
        if self.scaling == "none" or not self.training:
            return binarize(x, self.ste, u=u)
        grad = (
            "unit" if self.scaling == "max" else self.scale_grad
        )  # max: s is a constant, the gradient passes as it is
        return scaled_sign(x, self.scale(x), self.ste, grad, u, self.gain)

    def scale(self, w: Tensor) -> Tensor:
        """What the signs are multiplied with: 0-dim, or [outputs, 1, ...]. Nothing is ever divided by it."""
        if self.scaling == "channel_mean":
            return channel_mean(w) * self.gain
        return w.detach().abs().amax() * self.gain if self.scaling == "max" else w.new_ones(())

    @torch.no_grad()
    def adopt(self) -> None:
        """The layer's weight becomes latent: pretrained ones, of order 0.01, would have any step flip them.

        Called on the first of the layers that share it.
        They are rescaled as a whole, which changes no sign; ``gain`` takes the factor back where magnitudes count.
        """
        weight, wanted = self.layer.weight, self.scheme.latent_std  # type: ignore[attr-defined]  # a Bnn's
        if self.scheme.update == "bop":  # type: ignore[attr-defined]
            weight.copy_(binary_sign(weight))
            return
        spread = weight.std(correction=0)
        if wanted is not None and wanted != "auto" and bool(spread > 0):
            weight.mul_(wanted / spread)
            for member in self.group:  # layers that share the weight
                assert isinstance(member, LatentSign)
                member.gain.mul_(spread / wanted)
        self.clip()

    def clip(self) -> None:
        """W <- clip(W, -1, 1): without it magnitude, the inertia of a sign, has no bound."""
        weight = self.layer.weight
        with torch.no_grad():
            weight.clamp_(-1, 1)

    def saturated(self, x: Tensor) -> Tensor:
        return (x.detach().abs() >= 1).sum()

    def commit(self, all_reduce: AllReduce) -> None:
        if not self.waits:
            self.adopt()
        self.set_ready(not self.waits)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.ready:  # a file of other code need not have clipped them
            self.clip()


class Rectifier(Quantizer):
    """Takes a ReLU's place where a sign reads it, which would otherwise see nothing but +1.

        kind       f(x)
        hardtanh   clip(x, -1, 1)
        prelu      x where x > 0, else beta_c x
        rprelu     prelu(x - gamma_c) + zeta_c      (RPReLU, arXiv:2003.03488 eq. 4)

    Args:
        site: of the rectifier's result.
        kind: what stands in its place.
    """

    has_grid = False  # real numbers come out

    def __init__(self, site: Site, kind: str) -> None:
        super().__init__(site)
        self.kind = kind
        channels = site.channels or 1
        self.slope = nn.Parameter(torch.full((channels,), _SLOPE)) if kind != "hardtanh" else None
        self.before = nn.Parameter(torch.zeros(channels)) if kind == "rprelu" else None
        self.after = nn.Parameter(torch.zeros(channels)) if kind == "rprelu" else None

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        if self.slope is None:
            return x.clamp(-1, 1)  # closed, unlike F.hardtanh: a value clipped to 1 goes on learning
        if self.before is not None:
            x = x + along(-self.before, x, self.site)  # x - gamma would negate a whole gradient on the way back
        x = leaky(x, along(self.slope, x, self.site))
        return x if self.after is None else x + along(self.after, x, self.site)

    def lower(self, build: Builder, x: Any) -> Any:
        """The same float functions in a program."""
        if self.slope is None:
            return build.island("clamp", x, low=-1.0, high=1.0)
        shape = shape_along(x.shape, self.site)
        if self.before is not None:
            x = build.island("add", x, constants={"other": -self.before.reshape(shape)})
        axis = len(x.shape) - len(shape)
        x = build.move(x, lambda t: t.transpose(1, axis))  # where the slopes of a program's PReLU stand
        x = build.move(build.island("prelu", x, constants={"slope": self.slope}), lambda t: t.transpose(1, axis))
        return x if self.after is None else build.island("add", x, constants={"other": self.after.reshape(shape)})

    def forward(self, x: Tensor, rectify: bool = False) -> Tensor:
        return self.quantize(x) if self.switch.quantizing else F.relu(x)

    def commit(self, all_reduce: AllReduce) -> None:
        """Nothing to set."""

    def exponent(self) -> Tensor:
        raise InvariantError(f"{self.site.key}: asked for the exponent of real numbers.")

    def grid(self) -> Grid:
        raise InvariantError(f"{self.site.key}: asked for the grid of real numbers.")

    def extra_repr(self) -> str:
        return self.kind


def along(parameter: Tensor, x: Tensor, site: Site) -> Tensor:
    """A parameter per channel in the shape that broadcasts against x."""
    return parameter.reshape(shape_along(x.shape, site))


def shape_along(shape: Sequence[int], site: Site) -> tuple[int, ...]:
    """Of a parameter per channel that broadcasts against a tensor of that shape."""
    return (-1, *([1] * behind(len(shape), site)))


def behind(axes: int, site: Site) -> int:
    """How many axes of a tensor lie behind that of its channels."""
    return max(axes - 2, 0) if site.behind is None else site.behind
