"""Sums of codes in evaluation: float32 where a proof says that it holds them, else float64 up to the next quantizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_lowbit.graph.fold import per_channel
from lightning_lowbit.modules.clipped import ClipQuantizer
from lightning_lowbit.modules.elementwise import LowBitAdd, LowBitAvgPool, LowBitOp
from lightning_lowbit.modules.merged import MergedBias
from lightning_lowbit.numerics.clipping import HostLimits
from lightning_lowbit.numerics.guards import FLOAT32_EXACT, float_sums_exact
from lightning_lowbit.numerics.merged_bias import own_scale

__all__ = ["narrowed", "operation", "product"]


def product(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """The layer's products and its bias, in evaluation exactly the integers' sums.

    Args:
        x, weight, bias: on their grids.
        scale: codes per unit of the weight.
    """
    if layer.training or x.dtype == torch.float64 or not _integers(layer, bias):
        return layer.op(x, weight, bias)  # type: ignore[no-any-return]
    if torch.compiler.is_compiling():  # reads no value: the largest codes in every place, and the bias apart
        if not _any_fit(layer, weight, 2**layer.input_grid.bits):
            return _wide_product(layer, x, weight, bias)
        y: Tensor = layer.op(x, weight, None)
        return y if bias is None else y.double() + layer._along_channels(bias).double()
    fits = _fit(layer, weight, bias, scale)
    return layer.op(x, weight, bias) if fits else _wide_product(layer, x, weight, bias)


def _wide_product(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return layer.op(x.double(), weight.double(), None if bias is None else bias.double())  # type: ignore[no-any-return]


def _integers(layer: Any, bias: Tensor | None) -> bool:
    """Whether there is a unit of which all its operands are multiples."""
    source = layer.input_grid
    grids = isinstance(source, ClipQuantizer) and source.ready and source.has_exponent
    return grids and layer.lowbit_weight.has_exponent and (bias is None or layer.lowbit_bias is not None)


def _any_fit(layer: Any, weight: Tensor, largest: float) -> bool:
    """Whether float32 holds the products of any weights of that shape with codes up to ``largest``."""
    outputs = weight.shape[0] if layer.out_axis == 0 else weight.shape[1] * layer.groups
    terms = weight.numel() // outputs
    return bool(terms * largest * 2.0 ** (layer.lowbit_weight.form.bits - 1) <= FLOAT32_EXACT / 2)


def _fit(layer: Any, weight: Tensor, bias: Tensor | None, scale: Tensor) -> bool:
    """Whether float32 holds every partial sum of these weights (numerics.guards)."""
    limits = layer.input_grid.limits().to_host()
    units = limits.scale * per_channel(scale, layer.out_axis, layer.groups)
    finer = 1.0 if bias is None else _finer(layer.lowbit_bias, bias, units)
    largest = _largest(limits) * finer
    added = None if bias is None or not bias.numel() else bias.detach().abs() * (units * finer)
    if _any_fit(layer, weight, largest) and (added is None or float(added.amax()) <= FLOAT32_EXACT / 2):
        return True
    return float_sums_exact(weight.detach() * scale, largest, added, layer.out_axis, layer.groups)


def _largest(limits: HostLimits) -> float:
    """Largest magnitude of a code, counted from the code of 0."""
    return max(limits.zero_point - limits.qmin, limits.qmax - limits.zero_point)


def _finer(quantizer: MergedBias, bias: Tensor, units: Tensor) -> float:
    """How many units of a bias on a grid of its own make one of the products', 1 where theirs are as fine."""
    if quantizer.rule not in ("own", "tidl_scale") or not bool(bias.any()):
        return 1.0
    return max(1.0, float((own_scale(bias, quantizer.bits) / units).amax()))


def operation(op: LowBitOp, *operands: Any, **settings: Any) -> Tensor:
    """A sum, a mean or a rectifier; in evaluation no rounding of floats comes before the quantizer's."""
    if op.training or not op.switch.quantizing:
        return op.op(*operands, **settings)
    wide = operands if _fits(op) else [x.double() if isinstance(x, Tensor) else x for x in operands]
    y = op.op(*wide, **settings)
    return y if op.lowbit_output is not None and op.lowbit_output.ready else narrowed(op, y)


def _fits(op: LowBitOp) -> bool:
    """Whether float32 does an operation exactly."""
    if isinstance(op, LowBitAvgPool):
        return False
    if not isinstance(op, LowBitAdd):
        return True
    grids = [q for q in op.operand_grids if isinstance(q, ClipQuantizer) and q.ready]
    if torch.compiler.is_compiling() or len(grids) < len(op.operand_grids) or not grids:
        return False
    limits = [q.limits().to_host() for q in grids]
    finest = max(limit.scale for limit in limits)
    return math.fsum(_largest(limit) * finest / limit.scale for limit in limits) <= FLOAT32_EXACT


def narrowed(module: Any, y: Tensor) -> Tensor:
    """What others than low-bit modules read too (``narrow``) in the network's own dtype."""
    like = module.__dict__.get("narrow")
    return y if like is None or y.dtype != torch.float64 else y.to(like.weight.dtype)
