"""Merged layers and means in an integer program: what ``modules.merging`` computes in evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_lowbit.graph.fold import per_channel
from lightning_lowbit.modules.elementwise import LowBitAdd, LowBitAvgPool, LowBitOp
from lightning_lowbit.modules.lowering import Builder, Codes, refuse
from lightning_lowbit.modules.merging import quantized
from lightning_lowbit.numerics.exponent import ceil_log2
from lightning_lowbit.numerics.guards import FLOAT64_EXACT, quotients_exact

__all__ = ["lower_merged", "lower_operation"]


@torch.no_grad()
def lower_merged(build: Builder, layer: Any, x: Codes) -> Codes:
    """Twin of ``merged_layer``; what the group's end has rounded passes the modules that it stands for unchanged."""
    if not layer.lowbit_weight.has_exponent:
        raise refuse(layer.path, "the scale of its weights is no power of two", "Convert with power2=True.")
    group = layer.group
    if layer._forward_hooks and (group.end is not None or layer.norm is not None):
        raise refuse(
            layer.path, "a forward_hook of yours reads it before the norm and the rectifier that it stands for",
            "Remove the hook.",
        )  # fmt: skip
    x = build.snap(x, layer.lowbit_input)
    weight, bias, scale = quantized(layer)
    if x.is_float or (bias is not None and layer.lowbit_bias is None):
        y = build.island("layer", x, layer=layer, weight=weight, bias=bias)
    else:
        y = _sums(build, layer, x, weight, bias, -ceil_log2(per_channel(scale, layer.out_axis, layer.groups)))
    return build.snap(_held_exactly(layer, y), group.end, group.rectify, 6.0 if group.six else None)


def _sums(build: Builder, layer: Any, x: Codes, weight: Tensor, bias: Tensor | None, exponent: Tensor) -> Codes:
    """Products and a bias, which may be on a grid of its own."""
    if bias is None:
        return build.product(layer, x, weight, exponent, None)
    grid = layer.lowbit_bias.exponent()
    if bool((grid >= x.exponent + exponent).all()):
        return build.product(layer, x, weight, exponent, bias)
    return build.constant(build.product(layer, x, weight, exponent, None), bias, int(grid.min()), layer.channel_axis)


def _held_exactly(module: Any, y: Codes) -> Codes:
    """y, where float64 holds its integers, as evaluation has them."""
    if not y.is_float and max(-y.low, y.high) > FLOAT64_EXACT:
        raise refuse(
            module.path, f"its sums can reach {max(-y.low, y.high):.3g}, beyond float64", "Convert with fewer bits."
        )
    return y


def lower_operation(build: Builder, op: LowBitOp, *operands: Any, float_means: bool, **settings: Any) -> Codes:
    """Twin of ``merging_sums.operation`` and of the quantizer behind it.

    Args:
        float_means: average pools are torch's own.
    """
    if isinstance(op, LowBitAvgPool):
        return _mean(build, op, *operands, float_means=float_means, **settings)
    if isinstance(op, LowBitAdd):
        terms = [op.snapped(build, index, x) for index, x in enumerate((*operands, *settings.values()))]
        return build.snap(_held_exactly(op, build.add(terms)), op.lowbit_output)
    return op.lower(build, *operands, **settings)


def _mean(build: Builder, op: LowBitAvgPool, input: Codes, *args: Any, float_means: bool, **settings: Any) -> Codes:
    if float_means:
        raise refuse(op.path, "its means are float", "Convert with Jacinto(avgpool='exact').")
    sums = build.pool(op.snapped(build, 0, input), op.kind, *args, **{**op.settings, **settings})
    if op.lowbit_output is None:
        return replace(sums, precision="float64")
    to = op.lowbit_output.as_snap()
    bits = (to.high - to.low).bit_length()
    if sums.count is not None and not quotients_exact(sums.count, to.exponent - sums.exponent, bits):
        raise refuse(op.path, "its means have more digits than float64 holds", "Convert with fewer bits.")
    return build.snap(sums, to)
