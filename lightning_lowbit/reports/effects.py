"""How far a network's outputs are from those of another one: sums over batches, and the numbers that follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError

__all__ = ["METRICS", "Effect", "Measure"]

METRICS = ("sqnr", "cosine", "kl", "accuracy")


@dataclass(frozen=True)
class Effect:
    """What changed in the outputs; None where it was not measured.

    Attributes:
        sqnr: 10 log10(sum y^2 / sum (y' - y)^2) in dB; infinite where nothing changed.
        cosine: of the angle between all outputs y and y'.
        kl: mean of KL(softmax(y) || softmax(y')) in nats.
        accuracy_delta: accuracy of y' less that of y.
    """

    sqnr: float | None = None
    cosine: float | None = None
    kl: float | None = None
    accuracy_delta: float | None = None

    def value(self, metric: str) -> float | None:
        """By its name in METRICS."""
        found: float | None = getattr(self, "accuracy_delta" if metric == "accuracy" else metric)
        return found

    def cells(self) -> tuple[str, ...]:
        """As printed, in the order of METRICS.

        >>> Effect(math.inf, 1.0, 0.0, -0.0125).cells()
        ('equal', '1.000000', '0', '-1.25')
        >>> Effect(31.26, 0.99975).cells()
        ('31.3 dB', '0.999750', '', '')
        """
        return (
            "" if self.sqnr is None else "equal" if math.isinf(self.sqnr) else f"{self.sqnr:.1f} dB",
            "" if self.cosine is None else f"{self.cosine:.6f}",
            "" if self.kl is None else f"{self.kl:.3g}",
            "" if self.accuracy_delta is None else f"{100 * self.accuracy_delta:+.2f}",
        )


class Measure:
    """Sums over batches, in float64.

    Args:
        metrics: of METRICS.

    >>> measure = Measure(("sqnr", "accuracy"))
    >>> y, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64), torch.tensor([0, 0])
    >>> measure.add([y], [y + 0.1], labels)
    >>> measure.effect()
    Effect(sqnr=16.9..., cosine=None, kl=None, accuracy_delta=0.0)
    >>> measure.accuracy
    0.5
    """

    def __init__(self, metrics: Sequence[str]) -> None:
        self.metrics = frozenset(metrics)
        self.samples = self.rows = self.labeled = 0
        self.signal = self.noise = self.product = self.power = self.kl = 0.0
        self.right = self.right_before = 0

    def add(self, reference: Sequence[Tensor], outputs: Sequence[Tensor], labels: Tensor | None) -> None:
        """Take in a batch.

        Args:
            reference, outputs: float64, [N, ...] each; KL and accuracy are those of the first, classes on axis 1.
            labels: int64 [N, ...] without the axis of classes; None leaves accuracy out.
        Raises:
            ConfigError: labels do not fit the outputs.
        """
        for y, changed in zip(reference, outputs, strict=True):
            self.signal += float(y.square().sum())
            self.noise += float((changed - y).square().sum())
            self.power += float(changed.square().sum())
            self.product += float((y * changed).sum())
        y, changed = reference[0], outputs[0]
        self.samples += len(y) if y.dim() else 1
        if y.dim() < 2:
            return
        if "kl" in self.metrics:
            p, q = torch.log_softmax(y, 1), torch.log_softmax(changed, 1)
            self.kl += float((p.exp() * (p - q)).sum())
            self.rows += y.numel() // y.shape[1]
        if "accuracy" in self.metrics and labels is not None:
            if labels.shape != y.argmax(1).shape:
                raise ConfigError(
                    f"sensitivity: got labels of shape {list(labels.shape)} for outputs {list(y.shape)}, expected "
                    f"{list(y.argmax(1).shape)}. Give target=, which takes labels out of a batch, or leave "
                    "'accuracy' out of metrics."
                )
            labels = labels.to(y.device)
            self.labeled += labels.numel()
            self.right_before += int((y.argmax(1) == labels).sum())
            self.right += int((changed.argmax(1) == labels).sum())

    @property
    def accuracy(self) -> float | None:
        """Of the reference."""
        return self.right_before / self.labeled if self.labeled else None

    def effect(self) -> Effect:
        """The numbers of all batches so far; NaN where the outputs are not finite."""
        return Effect(
            self._sqnr() if "sqnr" in self.metrics else None,
            self._cosine() if "cosine" in self.metrics else None,
            max(self.kl / self.rows, 0.0) if self.rows else None,
            (self.right - self.right_before) / self.labeled if self.labeled else None,
        )

    def _sqnr(self) -> float:
        if self.noise == 0:
            return math.inf
        if not math.isfinite(self.noise):
            return math.nan
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf

    def _cosine(self) -> float:
        both = math.sqrt(self.signal) * math.sqrt(self.power)
        return self.product / both if both else float(self.signal == self.power)
