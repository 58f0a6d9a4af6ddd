"""Biases take up what quantization shifts the means of their channels by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowbit.modules.base import Mode, mode, switch_of
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.numerics.observers import AllReduce

__all__ = ["calibrate_biases"]


def calibrate_biases(root: nn.Module, run: Callable[[], int], rate: float, all_reduce: AllReduce) -> None:
    """bias += rate * (mean_float - mean_quantized), batch by batch, each channel for itself.

    Two passes over the same batches. What is compared are sums before rectifier and quantizer, batch norm merged; the
    weights of the second pass are the quantized ones, and a correction acts from the next batch on. It goes to the
    batch norm's bias where there is one.

    Args:
        root: a converted, calibrated network in evaluation mode whose layers have a ``group``.
        run: feeds the batches, the same ones each time.
        rate: share of a shift that one batch corrects.
        all_reduce: combines over processes.
    """
    layers = [m for m in root.modules() if isinstance(m, LowBitLayer) and _bias_of(m) is not None]
    means: dict[str, list[Tensor]] = {layer.path: [] for layer in layers}
    hooks = [layer.register_forward_hook(partial(_note, means[layer.path], all_reduce)) for layer in layers]
    try:
        with mode([switch_of(root)], Mode.FOLDED):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    for layer in layers:
        layer.__dict__["group"].tap = partial(_correct, layer, means[layer.path], rate, all_reduce)
    try:
        run()
    finally:
        for layer in layers:
            layer.__dict__["group"].tap = None


def _bias_of(layer: LowBitLayer) -> Tensor | None:
    """What a correction is added to: beta, or the layer's own bias."""
    return layer.bias if layer.norm is None else layer.norm.bias


def _mean(sums: Tensor, layer: LowBitLayer, all_reduce: AllReduce) -> Tensor:
    """Mean of each channel over everything else and all processes, [C]."""
    axes = [axis for axis in range(sums.dim()) if axis != layer.channel_axis % sums.dim()]
    count = sums.numel() // sums.shape[layer.channel_axis]
    total = all_reduce(torch.cat([sums.double().sum(axes), sums.new_tensor([count], dtype=torch.float64)]), "sum")
    return (total[:-1] / total[-1]).to(sums.dtype)


def _note(means: list[Tensor], all_reduce: AllReduce, layer: Any, args: Any, output: Tensor) -> None:
    means.append(_mean(output, layer, all_reduce))


def _correct(layer: LowBitLayer, means: list[Tensor], rate: float, all_reduce: AllReduce, sums: Tensor) -> None:
    bias = _bias_of(layer)
    assert bias is not None
    with torch.no_grad():
        bias.add_(means.pop(0) - _mean(sums, layer, all_reduce), alpha=rate)
