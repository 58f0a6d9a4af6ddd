"""Convolutions and linear layers in integers, forward and backward (NITI sections 4, 6 and 8)."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_lowbit import kernels
from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.modules.block import BiasCodes, WeightCodes
from lightning_lowbit.modules.carrier import Carrier, apply, is_codes
from lightning_lowbit.modules.elementwise import LowBitReLU
from lightning_lowbit.modules.integer_rounding import error_codes, lower_entry, lower_rounded, rounded
from lightning_lowbit.modules.layers import LowBitConv1d, LowBitConv2d, LowBitLayer, LowBitLinear, product_settings
from lightning_lowbit.modules.lowering import Builder, Codes
from lightning_lowbit.numerics.block import ShiftRounding, align, shift_round
from lightning_lowbit.numerics.exponent import pow2
from lightning_lowbit.numerics.guards import FLOAT32_EXACT

__all__ = ["PRODUCTS", "channel_sums", "collect", "integer_layer", "lower_layer", "spatial", "unsupported"]

_BIAS_LIMIT = 2**30


class Products(Protocol):
    """The three products of a layer, of int8 codes; each returns the integer sums."""

    def forward(self, layer: Any, x: Tensor, weight: Tensor, nonnegative: bool) -> Tensor: ...

    def for_input(self, layer: Any, err: Tensor, weight: Tensor, size: torch.Size) -> Tensor: ...

    def for_weight(self, layer: Any, x: Tensor, err: Tensor) -> Tensor: ...


class LinearProducts:
    def forward(self, layer: Any, x: Tensor, weight: Tensor, nonnegative: bool) -> Tensor:
        acc = kernels.int8_matmul(x.reshape(-1, x.shape[-1]), weight.t(), exact_float=True)
        return acc.reshape(*x.shape[:-1], acc.shape[-1])

    def for_input(self, layer: Any, err: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
        return kernels.int8_matmul(err.reshape(-1, err.shape[-1]), weight, exact_float=True).reshape(size)

    def for_weight(self, layer: Any, x: Tensor, err: Tensor) -> Tensor:
        errors, rows = err.reshape(-1, err.shape[-1]), x.reshape(-1, x.shape[-1])
        if x.dtype is torch.uint8:  # which only first operands may be
            return kernels.int8_matmul(rows.t(), errors).t()
        return kernels.int8_matmul(errors.t(), rows)


class ConvProducts:
    """Convolutions of one or two axes; an unbatched input gets a batch of one."""

    def __init__(self, forward: Any, for_input: Any, for_weight: Any, dims: int) -> None:
        self.products, self.dims = (forward, for_input, for_weight), dims

    def forward(self, layer: Any, x: Tensor, weight: Tensor, nonnegative: bool) -> Tensor:
        settings = product_settings(layer)
        acc: Tensor = self.products[0](self._batched(x), weight, exact_float=True, nonnegative=nonnegative, **settings)
        return acc if x.dim() > self.dims + 1 else acc.squeeze(0)

    def for_input(self, layer: Any, err: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
        full = size if len(size) > self.dims + 1 else torch.Size((1, *size))
        acc: Tensor = self.products[1](self._batched(err), weight, full, exact_float=True, **product_settings(layer))
        return acc.reshape(size) if full != size else acc

    def for_weight(self, layer: Any, x: Tensor, err: Tensor) -> Tensor:
        settings = product_settings(layer)
        err, size = self._batched(err), layer.weight.shape[1:]
        acc: Tensor = self.products[2](self._batched(x), err, (err.shape[1], *size), **settings)
        return acc

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.dim() > self.dims + 1 else x.unsqueeze(0)


PRODUCTS: dict[type[LowBitLayer], Products] = {
    LowBitLinear: LinearProducts(),
    LowBitConv1d: ConvProducts(kernels.int8_conv1d, kernels.int8_conv1d_input, kernels.int8_conv1d_weight, 1),
    LowBitConv2d: ConvProducts(kernels.int8_conv2d, kernels.int8_conv2d_input, kernels.int8_conv2d_weight, 2),
}


def unsupported(layer: torch.nn.Module) -> str | None:
    """Why a layer has no integer form here; None where it has."""
    if not isinstance(layer, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)):
        return f"{type(layer).__name__} has no integer product"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"padding_mode={layer.padding_mode!r} has no integer product, only 'zeros' has"
    if hasattr(layer, "weight_orig"):
        return "it is pruned: integer weights are updated in place, a mask would undo that"
    return None


def integer_layer(layer: LowBitLayer, x: Tensor) -> Tensor:
    """A layer's forward on a carrier: int8 product, bias, one rounding."""
    if not is_codes(x):
        raise UnsupportedModelError(
            f"{layer.path}: its input came in float where integers were expected, behind operations that were not "
            "followed when the network was converted. Make them modules, or leave the layer float with skip=."
        )
    quantizer: Any = layer.lowbit_bias
    bias = None if quantizer is None else quantizer.target()
    if layer.switch.tally is not None:
        weight: Any = layer.lowbit_weight
        for codes in (weight, quantizer):
            if codes is not None:
                layer.switch.tally.count(codes, codes.target())
    return apply(_Product, x, layer.weight, bias, layer)


class _Product(torch.autograd.Function):
    """The parameters are arguments so that autograd comes here; their gradients go to ``layer.gathered``."""

    @staticmethod
    def forward(ctx: Any, x: Carrier, weight: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        quantizer: WeightCodes = layer.lowbit_weight
        codes, exponent = quantizer.codes(), x.exponent + quantizer.exponent()
        # What a rectifier made, and pools, pads and dropouts passed on, holds no negative code.
        nonnegative = isinstance(x.origin, LowBitReLU)
        acc = PRODUCTS[type(layer)].forward(layer, x.payload, codes, nonnegative)
        if bias is not None:
            acc = _with_bias(acc, layer, exponent)
        ctx.layer, ctx.x_exponent, ctx.size = layer, x.exponent, x.shape
        ctx.save_for_backward(x.payload if weight.requires_grad else None, codes)
        return rounded(acc, exponent, layer, layer.lowbit_accumulator, "act")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        layer = ctx.layer
        x, codes = ctx.saved_tensors
        err, exponent = error_codes(grad, layer, layer.lowbit_error)
        products = PRODUCTS[type(layer)]
        if ctx.needs_input_grad[1]:
            collect(layer, "weight", products.for_weight(layer, x, err), exponent + ctx.x_exponent)
        if ctx.needs_input_grad[2]:
            collect(layer, "bias", channel_sums(err, spatial(layer)), exponent)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        acc = products.for_input(layer, err, codes, ctx.size)
        exponent = exponent + layer.lowbit_weight.exponent()
        return rounded(acc, exponent, layer, layer.lowbit_error, "err"), None, None, None


def _with_bias(acc: Tensor, layer: Any, exponent: Tensor) -> Tensor:
    """The bias shifted onto the accumulator's exponent: right with ties away from zero, left within 30 bits."""
    moved, products = _moved_bias(layer, exponent), 128 * 127 * layer.weight[0].numel()
    if acc.dtype is torch.float32:
        if acc.device.type == "cpu" and products + int(moved.abs().amax()) < FLOAT32_EXACT:
            moved = moved.to(torch.float32)  # proved: the sum with the bias is exact too
        else:
            acc = acc.to(torch.int32)
    elif products + _BIAS_LIMIT >= 2**31:
        acc = acc.to(torch.int64)
    return acc.add_(moved.reshape(-1, *([1] * spatial(layer))))


def _moved_bias(layer: Any, exponent: Tensor) -> Tensor:
    """Codes of the bias on the accumulator's exponent, int32, at most 2^30."""
    quantizer: BiasCodes = layer.lowbit_bias
    shift = exponent - quantizer.exponent()
    left = shift.neg().clamp(0, 30)
    limit = _BIAS_LIMIT >> left  # beyond it a left shift would leave int32
    moved = shift_round(quantizer.codes().to(torch.int32), shift.clamp(min=0), ShiftRounding.HALF_AWAY)
    return torch.minimum(torch.maximum(moved, -limit), limit) << left


def lower_layer(build: Builder, layer: Any, x: Codes) -> Codes:
    """``integer_layer`` of evaluation: the exponents are known, and with them the bias on that of the products."""
    x, weight = lower_entry(build, x, layer.lowbit_input), layer.lowbit_weight
    exponent, bias = x.exponent + weight.exponent(), None
    if layer.lowbit_bias is not None:
        bias = _moved_bias(layer, exponent).double() * pow2(exponent, torch.float64)
    values = weight.codes().double() * pow2(weight.exponent(), torch.float64)
    return lower_rounded(
        build, build.product(layer, x, values, weight.exponent(), bias), layer, layer.lowbit_accumulator
    )


def spatial(layer: Any) -> int:
    """Axes behind the channels."""
    return 0 if layer.channel_axis == -1 else len(layer.kernel_size)


def channel_sums(err: Tensor, spatial: int) -> Tensor:
    """Sum of errors per output channel, as a product with ones: faster than a sum of int8."""
    rows = err.movedim(-1 - spatial, -1).reshape(-1, err.shape[-1 - spatial])
    ones = torch.ones((1, len(rows)), dtype=torch.int8, device=err.device)
    return kernels.int8_matmul(ones, rows).reshape(-1)


def collect(layer: Any, name: str, acc: Tensor, exponent: Tensor) -> None:
    """Add a gradient to what the layer has gathered since its last update, on the finer of both exponents."""
    known = layer.gathered.get(name)
    if known is None:
        layer.gathered[name] = (acc, exponent)
    else:
        a, b, finest = align(known[0].to(torch.int64), known[1], acc.to(torch.int64), exponent)
        layer.gathered[name] = (a + b, finest)
