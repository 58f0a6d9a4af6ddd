"""Random integers as a pure function of keys: equal on every device, instruction set and thread count.

No generator state: the bits of sample i do not depend on which process or batch position computes them.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

__all__ = ["combine", "counter_bits"]

_WORD = 0xFFFFFFFF
_SLICE = 1 << 16  # elements per pass: the int64 words of one slice stay in cache


def _mix(x: Any) -> Any:
    """Bijection of 32-bit words in which every input bit flips every output bit with probability near 1/2.

    Wellons' "lowbias32". The words live in int64 and the second multiplier is 0x846CA68B - 2^32: every product
    stays below 2^63 in magnitude, and the mask takes it modulo 2^32.
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * -0x7B935975) & _WORD
    return x ^ (x >> 16)


@overload
def combine(*words: int) -> int: ...
@overload
def combine(*words: int | Tensor) -> int | Tensor: ...
def combine(*words: int | Tensor) -> int | Tensor:
    """Fold words (a seed, a step, the crc32 of a layer's name, ...) into one key; their order counts.

    Two tuples of equal length that differ in one word never give one state, and keys collide about as 63 random
    bits do.

    Args:
        words: ints or int64 tensors (broadcast against each other); the low 64 bits count.
    Returns:
        key in [0, 2**63): an int, or an int64 tensor if any word is one.

    >>> combine(1234, 0), combine(0, 1234)
    (7821530628748997354, 130391712686725383)
    """
    low: Any = 0x243F6A88
    high: Any = 0x85A308D3
    for word in words:
        low, high = low ^ (word & _WORD), high ^ ((word >> 32) & _WORD)
        # Three Feistel rounds: a bijection of the 64 bits of state.
        high = high ^ _mix(low)
        low = low ^ _mix(high)
        high = high ^ _mix((low + 0x13198A2E) & _WORD)
    key: int | Tensor = ((high & 0x7FFFFFFF) << 32) | low
    return key


def counter_bits(key: int | Tensor, samples: Tensor, per_sample: int) -> Tensor:
    """31 uniform bits for every element of every sample.

    Args:
        key: from :func:`combine`; an int or int64 0-dim tensor.
        samples: global indices of the samples, int64, (N,).
        per_sample: elements of one sample, below 2**32.
    Returns:
        integers in [0, 2**31), int32, (N, per_sample); row i depends on key and samples[i] only.

    >>> counter_bits(combine(1), torch.tensor([0, 7]), 3).tolist()
    [[1737850331, 347256913, 567992406], [1330646226, 562449950, 1303678400]]
    """
    rows = torch.as_tensor(combine(key, samples.to(torch.int64))).unsqueeze(1)
    element = torch.arange(per_sample, device=samples.device)
    bits = torch.empty((samples.numel(), per_sample), dtype=torch.int32, device=samples.device)
    whole = torch.compiler.is_compiling()  # what is fused needs no slices
    size = max(1, samples.numel() if whole else _SLICE // max(per_sample, 1))
    for row, out in zip(torch.split(rows, size), torch.split(bits, size), strict=True):
        # Two keyed rounds: with one, rows whose low words are near would hold the same words in another order.
        out.copy_(_mix(_mix(element ^ (row & _WORD)) ^ (row >> 32)) >> 1)
    return bits
