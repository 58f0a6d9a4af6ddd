"""NITI's rules for exponents and payloads: shifts from bit widths, weights and inputs to int8, weight decay."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lowbit.numerics.block import bit_width
from lightning_lowbit.numerics.exponent import ceil_log2, clamp_exponent, pow2

__all__ = [
    "EMPTY_EXPONENT",
    "PAYLOAD_BITS",
    "act_shift",
    "decayed",
    "drawn_range",
    "grad_shift",
    "input_codes",
    "weight_codes_maxnorm",
]

PAYLOAD_BITS = 7
"""Magnitude bits of an int8 payload."""
EMPTY_EXPONENT = -PAYLOAD_BITS
"""Exponent of a tensor that is all zeros: that of the range 1."""
_DECAY_BITS = 15


def act_shift(width: Tensor) -> Tensor:
    """Right shift that brings accumulators of ``width`` bits, activations or errors, to 7 bits and sign.

    Nothing is ever shifted left: small numbers stay small. A width of 7 includes magnitude 128, so that the
    unshifted payload must be clipped.

    >>> act_shift(torch.tensor([0, 6, 7, 8, 31], dtype=torch.int32)).tolist()
    [0, 0, 0, 1, 24]
    """
    return (width - PAYLOAD_BITS).clamp(min=0)


def grad_shift(width: Tensor, mu: int | Tensor) -> Tensor:
    """Right shift that brings weight gradients of ``width`` bits to ``mu`` bits: the update is at most 2^mu.

    Where the width is 0 (no magnitude above 1) the update is zero by definition: multiply it by (width > 0).
    The shift of 0 returned there is what the exponent is advanced by, and would pass +-1 on.

    Args:
        width: bit width of the accumulators, int32, 0-dim or one per layer.
        mu: bits of an update, possibly negative: at -1 even the largest gradient is only a chance of 1.

    >>> width = torch.tensor([0, 1, 5, 6, 20], dtype=torch.int32)
    >>> grad_shift(width, 5).tolist(), grad_shift(width, -1).tolist()
    ([0, 0, 0, 1, 15], [0, 2, 6, 7, 21])
    """
    return torch.where(width > 0, (width - mu).clamp(min=0), torch.zeros_like(width))


def decayed(acc: Tensor, weight: Tensor) -> Tensor:
    """Weight decay on the gradient's accumulators: acc + w * 2^(bw - 15), truncated toward zero if that divides.

    A weight of 127 adds up to 2^-8 of the largest gradient, whatever the gradient's size.

    Args:
        acc: weight gradient, int32 or int64, any shape; bw is its bit width.
        weight: payload, int8, same shape.

    Returns:
        int64, same shape: near 2^31 the sum leaves int32.

    >>> decayed(torch.tensor([1 << 16, 0]), torch.tensor([-3, 127], dtype=torch.int8)).tolist()  # bw = 16
    [65530, 254]
    >>> decayed(torch.tensor([1 << 13, 0]), torch.tensor([-7, 127], dtype=torch.int8)).tolist()  # bw = 13
    [8191, 31]
    """
    gain = bit_width(acc).to(torch.int64) - _DECAY_BITS
    one = torch.ones_like(gain)
    term = weight.to(torch.int64) * (one << gain.clamp(min=0))
    return acc.to(torch.int64) + torch.div(term, one << (-gain).clamp(min=0), rounding_mode="trunc")


def weight_codes_maxnorm(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights drawn at random to int8, scaled so that the largest is +-127 (NITI, sec. Initialization).

    q = round_half_even(w / R * 127), s = ceil(log2 R) - 7, R = max|w|: the real weights grow by 127 * 2^s / R,
    between 0.992 and 1.984. Right for a draw, wrong for trained weights: those take ``input_codes(narrow=True)``.

    Args:
        weight: float, finite, any shape.

    Returns:
        payload int8 in [-127, 127], and its exponent, int32, 0-dim.

    >>> for values in ([1.0, -0.5, 0.25], [1.01, 0.0], [0.0, 0.0], [2.0**-149, 0.0]):
    ...     codes, exponent = weight_codes_maxnorm(torch.tensor(values))
    ...     print(codes.tolist(), exponent.item())
    [127, -64, 32] -7
    [127, 0] -6
    [0, 0] -7
    [127, 0] -149
    """
    weight = _as_float(weight)
    largest = _largest(weight)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    # In this order: 127 / R would overflow for the smallest R, and w / R rounds as the published code does.
    codes = torch.round(weight / scale * 127).to(torch.int8)
    return codes, _exponent_of(largest)


def drawn_range(shape: Sequence[int]) -> int:
    """Exponent of the range of a Xavier uniform draw: ceil(log2 sqrt(6 / (fan_in + fan_out))), fans as (O, I, kH, kW).

    >>> drawn_range((64, 64)), drawn_range((10, 64)), drawn_range((128, 128, 3, 3)), drawn_range((3, 3))
    (-2, -1, -4, 0)
    """
    outputs, inputs, *window = shape
    return math.ceil(math.log2(6 / ((outputs + inputs) * math.prod(window))) / 2)


def input_codes(x: Tensor, range_exponent: Tensor | int | None = None, narrow: bool = False) -> tuple[Tensor, Tensor]:
    """Floats to int8 on a pure power-of-two grid: q = clamp(round_half_even(x * 2^(7-b)), -128, 127).

    Args:
        x: float, any shape, possibly empty; bfloat16 and float16 count as float32.
        range_exponent: b, the log2 of the range: values are clipped to [-2^b, 2^b). None takes the least b with
            2^b >= max|x|, as training does; evaluation hands in the one it has frozen.
        narrow: clip at +-127 instead, for weights that were trained in float.

    Returns:
        payload int8 and its exponent b - 7, int32, 0-dim, clamped to [-149, 120].

    >>> for values in ([-1.0, 1.0, 0.5], [1.01, -0.0118], [0.0], [2.0**-149, -(2.0**-148)]):
    ...     codes, exponent = input_codes(torch.tensor(values))
    ...     print(codes.tolist(), exponent.item())
    [-128, 127, 64] -7
    [65, -1] -6
    [0] -7
    [1, -2] -149
    >>> [int(c) for c in input_codes(torch.tensor([-1.0, 3.0]), range_exponent=0, narrow=True)[0]]
    [-127, 127]
    """
    x = _as_float(x)
    if range_exponent is None:
        exponent = _exponent_of(_largest(x))
    else:
        exponent = _clamped(torch.as_tensor(range_exponent, device=x.device))
    codes = _scaled(x, -exponent).round_().clamp_(-127 if narrow else -128, 127)
    return codes.to(torch.int8), exponent


def _as_float(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax() if x.numel() else x.new_zeros(())


def _exponent_of(largest: Tensor) -> Tensor:
    return torch.where(largest > 0, _clamped(ceil_log2(largest)), torch.full_like(largest, EMPTY_EXPONENT).int())


def _clamped(range_exponent: Tensor) -> Tensor:
    return clamp_exponent(range_exponent.to(torch.int32) - PAYLOAD_BITS)


def _scaled(x: Tensor, shift: Tensor) -> Tensor:
    """x * 2**shift in two factors: 2^149 is no float32. Where the first underflows the result stays below 1/2."""
    half = torch.div(shift, 2, rounding_mode="trunc")
    return x * pow2(half, x.dtype) * pow2(shift - half, x.dtype)
