"""What quantizers do while a network learns, counted: noise, codes that change or are never used, signs that flip."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_lowbit.errors import ConfigError

__all__ = [
    "ClippedShare", "CodeFlips", "DeadBits", "FlipRatio", "NanCount", "OutsideShare", "SaturatedShare", "Share", "Sqnr",
    "ZeroShare",
]  # fmt: skip


def _count() -> Tensor:
    return torch.zeros((), dtype=torch.int64)  # float32 stops counting at 2^24


class Share(Metric):
    """Share of values that are ``counted``, in [0, 1]; NaN where none was seen.

    Counts are exact integers, which processes sum. Under a name of their own for each kind of share: a
    MetricCollection merges metrics whose states have equal names and, after the first batch, equal values.

    Attributes:
        name: of the state that counts.
        seen: values so far.
    """

    full_state_update = False
    is_differentiable = False
    name: ClassVar[str]
    seen: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state(self.name, _count(), dist_reduce_fx="sum")
        self.add_state("seen", _count(), dist_reduce_fx="sum")

    @abstractmethod
    def counted(self, x: Tensor) -> Tensor:
        """Which values count: bool, shape of x."""

    def update(self, x: Tensor) -> None:
        """Look at a tensor of any shape and real dtype."""
        self._add(self.counted(x), x.numel())

    def compute(self) -> Tensor:
        share: Tensor = getattr(self, self.name) / self.seen
        return share

    def _add(self, which: Tensor, seen: int) -> None:
        setattr(self, self.name, getattr(self, self.name) + which.sum())
        self.seen = self.seen + seen


class ClippedShare(Share):
    """Latent weights at the clip, |w| >= 1: with all their inertia, and (outside the window) without a gradient.

    >>> ClippedShare()(torch.tensor([-1.0, -0.5, 0.0, 1.0]))
    tensor(0.5000)
    """

    name = "clipped"

    def counted(self, x: Tensor) -> Tensor:
        return x.abs() >= 1


class ZeroShare(Share):
    """Exact zeros of either sign, which a binary sign takes as +1.

    >>> ZeroShare()(torch.tensor([-0.0, 0.0, 1e-30, float("nan")]))
    tensor(0.5000)
    """

    name = "zeros"

    def counted(self, x: Tensor) -> Tensor:
        return x == 0


class OutsideShare(Share):
    """Values outside the window [-1, 1] of an input's sign, behind which most stand-in gradients are 0.

    >>> OutsideShare()(torch.tensor([-1.5, -1.0, 1.0, float("inf")]))
    tensor(0.5000)
    """

    name = "outside"

    def counted(self, x: Tensor) -> Tensor:
        return x.abs() > 1


class FlipRatio(Share):
    """Share of weights whose sign changes in a step.

    Healthy from 1e-4 to 1e-2, falling with the learning rate; Helwegen et al. (arXiv:1906.02107) plot its logarithm.
    Signs are those of a binary network: x < 0 is negative, zero and NaN are not.

    >>> flips = FlipRatio()
    >>> flips(torch.tensor([1.0, -1.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, -0.0, -2.0]))
    tensor(0.5000)
    """

    name = "flips"

    def counted(self, x: Tensor) -> Tensor:
        return x if x.dtype is torch.bool else x < 0

    def update(self, before: Tensor, after: Tensor, steps: int = 1) -> None:  # type: ignore[override]  # of a change
        """Compare the signs before and after ``steps`` updates; what flips there and back in between stays unseen.

        Args:
            before, after: weights or signs of one shape; bool is True where negative.
            steps: how many updates lie between them, at least 1.
        Raises:
            ConfigError: shapes differ, or no step lies between.
        """
        if before.shape != after.shape or steps < 1:
            raise ConfigError(
                f"FlipRatio: got {tuple(before.shape)} before and {tuple(after.shape)} after {steps} steps, expected "
                "one shape and at least 1 step. Pass the weight of one layer at two times."
            )
        self._add(self.counted(before) != self.counted(after), before.numel() * steps)


class NanCount(Metric):
    """How many values are NaN, which a binary sign takes as +1 without a word.

    >>> NanCount()(torch.tensor([float("nan"), 0.0, float("inf")]))
    tensor(1)
    """

    full_state_update = False
    is_differentiable = False
    nan: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("nan", _count(), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        """Look at a tensor of any shape and real dtype."""
        self.nan = self.nan + torch.isnan(x).sum()

    def compute(self) -> Tensor:
        return self.nan


class Sqnr(Metric):
    """Signal over quantization noise in decibels, 10 log10(sum x^2 / sum (y - x)^2).

    Infinite where nothing was rounded, NaN of a NaN. A bit more is worth 6 dB.

    >>> Sqnr()(torch.tensor([1.0, 0.5, 0.1]), torch.tensor([1.0, 0.5, 0.0]))
    tensor(21.0037, dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    signal: Tensor
    noise: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("signal", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("noise", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor, y: Tensor) -> None:
        """Compare float values ``x`` with the quantized ``y``, of one shape."""
        x, y = x.double(), y.double()
        self.signal = self.signal + x.square().sum()
        self.noise = self.noise + (y - x).square().sum()

    def compute(self) -> Tensor:
        return torch.where(self.noise == 0, torch.inf, 10 * torch.log10(self.signal / self.noise))


class SaturatedShare(Share):
    """Values beyond the grid, as a quantizer counts them.

    >>> SaturatedShare()(torch.tensor(3), 12)
    tensor(0.2500)
    """

    name = "saturated"

    def counted(self, x: Tensor) -> Tensor:
        return x

    def update(self, saturated: Tensor, seen: int) -> None:  # type: ignore[override]  # counted by the quantizer
        """Add ``saturated`` (0-dim) among ``seen`` values."""
        self._add(saturated, seen)


class CodeFlips(Share):
    """Share of codes that are others than they were; of signs and of any width.

    >>> CodeFlips()(torch.tensor([3, -1, 0, 5]), torch.tensor([3, -2, 0, 5]))
    tensor(0.2500)
    """

    name = "changed"

    def counted(self, x: Tensor) -> Tensor:
        return x

    def update(self, before: Tensor, after: Tensor) -> None:  # type: ignore[override]  # of a change
        """Compare codes of one shape."""
        self._add(before != after, before.numel())


class DeadBits(Metric):
    """Top bits that no code uses: the range is 2^n times as wide as the values are; NaN where none was seen.

    >>> DeadBits()(torch.tensor([-32, 31, 0]), 7), DeadBits()(torch.tensor([-33, 0]), 7)
    (tensor(2.), tensor(1.))
    """

    full_state_update = False
    is_differentiable = False
    reach: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.bits = 0
        self.add_state("reach", torch.full((), -1.0, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, codes: Tensor, bits: int) -> None:
        """Look at codes of any shape and real dtype that have so many ``bits`` beside the sign."""
        self.bits = bits
        if codes.numel():
            low, high = codes.double().aminmax()
            self.reach = torch.maximum(self.reach, torch.maximum(high, -1 - low))  # -2^n needs n bits, as 2^n - 1 does

    def compute(self) -> Tensor:
        used = torch.frexp(self.reach).exponent
        return torch.where(self.reach < 0, torch.nan, (self.bits - used).clamp(min=0).float())
