"""Calibrate: other batches than the train loader's first ones."""

from __future__ import annotations

from typing import Any

from lightning_lowbit.callbacks.schedule import Setting
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.plugins.lifecycle import Lifecycle

__all__ = ["Calibrate"]


class Calibrate(Setting):
    """Choose what the quantizers are calibrated on.

    Args:
        dataloader: batches to use; None keeps the train loader.
        batches: how many of them; None keeps QuantCallback's number.
    """

    def __init__(self, dataloader: Any = None, batches: int | None = None) -> None:
        if batches is not None and batches < 1:
            raise ConfigError(f"Calibrate(batches={batches}): expected at least 1.")
        self.dataloader, self.batches = dataloader, batches

    def configure(self, lifecycle: Lifecycle) -> None:
        lifecycle.calibration_loader = self.dataloader
        if self.batches is not None:
            lifecycle.calibrate_batches = self.batches
