"""Layers as integer products: their geometry, their weights as codes, and how large their sums can become."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_lowbit.errors import InvariantError, UnsupportedModelError
from lightning_lowbit.export.program_check import MOST
from lightning_lowbit.graph.fold import per_output
from lightning_lowbit.modules.layers import padding_of

__all__ = ["geometry", "product_bounds", "product_shape", "whole_codes"]

Array = np.ndarray[Any, Any]
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def geometry(layer: Any, shape: tuple[int, ...], wanted: Any = None) -> tuple[str, dict[str, Any]]:
    """Kind of a layer's product, and its attributes for an input of that shape.

    Args:
        layer: convolution, transposed convolution or linear layer.
        shape: of its input.
        wanted: size of the output that the call asks for (transposed ones).

    Raises:
        UnsupportedModelError: a layer of another kind, or an input without a batch.
    """
    if isinstance(layer, nn.Linear):
        return "linear", {}
    path = str(getattr(layer, "path", type(layer).__name__))
    if not isinstance(layer, (*_CONVS, *_TRANSPOSED)):
        raise UnsupportedModelError(
            f"{path}: {type(layer).__name__} has no product. Leave it out with skip=['{path}']."
        )
    if len(shape) != len(layer.kernel_size) + 2:
        raise UnsupportedModelError(f"{path}: got an input of {len(shape)} axes, expected a batch of samples.")
    common = {"stride": list(layer.stride), "dilation": list(layer.dilation), "groups": layer.groups}
    if isinstance(layer, _TRANSPOSED):
        extra = list(layer.output_padding)
        if wanted is not None:
            sizes = zip(shape[2:], layer.stride, layer.padding, layer.dilation, layer.kernel_size, strict=True)
            plain = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in sizes]  # type: ignore[operator]  # numbers
            extra = [int(size) - n for size, n in zip(wanted[-len(plain) :], plain, strict=True)]
        return "conv_transpose", {**common, "padding": list(layer.padding), "output_padding": extra}
    sides = padding_of(layer) if layer.padding_mode == "zeros" else [(0, 0)] * len(layer.kernel_size)
    return "conv", {**common, "padding": [list(side) for side in sides]}


def product_shape(layer: Any, kind: str, attributes: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the product of an input of that shape."""
    if kind == "linear":
        return (*shape[:-1], layer.out_features)
    sizes = []
    for axis, (n, k) in enumerate(zip(shape[2:], layer.kernel_size, strict=True)):
        s, p, d = (attributes[name][axis] for name in ("stride", "padding", "dilation"))
        if kind == "conv":
            sizes.append((n + sum(p) - d * (k - 1) - 1) // s + 1)
        else:
            sizes.append((n - 1) * s - 2 * p + d * (k - 1) + 1 + attributes["output_padding"][axis])
    return (shape[0], layer.out_channels, *sizes)


def whole_codes(values: Tensor, exponents: Tensor, path: str, what: str, layer: Any) -> Array:
    """Values as the integers that they are on a grid, int64.

    Args:
        values: of a weight, or [C].
        exponents: of the step, [1], or [C] one per output.
        layer: whose weight it is; None of a vector.

    Raises:
        InvariantError: a value is no multiple of the step.
    """
    steps = torch.ldexp(torch.ones((), dtype=torch.float64), exponents.to(values.device, torch.float64))
    if len(steps) > 1 and layer is not None:
        steps = per_output(steps, values.double(), layer.out_axis, layer.groups)
    codes = values.detach().double() / steps
    off = codes != codes.round()
    if bool(off.any()):
        raise InvariantError(
            f"{path}: {int(off.sum())} values of its {what} are off the grid of step 2^{exponents.tolist()[:3]}, the "
            f"first {float(values.detach()[off].reshape(-1)[0])!r}. Please report it, with the model."
        )
    found: Array = codes.to(torch.int64).cpu().numpy()
    return found


def product_bounds(layer: Any, weight: Array, bias: Array | None, low: int, high: int) -> tuple[int, int]:
    """Between what all partial sums of a product lie, in any order, for inputs in [low, high] or the border's 0.

    Args:
        weight: codes, as the layer keeps its weight.
        bias: codes, [outputs] or None.
    """
    w = weight.astype(object) if max(-low, high) * int(np.abs(weight).sum()) >= MOST else weight
    ends = [np.minimum(np.minimum(w * low, w * high), 0), np.maximum(np.maximum(w * low, w * high), 0)]
    sums = [_per_output(part, layer) for part in ends]
    if bias is not None:
        sums = [sums[0] + np.minimum(bias, 0), sums[1] + np.maximum(bias, 0)]
    return int(sums[0].min()), int(sums[1].max())


def _per_output(terms: Array, layer: Any) -> Array:
    """Sums over all that one output adds up, [outputs]."""
    found: Array
    if isinstance(layer, _TRANSPOSED):
        grouped = terms.reshape(layer.groups, terms.shape[0] // layer.groups, terms.shape[1], -1)
        found = grouped.sum((1, 3)).reshape(-1)
    else:
        found = terms.reshape(terms.shape[0], -1).sum(1)
    return found
