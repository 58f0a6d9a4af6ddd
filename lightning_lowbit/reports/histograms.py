"""Histograms of weights and activations, with the grid that they are rounded to drawn in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.export.record import in_evaluation
from lightning_lowbit.modules.base import low_bit_modules, switch_of
from lightning_lowbit.modules.carrier import plain
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.grid import Grid
from lightning_lowbit.reports.plots import COLORS, literal, new_figure
from lightning_lowbit.reports.sensitivity import split, unchanged

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["activation_histograms", "rounding_activations", "weight_histograms"]

_BINS = 80
_MOST_LINES = 64  # codes that are drawn one by one
_MOST_VALUES = 1 << 16  # of a tensor and a batch
_ACROSS = 3


@dataclass
class _Values:
    """What one tensor held before it was rounded."""

    name: str
    grid: Grid
    parts: list[Tensor] = field(default_factory=list)


def weight_histograms(module: nn.Module, sites: Sequence[str] = ("*",)) -> Figure:
    """Each layer's weight as it is quantized (batch norm merged), before rounding.

    Args:
        module: converted; what is not calibrated has no grid, and is left out.
        sites: globs of module paths.
    Raises:
        ConfigError: no quantized weight among ``sites``.
    """
    switch_of(module)
    with unchanged(module), in_evaluation(module), torch.no_grad():
        found = [
            _Values(path, quantizer.grid(), [_thinned(layer.in_evaluation()[0])])
            for path, layer in low_bit_modules(module)
            if isinstance(layer, LowBitLayer) and _chosen(path, sites)
            if (quantizer := layer.lowbit_weight) is not None and quantizer.ready
        ]
    return _drawn(found, f"no quantized weight in {', '.join(sites)}")


def activation_histograms(module: nn.Module, batches: Iterable[Any], sites: Sequence[str] = ("*",)) -> Figure:
    """Each quantized activation of these batches before it is rounded, behind its rectifier if that is part of it.

    Args:
        module: converted and calibrated; it runs in evaluation and is left as it was.
        batches: as `sensitivity` takes them; of large tensors evenly spaced values are shown.
        sites: globs of module paths.
    Raises:
        ConfigError: no quantized activation among ``sites`` in these batches.
    """
    wanted = {
        quantizer: _Values(f"{quantizer.site.path}.{quantizer.site.slot.removeprefix('lowbit_')}", Grid(8))
        for quantizer in rounding_activations(module)
        if _chosen(quantizer.site.path, sites)
    }

    def watch(quantizer: Quantizer, given: tuple[Any, ...], settings: dict[str, Any]) -> None:
        rectify = settings.get("rectify", len(given) > 1 and given[1])
        if getattr(quantizer, "fused", False) and not settings.get("closes"):
            return  # the layer before it does its work, in another call
        x = settings.get("value")
        x = plain(given[0] if x is None else x).detach()
        wanted[quantizer].grid = quantizer.grid()
        wanted[quantizer].parts.append(_thinned(torch.relu(x) if rectify is True else x))

    hooks = [quantizer.register_forward_pre_hook(watch, with_kwargs=True) for quantizer in wanted]
    try:
        with unchanged(module), in_evaluation(module), torch.no_grad():
            for number, batch in enumerate([batches] if isinstance(batches, Tensor) else batches):
                module(*split(module, batch, number)[0])
    finally:
        for hook in hooks:
            hook.remove()
    return _drawn([v for v in wanted.values() if v.parts], f"no quantized activation in {', '.join(sites)} ran")


def rounding_activations(module: nn.Module) -> list[Quantizer]:
    """The quantizers whose tensors `activation_histograms` can show."""
    return [
        quantizer
        for _, quantizer in quantizers(module)
        if quantizer.has_grid and quantizer.ready
        and quantizer.site.role not in ("weight", "bias", "error", "weight_grad")
    ]  # fmt: skip


def _chosen(path: str, sites: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in sites)


def _thinned(x: Tensor) -> Tensor:
    """Evenly spaced values, finite ones, in float64 on the host."""
    flat = x.detach().reshape(-1)
    flat = flat[:: max(1, math.ceil(flat.numel() / _MOST_VALUES))].double().cpu()
    return flat[torch.isfinite(flat)]


# -- drawing -------------------------------------------------------------------------------------------------
def _drawn(found: Sequence[_Values], missing: str) -> Figure:
    if not found:
        raise ConfigError(f"histograms: {missing}. Calibrate the network, or give other globs of module paths.")
    across = min(_ACROSS, len(found))
    down = math.ceil(len(found) / across)
    figure = new_figure(2.1 * down)
    for number, values in enumerate(found):
        axes = figure.add_subplot(down, across, number + 1)
        axes.spines[["top", "right", "left"]].set_visible(False)
        _draw(axes, torch.cat(values.parts), values.grid)
        axes.set_title(literal(values.name), fontsize="small")
        axes.set_xlabel(literal(str(values.grid)), fontsize="x-small")
        axes.set_yticks([])
        axes.tick_params(labelsize="x-small")
        axes.locator_params(axis="x", nbins=4)
    return figure


def _draw(axes: Axes, values: Tensor, grid: Grid) -> None:
    """Counts on a square-root scale, so that tails are seen; codes as lines, or the range where they are many."""
    low, high = (float(values.min()), float(values.max())) if values.numel() else (0.0, 0.0)
    low, high = min(low, grid.low), max(high, grid.high)
    counts = torch.histc(values, _BINS, low, high).sqrt()
    axes.stairs(counts.numpy(), torch.linspace(low, high, _BINS + 1).numpy(), fill=True, color=COLORS[0])
    codes = _codes(grid)
    if codes:
        axes.vlines(codes, 0.0, float(counts.max()), color=COLORS[1], linewidth=0.5, zorder=3)
    else:
        axes.axvspan(grid.low, grid.high, color=COLORS[1], alpha=0.12, linewidth=0)
        axes.vlines([grid.low, grid.high], 0.0, float(counts.max()), color=COLORS[1], linewidth=0.8, zorder=3)


def _codes(grid: Grid) -> list[float]:
    """What the codes are worth; none where they are many, or differ by channel."""
    if grid.axis is not None or grid.qmax - grid.qmin >= _MOST_LINES:
        return []
    codes = (-1, 1) if grid.binary else range(grid.qmin, grid.qmax + 1)
    return [(code - grid.zero_point) * grid.step for code in codes]
