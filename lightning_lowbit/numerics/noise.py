"""Random integers as a pure function of keys: equal on every device, instruction set and thread count.

No generator state: the bits of sample i do not depend on which process or batch position computes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, overload

import torch
from torch import Tensor

from lightning_lowbit.numerics.ste import eager_cpu

__all__ = ["combine", "counter_bits", "counter_bits_reference", "counter_floats"]

_WORD = 0xFFFFFFFF
# The multipliers modulo 2^32; as int32, so that a product is one.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_SLICE = 1 << 16  # elements per thread and pass: the words of one slice stay in cache
_DEVICE_SLICES = 1 << 6  # slices per pass elsewhere, where calls cost more than memory
_FEW_SAMPLES = 16  # are combined faster by Python than by some 50 operations of torch


def _mix(x: Any) -> Any:
    """Bijection of 32-bit words in which every input bit flips every output bit with probability near 1/2.

    Wellons' "lowbias32". The words live in int64 and the second multiplier is 0x846CA68B - 2^32: every product
    stays below 2^63 in magnitude, and the mask takes it modulo 2^32.
    """
    x = x ^ (x >> 16)
    x = (x * _FIRST) & _WORD
    x = x ^ (x >> 15)
    x = (x * _SECOND) & _WORD
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
        per_sample: elements of one sample, at most 2**32.
    Returns:
        integers in [0, 2**31), int32, (N, per_sample); row i depends on key and samples[i] only.

    >>> counter_bits(combine(1), torch.tensor([0, 7]), 3).tolist()
    [[1737850331, 347256913, 567992406], [1330646226, 562449950, 1303678400]]
    """
    if torch.compiler.is_compiling():
        return counter_bits_reference(key, samples, per_sample)
    bits = torch.empty((samples.numel(), per_sample), dtype=torch.int32, device=samples.device)
    for out, word, spare in _raw_words(key, samples, bits):
        _last_step(word, spare, 1, out)
    return bits


def counter_bits_reference(key: int | Tensor, samples: Tensor, per_sample: int) -> Tensor:
    """:func:`counter_bits` as its definition reads, in int64: slow, what a compiler fuses, and what that equals."""
    rows = torch.as_tensor(combine(key, samples.to(torch.int64))).unsqueeze(1)
    element = torch.arange(per_sample, device=samples.device)
    # Two keyed rounds: with one, rows whose low words are near would hold the same words in another order.
    bits: Tensor = _mix(_mix(element ^ (rows & _WORD)) ^ (rows >> 32)) >> 1
    return bits.to(torch.int32)


def counter_floats(key: int | Tensor, samples: Tensor, per_sample: int) -> Tensor:
    """The first 24 of the bits of :func:`counter_bits` as uniform multiples of 2^-24 in [0, 1).

    Returns:
        float32, (N, per_sample).

    >>> counter_floats(combine(1), torch.tensor([0]), 3).mul(2**24).int().tolist()
    [[13576955, 2712944, 4437440]]
    """
    if torch.compiler.is_compiling():
        return (counter_bits_reference(key, samples, per_sample) >> 7).to(torch.float32) * 2.0**-24
    floats = torch.empty((samples.numel(), per_sample), dtype=torch.float32, device=samples.device)
    for out, word, spare in _raw_words(key, samples, floats):
        out.copy_(_last_step(word, spare, 8, word)).mul_(2.0**-24)
    return floats


def _raw_words(key: int | Tensor, samples: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The pieces of out (N, per_sample), and for each its words before the last step of `_mix`, and a buffer.

    In int32, whose products wrap as those of unsigned words do. A xor commutes with x ^ (x >> 16), so that this step
    is taken of the elements once and of each row; and it undoes itself, so that it drops out between the rounds.
    """
    if not out.numel():
        return
    rows = _rows(key, samples).unsqueeze(1)
    rows = rows ^ ((rows >> 16) & 0x0000FFFF_0000FFFF)  # both halves at once
    low, high = rows.to(torch.int32), (rows >> 32).to(torch.int32)  # the low 32 bits of each
    size = _SLICE * (torch.get_num_threads() if out.device.type == "cpu" else _DEVICE_SLICES)
    width = min(size, out.shape[1])
    height = min(max(1, size // width), out.shape[0])
    word, spare = (torch.empty((height, width), dtype=torch.int32, device=out.device) for _ in range(2))
    for start in range(0, out.shape[1], width):
        columns = out[:, start : start + width]
        element = _elements(start, start + columns.shape[1], out.device)
        for part, low_part, high_part in zip(*(torch.split(x, height) for x in (columns, low, high)), strict=True):
            if part.shape != word.shape:
                word, spare = (x[: part.shape[0], : part.shape[1]] for x in (word, spare))
            torch.bitwise_xor(element, low_part, out=word)
            _multiply(word, spare).bitwise_xor_(high_part)
            yield part, _multiply(word, spare), spare


def _elements(start: int, stop: int, device: torch.device) -> Tensor:
    """x ^ (x >> 16) of the words start to stop - 1: int32."""
    element = torch.arange(start, stop, device=device)
    return (element ^ (element >> 16)).to(torch.int32)


def _rows(key: int | Tensor, samples: Tensor) -> Tensor:
    """combine(key, sample) of each sample: int64, (N,)."""
    if isinstance(key, int) and samples.numel() <= _FEW_SAMPLES and eager_cpu(samples):
        return torch.tensor([combine(key, sample) for sample in samples.tolist()])
    return torch.as_tensor(combine(key, samples.to(torch.int64)))


def _multiply(x: Tensor, spare: Tensor) -> Tensor:
    """`_mix` between its first and its last step, in place."""
    x.mul_(_FIRST)
    torch.bitwise_right_shift(x, 15, out=spare)  # copies of the sign come in
    return x.bitwise_xor_(spare.bitwise_and_(_WORD >> 15)).mul_(_SECOND)


def _last_step(x: Tensor, spare: Tensor, drop: int, out: Tensor) -> Tensor:
    """The last step of `_mix`, less its lowest bits: out = (x ^ (x >> 16)) >> drop; overwrites x."""
    x.bitwise_right_shift_(drop).bitwise_and_(_WORD >> drop)
    return torch.bitwise_xor(x, torch.bitwise_right_shift(x, 16, out=spare), out=out)
