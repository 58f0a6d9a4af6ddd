"""A binarized network's evaluation as operations of an integer program: the twin of `binary_layers`."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from lightning_lowbit.modules.binary import LatentSign, Rectifier, SignInput
from lightning_lowbit.modules.elementwise import LowBitAvgPool, LowBitReLU
from lightning_lowbit.modules.layers import LowBitLayer, padding_of
from lightning_lowbit.modules.lowering import Builder, refuse
from lightning_lowbit.modules.norm import LowBitBatchNorm
from lightning_lowbit.numerics.affine import affine_parameters

__all__ = ["lower_binary"]


def lower_binary(build: Builder, module: Any, *operands: Any, **settings: Any) -> Any:
    """What a module does, sums of signs as integers; batch norms and scales become thresholds where signs follow."""
    if isinstance(module, Rectifier):
        return module.lower(build, operands[0])
    if isinstance(module, LowBitReLU) and isinstance(module.lowbit_output, Rectifier):
        x = build.island("clamp", operands[0], low=None, high=6.0) if module.six else operands[0]
        return module.lowbit_output.lower(build, x)
    if isinstance(module, LowBitBatchNorm):
        return _norm(build, module, *operands)
    if isinstance(module, LowBitLayer):
        lowered = _signed if isinstance(module.lowbit_weight, LatentSign) else _end
        return lowered(build, module, *operands)
    lowered = module.lower(build, *operands, **settings)
    return build.floats(lowered) if isinstance(module, LowBitAvgPool) else lowered  # of integers too: quotients


def _signed(build: Builder, layer: Any, x: Any) -> Any:
    """Sums of sign(x) sign(w) as integers, then the scale and the float bias."""
    weight: LatentSign = layer.lowbit_weight
    if not weight.ready:
        raise refuse(
            layer.path, "its weights are float, in the first of two stages",
            f"Train on until they are binary (weights_at={layer.scheme.weights_at!r}).",
        )  # fmt: skip
    signs = weight.quantize(layer.weight)
    plain, sides = _bordered(layer)
    if layer.lowbit_input is None:
        x = build.floats(x)
        x = x if sides is None else build.border(x, sides, layer.scheme.pad_value)
        y = build.island("layer", x, layer=plain, weight=signs, bias=None)
    else:
        x = layer.lowbit_input.lower(build, x)
        x = x if sides is None else build.border(x, sides, layer.scheme.pad_value)
        y = build.product(plain, x, signs, weight.exponent(), None)
    if weight.scaling != "none":
        scale = weight.scale(layer.weight)
        y = build.island("mul", y, constants={"other": _along(layer, scale, y) if scale.numel() > 1 else scale})
    return y if layer.bias is None else build.island("add", y, constants={"other": _along(layer, layer.bias, y)})


def _bordered(layer: Any) -> tuple[Any, list[tuple[int, int]] | None]:
    """The layer without its own padding, and that padding, where the scheme says what stands there."""
    pads = isinstance(layer, nn.modules.conv._ConvNd) and layer.padding_mode == "zeros"
    if not pads or not layer.scheme.pad_value:
        return layer, None
    plain = copy.copy(layer)
    plain.padding = (0,) * len(layer.kernel_size)
    return plain, padding_of(layer)


def _along(layer: Any, values: Tensor, x: Any) -> Tensor:
    """One value an output in the shape that broadcasts against x."""
    return values.reshape(-1, *[1] * (0 if layer.channel_axis == -1 else len(x.shape) - 2))


def _norm(build: Builder, norm: Any, x: Any) -> Any:
    if norm.running_mean is None:
        raise refuse(
            norm.path, "it normalizes by the batch that it is given", "Train it with track_running_stats=True."
        )
    a, b = affine_parameters(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    return build.island("affine", x, constants={"a": a, "b": b})


def _end(build: Builder, layer: Any, x: Any) -> Any:
    """A first or last layer in 8 bits: integers until the one conversion to float32."""
    signs = isinstance(layer.lowbit_input, SignInput)  # of a layer that shares its weight with a binary one
    x = layer.lowbit_input.lower(build, x) if signs else build.snap(x, layer.lowbit_input)
    values = layer.lowbit_weight(layer.weight)  # its range is that of the present weight
    exponent, bias = layer.lowbit_weight.exponent(), layer.bias
    whole = bias is None or (layer.lowbit_bias is not None and layer.lowbit_weight.ready)
    y = build.product(layer, x, values, exponent, layer.lowbit_bias(bias) if bias is not None and whole else None)
    y = build.in_float32(y, "nearest", f"Leave the layer out with skip=['{layer.path}'].")
    return y if whole else build.island("add", y, constants={"other": _along(layer, bias, y)})
