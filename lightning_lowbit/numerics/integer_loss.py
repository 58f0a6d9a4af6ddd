"""Cross-entropy's error in integers alone: what NITI sends back from int8 logits."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.numerics.block import ShiftRounding, shift_round

__all__ = ["ERROR_EXPONENT", "cross_entropy_error", "extra_bits", "wide_error"]

ERROR_EXPONENT = -7
"""Exponent of the int8 error: err * 2^-7 is (p - y), rounded; the reference writes 0, and no update reads it."""

_LOG2E_15 = 47274
"""log2(e) = 1.442695 with 15 fraction bits: e^v = 2^(v log2 e), and powers of two are shifts."""
_OFFSET = 10
"""The row's largest logit becomes 2^10 - 1: ten bits are what the 11 of the probabilities can still resolve."""
_PROBABILITY_BITS = 11
"""p is floor(2^11 p): 12 bits with sign, of which the final shift drops 4; 8 bits at once would lose p < 1/256."""
_SHIFT = 4
_TAYLOR_FROM = -7
"""At exponents up to here every |logit| is below 1 (127 < 2^7): z would be 0 or +-1, so Taylor takes over."""
_LARGEST_EXPONENT = 32
"""Distinct logits times 2^32 are further apart than the offset: one-hot already."""
_SMALLEST_EXPONENT = -25
"""2^(1 - 2s) * 2^11 stays below 2^63 from here up."""
_LEVELS = 127


def extra_bits(classes: int) -> int:
    """Probability bits beyond 11 that so many classes need, lest a uniform p be floor(2^11 / C) = 0.

    >>> [extra_bits(c) for c in (1, 2, 10, 1000, 1024, 1025, 2048, 2049, 5000)]
    [0, 0, 0, 0, 0, 1, 1, 2, 3]
    """
    return max(0, (classes - 1).bit_length() - _OFFSET)


def wide_error(logits: Tensor, exponent: Tensor | int, target: Tensor, extra: int | None = None) -> Tensor:
    """P - y * sum(P), with P = floor(2^(11 + k) p): the error before its final shift (NITI, sec. Loss Function).

    Two approximations of e^v, v = logit * 2^s, chosen on the device::

        s > -7    2^z - 1, z = max(0, tdiv(tdiv(a * 47274, 2^15) * 2^s) - rowmax + 10)    0..1023
        else      2^(1-2s) + a * 2^(1-s) + a^2                       (1 + v + v^2/2) * 2^(1-2s)

    The factor 2^(1-2s) makes integers of all three terms and cancels in the normalization. Below s = -25
    (sooner with k > 0) it no longer fits: there a is divided, truncating, so that -25 serves.

    Args:
        logits: payload, int8, (N, C); real value is logits * 2**exponent.
        exponent: integer, 0-dim; never read by the host.
        target: class numbers in [0, C), int64, (N,).
        extra: k; None takes extra_bits(C), 0 is what was published.

    Returns:
        int64 (N, C) in [-2^(11+k), 2^(11+k)]; every row sums to 0.

    Raises:
        ConfigError: a shape or a dtype is another.

    >>> wide_error(torch.tensor([[0, 0], [1, 0], [127, -127]], dtype=torch.int8), 0, torch.tensor([0, 0, 1])).tolist()
    [[-1024, 1024], [-682, 682], [2048, -2048]]
    >>> wide_error(torch.tensor([[127, -128]], dtype=torch.int8), -7, torch.tensor([0])).tolist()  # 1/2 of 2.49 + 0.5
    [[-343, 343]]
    """
    _check(logits, target)
    k = extra_bits(logits.shape[1]) if extra is None else extra
    s = torch.as_tensor(exponent, device=logits.device).to(torch.int64)
    a = logits.to(torch.int64)
    # Both are computed, each with s clamped to its own range, because asking which would wait for the device.
    x = torch.where(s > _TAYLOR_FROM, _base_two(a, s), _taylor(a, s, k))
    p = _truncated(x << (_PROBABILITY_BITS + k), x.sum(1, keepdim=True))
    return p.scatter_add(1, target[:, None], -p.sum(1, keepdim=True))


def cross_entropy_error(
    logits: Tensor, exponent: Tensor | int, target: Tensor, noise: Tensor, extra: int | None = None
) -> Tensor:
    """The int8 error of cross-entropy, about 2^7 (p - y): ``wide_error`` shifted stochastically by 4 + k bits.

    The error of a sample is not divided by the batch's size: the rule of the weight gradient normalizes anyway.

    Args:
        logits: payload, int8, (N, C).
        exponent: integer, 0-dim.
        target: class numbers in [0, C), int64, (N,).
        noise: uniform random bits, any integer dtype, (N, C); the low 4 + k bits decide. A magnitude goes up
            where its dropped bits exceed them.
        extra: k; None takes extra_bits(C), 0 is what was published.

    Returns:
        int8 (N, C) in [-127, 127], at exponent ERROR_EXPONENT.

    Raises:
        ConfigError: a shape or a dtype is another.

    A wide error of 682 = 42 * 16 + 10 goes up below a noise of 10, and so does its negative in magnitude; 1024
    is exact, 2048 is clipped:

    >>> one = torch.tensor([0])
    >>> def errors(logits, noise, target=one, exponent=0):
    ...     row = torch.tensor([logits], dtype=torch.int8)
    ...     return cross_entropy_error(row, exponent, target, torch.full_like(row, noise)).tolist()[0]
    >>> [errors([3, 3, 3], noise) for noise in (0, 9, 10, 15, 16)]
    [[-86, 43, 43], [-85, 43, 43], [-85, 42, 42], [-85, 42, 42], [-86, 43, 43]]
    >>> errors([0, 0], 0), errors([0, 0], 15), errors([-127, 127], 0), errors([127, -127], 0), errors([5], 0)
    ([-64, 64], [-64, 64], [-127, 127], [0, 0], [0])
    """
    wide = wide_error(logits, exponent, target, extra)
    if noise.shape != logits.shape:
        raise ConfigError(
            f"cross_entropy_error: got noise of shape {tuple(noise.shape)}, expected {tuple(logits.shape)} as the "
            "logits; draw one number per logit."
        )
    shift = _SHIFT + (extra_bits(logits.shape[1]) if extra is None else extra)
    err = shift_round(wide, shift, ShiftRounding.STOCHASTIC, noise)
    return err.clamp(-_LEVELS, _LEVELS).to(torch.int8)


def _base_two(a: Tensor, s: Tensor) -> Tensor:
    """2^z - 1, the row's largest z at 10; classes 10 octaves below it get exactly 0."""
    s = s.clamp(_TAYLOR_FROM + 1, _LARGEST_EXPONENT)
    z = _truncated(a * _LOG2E_15, 1 << 15)
    z = _truncated(z * _shifted_one(s), _shifted_one(-s))
    z = (z - z.amax(1, keepdim=True) + _OFFSET).clamp(min=0)
    return _shifted_one(z) - 1


def _taylor(a: Tensor, s: Tensor, k: int) -> Tensor:
    """(1 + v + v^2/2) * 2^(1-2s) for |v| <= 1, positive throughout; 2^(12 + k - 2s) must fit int64."""
    smallest = _SMALLEST_EXPONENT + (k + 1) // 2
    a = _truncated(a, _shifted_one((smallest - s).clamp(max=8)))  # int8 / 2^8 truncates to 0, and so beyond
    s = s.clamp(smallest, _TAYLOR_FROM)
    return _shifted_one(1 - 2 * s) + a * _shifted_one(1 - s) + a * a


def _shifted_one(n: Tensor) -> Tensor:
    """2**max(n, 0) in integers."""
    return torch.ones_like(n) << n.clamp(min=0)


def _truncated(num: Tensor, den: Tensor | int) -> Tensor:
    """Divide, truncating toward zero: the published code relies on it for negative numbers."""
    return torch.div(num, den, rounding_mode="trunc")


def _check(logits: Tensor, target: Tensor) -> None:
    if logits.dtype != torch.int8 or logits.ndim != 2:
        raise ConfigError(
            f"integer cross-entropy: got logits {logits.dtype} {tuple(logits.shape)}, expected torch.int8 (N, C); "
            "hand over the payload, further dimensions moved into N."
        )
    if target.dtype != torch.int64 or target.shape != logits.shape[:1]:
        raise ConfigError(
            f"integer cross-entropy: got target {target.dtype} {tuple(target.shape)}, expected torch.int64 "
            f"({logits.shape[0]},), one class number per row; probabilities take the float loss."
        )
