"""Stochastic gradient descent with momentum in integers: every product closes on the grid of what it is added to.

A number of k bits has k - 1 fractional bits and a sign; its code is its value times 2^(k-1). Fractional bits add up in
a product, so a momentum of 3 bits times an accumulator of 13 is on the 15-bit grid of the gradients, and a learning
rate of 10 bits times that sum is on the 24-bit grid of the stored weights: only the accumulator is ever rounded, when
it is stored (Yang et al., arXiv:1909.02384, momentum optimizer and updates).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.rounding import round_to, shift_right_rounded

__all__ = [
    "UpdateFormat",
    "float_step",
    "integer_step",
    "integer_step_",
    "learning_rate_code",
    "learning_rate_notice",
    "momentum_code",
    "momentum_notice",
    "recover",
    "store",
]

_LARGEST = 2**30  # of a stored code: one step more still fits int32
_SLICE = 1 << 16  # elements: a slice and its scratch share the L2 cache
_BOUNDS = {
    "gradient": (2, 16),
    "momentum": (2, 8),
    "accumulator": (2, 16),
    "learning_rate": (2, 16),
    "weight": (16, 31),
}


@dataclass(frozen=True)
class UpdateFormat:
    """Bits of the five numbers of an update; each has one less of them behind the binary point.

    Args:
        gradient: of a quantized gradient.
        momentum: of the momentum coefficient.
        accumulator: of the momentum accumulator as stored.
        learning_rate: of the learning rate.
        weight: of the stored weight.
        exact: refuse widths that do not close; without, what falls below a grid is rounded half to even.

    Raises:
        ConfigError: a width out of its bounds, or widths that do not close while ``exact``.

    >>> UpdateFormat().closes
    True
    >>> UpdateFormat(accumulator=12, exact=False).closes
    False
    """

    gradient: int = 15
    momentum: int = 3
    accumulator: int = 13
    learning_rate: int = 10
    weight: int = 24
    exact: bool = True

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            bits = getattr(self, name)
            if not (type(bits) is int and low <= bits <= high):
                raise ConfigError(f"UpdateFormat: got {name}={bits!r}, expected an integer from {low} to {high}.")
        if self.closes or not self.exact:
            return
        gradient = self.momentum + self.accumulator - 1
        weight = self.gradient + self.learning_rate - 1
        if self.gradient != gradient:
            raise ConfigError(
                f"UpdateFormat: got gradient={self.gradient} with momentum={self.momentum} and "
                f"accumulator={self.accumulator}, expected gradient = momentum + accumulator - 1 = {gradient}; "
                "change one of the three, or set exact=False to round."
            )
        raise ConfigError(
            f"UpdateFormat: got weight={self.weight} with gradient={self.gradient} and "
            f"learning_rate={self.learning_rate}, expected weight = gradient + learning_rate - 1 = {weight}; "
            "change one of the three, or set exact=False to round."
        )

    @property
    def closes(self) -> bool:
        """Whether kGC = kMom + kAcc - 1 and kWU = kGC + klr - 1: an update then rounds nothing but the accumulator."""
        return (
            self.gradient == self.momentum + self.accumulator - 1
            and self.weight == self.gradient + self.learning_rate - 1
        )

    def stored_limit(self, bits: int | None = 8) -> int:
        """Largest stored code: what a weight of so many bits represents, or (None) the last before int32 overflows.

        >>> UpdateFormat().stored_limit() == 2**23 - 2**16, UpdateFormat().stored_limit(None) == 2**30
        (True, True)
        """
        return _LARGEST if bits is None else (1 << (self.weight - 1)) - (1 << max(self.weight - bits, 0))

    @property
    def sum_fraction(self) -> int:
        """Fractional bits of momentum * accumulator + gradient."""
        return max(self.momentum + self.accumulator - 2, self.gradient - 1)


def learning_rate_code(lr: float, format: UpdateFormat) -> int:
    """Q(lr, klr) as a code: nearest, ties to even, at most 2^(klr-1) - 1, and never 0 while lr > 0.

    Raises:
        ConfigError: lr is negative or not finite.

    >>> [learning_rate_code(lr, UpdateFormat()) for lr in (0.0, 1e-6, 2.0**-10, 0.003, 0.05, 0.5, 0.999, 3.0)]
    [0, 1, 1, 2, 26, 256, 511, 511]
    """
    code = _nearest("learning rate", lr, format.learning_rate)
    return max(code, 1) if lr > 0 else code


def learning_rate_notice(lr: float, format: UpdateFormat) -> str:
    """One sentence where the learning rate had to be raised to a unit or lowered to the largest code, else ''.

    >>> learning_rate_notice(1e-4, UpdateFormat())
    'learning rate 0.0001 rounds to 0 and is raised to 0.001953125, the unit of its 10 bits'
    >>> learning_rate_notice(0.05, UpdateFormat())
    ''
    """
    return _notice("learning rate", lr, learning_rate_code(lr, format), format.learning_rate)


def momentum_code(momentum: float, format: UpdateFormat) -> int:
    """Q(mom, kMom) as a code: nearest, ties to even, at most 2^(kMom-1) - 1; 3 bits know 0, 1/4, 1/2 and 3/4.

    Raises:
        ConfigError: momentum is negative or not finite.

    >>> [momentum_code(momentum, UpdateFormat()) for momentum in (0.0, 0.125, 0.25, 0.4, 0.75, 0.9)]
    [0, 0, 1, 2, 3, 3]
    """
    return _nearest("momentum", momentum, format.momentum)


def momentum_notice(momentum: float, format: UpdateFormat) -> str:
    """One sentence where the momentum is another on its grid, else ''.

    >>> momentum_notice(0.9, UpdateFormat())
    'momentum 0.9 is lowered to 0.75, the largest of its 3 bits'
    >>> momentum_notice(0.3, UpdateFormat())
    'momentum 0.3 is 0.25 in its 3 bits'
    """
    code = momentum_code(momentum, format)
    notice = _notice("momentum", momentum, code, format.momentum)
    value = math.ldexp(code, 1 - format.momentum)
    return notice or ("" if value == momentum else f"momentum {momentum:g} is {value:g} in its {format.momentum} bits")


def _nearest(name: str, value: float, bits: int) -> int:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{name}: got {value!r}, expected a finite number >= 0.")
    return min(round(math.ldexp(min(value, 1.0), bits - 1)), (1 << (bits - 1)) - 1)


def _notice(name: str, value: float, code: int, bits: int) -> str:
    scaled, held = math.ldexp(min(value, 2.0), bits - 1), math.ldexp(code, 1 - bits)
    if code == 1 and scaled <= 0.5:
        return f"{name} {value:g} rounds to 0 and is raised to {held:.10g}, the unit of its {bits} bits"
    if scaled - code > 0.5:
        return f"{name} {value:g} is lowered to {held:.10g}, the largest of its {bits} bits"
    return ""


def integer_step(
    weight: Tensor,
    acc: Tensor,
    grad: Tensor,
    lr: int,
    momentum: int,
    format: UpdateFormat,
    bits: int | None = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    """One update; the tensors given stay as they are. See :func:`integer_step_`.

    Returns:
        weight and acc after the step, and the number of saturated weights.

    >>> weight, acc = torch.tensor([1000, 2**23 - 2**16], dtype=torch.int32), torch.tensor([6, 0], dtype=torch.int16)
    >>> grad = torch.tensor([4, -9], dtype=torch.int16)
    >>> [t.tolist() for t in integer_step(weight, acc, grad, lr=26, momentum=1, format=UpdateFormat())]
    [[740, 8323072], [2, -2], 1]
    """
    weight, acc = weight.clone(), acc.clone()
    return weight, acc, integer_step_(weight, acc, grad, lr, momentum, format, bits)


@torch.no_grad()
def integer_step_(
    weight: Tensor,
    acc: Tensor,
    grad: Tensor,
    lr: int,
    momentum: int,
    format: UpdateFormat,
    bits: int | None = 8,
) -> Tensor:
    """One update in place, in slices: the scratch is some hundred kilobytes whatever the size of the layer.

        full   = mom * acc + g         fraction 14, exact
        weight = weight - lr * full    fraction 23, exact
        acc    = round(full / 4)       fraction 12, ties to even

    The numbers are those of the default format. In one that does not close, full has the finer of its terms'
    fractions, and the new weight is rounded half to even once. |acc| never exceeds the largest |g| so far.

    Args:
        weight: codes of the stored weights, int32, any shape; |code| <= 2^30.
        acc: codes of the accumulator, same shape. int16 where the gradients are at most that, else int32.
        grad: codes of the quantized gradients, integers of the same shape. In a format that does not close |g| < 2^24.
        lr, momentum: codes of the learning rate and the momentum, from :func:`learning_rate_code` and
            :func:`momentum_code`.
        bits: of the weights that layers multiply with; stored ones end at the last value that these tell apart.
            None: at +-2^30.
    Returns:
        number of weights at that end, int64 0-dim, on the weights' device.
    """
    _check(weight, acc, grad)
    narrow = acc.dtype == torch.int16 and grad.dtype != torch.int32 and format.closes
    # full <= (mom + 1) 2^15: the step then stays below 2^30, and full is exact in float32.
    step = _narrow_step if narrow and (momentum + 1) * lr <= 2**15 else _wide_step
    limit = format.stored_limit(bits)
    saturated = torch.zeros((), dtype=torch.int64, device=weight.device)
    for w, a, g in _slices(weight, acc, grad):
        step(w, a, g, lr, momentum, format, limit)
        saturated += (w.abs() >= limit).sum()
    return saturated


def _narrow_step(w: Tensor, acc: Tensor, g: Tensor, lr: int, momentum: int, format: UpdateFormat, limit: int) -> None:
    full = g.to(torch.int32).add_(acc, alpha=momentum)
    w.sub_(full, alpha=lr).clamp_(-limit, limit)
    acc.copy_(round_to(full.to(torch.float32).mul_(2.0 ** (1 - format.momentum))))


def _wide_step(w: Tensor, acc: Tensor, g: Tensor, lr: int, momentum: int, format: UpdateFormat, limit: int) -> None:
    fraction = format.sum_fraction
    full = (acc.to(torch.int64) * momentum) << (fraction - (format.momentum + format.accumulator - 2))
    full += g.to(torch.int64) << (fraction - (format.gradient - 1))
    finer = (format.learning_rate - 1) + fraction - (format.weight - 1)  # the step's fraction beyond the weight's
    exact = (w.to(torch.int64) << max(finer, 0)) - ((full * lr) << max(-finer, 0))
    w.copy_(shift_right_rounded(exact, max(finer, 0)).clamp_(-limit, limit))
    stored = torch.iinfo(acc.dtype)
    acc.copy_(shift_right_rounded(full, fraction - (format.accumulator - 1)).clamp_(stored.min, stored.max))


def float_step(
    weight: Tensor,
    acc: Tensor,
    grad: Tensor,
    lr: int,
    momentum: int,
    format: UpdateFormat,
    bits: int | None = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same update on values instead of codes, as the paper writes it.

        acc    = mom * accQ + g
        weight = Q(weight - lr * acc, kWU)    (Q changes nothing where the format closes)
        accQ   = Q(acc, kAcc)

    Exact in float32 at the default widths while |weight| < 2 and |acc| < 2; float64 leaves room for any.

    Args:
        weight, acc, grad: values on their grids, float32 or float64, one shape.
        lr, momentum: codes, as of :func:`integer_step_`.
    Returns:
        weight and accQ after the step, and the number of weights at or beyond the limit.
    """
    weight_unit, acc_unit = 2.0 ** (1 - format.weight), 2.0 ** (1 - format.accumulator)
    full = acc * (momentum * 2.0 ** (1 - format.momentum)) + grad
    weight = weight - full * (lr * 2.0 ** (1 - format.learning_rate))
    codes = round_to(weight / weight_unit)
    limit = format.stored_limit(bits)
    codes = codes.clamp(-limit, limit)
    saturated = (codes.abs() >= limit).sum()
    return codes * weight_unit, round_to(full / acc_unit) * acc_unit, saturated


def store(codes: Tensor, format: UpdateFormat, out: Tensor | None = None) -> Tensor:
    """Stored codes as the float parameter: code * 2^-(kWU-1), exact in float32 for |code| <= 2^24 (2.0 at 24 bits).

    Args:
        codes: int32, any shape.
        out: parameter to write to, same shape; without, a new float32 tensor.
    """
    out = torch.empty_like(codes, dtype=torch.float32) if out is None else out
    with torch.no_grad():
        return out.copy_(codes).mul_(2.0 ** (1 - format.weight))


def recover(weight: Tensor, format: UpdateFormat, bits: int | None = None) -> Tensor:
    """Codes of a float parameter, int32: nearest, ties to even, within +-``stored_limit(bits)``.

    The inverse of :func:`store` for |code| <= 2^24. Every float32 is scaled without error, so a float checkpoint is
    rounded once; NaN has no code.

    >>> codes = torch.tensor([-(2**24), 2**24 - 1, 1, 0], dtype=torch.int32)
    >>> recover(store(codes, UpdateFormat()), UpdateFormat()).tolist()
    [-16777216, 16777215, 1, 0]
    >>> recover(torch.tensor([1.5 * 2.0**-23, 2.5 * 2.0**-23, 1000.0, 1.0]), UpdateFormat()).tolist()
    [2, 2, 1073741824, 8388608]
    """
    limit = format.stored_limit(bits)
    w = weight.detach() if weight.dtype == torch.float64 else weight.detach().to(torch.float32)
    return round_to(w * 2.0 ** (format.weight - 1)).clamp_(-limit, limit).to(torch.int32)


def _slices(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    if not all(t.is_contiguous() for t in tensors) or tensors[0].device.type != "cpu":
        return [tensors]
    return list(zip(*(torch.split(t.view(-1), _SLICE) for t in tensors), strict=True))


def _check(weight: Tensor, acc: Tensor, grad: Tensor) -> None:
    integers = (torch.int8, torch.int16, torch.int32)
    if weight.dtype != torch.int32 or acc.dtype not in integers[1:] or grad.dtype not in integers:
        raise TypeError(
            f"integer_step: got weight {weight.dtype}, acc {acc.dtype}, grad {grad.dtype}, expected int32, int16 or "
            "int32, and int8 to int32; float values go through float_step."
        )
    if not weight.shape == acc.shape == grad.shape:
        raise ValueError(
            f"integer_step: got weight {tuple(weight.shape)}, acc {tuple(acc.shape)}, grad {tuple(grad.shape)}, "
            "expected one shape."
        )
