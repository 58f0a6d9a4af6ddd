"""Evaluation multiplies integers: float32 where a proof says that it holds their sums, else float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowbit.graph.network import Flow
from lightning_lowbit.graph.plan import Plan
from lightning_lowbit.graph.units import others_read
from lightning_lowbit.modules.elementwise import LowBitAvgPool
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.numerics.exponent import pow2
from lightning_lowbit.numerics.guards import FLOAT32_EXACT, float_sums_exact, quotients_exact

__all__ = ["exact_mean", "exact_product", "narrow_for_others"]


def exact_product(layer: LowBitLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's products, in evaluation exactly the integers' sums.

    Args:
        layer: both of its operands have quantizers with power-of-two steps, and so has its bias if there is one.
        x, weight, bias: on their grids.
    Returns:
        float64 where float32 is not proved to hold every partial sum; the next quantizer rounds it and gives float32.
        What leaves the converted part (`narrow_for_others`) is rounded once to the network's own dtype.
    """
    if layer.training or not layer.switch.quantizing or x.dtype == torch.float64 or _proved(layer, weight, bias):
        return layer.op(x, weight, bias)
    y = layer.op(x.double(), weight.double(), None if bias is None else bias.double())
    return y.to(weight.dtype) if layer.__dict__.get("narrow") else y


def exact_mean(op: LowBitAvgPool, x: Tensor, *args: Any, **settings: Any) -> Tensor:
    """The mean of windows, in evaluation such that its quantizer rounds the exact quotient (numerics.guards).

    float64 where float32 may not hold the sums, or a quotient near enough to a tie.
    """
    if op.training or not op.switch.quantizing or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return op.op(x, *args, **settings)
    sums, count = op.sums(x, *args, **settings)
    source, target = op.operand_grids[0] if op.operand_grids else None, op.lowbit_output
    if source is None or target is None or not (source.ready and target.ready):
        return sums / count
    codes, out = source.grid(), target.grid()
    n, apart = int(torch.as_tensor(count).max()), int(target.exponent()) - int(source.exponent())
    if n * max(-codes.qmin, codes.qmax) < FLOAT32_EXACT and quotients_exact(n, apart, out.bits, 24):
        return sums / count
    return op.op(x.double(), *args, **settings)


def narrow_for_others(root: nn.Module, flow: Flow, plan: Plan) -> None:
    """Mark what ends float64 sums: quantizers, and layers whose results are read by what knows one dtype alone."""
    layers = {layer.path for layer in plan.layers}
    first = root.get_submodule(plan.layers[0].path)
    for module in root.modules():
        if isinstance(module, Quantizer):
            module.__dict__["like"] = first
    bare = frozenset(
        (op.owner, op.key) for op in plan.ops if getattr(root.get_submodule(op.path), "lowbit_output", None) is None
    )
    for call in flow.calls:
        if call.path in layers and others_read(call, flow, plan, bare):
            root.get_submodule(call.path).__dict__["narrow"] = True


def _proved(layer: LowBitLayer, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether float32 holds all sums (numerics.guards), or they are no integers anyhow."""
    source: Any = layer.input_grid
    quantizer, unit = layer.lowbit_weight, layer.accumulator_exponent()
    integers = bias is None or layer.lowbit_bias is not None
    if source is None or quantizer is None or unit is None or not integers:
        return True
    largest = max(-source.qmin, source.qmax)
    # First by the largest weight that there could be in every place: most layers are narrow enough.
    terms = math.prod(weight.shape) // weight.shape[layer.out_axis]
    most = terms * largest * 2 ** (quantizer.bits - 1)  # type: ignore[operator]  # a number
    if torch.compiler.is_compiling():  # reads no value
        return bias is None and most < FLOAT32_EXACT
    own = layer.lowbit_bias is not None and getattr(layer.lowbit_bias, "own", True)  # else on the step of the products
    if not own:
        added = 0.0 if bias is None else float(bias.detach().abs().amax()) * 2.0 ** -int(unit)
        if most + added < FLOAT32_EXACT:
            return True
    finest = torch.minimum(unit, layer.lowbit_bias.exponent()) if own and layer.lowbit_bias is not None else unit
    codes = weight.double() * pow2(unit - finest - quantizer.exponent(), torch.float64)
    biases = None if bias is None else bias.double() * pow2(-finest, torch.float64)
    return float_sums_exact(codes, largest, biases, layer.out_axis, layer.groups)
