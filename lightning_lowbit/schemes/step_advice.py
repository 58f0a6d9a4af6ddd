"""What a learning rate comes to where gradients have one size: how far it carries a weight, and which would do."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import low_bit_modules
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.stored import StoredWeight
from lightning_lowbit.numerics.momentum import UpdateFormat, learning_rate_notice, momentum_code, momentum_notice
from lightning_lowbit.numerics.step_size import finetune_lr, suggest_lr

__all__ = ["Notices", "advise_lr", "lr_notice"]


def advise_lr(model: nn.Module, steps: int | None = None, dr: int = 128, momentum: float = 0.25) -> float:
    """A learning rate for a converted network whose update is integer momentum.

    Args:
        model: converted and calibrated: the standard deviations of its weights count, in units of their ranges.
        steps: of a run from scratch, which is to carry a weight some tens of deviations; None fine-tunes: a gradient
            moves a weight by some thousandths of a deviation.
        dr: range of quantized gradients.
        momentum: in [0, 1).
    Raises:
        ConfigError: nothing that such an update moves.
    """
    layers = [module for _, module in low_bit_modules(model) if isinstance(module, LowBitLayer)]
    stored = [layer.lowbit_weight for layer in layers if isinstance(layer.lowbit_weight, StoredWeight)]
    spread = [float(weight.layer.weight.detach().std()) * 2.0**-weight.power for weight in stored]
    if not spread:
        raise ConfigError(
            f"advise_lr: {type(model).__name__} has no layer with a stored weight. Convert it first: "
            "lightning_lowbit.convert(module, 'wageubn', example_input=batch)."
        )
    mean, format = sum(spread) / len(spread), layers[0].scheme.update_format  # type: ignore[attr-defined]  # Wageubn's
    if steps is None:
        return finetune_lr(mean, dr, grad_bits=format.gradient, lr_bits=format.learning_rate)
    return suggest_lr(mean, steps, dr, momentum, grad_bits=format.gradient, lr_bits=format.learning_rate)


def lr_notice(
    spread: Sequence[float], lr: float, momentum: float, dr: int, format: UpdateFormat, steps: int | None,
    least: float = 8.0, good: float = 30.0,
) -> str:  # fmt: skip
    """One sentence where a run's steps carry a weight so little that it cannot learn, else ''.

    Args:
        spread: standard deviations of layers' weights, in units of their ranges.
        lr, momentum: of the optimizer.
        dr: range of quantized gradients.
        format: of the update.
        steps: of the run; None where it has no end.
        least, good: deviations that are enough, and that are advised: fewer where weights come from elsewhere.

    >>> lr_notice([0.1], 0.01, 0.25, 128, UpdateFormat(), 200)
    'learning rate 0.01 carries a weight at most 0.21 standard deviations in 200 steps; 0.998 carries it 20.8'
    >>> lr_notice([0.1], 0.5, 0.25, 128, UpdateFormat(), 2000)
    ''
    """
    if steps is None or not spread or not any(spread):
        return ""
    mean = sum(spread) / len(spread)
    momentum = momentum_code(momentum, format) * 2.0 ** (1 - format.momentum)
    reach = steps * dr * 2.0 ** (1 - format.gradient) / (1 - momentum) / mean
    if reach * lr >= least or lr <= 0:
        return ""
    better = suggest_lr(mean, steps, dr, momentum, good, format.gradient, format.learning_rate)
    return (
        f"learning rate {lr:g} carries a weight at most {reach * lr:.2g} standard deviations in {steps} steps; "
        f"{better:.3g} carries it {reach * better:.3g}"
    )


class Notices:
    """What is said of an optimizer's settings, each thing once: as a warning, or as news for whoever asks.

    Args:
        format: of the update.
    """

    def __init__(self, format: UpdateFormat) -> None:
        self.format = format
        self.said: set[str] = set()
        self.news: list[str] = []
        self.rates: dict[int, float] = {}  # by a group's first parameter, of its last step
        self.largest = 0.0  # rate so far

    def first(self, topic: str) -> bool:
        """Whether it comes up for the first time."""
        new = topic not in self.said
        self.said.add(topic)
        return new

    def warn(self, topic: str, words: str) -> None:
        if words and self.first(topic):
            warnings.warn(f"wageubn: {words}", stacklevel=4)

    def tell(self, topic: str, words: str) -> None:
        if words and self.first(topic):
            self.news.append(words)

    def take(self) -> list[str]:
        told, self.news = self.news, []
        return told

    def of_group(self, group: Mapping[str, Any], lr: float, momentum: float) -> None:
        """What the grids make of a group's learning rate and momentum, and which settings the update does not know."""
        first, raised = id(group["params"][0]), learning_rate_notice(lr, self.format)
        if self.rates.get(first) == lr:  # no schedule that passes by
            self.warn(f"rate {first}", raised)
        else:
            self.tell("rate", raised)
        self.rates[first], self.largest = lr, max(lr, self.largest)
        self.tell(f"momentum {momentum}", momentum_notice(momentum, self.format))
        unknown = [name for name in ("nesterov", "dampening", "betas", "amsgrad", "alpha") if group.get(name)]
        unknown += ["weight_decay"] if group.get("decoupled_weight_decay") and group.get("weight_decay") else []
        if unknown:
            names = ", ".join(unknown)
            self.tell(
                names,
                f"{names} of the optimizer: unknown to the integer update of low-bit parameters, which is SGD with "
                "momentum. update='fake' keeps the optimizer's own step.",
            )
