"""FoldBatchNorm: when folded batch norms go over from batch statistics to frozen ones."""

from __future__ import annotations

from lightning_lowbit.callbacks.schedule import Setting
from lightning_lowbit.modules.base import Milestone
from lightning_lowbit.modules.moments import check_moment
from lightning_lowbit.plugins.lifecycle import Lifecycle

__all__ = ["FoldBatchNorm"]


class FoldBatchNorm(Setting):
    """Choose when the statistics of folded batch norms freeze, in place of the scheme's own moment.

    Args:
        freeze: fraction of the run, epoch, "N steps", 0 for from the start; None keeps them live.
    """

    def __init__(self, freeze: float | int | str | None) -> None:
        check_moment("FoldBatchNorm(freeze)", freeze)
        self.freeze = freeze

    def configure(self, lifecycle: Lifecycle) -> None:
        lifecycle.replace(Milestone(self.freeze, "freeze_batch_norm"))
