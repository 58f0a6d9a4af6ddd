"""When the width of a tensor changes while a network trains: grow at once, shrink after long idleness (WAGEUBN)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.exponent import EXPONENT_MAX, EXPONENT_MIN, pow2
from lightning_lowbit.numerics.fraclen import largest_fraclen
from lightning_lowbit.numerics.observers import AllReduce
from lightning_lowbit.numerics.ste import eager_cpu
from lightning_lowbit.numerics.widths import Format, check_bits, fixed_unit, fixed_width

__all__ = ["Hysteresis", "WidthState"]

_MOST_BITS = 53  # of a Grid: float64 counts no further


class WidthState(NamedTuple):
    """What :class:`Hysteresis` remembers of a tensor; 0-dim views into its state, whole numbers but ``share``.

    Args:
        integer: integer bits now.
        idle: steps in a row that left the top bit unused.
        grown, shrunk: decisions so far.
        share: of the entries that saturated in the last step with any, for reports.
        frozen: 1 where ``integer`` no longer moves.
        saturated, entries, reach: how many saturated and were seen, and the largest magnitude, since the last commit.
    """

    integer: Tensor
    idle: Tensor
    grown: Tensor
    shrunk: Tensor
    share: Tensor
    frozen: Tensor
    saturated: Tensor
    entries: Tensor
    reach: Tensor


@dataclass(frozen=True)
class Hysteresis:
    """When the integer bits of a tensor change during training. The rule; its state is one tensor, for a buffer.

        more than ``share`` of a step's entries saturate      one bit more, at once
        the top bit was idle for ``patience`` steps in a row  one bit less
        frozen, nothing but zeros, or a NaN or inf            no change, and the step does not count

    The state is float32, which weight averaging may touch and holds whole numbers exactly below 2^24. Every call but
    :meth:`format` waits for no device. A step is any number of ``observe``, one ``reduce`` where there are ranks,
    one ``commit``; then all ranks decide alike.

    Args:
        bits: of a code (policy fixed_width); not used with ``fraction``.
        signed: whether one bit is the sign; of unsigned tensors only x >= 0 counts.
        fraction: the fixed unit 2^-fraction (policy fixed_unit): the width moves instead.
        share: of the entries, 0 to 1.
        patience: in steps.

    >>> rule = Hysteresis(bits=8, patience=2); state = rule.start(0)
    >>> def step(x):
    ...     rule.observe(state, torch.tensor([x]))
    ...     rule.commit(state)
    ...     return rule.format(state).integer
    >>> [step(x) for x in (0.6, 1.1, 1.1, 0.7, 0.7)]
    [0, 1, 1, 1, 0]
    """

    bits: int = 8
    signed: bool = True
    fraction: int | None = None
    share: float = 1e-4
    patience: int = 1000

    def __post_init__(self) -> None:
        check_bits(self.bits, self.signed)
        if not 0 <= self.share < 1:
            raise ConfigError(f"Hysteresis: got share={self.share!r}, expected a share of the entries in [0, 1).")
        if self.patience < 1:
            raise ConfigError(f"Hysteresis: got patience={self.patience!r}, expected at least 1 step.")

    def start(self, integer: Tensor | int = 0, device: torch.device | str | None = None) -> Tensor:
        """A state that begins with ``integer`` bits; float32 [9]."""
        state = torch.zeros(len(WidthState._fields), dtype=torch.float32, device=device)
        state[0] = integer
        return state

    @staticmethod
    def view(state: Tensor) -> WidthState:
        """The parts of a state by name; writing to one writes to the state."""
        return WidthState(*state.detach().unbind(-1))

    @torch.no_grad()
    def observe(self, state: Tensor, x: Tensor) -> None:
        """Take in a tensor before it is quantized: any shape and float dtype; NaN and inf make the step void."""
        if x.numel() == 0:
            return
        now = self.view(state)
        f, magnitude = self._point(now.integer)
        x = x.detach()
        x = x if x.dtype == torch.float64 else x.to(torch.float32)
        # round_half_even(v) > 2^m - 1 exactly where v >= 2^m - 1/2: nothing has to be rounded.
        full = ((pow2(magnitude, torch.float64) - 0.5) * pow2(-f, torch.float64)).to(x.dtype)
        # Two reductions, or one: the joint one is not vectorized.
        reach = torch.maximum(-x.amin(), x.amax()) if self.signed else x.amax().clamp(min=0)
        now.entries.add_(x.numel())
        # inf, not NaN: ranks agree on the maximum of numbers only.
        now.reach.copy_(torch.maximum(now.reach, reach.to(torch.float32).nan_to_num(nan=math.inf, posinf=math.inf)))
        if eager_cpu(x) and not bool(reach >= full):
            return  # the host has the value at no cost
        beyond = x.abs() if self.signed else x.clamp(min=0)
        # A float sum of zeros and ones: faster than counting booleans, and exact below 2^24.
        beyond.sub_(torch.nextafter(full, torch.zeros_like(full))).clamp_(min=0).sign_()
        now.saturated.add_(beyond.sum())

    def reduce(self, state: Tensor, all_reduce: AllReduce) -> None:
        """Combine a step over ranks: two small collectives, on every rank whatever it has seen."""
        now = self.view(state)
        saturated, entries = all_reduce(torch.stack([now.saturated, now.entries]), "sum").unbind()
        now.saturated.copy_(saturated)
        now.entries.copy_(entries)
        now.reach.copy_(all_reduce(now.reach, "max"))

    @torch.no_grad()
    def commit(self, state: Tensor) -> None:
        """Decide by what was observed since the last commit, and forget it.

        Args:
            state: [9], or [..., 9] of several tensors under one rule, decided each for itself in one go.
        """
        now = self.view(state)
        f, magnitude = self._point(now.integer)
        seen = (now.reach > 0) & now.reach.isfinite()
        moves = seen & (now.frozen == 0)
        share = now.saturated / now.entries.clamp(min=1)
        grow = moves & (share > self.share)
        top = torch.round(now.reach.to(torch.float64) * pow2(f, torch.float64)) >= pow2(magnitude - 1, torch.float64)
        idle = torch.where(top | grow, 0.0, now.idle + 1)
        shrink = moves & (idle >= self.patience)
        integer = self._bounded(now.integer.round() + grow.to(torch.float32) - shrink.to(torch.float32))
        change = integer - now.integer.round()
        now.idle.copy_(torch.where(moves, torch.where(shrink, 0.0, idle), now.idle))
        now.grown.add_(change.clamp(min=0))
        now.shrunk.sub_(change.clamp(max=0))
        now.share.copy_(torch.where((now.entries > 0) & now.reach.isfinite(), share, now.share))
        now.integer.copy_(integer)
        for spent in (now.saturated, now.entries, now.reach):
            spent.zero_()

    def freeze(self, state: Tensor, frozen: bool = True) -> None:
        """Let the integer bits stay as they are; ``share`` is kept up to date for reports."""
        self.view(state).frozen.fill_(float(frozen))

    def format(self, state: Tensor) -> Format:
        """The format now; reads the device."""
        integer = round(float(state[0]))
        if self.fraction is None:
            return fixed_width(self.bits, integer, self.signed)
        return fixed_unit(self.fraction + 1, integer, self.signed)

    def _point(self, integer: Tensor) -> tuple[Tensor, Tensor]:
        """Fraction bits and magnitude bits, 0-dim int32."""
        i = integer.round().to(torch.int32)
        if self.fraction is None:
            magnitude = torch.full_like(i, largest_fraclen(self.bits, self.signed))
            return magnitude - i, magnitude
        f = torch.full_like(i, self.fraction)
        return f, f + i

    def _bounded(self, integer: Tensor) -> Tensor:
        """Formats that a Grid can say."""
        if self.fraction is None:
            magnitude = largest_fraclen(self.bits, self.signed)
            return integer.clamp(magnitude + EXPONENT_MIN, magnitude + EXPONENT_MAX)
        return integer.clamp(1 - self.fraction, largest_fraclen(_MOST_BITS, self.signed) - self.fraction)
