"""A point of a run, as users and schemes write it."""

from __future__ import annotations

import re

from lightning_lowbit.errors import ConfigError

__all__ = ["HALF", "STEPS", "Moment", "check_moment"]

Moment = int | float | str
"""float in (0, 1) = fraction, int = epoch, "500 steps" = step, "half-1" = an epoch before half of them, 0 = at once."""

STEPS = re.compile(r"\s*(\d+)\s*steps?\s*")
"""So many steps; a number without the word is refused, for it might have been meant as epochs."""

HALF = re.compile(r"half([+-]\d+)?")
"""So many epochs before or behind half of a run's, rounded down: at once or never where the run is too short for it."""


def check_moment(name: str, moment: Moment | None) -> None:
    """Refuse what is no moment: a float in (0, 1), an int >= 0, or "N steps"."""
    if moment is None or (isinstance(moment, int) and not isinstance(moment, bool) and moment >= 0):
        return
    if isinstance(moment, float) and (0 <= moment < 1):
        return
    if isinstance(moment, str) and (STEPS.fullmatch(moment) or HALF.fullmatch(moment)):
        return
    raise ConfigError(
        f"{name}={moment!r}: expected a fraction of the run in (0, 1), an epoch as int, steps as '500 steps', "
        "'half+1' for an epoch behind half of them, or 0 for at once."
    )
