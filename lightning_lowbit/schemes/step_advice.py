"""What a learning rate comes to where gradients have one size: how far it carries a weight, and which would do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import low_bit_modules
from lightning_lowbit.modules.stored import StoredWeight
from lightning_lowbit.numerics.momentum import UpdateFormat
from lightning_lowbit.numerics.step_size import finetune_lr, suggest_lr

__all__ = ["advise_lr", "lr_notice"]

_TOO_SHORT = 3.0  # standard deviations of a layer's weights, over the whole run
_GOOD = 30.0


def advise_lr(model: nn.Module, steps: int | None = None, dr: int = 128, momentum: float = 0.25) -> float:
    """A learning rate for a converted network whose update is integer momentum.

    Args:
        model: converted and calibrated: the standard deviations of its weights count, in units of their ranges.
        steps: of a run from scratch, which is to carry a weight some tens of deviations; None fine-tunes: a gradient
            moves a weight by a thousandth of a deviation.
        dr: range of quantized gradients.
        momentum: in [0, 1).
    Raises:
        ConfigError: nothing that such an update moves.
    """
    found = [module.lowbit_weight for _, module in low_bit_modules(model) if hasattr(module, "lowbit_weight")]
    spread = [float(q.layer.weight.detach().std()) * 2.0**-q.power for q in found if isinstance(q, StoredWeight)]
    if not spread:
        raise ConfigError(
            f"advise_lr: {type(model).__name__} has no layer with a stored weight. Convert it first: "
            "lightning_lowbit.convert(module, 'wageubn', example_input=batch)."
        )
    mean = sum(spread) / len(spread)
    return finetune_lr(mean, dr) if steps is None else suggest_lr(mean, steps, dr, momentum)


def lr_notice(
    spread: Sequence[float], lr: float, momentum: float, dr: int, format: UpdateFormat, steps: int | None
) -> str:
    """One sentence where a run's steps carry a weight so little that it cannot learn, else ''.

    Args:
        spread: standard deviations of layers' weights, in units of their ranges.
        lr, momentum: of the optimizer.
        dr: range of quantized gradients.
        format: of the update.
        steps: of the run; None where it has no end.

    >>> lr_notice([0.1], 0.01, 0.25, 128, UpdateFormat(), 200)
    'learning rate 0.01 carries a weight at most 0.21 standard deviations in 200 steps; 0.998 carries it 20.8'
    >>> lr_notice([0.1], 0.5, 0.25, 128, UpdateFormat(), 2000)
    ''
    """
    if steps is None or not spread or not any(spread):
        return ""
    mean = sum(spread) / len(spread)
    reach = steps * dr * 2.0 ** (1 - format.gradient) / (1 - min(momentum, 0.75)) / mean
    if not mean or reach * lr >= _TOO_SHORT or lr <= 0:
        return ""
    better = suggest_lr(mean, steps, dr, min(momentum, 0.75), _GOOD, format.gradient, format.learning_rate)
    return (
        f"learning rate {lr:g} carries a weight at most {reach * lr:.2g} standard deviations in {steps} steps; "
        f"{better:.3g} carries it {reach * better:.3g}"
    )
