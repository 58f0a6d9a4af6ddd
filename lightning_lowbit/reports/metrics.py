"""What a binary network does while it learns, counted: signs that flip, latents at the clip, inputs of the signs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_lowbit.errors import ConfigError

__all__ = ["ClippedShare", "FlipRatio", "NanCount", "OutsideShare", "Share", "ZeroShare"]


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
