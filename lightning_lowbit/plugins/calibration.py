"""Calibration in a Trainer: which batches, over which processes, and what must hear of the new grids."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.calibrate import calibrate
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.plugins.batches import drive
from lightning_lowbit.plugins.distributed import all_reduce

__all__ = ["calibrate_before_evaluation", "calibrate_on", "share_whole_numbers", "update_averages"]


def calibrate_on(
    trainer: Any,
    module: nn.Module,
    loaders: Any,
    limit: int,
    step: str = "training_step",
) -> None:
    """Set all grids from up to ``limit`` batches.

    Args:
        trainer: the Trainer.
        module: a converted LightningModule.
        loaders: one loader or a collection of them.
        limit: number of batches.
        step: how a batch is fed if the module has no ``calibration_step``.
    """
    still_open = calibrate(module, functools.partial(drive, trainer, module, loaders, limit, step), all_reduce)
    if still_open:
        rank_zero_warn(
            f"zero throughout calibration, so they stay float: {', '.join(still_open[:6])} ({len(still_open)} in all)."
        )


def calibrate_before_evaluation(
    trainer: Any, module: nn.Module, loop: Any, step: str, loaders: Any, limit: int
) -> bool:
    """Give a network that was never calibrated its grids before its first evaluation, and only then.

    Args:
        trainer: the Trainer.
        module: a converted LightningModule.
        loop: the evaluation loop that is about to run.
        step: its step.
        loaders: the user's choice; None takes ``datamodule.calibration_dataloader()``, else the loop's own
            batches.
        limit: number of batches.
    Returns:
        whether it was done.
    """
    if switch_of(module).started:
        return False
    if loaders is None and trainer.datamodule is not None:
        loaders = getattr(trainer.datamodule, "calibration_dataloader", lambda: None)()
    if loaders is not None:
        calibrate_on(trainer, module, loaders, limit)
    else:
        rank_zero_info("lightning_lowbit: not calibrated yet; taking the first evaluation batches.")
        calibrate_on(trainer, module, loop._combined_loader.iterables, limit, step)
    switch_of(module).provisional = True
    return True


def _averages(trainer: Any) -> list[nn.Module]:
    """The averaged copies of the network that callbacks keep, under its own names."""
    copies = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    wrapper = torch.optim.swa_utils.AveragedModel
    return [copy.module if isinstance(copy, wrapper) else copy for copy in copies if copy is not None]


def _twins(trainer: Any, module: nn.Module) -> Iterator[tuple[Quantizer, Any]]:
    """Every quantizer of the network with its twin in each averaged copy."""
    for copy in _averages(trainer):
        twins = dict(copy.named_modules())
        yield from ((quantizer, twins[path]) for path, quantizer in quantizers(module) if path in twins)


def update_averages(trainer: Any, module: nn.Module, weights: bool = False) -> None:
    """Averaged copies were made of the float network; from here on they average grids.

    With ``weights`` they begin anew as a whole, since the network's weights are others.
    """
    if weights:
        for copy in _averages(trainer):
            copy.load_state_dict(module.state_dict())
        return
    for quantizer, twin in _twins(trainer, module):
        twin.load_state_dict(quantizer.state_dict())


def share_whole_numbers(trainer: Any, module: nn.Module) -> None:
    """Averaged copies hold the network's own integer bits and moments, not averages of them.

    Before an evaluation, before a file is written and when an epoch ends: the next thing that reads them follows.
    """
    for quantizer, twin in _twins(trainer, module):
        for name in quantizer.whole:
            getattr(twin, name).copy_(getattr(quantizer, name))
        if quantizer.whole:
            twin.refresh()
