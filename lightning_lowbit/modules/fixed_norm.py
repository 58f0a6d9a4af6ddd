"""Batch norm with its mean, deviation, normalized value, parameters and statistics on grids of their own (WAGEUBN)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lowbit.modules.base import Mode, Site
from lightning_lowbit.modules.norm import has_seen_data
from lightning_lowbit.modules.quantizer import Quantizer, in_backward
from lightning_lowbit.modules.stored import StoredWeight
from lightning_lowbit.modules.widths import require_grid
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.numerics.normalize import NormFormat, batch_norm, odd_float32, running_update
from lightning_lowbit.numerics.normalize_format import OFF
from lightning_lowbit.numerics.widths import Format, choose_format

__all__ = ["NormGrids", "fixed_norm"]

_WIDEST = 16  # integer bits that a normalized value may have
_LEAST_GUARD = 4  # sixteen deviations are no explosion yet, whatever the batch


class NormGrids(Quantizer):
    """What a batch norm computes with, in the slot for its sums: its grids, and whether they are in force yet.

    Args:
        site: where it stands.
        format: of mean, deviation, normalized value, gamma and beta.
        running_bits: of the running statistics; 32 leaves them.
        momentum: share of a batch in them; None takes the norm's own.
        check: whether results are looked at.

    Attributes:
        guard: integer bits of |xhat| in evaluation: half of the bits of the most values that a channel had in a batch,
            since |xhat| of n values stays below their root; at least 4.
        reach: largest |xhat| of a batch that was looked at for the report; None before.
        behind: the layer whose result is normalized, in whose units statistics are counted; None without one.
    """

    has_grid = False
    whole = ("guard", "begun")
    guard: Tensor
    begun: Tensor

    def __init__(
        self, site: Site, format: NormFormat, running_bits: int, momentum: float | None, check: bool = False
    ) -> None:
        super().__init__(site)
        self.format, self.running_bits, self.momentum, self.check = format, running_bits, momentum, check
        self.register_buffer("guard", torch.zeros(()))
        self.register_buffer("begun", torch.ones(()))
        self.on = True
        self.reach: float | None = None

    def switch_on(self, on: bool) -> None:
        self.on = on
        self.begun.fill_(float(on))

    def refresh(self) -> None:
        super().refresh()
        self.on = bool(self.begun.round().item())

    @property
    def power(self) -> int:
        """log2 of the unit that statistics are counted in."""
        behind: Any = self.__dict__.get("behind")
        weight = None if behind is None else behind.lowbit_weight
        return weight.power if isinstance(weight, StoredWeight) and weight.ready else 0

    @property
    def present(self) -> NormFormat:
        """The format in evaluation: a channel that was constant in training must not explode at one odd value."""
        bits = round(float(self.guard))
        return dataclasses.replace(self.format, integer_bits=bits) if bits else self.format

    def quantize(self, x: Tensor, rectify: bool = False) -> Tensor:
        return x

    def exponent(self) -> Tensor:
        return torch.zeros((), dtype=torch.int32)

    def grid(self) -> Grid:
        return Grid(bits=OFF, exponent=-self.format.fraction)

    def formats(self) -> dict[str, Format | None]:
        """Data widths by symbol, from the statistics and parameters as they are; None where there is none."""
        norm: Any = self.__dict__["norm"]
        scale = 2.0**-self.power
        deviation = None if norm.running_var is None else norm.running_var.clamp(min=0).sqrt() * scale
        mean = None if norm.running_mean is None else norm.running_mean * scale
        xhat = None if self.reach is None else torch.tensor(self.reach)
        tensors = {"mean": mean, "deviation": deviation, "xhat": xhat, "gamma": norm.weight, "beta": norm.bias}
        return {name: _format(getattr(self.format, name), value) for name, value in tensors.items()}


def _format(bits: int, value: Tensor | None) -> Format | None:
    return None if value is None or bits >= OFF else choose_format(value, "fixed_unit", bits)


def fixed_norm(norm: Any, x: Tensor) -> Tensor:
    """y = Q(gamma) Q((x - Q(mean)) / (Q(deviation) + 2^-15)) + Q(beta) of [N, C, ...].

    In training by the statistics of the batch (of all processes' batches where the norm is a SyncBatchNorm), which
    move the running ones; in evaluation, and where the norm was put into eval mode, by the running ones. They hold the
    biased variance. A batch with NaN or infinite values does not move them.
    """
    grids = norm.lowbit_accumulator
    if not isinstance(grids, NormGrids) or not (grids.on and norm.switch.quantizing):
        fresh = norm.running_mean is not None and not has_seen_data(norm)
        if norm.switch.mode is Mode.OBSERVE and fresh:  # evaluation would show tensors as they never are in training
            return F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
        return norm.op(x)  # type: ignore[no-any-return]
    norm._check_input_dim(x)
    by_batch = norm.training or norm.running_mean is None
    run, power = norm.switch.run, grids.power
    values = x.numel() // x.shape[1] * (run.world if isinstance(norm, nn.SyncBatchNorm) else 1)  # of a channel
    if by_batch and values == 1:
        raise ValueError(f"{norm.path}: expected more than one value per channel in training, got {tuple(x.shape)}")
    reduce = run.reduce_sum if isinstance(norm, nn.SyncBatchNorm) and run.world > 1 else None
    format = grids.format if by_batch else grids.present
    running = None if by_batch else (norm.running_mean, norm.running_var)
    y, mean, var = batch_norm(x, norm.weight, norm.bias, format, running, reduce, exponent=power)
    if norm.training and not in_backward() and norm.running_mean is not None and x.numel():
        _track(norm, grids, mean, var, power, values)
    if norm.switch.tally is not None:
        deviation = var.clamp(min=0).sqrt()
        shape = (1, -1, *[1] * (x.dim() - 2))
        xhat = (x.detach().to(torch.float64) - mean.reshape(shape)) / (deviation + 2.0**-15).reshape(shape)
        grids.reach = max(grids.reach or 0.0, float(xhat.abs().amax()))
    widths = (format.mean, format.deviation, format.xhat, format.gamma, format.beta)
    if grids.check and y.dtype is torch.float32 and max(widths) < OFF:
        require_grid(norm.path, y, format.fraction)
    wide = y.dtype is torch.float64 and grids.like is not None and grids.like.weight.dtype is not torch.float64
    return odd_float32(y) if wide else y


@torch.no_grad()
def _track(norm: Any, grids: NormGrids, mean: Tensor, var: Tensor, power: int, values: int) -> None:
    """Running statistics move towards those of the batch, and lie on their grid."""
    grids.guard.clamp_(min=min(_WIDEST, max(_LEAST_GUARD, math.ceil(math.log2(values) / 2))))
    norm.num_batches_tracked.add_(1)
    share = grids.momentum
    if share is None:
        share = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    finite = torch.isfinite(mean).all() & torch.isfinite(var).all()
    for running, value, unit in ((norm.running_mean, mean, power), (norm.running_var, var, 2 * power)):
        value = torch.where(finite, value, running.to(value.dtype))
        running_update(running, value, 1.0 - share, grids.running_bits, unit)
