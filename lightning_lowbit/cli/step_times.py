"""Training steps of several networks, timed side by side: what a step costs beside that of the float network."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor

from lightning_lowbit.cli.network import transferred
from lightning_lowbit.modules.convert import is_converted
from lightning_lowbit.plugins.batches import undisturbed
from lightning_lowbit.plugins.precision import lowbit_step

__all__ = ["Fitted", "ratios", "step_of"]

WARMUP = 3
Fitted = tuple[Any, Any]
"""A Trainer behind its fit, and its module."""


def ratios(fitted: Mapping[str, Fitted], base: str, rounds: int) -> tuple[dict[str, float], dict[str, str]]:
    """Time of a training step over that of ``base``, by name; the networks go on training by these steps.

    A shared machine drifts, and all steps of a round alike: so they run in turn, one thread's CPU time counts, and
    the ratio is the median of those within each round.

    Args:
        fitted: by name; each steps on its first training batch.
        base: the name that others are compared with.
        rounds: how often all of them step.
    Returns:
        ratios, and why others have none.
    """
    threads = torch.get_num_threads()
    times: dict[str, list[float]] = {}
    why: dict[str, str] = {}
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what there is to say of these networks was said in their fits
        torch.set_num_threads(1)
        steps = {}
        for name, (trainer, module) in fitted.items():
            stack.enter_context(undisturbed(trainer, module))
            try:
                steps[name] = step_of(trainer, module)
                for _ in range(WARMUP):
                    steps[name]()
            except Exception as error:  # of a training step that needs more of its Trainer than it has behind a fit
                steps.pop(name, None)
                why[name] = f"not measured: {error}"
        for _ in range(rounds):
            for name, step in steps.items():
                start = time.process_time()
                step()
                times.setdefault(name, []).append(time.process_time() - start)
    if base not in times:
        return {}, why
    return {
        name: statistics.median(own / of for own, of in zip(found, times[base], strict=True))
        for name, found in times.items()
    }, why


def step_of(trainer: Any, module: Any) -> Callable[[], object]:
    """One step of a fit that has ended: forward, backward, the user's optimizer, the scheme's update rule.

    Raises:
        ValueError: the fit was not on the CPU, or its optimizers are not one that Lightning steps.
    """
    if trainer.strategy.root_device.type != "cpu":
        raise ValueError(f"the fit was on {trainer.strategy.root_device}, steps are timed on the CPU")
    if not module.automatic_optimization or len(trainer.optimizers) != 1:
        raise ValueError("steps are timed with one optimizer and automatic optimization")
    (optimizer,) = trainer.optimizers
    batch, index, _ = next(iter(CombinedLoader(trainer.train_dataloader, "max_size_cycle")))
    batch = transferred(batch, 0, module, trainer.datamodule)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module.training_step(batch, index)
        loss = loss["loss"] if isinstance(loss, Mapping) else loss
        loss.backward()
        return loss  # type: ignore[no-any-return]  # what training_step gives

    if is_converted(module):
        return lambda: lowbit_step(module, optimizer, closure)
    return lambda: optimizer.step(closure)
