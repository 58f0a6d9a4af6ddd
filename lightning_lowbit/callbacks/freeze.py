"""Freeze: when trained ranges stop moving."""

from __future__ import annotations

from lightning_lowbit.callbacks.schedule import Setting
from lightning_lowbit.modules.base import Milestone
from lightning_lowbit.modules.moments import check_moment
from lightning_lowbit.plugins.lifecycle import Lifecycle

__all__ = ["Freeze"]


class Freeze(Setting):
    """Freeze the ranges of all quantizers, in place of the scheme's own moment.

    Args:
        at: when freezing begins: fraction of the run, epoch, "N steps"; None never freezes.
        until: when the last one is frozen, for schemes that freeze one after the other; None freezes all at once.
    """

    def __init__(self, at: float | int | str | None, until: float | int | str | None = None) -> None:
        check_moment("Freeze(at)", at)
        check_moment("Freeze(until)", until)
        self.at, self.until = at, until

    def configure(self, lifecycle: Lifecycle) -> None:
        lifecycle.replace(Milestone(self.at, "freeze_ranges"))
        if self.until is not None or any(m.what == "ranges_frozen" for m in lifecycle.scheme.milestones()):
            lifecycle.replace(Milestone(self.at if self.until is None else self.until, "ranges_frozen"))
