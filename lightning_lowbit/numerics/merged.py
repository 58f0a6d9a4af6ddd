"""Fake quantization of weights that a batch norm is merged into (TI Jacinto, edgeai QAT): ranges, codes, constraint.

Every range comes from the weights of this step and nothing here is trained or differentiated: the gradient goes
through the float network. No value is read on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lowbit.numerics.dtypes import wide
from lightning_lowbit.numerics.exponent import ceil2
from lightning_lowbit.numerics.percentile import percentile_range

__all__ = ["TINY", "constrain_weight", "covered_range", "inside", "quantize_weight", "unmerge", "weight_scale"]

TINY = 2.0**-16
"""The least range: a layer of zeros still has a scale."""

_LARGEST_GAIN = 256.0  # of a channel's own scale over that of the whole layer
_OUTLIER = 15.0  # weights up to here are never constrained
_OUTLIER_RATIO = 16.0  # nor are those up to here times the median magnitude
_SLICE = 1 << 17  # elements: a slice and its scratch share the L2 cache, calls stay few


def covered_range(largest: Tensor, power2: bool = True) -> Tensor:
    """A = max(largest, 2^-16), raised to a power of two (ceil2) where asked: what the codes of a grid cover.

    Of inf and NaN no range remains: NaN, and so becomes every weight.

    Args:
        largest: magnitudes >= 0 of any shape, float32 or float64.

    >>> covered_range(torch.tensor([0.0, 2.0**-17, 0.26, 0.5, 0.5000001, 3.0, 4.0, float("nan")])).tolist()
    [1.52587890625e-05, 1.52587890625e-05, 0.5, 0.5, 1.0, 4.0, 4.0, nan]
    >>> covered_range(torch.tensor([0.0, 3.0]), power2=False).tolist()
    [1.52587890625e-05, 3.0]
    """
    a = largest.clamp(min=TINY)
    return ceil2(a) if power2 else a


def weight_scale(
    weight: Tensor,
    bits: int,
    *,
    power2: bool = True,
    per_channel: bool = False,
    out_axis: int = 0,
    groups: int = 1,
    percent: float = 0.0,
    cap: float | None = None,
) -> Tensor:
    """Codes per unit, 2^(bits-1) / A, where A is the covered range of max |w|: always symmetric, always signed.

    Per channel, a scale is at most 256 times that of the whole layer: a channel of nearly nothing would ask for
    a shift that no accumulator has.

    Args:
        weight: [out, ...], or [in, out / groups, ...] with ``out_axis=1`` (transposed convolution), where group g
            owns the g-th of the ``groups`` equal parts of axis 0.
        bits: width of a code.
        power2: raise A to a power of two; without, A is max |w| itself.
        per_channel: one scale per output channel and group.
        percent: leave out this share of the weights at either end, in percent of the layer; 0 covers all.
        cap: largest max |w|; weights beyond are clipped.
    Returns:
        0-dim, or shaped to broadcast against weight; float64 for float64 weights, else float32.

    >>> weight_scale(torch.tensor([[0.3, -0.1], [0.02, 0.01]]), 8)
    tensor(256.)
    >>> weight_scale(torch.tensor([[0.3, -0.1], [0.02, 0.01], [0.0, 0.0]]), 8, per_channel=True).tolist()
    [[256.0], [4096.0], [65536.0]]
    >>> weight_scale(torch.tensor([0.5, -9.0]), 4, cap=4.0)
    tensor(2.)
    """
    w = wide(weight.detach())
    largest = _largest(w, out_axis, groups) if per_channel else torch.maximum(w.amax(), -w.amin())
    if percent > 0:
        largest = torch.minimum(largest, percentile_range(w, percent).abs().amax())
    if cap is not None:
        largest = largest.clamp(max=cap)
    codes = 2.0 ** (bits - 1)
    scale = codes / covered_range(largest, power2)
    if not per_channel:
        return scale
    return torch.minimum(scale, _LARGEST_GAIN * codes / covered_range(largest.amax(), power2))


def _largest(w: Tensor, out_axis: int, groups: int) -> Tensor:
    """max |w| per output channel, shaped to broadcast against w."""
    ones = [1] * (w.dim() - 1)
    if out_axis == 0:
        rows = w.reshape(w.shape[0], -1)
        return torch.maximum(rows.amax(1), -rows.amin(1)).reshape(-1, *ones)
    per_group = w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)
    largest = torch.maximum(per_group.amax((1, 3), keepdim=True), -per_group.amin((1, 3), keepdim=True))
    if groups == 1:
        return largest.reshape(1, -1, *ones[1:])
    return largest.expand(-1, per_group.shape[1], -1, -1).reshape(*w.shape[:2], *ones[1:])


def quantize_weight(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """clamp(round(w * scale), -2^(bits-1), 2^(bits-1) - 1) * (1 / scale); ties away from zero, NaN stays NaN.

        w * scale    -9  -8.5  -1.5  -0.5  0.49999997  0.5  1.5  6.5   8      (bits = 4)
        code         -8   -8    -2    -1       0        1    2    7    7

    A weight equal to A saturates one code below it; -A is a code.

    Args:
        weight: any shape; half-precision types are computed in float32.
        scale: 0-dim, or broadcastable against weight.
        bits: width of a code, up to 24 in float32.
    Returns:
        dtype of scale, shape and memory format of weight; no gradient.

    >>> v = torch.tensor([-9, -8.5, -1.5, -0.5, 0.49999997, 0.5, 1.5, 6.5, 8, float("nan")])
    >>> [x + 0 for x in quantize_weight(v, torch.tensor(1.0), 4).tolist()]
    [-8.0, -8.0, -2.0, -1.0, 0.0, 1.0, 2.0, 7.0, 7.0, nan]
    """
    w = weight.detach()
    if w.numel() <= _SLICE or w.device.type != "cpu" or torch.compiler.is_compiling():
        return _quantize(w, scale, bits, torch.empty_like(w, dtype=scale.dtype))
    y = torch.empty_like(w, dtype=scale.dtype)
    rows = max(1, _SLICE * torch.get_num_threads() * w.shape[0] // w.numel())
    per_row = scale.dim() == w.dim() and scale.shape[0] > 1
    for i in range(0, w.shape[0], rows):
        part = slice(i, i + rows)
        _quantize(w[part], scale[part] if per_row else scale, bits, y[part])
    return y


def _quantize(w: Tensor, scale: Tensor, bits: int, out: Tensor) -> Tensor:
    # trunc(v + copysign(0.5, v)), but 0.49999997 + 0.5 is 1 in float32: where |v| < 0.5 the clamp adds v itself, and
    # 2v truncates to 0. It also takes a third of the time of copysign; truncating division by 1 is vectorized on
    # the CPU, torch.trunc is not: a tenth of the time.
    v = torch.mul(w.to(scale.dtype), scale, out=out)
    v.add_(v.clamp(-0.5, 0.5)).div_(1.0, rounding_mode="trunc")
    return v.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).mul_(scale.reciprocal())


def inside(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Whether -A <= w <= A for A = 2^(bits-1) / scale: where the gradient of a quantized weight passes.

    The limit itself is inside, though its code saturates: a range taken from max |w| excludes nothing. NaN is
    outside.

    Returns:
        bool, shape of weight.

    >>> inside(torch.tensor([-1.01, -1.0, 0.0, 1.0, 1.01]), torch.tensor(8.0), 4).tolist()
    [False, True, True, True, False]
    """
    # In codes, as quantize_weight multiplies: where A is no power of two, 128 / (128 / A) may fall short of A.
    codes = weight.detach().to(scale.dtype) * scale
    return codes.abs_() <= 2.0 ** (bits - 1)


def constrain_weight(weight: Tensor) -> Tensor:
    """Clip outliers that would take the codes of all other weights, once before training starts.

    For M = max |w| and m = median |w|, if M > 15 and M > 16 m: A = ceil2(min(M, 16 m)), and w is clipped to
    120/128 of A, eight codes of eight bits below the end. Where more than half of the weights are 0, m tells
    nothing of the others and nothing is clipped; NaN clips nothing either.

    Args:
        weight: merged weights of one layer, any shape.
    Returns:
        clipped weights, dtype and shape of weight; no gradient.

    >>> constrain_weight(torch.tensor([40.0, -0.5, 0.5, 0.25, -33.0])).tolist()  # A = 8
    [7.5, -0.5, 0.5, 0.25, -7.5]
    >>> constrain_weight(torch.tensor([15.0, 0.1, 0.1])).tolist() == [15.0, *torch.full((2,), 0.1).tolist()]
    True
    """
    w = wide(weight.detach())
    magnitude = w.abs()
    largest, median = magnitude.amax(), _OUTLIER_RATIO * magnitude.median()
    limit = covered_range(torch.minimum(largest, median)) * (120 / 128)
    outlying = (largest > _OUTLIER) & (largest > median) & (median > 0)
    limit = torch.where(outlying, limit, torch.inf)
    return torch.clamp(w, -limit, limit).to(weight.dtype)


def unmerge(weight: Tensor, factor: Tensor, eps: float, master: Tensor, floor: bool = False) -> Tensor:
    """Undo a merge, W = w / s: write a merged weight back into the float weight it came from.

        |s|      > eps    <= eps
        plain    w / s    master
        floor    w / s    w / (eps with the sign of s)    as published: a channel with s = 0 is 0 from then on

    Args:
        weight: merged weights.
        factor: s = gamma / sqrt(var + eps), broadcastable against weight.
        eps: of the batch norm.
        master: the float weights, kept where s cannot be divided by.
    Returns:
        dtype and shape of weight.

    >>> w, s = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([-2.0, 0.0, -0.0])
    >>> unmerge(w, s, 0.5, torch.tensor([7.0, 8.0, 9.0])).tolist()
    [-1.5, 8.0, 9.0]
    >>> unmerge(w, s, 0.5, torch.tensor([7.0, 8.0, 9.0]), floor=True).tolist()
    [-1.5, 2.0, -0.0]
    """
    weight, factor = weight.detach(), factor.detach()
    if floor:
        return weight / torch.copysign(factor.abs().clamp(min=eps), factor)
    return torch.where(factor.abs() > eps, weight / factor, master.detach())
