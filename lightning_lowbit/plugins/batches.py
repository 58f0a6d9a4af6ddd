"""Batches for calibration: how a step is driven with them, and how that leaves no trace."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torchmetrics
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn
from torch.utils.data import DataLoader

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.plugins.order import RecordedOrder, generators_of
from lightning_lowbit.plugins.patching import Patches

__all__ = ["drive", "undisturbed"]

_SILENT = (
    "log",
    "log_dict",
    "manual_backward",
    "toggle_optimizer",
    "untoggle_optimizer",
    "clip_gradients",
    "backward",
    "print",
)


def drive(trainer: Any, module: Any, loaders: Any, limit: int, step: str) -> int:
    """Feed up to ``limit`` batches to the module's ``calibration_step`` or to the named Lightning step.

    Args:
        trainer: its strategy moves the batches, as in a run.
        module: the LightningModule.
        loaders: one loader or a collection of them, as the trainer got it.
        step: training_step, validation_step, test_step or predict_step, used if there is no calibration_step;
            "forward" calls the module on the batch's first item.
    Returns:
        number of batches fed.
    """
    evaluation = step in ("validation_step", "test_step", "predict_step")
    combined = CombinedLoader(
        apply_to_collection(loaders, DataLoader, _apart), "sequential" if evaluation else "max_size_cycle"
    )
    own = getattr(module, "calibration_step", None)
    count = 0
    with undisturbed(trainer, module, combined):
        for batch, index, loader_index in islice(iter(combined), limit):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=loader_index)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=loader_index)
            try:
                if own is not None:
                    own(batch)
                elif step == "forward":
                    module(batch[0] if isinstance(batch, (list, tuple)) else batch)
                else:
                    arguments = (batch, index) if step == "training_step" else (batch, index, loader_index)
                    function = getattr(module, step)
                    function(*arguments[: _arity(function)])
            except ConfigError:
                raise
            except Exception as error:
                error.add_note(
                    f"This happened in {type(module).__name__}.{'calibration_step' if own else step} during "
                    "calibration, which runs it without "
                    "gradients and with logging and optimizers silenced. Give the module a "
                    "calibration_step(batch) that only "
                    "calls the network."
                )
                raise
            count += 1
    return count


def _apart(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same loader without its running iteration and without whoever records its order.

    Calibration in mid-epoch must not take the workers of the training loop, nor be taken for its pass.
    """
    twin = copy.copy(loader)
    for name, value in {
        "_iterator": None,
        "batch_sampler": loader.batch_sampler,
        "sampler": loader.sampler,
    }.items():
        value = value.inner if isinstance(value, RecordedOrder) else value
        # Lightning's sampler of predictions keeps its running iteration: two loaders must not draw from one.
        object.__setattr__(twin, name, copy.copy(value) if name == "batch_sampler" else value)
    return twin


def _arity(function: Any) -> int:
    """How many of (batch, batch_idx, dataloader_idx) a step takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 3
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


@contextmanager
def undisturbed(trainer: Any, module: Any, loaders: CombinedLoader | None = None) -> Iterator[None]:
    """Leave random state, buffers and metrics as they were, and silence the step's side effects."""
    patches = Patches()
    silent = _Silent()
    for name in _SILENT:
        patches.set(module, name, silent)
    count = len(getattr(trainer, "optimizers", []) or [])
    patches.set(module, "optimizers", lambda *a, **k: silent if count < 2 else [_Silent() for _ in range(count)])
    patches.set(module, "lr_schedulers", lambda *a, **k: silent)
    generators = [g for loader in (loaders.flattened if loaders is not None else []) for g in _generators(loader)]
    states = [generator.get_state() for generator in generators]
    buffers = _buffers(module)
    metrics = [
        (m, {k: copy.deepcopy(v) for k, v in m.__dict__.items() if k in m._defaults or k in _METRIC_STATE})
        for m in _metrics(module)
    ]
    try:
        with isolate_rng(include_cuda=torch.cuda.is_available()):
            yield
    finally:
        patches.undo()
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for metric, metric_state in metrics:
            metric.__dict__.update(metric_state)


_METRIC_STATE = ("_update_count", "_computed", "_update_called", "_forward_cache")


def _generators(loader: Any) -> list[torch.Generator]:
    return generators_of(loader) if isinstance(loader, torch.utils.data.DataLoader) else []


def _metrics(module: nn.Module) -> list[torchmetrics.Metric]:
    return [m for m in module.modules() if isinstance(m, torchmetrics.Metric)]


def _buffers(module: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The user's buffers with copies of their values; the quantizers' are for calibration to set."""
    ours = {id(b) for m in module.modules() if isinstance(m, Quantizer) for b in m.buffers()}
    metric = {id(b) for m in _metrics(module) for b in m.buffers()}
    return [(b, b.detach().clone()) for b in module.buffers() if id(b) not in ours | metric]


class _Silent:
    """Takes any call and any attribute, does nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter((self, self))

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *args: object) -> None:
        return None
