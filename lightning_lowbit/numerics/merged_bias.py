"""Biases of layers with merged weights (TI Jacinto, edgeai QAT): on their own grid, or on that of the products.

A layer with inputs at s_x and weights at s_w codes per unit sums products at J = s_x * s_w codes per unit; J differs
by output channel where s_w does. Nothing here is differentiated, and no value is read on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lowbit.numerics.dtypes import wide
from lightning_lowbit.numerics.exponent import ceil2
from lightning_lowbit.numerics.merged import covered_range, quantize_weight
from lightning_lowbit.numerics.rounding import Rounding, round_to
from lightning_lowbit.numerics.ste import eager_cpu

__all__ = ["holding_scale", "own_scale", "products_bias", "quantize_bias", "reduce_weight_scale", "saturate_bias"]


def own_scale(bias: Tensor, bits: int, power2: bool = True) -> Tensor:
    """Codes per unit of a bias by itself, 2^(bits-1) / A with A the covered range of max |b|; one per layer.

    >>> own_scale(torch.tensor([0.3, -0.6]), 8)
    tensor(128.)
    """
    b = wide(bias.detach())
    return 2.0 ** (bits - 1) / covered_range(b.abs().amax(), power2)


def quantize_bias(bias: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The bias on its own grid: as :func:`lightning_lowbit.numerics.merged.quantize_weight`, ties away from zero.

    >>> quantize_bias(torch.tensor([-0.75, 0.25, 0.2, 9.0]), torch.tensor(2.0), 3).tolist()
    [-1.0, 0.5, 0.0, 1.5]
    """
    return quantize_weight(bias, scale, bits)


def saturate_bias(
    bias_q: Tensor,
    bias_scale: Tensor,
    input_low: Tensor,
    input_high: Tensor,
    weight_scale: Tensor,
    weight_bits: int,
    act_bits: int,
) -> Tensor:
    """What remains of a bias in an accelerator that adds it as one weight times the greatest input code.

        q = 2^(weight_bits-1) - 1 (inputs from below 0), else 2^weight_bits - 1;  r = trunc(J / s_b)
        r <= q    t = trunc(b J)
        r >  q    t = q clamp(trunc(b J / q), -2^(weight_bits-1), 2^(weight_bits-1) - 1)
        result    t / J

    With inputs in a small range J is large, and little of the bias fits.

    Args:
        bias_q: [out], on its own grid.
        bias_scale: s_b, codes per unit of that grid.
        input_low, input_high: limits of the layer's input, 0-dim, input_high > 0.
        weight_scale: s_w, 0-dim or [out].
        weight_bits: width of weights and bias.
        act_bits: width of the input's codes.
    Returns:
        [out], dtype of bias_q.

    >>> def saturated(bias: float, high: float) -> float:
    ...     limits = torch.tensor(0.0), torch.tensor(high)
    ...     return saturate_bias(torch.tensor([bias]), torch.tensor(128.0), *limits, torch.tensor(128.0), 8, 8).item()
    >>> saturated(0.8671875, 1.0), saturated(0.8671875, 2.0**-6)  # J 2^15 and 2^21
    (0.863800048828125, 0.015442371368408203)
    """
    half = 2.0 ** (weight_bits - 1)
    signed = input_low < 0
    s_x = _input_scale(signed, input_high, act_bits)
    j = s_x * weight_scale
    q = torch.where(signed, half - 1, 2 * half - 1).to(j.dtype)
    products = bias_q * j
    # The published rule limits the products to 2 weight_bits signed bits first, which this clamp implies.
    units = torch.trunc(products / q).clamp(-half, half - 1)
    t = torch.where(torch.trunc(j / bias_scale) > q, units * q, torch.trunc(products))
    return t / j


def reduce_weight_scale(
    weight_scale: Tensor, bias: Tensor, input_low: Tensor, input_high: Tensor, weight_bits: int, act_bits: int
) -> Tensor:
    """min(s_w, 2^(2 weight_bits - 1) / (ceil2(max |b|) s_x)): coarser weights, so that the bias fits its products.

    Args:
        weight_scale: s_w of any shape, before the weights are quantized with it.
        bias: [out], not quantized.
        input_low, input_high, weight_bits, act_bits: as of :func:`saturate_bias`.
    Returns:
        shape of weight_scale.

    >>> limits = torch.tensor(0.0), torch.tensor(2.0**-6)
    >>> reduce_weight_scale(torch.tensor([128.0, 0.5]), torch.tensor([0.87]), *limits, 8, 8).tolist()
    [2.0, 0.5]
    """
    s_x = _input_scale(input_low < 0, input_high, act_bits)
    return torch.minimum(weight_scale, own_scale(bias, 2 * weight_bits) / s_x)


def holding_scale(bias: Tensor, products_scale: Tensor, bits: int = 32) -> Tensor:
    """J, divided by the least power of two with which codes of ``bits`` hold the bias: J itself where they do.

    Products of 16-bit codes count in units so small that an ordinary bias is more than 2^31 of them. The grid that is
    left is a multiple of theirs, so the bias is shifted when it is added.

    Args:
        bias: [out].
        products_scale: J, codes per unit, 0-dim or [out].
    Returns:
        0-dim or [out], float64.

    >>> holding_scale(torch.tensor([50.0, 1.0]), torch.tensor(2.0**33)).log2().item()
    25.0
    """
    b = wide(bias.detach()).to(torch.float64)
    j = products_scale.to(torch.float64)
    largest, most = (b * j).abs(), 2.0 ** (bits - 1) - 1
    largest = largest.amax() if j.dim() == 0 else largest
    if largest.dim() == 0 and eager_cpu(b) and float(largest) <= most:  # nearly always, and half of the work
        return j
    return j / ceil2((largest / most).clamp(min=1.0))


def products_bias(bias: Tensor, products_scale: Tensor, bits: int = 32) -> Tensor:
    """The bias on the grid of the products: round(b J) / J, ties away from zero, computed in float64.

    J is that of :func:`holding_scale`. Where it is a power of two the result is exact: a float32 bias has 24 digits, so
    its code of up to 32 bits keeps them. With any other J a unit is what the bias's dtype holds of 1 / J, and a code of
    more than 22 bits is within one unit of what float32 can tell.

    Args:
        bias: [out]; half-precision types are computed in float32.
        products_scale: J, codes per unit, 0-dim or [out].
        bits: width of a code.
    Returns:
        [out], float64 for a float64 bias, else float32.

    >>> products_bias(torch.tensor([0.625, -0.625, 0.3]), torch.tensor(4.0)).tolist()
    [0.75, -0.75, 0.25]
    >>> products_bias(torch.tensor([40.25, 0.3]), torch.tensor(4.0), bits=8).tolist()  # 161 units: counted in halves
    [40.5, 0.5]
    """
    b, j = wide(bias.detach()), holding_scale(bias, products_scale, bits)
    codes = round_to(b.to(torch.float64) * j, Rounding.HALF_AWAY)
    return (codes * (1 / j).to(b.dtype)).to(b.dtype)


def _input_scale(signed: Tensor, high: Tensor, act_bits: int) -> Tensor:
    """Codes per unit of the layer's input."""
    return torch.where(signed, 2.0 ** (act_bits - 1), 2.0**act_bits).to(high.dtype) / high
