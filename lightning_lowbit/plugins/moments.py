"""Moments of a run as steps: fractions, epochs and "N steps", resolved once, then compared with a counter."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.moments import HALF, STEPS, Moment, check_moment

__all__ = ["ENDLESS", "RunLength", "resolve"]

ENDLESS = 10_000
"""Steps that fractions refer to where the run has no known length (max_epochs=-1, iterable data)."""


@dataclass(frozen=True)
class RunLength:
    """Optimizer steps of a run: in all (None if endless) and per epoch (None if unknown)."""

    total: int | None
    per_epoch: int | None

    @property
    def reference(self) -> int:
        return ENDLESS if self.total is None else self.total


def resolve(moment: Moment, run: RunLength, begin: int = 0) -> int:
    """Step at which ``moment`` is reached.

    Args:
        moment: fraction, epoch, "N steps", "half" and so many epochs.
        run: its length.
        begin: fractions count from this step to the end of the run.

    >>> run = RunLength(total=400, per_epoch=100)
    >>> [resolve(m, run) for m in (0, 0.5, 2, "30 steps")], resolve(0.5, run, begin=200)
    ([0, 200, 200, 30], 300)
    >>> [resolve(m, run) for m in ("half-1", "half", "half+1", "half-9")]
    [100, 200, 300, 0]
    """
    check_moment("moment", moment)
    if isinstance(moment, str):
        return _named(moment, run)
    if isinstance(moment, float):
        return begin + math.floor(moment * (run.reference - begin))
    if moment and run.per_epoch is None:
        raise ConfigError(
            f"epoch {moment}: the loader has no length, so epochs have no steps. Give '500 steps' instead."
        )
    return moment * (run.per_epoch or 0)


def _named(moment: str, run: RunLength) -> int:
    steps, half = STEPS.fullmatch(moment), HALF.fullmatch(moment)
    if steps is not None:
        return int(steps[1])
    assert half is not None  # by check_moment
    per_epoch = run.per_epoch or run.reference
    return max(0, (run.reference // per_epoch // 2 + int(half[1] or 0)) * per_epoch)
