"""What a batch norm on grids computes with: its widths, and the numbers that a channel is normalized with."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.rounding import round_to

__all__ = ["OFF", "NormFormat", "Statistics", "on_grid", "statistics_of"]

OFF = 32  # bits: from here on a value is left alone


@dataclass(frozen=True)
class NormFormat:
    """Bits of what a batch norm computes with; k bits are k - 1 behind the binary point, 32 or more are no grid.

    Args:
        mean, deviation, xhat, gamma, beta: widths.
        eps_exponent: log2 of what is added to the deviation.
        integer_bits: of the normalized value, which is clipped below 2^integer_bits; None does not clip. A channel
            that was constant in training is divided by 2^-15, so that one odd value in evaluation is 2^15 times
            too large.

    Raises:
        ConfigError: a field out of range.
    """

    mean: int = 16
    deviation: int = 16
    xhat: int = 16
    gamma: int = 8
    beta: int = 8
    eps_exponent: int = -15
    integer_bits: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self)[:5]:
            bits = getattr(self, field.name)
            if not (type(bits) is int and (2 <= bits <= 24 or bits >= OFF)):
                raise ConfigError(
                    f"NormFormat: got {field.name}={bits!r}, expected an integer from 2 to 24, or {OFF} for no grid."
                )
        if not -24 <= self.eps_exponent <= -1:
            raise ConfigError(f"NormFormat: got eps_exponent={self.eps_exponent!r}, expected -24 to -1.")
        if self.integer_bits is not None and not 0 <= self.integer_bits <= 16:
            raise ConfigError(f"NormFormat: got integer_bits={self.integer_bits!r}, expected 0 to 16, or None.")

    @property
    def fraction(self) -> int:
        """Fractional bits of y."""
        return max(self.gamma + self.xhat - 2, self.beta - 1)

    @property
    def xhat_unit(self) -> float:
        """What a code of xhat is worth; 1 without a grid."""
        return 1.0 if self.xhat >= OFF else 2.0 ** (1 - self.xhat)

    @property
    def xhat_limit(self) -> float | None:
        """Largest |xhat|: one unit below 2^integer_bits."""
        return None if self.integer_bits is None else 2.0**self.integer_bits - 2.0 ** (1 - self.xhat)


class Statistics(NamedTuple):
    """What a channel is normalized with, float64 [C]; ``mean`` and ``deviation`` are those before their grids."""

    mean_q: Tensor
    s: Tensor
    mean: Tensor
    deviation: Tensor
    values: Tensor | None  # how many per channel; None: of no batch, so no gradient flows through the statistics


def on_grid(v: Tensor, bits: int, exponent: int = 0) -> Tensor:
    return v if bits >= OFF else round_to(v * 2.0 ** (bits - 1 - exponent)) * 2.0 ** (exponent - bits + 1)


def statistics_of(
    mean: Tensor, var: Tensor, format: NormFormat, exponent: int, values: Tensor | None = None
) -> Statistics:
    """In x's own units: a power of two moves the grids, and nothing else."""
    mean_q, deviation = on_grid(mean, format.mean, exponent), var.clamp(min=0.0).sqrt()
    s = on_grid(deviation, format.deviation, exponent) + 2.0 ** (format.eps_exponent + exponent)
    return Statistics(mean_q, s, mean, deviation, values)
