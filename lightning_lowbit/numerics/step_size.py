"""How far a learning rate carries where the size of a gradient is thrown away (WAGEUBN, arXiv:1909.02384)."""

from __future__ import annotations

import math

from lightning_lowbit.errors import ConfigError

__all__ = ["finetune_lr", "suggest_lr"]


def suggest_lr(
    weight_std: float,
    steps: float,
    dr: int = 128,
    momentum: float = 0.25,
    deviations: float = 30.0,
    grad_bits: int = 15,
    lr_bits: int = 10,
) -> float:
    """A learning rate for training with the constant quantizer, which throws the size of a gradient away.

    A step moves a weight by at most lr dr 2^-14 / (1 - momentum), so that the rate alone decides how far a weight
    can get. The way of a whole run is to be some tens of standard deviations:

        steps lr dr 2^-(grad_bits-1) / (1 - momentum) = deviations std

    Args:
        weight_std: of the weights at the start; of several layers, the mean.
        steps: of the optimizer at this rate and dr; where a schedule lowers them, the steps times its mean factor.
        dr: range of a quantized gradient, in its units.
        momentum: in [0, 1).
        deviations: of the way. Below a few, training is far too slow.
        grad_bits: of a gradient, 15 published.
        lr_bits: of the learning rate, 10 published.
    Returns:
        Within what the rate's format holds: 2^-9 to 1 - 2^-9 = 511/512. At the lower end a longer way than asked.

    >>> round(suggest_lr(0.06, 264, deviations=20), 3), suggest_lr(0.06, 10) == 511 / 512
    (0.436, True)
    """
    if not 0 <= momentum < 1:
        raise ConfigError(f"suggest_lr: got momentum={momentum}, expected a number in [0, 1).")
    if not steps > 0:
        raise ConfigError(f"suggest_lr: got steps={steps}, expected a positive number.")
    return _rate(deviations * weight_std * (1 - momentum) / steps, dr, grad_bits, lr_bits)


def finetune_lr(weight_std: float, dr: int = 128, share: float = 3e-3, grad_bits: int = 15, lr_bits: int = 10) -> float:
    """A learning rate for fine-tuning: lr dr 2^-(grad_bits-1) = share std, whatever the number of steps.

    Args:
        weight_std, dr, grad_bits, lr_bits: as of :func:`suggest_lr`.
        share: of a standard deviation that one gradient moves a weight at most.
    Returns:
        As of :func:`suggest_lr`.

    >>> finetune_lr(0.0625)
    0.024
    """
    return _rate(share * weight_std, dr, grad_bits, lr_bits)


def _rate(largest_move: float, dr: int, grad_bits: int, lr_bits: int) -> float:
    """lr with lr dr 2^-(grad_bits-1) = largest_move, within its format."""
    if not math.isfinite(largest_move) or largest_move < 0:
        raise ConfigError(f"learning rate: got a largest move of {largest_move}, expected finite weights.")
    if dr < 1:
        raise ConfigError(f"learning rate: got dr={dr}, expected at least 1.")
    unit = math.ldexp(1.0, 1 - lr_bits)
    return min(max(math.ldexp(largest_move / dr, grad_bits - 1), unit), 1 - unit)
