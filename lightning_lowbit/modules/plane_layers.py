"""Convolutions and linear layers whose three products are products of integers, with errors on their grid (WAGEUBN)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowbit import kernels
from lightning_lowbit.graph.network import Flow
from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.graph.plan import Plan
from lightning_lowbit.modules.error_gate import ErrorQuantizer
from lightning_lowbit.modules.fixed_norm import NormGrids
from lightning_lowbit.modules.integer_layers import PRODUCTS, channel_sums, spatial
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.planes import Operand, Plane, together
from lightning_lowbit.modules.quantizer import on
from lightning_lowbit.modules.stored import StoredBias, StoredWeight
from lightning_lowbit.modules.widths import WidthQuantizer, require_grid
from lightning_lowbit.numerics.dtypes import compute_dtype
from lightning_lowbit.numerics.guards import FLOAT32_EXACT
from lightning_lowbit.numerics.through import require_first_order

__all__ = ["connect_sums", "float32_holds", "multiplies_integers", "passes_wide", "plane_layer"]


def multiplies_integers(layer: LowBitLayer) -> bool:
    """Whether the layer's products are exact integer products: of codes, by a kernel that there is."""
    return (
        type(layer) in PRODUCTS
        and getattr(layer, "padding_mode", "zeros") == "zeros"
        and isinstance(layer.input_grid, WidthQuantizer)
        and isinstance(layer.lowbit_weight, StoredWeight)
        and layer.input_grid.ready
        and layer.lowbit_weight.ready
    )


def plane_layer(layer: LowBitLayer, x: Tensor) -> Tensor:
    """y = x W + b with x and W on their grids; back, both products with the rounded errors of y.

    Layers without an integer product (transposed, of three axes, with other padding), and any layer while errors are
    not rounded, multiply the same numbers in floats.
    """
    x = on(layer.lowbit_input, x)
    bias = None if layer.bias is None else on(layer.lowbit_bias, layer.bias)
    errors = layer.lowbit_error
    rounded = isinstance(errors, ErrorQuantizer) and errors.gate.on
    wide = not torch.is_grad_enabled() and not layer.training and not float32_holds(layer)
    if multiplies_integers(layer) and (rounded or not torch.is_grad_enabled()):
        if layer.switch.tally is not None and layer.lowbit_weight is not None:
            layer.switch.tally.count(layer.lowbit_weight, layer.weight)
        y: Tensor = _Product.apply(x, layer.weight, bias, layer, wide)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    elif wide:
        weight = on(layer.lowbit_weight, layer.weight).double()
        y = layer.op(x.double(), weight, None if bias is None else bias.double())
    else:
        y = layer.op(x, on(layer.lowbit_weight, layer.weight), bias)
        if rounded and errors is not None and y.requires_grad:
            y.register_hook(errors.quantize)  # type: ignore[no-untyped-call]  # torch does not type it
    result = on(layer.lowbit_output, on(layer.lowbit_accumulator, y))
    return result.to(compute_dtype(x)) if wide and not passes_wide(layer) else result


def float32_holds(layer: LowBitLayer) -> bool:
    """Whether float32 holds the layer's sums, by the widths of what it multiplies."""
    source, weight = layer.input_grid, layer.lowbit_weight
    if not isinstance(source, WidthQuantizer) or not isinstance(weight, StoredWeight):
        return True  # they are no integers
    terms = math.prod(layer.weight.shape) // layer.weight.shape[layer.out_axis]
    return layer.bias is None and terms * source.format.limits[1] * weight.most <= FLOAT32_EXACT


def passes_wide(layer: LowBitLayer) -> bool:
    """Whether its sums reach those who read them in float64."""
    rounded = layer.lowbit_output is not None or layer.lowbit_accumulator is not None
    readers = layer.__dict__.get("rounded_by", ())
    return bool(readers) and not rounded and all(reader.on for reader in readers if isinstance(reader, NormGrids))


def connect_sums(root: nn.Module, flow: Flow, plan: Plan) -> None:
    """Tell layers what rounds their sums, where only batch norms on integers and rectifiers read them.

    These take float64 and give float32.
    """
    ops = {(op.owner, op.key): op.path for op in plan.ops if op.kind is Kind.RELU}
    slots = dict.fromkeys(plan.islands, "lowbit_accumulator") | dict.fromkeys(ops.values(), "lowbit_output")
    for path in {layer.path for layer in plan.layers}:
        layer: Any = root.get_submodule(path)
        calls = [call for call in flow.calls if call.path == path]
        places = [ops.get((reader.owner, reader.key), reader.path) for call in calls for reader in call.readers]
        found = [getattr(root.get_submodule(place), slots[place], None) for place in places if place in slots]
        known = [quantizer for quantizer in found if isinstance(quantizer, (NormGrids, WidthQuantizer))]
        if len(known) < len(places) or any(call in flow.exits or call.alone for call in calls):
            continue
        layer.__dict__["rounded_by"] = known
        for quantizer in known:
            quantizer.__dict__["like"] = layer


class _Product(torch.autograd.Function):
    """``weight`` and ``x`` are multiplied as their quantizers' codes; their gradients pass those straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Any, wide: bool) -> Tensor:
        a, w = layer.input_grid.operand(x), layer.lowbit_weight.operand(weight)
        products = PRODUCTS[type(layer)]
        with _backend(layer):
            sums = [
                (products.forward(layer, p.codes, q.codes, p.codes.dtype is torch.uint8), p.shift + q.shift)
                for p in a.planes
                for q in w.planes
            ]
        y = together(sums, a.exponent + w.exponent, torch.float64 if wide else compute_dtype(x))
        if bias is not None:
            y += bias.reshape(-1, *([1] * spatial(layer)))
        if layer.scheme.check:
            _require_sums(layer, y, a, w)
        ctx.layer, ctx.size, ctx.exponents, ctx.dtype = layer, x.shape, (a.exponent, w.exponent), compute_dtype(x)
        ctx.shifts = [p.shift for p in a.planes], [q.shift for q in w.planes]
        keep_a = a.planes if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(*(p.codes for p in (*keep_a, *w.planes)))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        require_first_order(ctx.layer.path)
        layer, products = ctx.layer, PRODUCTS[type(ctx.layer)]
        saved = list(ctx.saved_tensors)
        w = [Plane(codes, shift) for codes, shift in zip(saved[-len(ctx.shifts[1]) :], ctx.shifts[1], strict=True)]
        a = [Plane(codes, shift) for codes, shift in zip(saved[: -len(w)], ctx.shifts[0], strict=False)]
        err: Operand = layer.lowbit_error.gate.operand(grad, layer.switch.run)
        of_x, of_weight, of_bias = None, None, None
        with _backend(layer):
            if ctx.needs_input_grad[0]:
                sums = [
                    (products.for_input(layer, e.codes, q.codes, ctx.size), e.shift + q.shift)
                    for e in err.planes
                    for q in w
                ]
                of_x = together(sums, err.exponent + ctx.exponents[1], ctx.dtype)
            if ctx.needs_input_grad[1]:
                sums = [(acc, p.shift + shift) for p in a for acc, shift in _for_weight(layer, p.codes, err)]
                of_weight = together(sums, err.exponent + ctx.exponents[0], ctx.dtype)
            if ctx.needs_input_grad[2]:
                sums = [(channel_sums(e.codes, spatial(layer)), e.shift) for e in err.planes]
                of_bias = together(sums, err.exponent, ctx.dtype)
        return of_x, of_weight, of_bias, None, None


def _for_weight(layer: Any, codes: Tensor, err: Operand) -> list[tuple[Tensor, int]]:
    """Products of one plane of codes with all planes of errors: at once where there are no groups, side by side."""
    product, axis = PRODUCTS[type(layer)].for_weight, -1 - spatial(layer)
    if layer.groups > 1 or len(err.planes) == 1:
        return [(product(layer, codes, e.codes), e.shift) for e in err.planes]
    acc = product(layer, codes, torch.cat([e.codes for e in err.planes], axis))
    return [(part, e.shift) for part, e in zip(acc.chunk(len(err.planes)), err.planes, strict=True)]


@contextmanager
def _backend(layer: LowBitLayer) -> Iterator[None]:
    """The backend that the scheme names; "auto" leaves it to `kernels.use` and the environment."""
    name: str = layer.scheme.backend  # type: ignore[attr-defined]  # of Wageubn
    if name == "auto":
        yield
        return
    with kernels.use(name):
        yield


def _require_sums(layer: LowBitLayer, y: Tensor, a: Operand, w: Operand) -> None:
    fraction = -int(a.exponent) - int(w.exponent)
    if isinstance(layer.lowbit_bias, StoredBias):
        fraction = max(fraction, layer.lowbit_bias.bits - 1)
    require_grid(f"{layer.path}.sums", y, fraction)
