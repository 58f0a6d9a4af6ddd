"""Convolutions and linear layers whose three products are products of integers, with errors on their grid (WAGEUBN)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_lowbit import kernels
from lightning_lowbit.modules.error_gate import ErrorQuantizer
from lightning_lowbit.modules.integer_layers import PRODUCTS, channel_sums, spatial
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.planes import Operand, Plane, together
from lightning_lowbit.modules.quantizer import on
from lightning_lowbit.modules.stored import StoredBias, StoredWeight
from lightning_lowbit.modules.widths import WidthQuantizer, require_grid
from lightning_lowbit.numerics.dtypes import compute_dtype
from lightning_lowbit.numerics.through import require_first_order

__all__ = ["multiplies_integers", "plane_layer"]


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
    if multiplies_integers(layer) and (rounded or not torch.is_grad_enabled()):
        if layer.switch.tally is not None and layer.lowbit_weight is not None:
            layer.switch.tally.count(layer.lowbit_weight, layer.weight)
        y: Tensor = _Product.apply(x, layer.weight, bias, layer)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    else:
        y = layer.op(x, on(layer.lowbit_weight, layer.weight), bias)
        if rounded and errors is not None and y.requires_grad:
            y.register_hook(errors.quantize)  # type: ignore[no-untyped-call]  # torch does not type it
    return on(layer.lowbit_output, on(layer.lowbit_accumulator, y))


class _Product(torch.autograd.Function):
    """``weight`` and ``x`` are multiplied as their quantizers' codes; their gradients pass those straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        a, w = layer.input_grid.operand(x), layer.lowbit_weight.operand(weight)
        products = PRODUCTS[type(layer)]
        with _backend(layer):
            sums = [
                (products.forward(layer, p.codes, q.codes, p.codes.dtype is torch.uint8), p.shift + q.shift)
                for p in a.planes
                for q in w.planes
            ]
        y = together(sums, a.exponent + w.exponent, compute_dtype(x))
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
        return of_x, of_weight, of_bias, None


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
