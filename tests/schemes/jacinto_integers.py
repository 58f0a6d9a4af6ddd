"""Jacinto's arithmetic in int64, hop by hop, from float parameters, statistics and observed ranges alone.

Written from the formulas: no rounding, scale or merge of the package is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lowbit.modules.clipped import ClipQuantizer

__all__ = ["Codes", "add", "codes", "joined", "layer", "mean", "pooled"]


@dataclass(frozen=True)
class Codes:
    """Integers worth 2**-fraction each."""

    values: Tensor  # int64
    fraction: int

    def real(self) -> Tensor:
        return self.values.double() * 2.0**-self.fraction


@dataclass(frozen=True)
class _Format:
    fraction: int
    low: int
    high: int


def _ceil_log2(value: float) -> int:
    mantissa, exponent = math.frexp(max(value, 2.0**-16))
    return exponent - (mantissa == 0.5)


def _format(quantizer: ClipQuantizer) -> _Format:
    """A = ceil2 of the larger end, of the upper one where nothing is negative; members of a concat share the widest."""
    members = [m for m in quantizer.group if isinstance(m, ClipQuantizer)]
    ends = [(0.0 if m.flag is False else float(m.clips[0]), float(m.clips[1])) for m in members]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    bits = quantizer.form.bits
    signed = low < 0
    limit = _ceil_log2(max(abs(low), abs(high)) if signed else abs(high))
    if signed:
        return _Format(bits - 1 - limit, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return _Format(bits - limit, 0, 2**bits - 1)


def _requantized(numerator: Tensor, fraction: int, to: _Format, divisor: int = 1) -> Codes:
    """floor(numerator / divisor * 2**(to.fraction - fraction) + 1/2), then saturated."""
    shift = to.fraction - fraction
    if shift >= 0:
        numerator = numerator << shift
    else:
        divisor = divisor << -shift
    code = torch.div(2 * numerator + divisor, 2 * divisor, rounding_mode="floor")
    return Codes(code.clamp(to.low, to.high), to.fraction)


def codes(x: Tensor, quantizer: ClipQuantizer) -> Codes:
    """A float tensor on a grid."""
    to = _format(quantizer)
    code = torch.floor(x.double() * 2.0**to.fraction + 0.5).to(torch.int64)
    return Codes(code.clamp(to.low, to.high), to.fraction)


def _half_away(x: Tensor) -> Tensor:
    return (x.abs() + 0.5).floor().copysign(x).to(torch.int64)


def layer(x: Codes, module: Any, end: ClipQuantizer | None = None, bits: int = 8, rectify: bool = False) -> Codes:
    """A convolution or linear layer with its norm merged, int32 bias; requantized for ``end`` if there is one."""
    weight, bias, norm = module.weight.detach(), module.bias, module.norm
    bias = torch.zeros(len(weight)) if bias is None else bias.detach()
    if norm is not None:
        factor = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
        weight = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
        bias = norm.bias.detach() + (bias - norm.running_mean) * factor
    fraction = bits - 1 - _ceil_log2(float(weight.abs().max()))
    w = _half_away(weight.double() * 2.0**fraction).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    products = x.fraction + fraction
    b = _half_away(bias.double() * 2.0**products)
    assert int(b.abs().max()) < 2**31
    if weight.dim() == 2:
        acc = x.values @ w.t() + b
    else:
        settings = (module.stride, module.padding, module.dilation, module.groups)
        acc = F.conv2d(x.values, w, None, *settings) + b.reshape(1, -1, 1, 1)
    acc = acc.clamp(min=0) if rectify else acc
    return Codes(acc, products) if end is None else _requantized(acc, products, _format(end))


def add(a: Codes, b: Codes, end: ClipQuantizer) -> Codes:
    """The sum of two grids on the finer one, then requantized."""
    fraction = max(a.fraction, b.fraction)
    acc = (a.values << (fraction - a.fraction)) + (b.values << (fraction - b.fraction))
    return _requantized(acc, fraction, _format(end))


def joined(*parts: Codes) -> Codes:
    assert len({part.fraction for part in parts}) == 1
    return Codes(torch.cat([part.values for part in parts], 1), parts[0].fraction)


def pooled(x: Codes, size: int) -> Codes:
    """Max pool."""
    return Codes(F.max_pool2d(x.values.double(), size).to(torch.int64), x.fraction)  # exact: codes are small


def mean(x: Codes, end: ClipQuantizer) -> Codes:
    """Over the whole map, [n, C, 1, 1]."""
    sums = x.values.sum((2, 3), keepdim=True)
    return _requantized(sums, x.fraction, _format(end), x.values[0, 0].numel())
