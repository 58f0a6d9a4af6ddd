"""BinaryMonitor: how many signs flip in a step, layer by layer, and what the signs see."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.base import low_bit_modules, switch_of
from lightning_lowbit.modules.binary import LatentSign, SignInput
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.plugins.distributed import reduce_sum_flat
from lightning_lowbit.reports.metrics import ClippedShare, FlipRatio, NanCount, OutsideShare, ZeroShare

__all__ = ["BinaryMonitor"]

_COLUMNS = {"flips": "flips per step", "clipped": "clipped", "zeros": "zeros", "outside": "outside", "nan": "NaN"}
_LEGEND = (
    "flips: share of the weights' signs, healthy from 1e-4 to 1e-2. clipped: latents with |w| = 1. zeros, outside "
    "[-1, 1]: of what the layer takes signs of, on one batch"
)


class BinaryMonitor(Callback):
    """Watch the binary layers of a network while it trains, wherever this stands in the list.

    Behind every n-th optimizer step each layer's values go to the Trainer's loggers and to its callback metrics:

        flips/PATH     share of the weights' signs that changed, per step, since the last time
        clipped/PATH   share of latent weights at the clip, |w| >= 1 (none under Bop, whose weights are signs)
        zeros/PATH     share of exact zeros among what the layer takes signs of
        outside/PATH   share of them outside [-1, 1]
        nan/PATH       how many of them are NaN, which passes as +1

    The last three are counted on one batch, over all processes. While weights (or inputs) are float, what concerns
    them is missing. Training computes the same bits with and without this callback.

    Args:
        every_n_steps: optimizer steps, as ``trainer.global_step`` counts them, from one time to the next.

    Attributes:
        values: of the last time, by path and name: ``values["layer1.0.conv1"]["flips"]``.
        step: when that was; None before the first time.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"BinaryMonitor(every_n_steps={every_n_steps}): expected at least 1.")
        self.every_n_steps = every_n_steps
        self.values: dict[str, dict[str, float]] = {}
        self.step: int | None = None
        self._layers: dict[str, LowBitLayer] = {}
        self._metrics: dict[str, dict[str, Metric]] = {}
        self._before: dict[str, tuple[Tensor, int]] = {}  # which weights were negative, behind which step
        self._hooks: list[RemovableHandle] = []
        self._inputs_seen = False  # since the last time
        self._last = 0  # the last step that was looked at
        self._stride = 1  # steps in a batch: several optimizers make several

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._leave()
        self._layers = _binary_layers(pl_module)
        if not self._layers:
            raise ConfigError(_nothing_binary(pl_module))
        # Ours to sum: processes exchange all counts at once.
        self._metrics = {
            path: {
                name: metric(sync_on_compute=False).to(pl_module.device)
                for names, metrics in _watched(layer)
                for name, metric in zip(names, metrics, strict=True)
            }
            for path, layer in self._layers.items()
        }
        self.values, self.step = {}, None
        self._before, self._inputs_seen, self._last = {}, False, trainer.global_step
        if not trainer.loggers:
            rank_zero_info(
                "BinaryMonitor: the Trainer has no logger; the last values stand in BinaryMonitor.values and in a "
                "table at the end."
            )
