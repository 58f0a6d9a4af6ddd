"""Fit without labels: blocks learn from the float network before the first epoch, then the fit ends."""

from __future__ import annotations

import functools
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.reconstruct import reconstruct
from lightning_lowbit.plugins.batches import drive

__all__ = ["reconstruct_within_fit"]


def reconstruct_within_fit(trainer: Any, pl_module: Any, loaders: Any, batches: int, settings: dict[str, Any]) -> None:
    """Reconstruct all blocks on the calibration batches and end the fit: no training_step, no label.

    Raises:
        ConfigError: several processes (each would learn from its own batches).
    """
    if trainer.world_size > 1:
        raise ConfigError(
            f"label_free on {trainer.world_size} processes: expected one device, its batches are few. Use devices=1."
        )
    errors = reconstruct(
        pl_module, functools.partial(drive, trainer, pl_module, loaders, batches, "forward"), **settings
    )
    for path, (before, after) in errors.items():
        rank_zero_info(f"lightning_lowbit: {path}: mean squared error to float {before:.3g} -> {after:.3g}")
    trainer.should_stop = True
