"""Layers and norms of a binarized network: sums of signs, and one affine function before the next sign."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lowbit import kernels
from lightning_lowbit.modules.binary import LatentSign
from lightning_lowbit.modules.integer_layers import unsupported
from lightning_lowbit.modules.layers import padding_of, product_settings
from lightning_lowbit.modules.quantizer import on
from lightning_lowbit.numerics.affine import affine, affine_parameters
from lightning_lowbit.numerics.exponent import pow2

__all__ = [
    "binary_layer", "binary_norm", "end_result", "finished", "integer_end", "products",
]  # fmt: skip

_CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def binary_layer(layer: Any, x: Tensor) -> Tensor:
    """sum of sign(x) sign(w), times the scale of the weights, plus a float bias.

    Training multiplies with scale * sign(w), through which the latents learn. Evaluation adds up the signs first:
    integers, exact in float32 below 2^24, which a packed layer counts as well; scale and bias come behind.
    """
    x, weight = on(layer.lowbit_input, x), layer.lowbit_weight
    bare = isinstance(weight, LatentSign) and weight.ready and weight.scaling != "none" and not layer.training
    scale = weight.scale(layer.weight) if bare else None
    return finished(products(layer, x, on(weight, layer.weight)), scale, layer.bias, 1 - layer.weight.dim())


def products(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's sums without bias; a border of the scheme's choosing around convolutions."""
    border = layer.scheme.pad_value
    if border and isinstance(layer, nn.modules.conv._ConvNd) and layer.padding_mode == "zeros":
        x = F.pad(x, [pad for sides in reversed(padding_of(layer)) for pad in sides], value=float(border))
        y = _CONV[len(layer.kernel_size)](x, weight, None, layer.stride, 0, layer.dilation, layer.groups)
    else:
        y = layer.op(x, weight, None)
    # Libraries on other devices may choose Winograd, whose sums of integers are off by its own rounding.
    exact: Tensor = y if layer.training or y.device.type == "cpu" or layer.lowbit_input is None else y.round()
    return exact


def finished(dot: Tensor, scale: Tensor | None, bias: Tensor | None, axis: int) -> Tensor:
    """dot * scale + bias: multiply, round, add, round.

    Args:
        dot: sums, [N, outputs, ...] or [..., outputs].
        scale: 0-dim or one per output, any shape.
        bias: [outputs].
        axis: of the outputs in dot, from the end: -1 of a linear layer, -3 of images, batched or not.
    """
    shape = [-1] + [1] * (-1 - axis)
    if scale is not None:
        dot = dot * (scale.reshape(shape) if scale.numel() > 1 else scale.reshape(()))
    return dot if bias is None else dot + bias.reshape(shape)


def binary_norm(norm: Any, x: Tensor) -> Tensor:
    """A batch norm: torch's while it trains, one affine function of its moving statistics in evaluation."""
    if norm.training or norm.running_mean is None:
        result: Tensor = norm.op(x) if norm.since is None else _renewed(norm, x)
        return result
    a, b = affine_parameters(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    return affine(x, a, b)


def _renewed(norm: Any, x: Tensor) -> Tensor:
    """Training behind a change of the network: moving statistics are the mean since then, until they move as ever."""
    if norm.momentum is None:
        result: Tensor = norm.op(x)
        return result
    norm._check_input_dim(x)
    share = max(norm.momentum, 1 / (norm.since + 1))
    norm.since += 1
    norm.num_batches_tracked.add_(1)
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, share, norm.eps)


def integer_end(layer: Any, x: Tensor) -> Tensor:
    """A first or last layer in 8 bits: trained on grid values, evaluated as integers whatever the sums' length."""
    source, weight = layer.lowbit_input, layer.lowbit_weight
    if layer.training or source is None or not (source.ready and weight.ready):
        return layer.quantized(x)  # type: ignore[no-any-return]  # layers have it
    return _integer_end(layer, x) if unsupported(layer) is None else _float64_end(layer, x)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the kernels choose among libraries
def _integer_end(layer: Any, x: Tensor) -> Tensor:
    source, weight, bias = layer.lowbit_input, layer.lowbit_weight, layer.bias
    values = on(weight, layer.weight)  # first: its range is that of the present weight
    unit = pow2(source.exponent() + weight.exponent()).to(layer.weight.dtype)
    if bias is not None and layer.lowbit_bias is not None:
        bias = (on(layer.lowbit_bias, bias) / unit).to(torch.int64)
    codes = (on(source, x) / pow2(source.exponent())).to(torch.int8)
    w = (values / pow2(weight.exponent())).to(torch.int8)
    return end_result(codes, w, bias, unit, product_settings(layer))


def _float64_end(layer: Any, x: Tensor) -> Tensor:
    """The same where there is no integer product."""
    weight, bias = on(layer.lowbit_weight, layer.weight), layer.bias
    inside = None if bias is None or layer.lowbit_bias is None else layer.lowbit_bias(bias).double()
    y: Tensor = layer.op(on(layer.lowbit_input, x).double(), weight.double(), inside).to(weight.dtype)
    return y if inside is not None else finished(y, None, bias, 1 - layer.weight.dim())


def end_result(codes: Tensor, w: Tensor, bias: Tensor | None, unit: Tensor, settings: dict[str, Any]) -> Tensor:
    """(sum of products + bias) * unit: integers until the one conversion to the type of ``unit``, which rounds once.

    Args:
        codes, w: int8.
        bias: integers in units of the sums, or a float that is added behind.
        unit: 0-dim, a power of two.
        settings: of the convolution.
    """
    if w.dim() == 2:
        acc = kernels.int8_matmul(codes.reshape(-1, w.shape[1]), w.t()).reshape(*codes.shape[:-1], w.shape[0])
    else:
        conv: Any = kernels.int8_conv1d if w.dim() == 3 else kernels.int8_conv2d
        batched = codes.dim() == w.dim()
        acc = conv(codes if batched else codes.unsqueeze(0), w, **settings)
        acc = acc if batched else acc.squeeze(0)
    if bias is None:
        return acc.to(unit.dtype) * unit
    if bias.is_floating_point():
        return finished(acc.to(unit.dtype) * unit, None, bias, 1 - w.dim())
    shape = [-1] + [1] * (w.dim() - 2)
    return (acc.to(torch.int64) + bias.to(torch.int64).reshape(shape)).to(unit.dtype) * unit
