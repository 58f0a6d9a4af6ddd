"""Operands of exact integer products wider than 8 bits: planes of 8-bit codes, and their sums put together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lowbit.kernels.fusion import is_dense
from lightning_lowbit.numerics.exponent import pow2
from lightning_lowbit.numerics.ste import slices

__all__ = ["Operand", "Plane", "digits", "together", "values_of"]


_SLICE = 1 << 17  # elements per thread and pass


class Plane(NamedTuple):
    """8-bit codes that count 2^shift units of their operand."""

    codes: Tensor
    shift: int


class Operand(NamedTuple):
    """A tensor as integers: the sum of codes * 2^shift over its planes, times 2^exponent.

    Args:
        planes: int8 codes, or one plane of uint8.
        exponent: int, or int32 0-dim on the codes' device.
    """

    planes: tuple[Plane, ...]
    exponent: Tensor | int


def digits(codes: Tensor, most: int) -> tuple[Plane, ...]:
    """Integers as planes: themselves where they are 8 bits wide, else signed digits to base 256.

    Args:
        codes: integers of any width, |codes| <= most < 2^31.
        most: the largest magnitude that there may be; it alone says how many planes there are.

    >>> [(plane.codes.tolist(), plane.shift) for plane in digits(torch.tensor([-300, 200, 1023]), 1023)]
    [([-44, -56, -1], 0), ([-1, 1, 4], 8)]
    """
    if codes.dtype in (torch.int8, torch.uint8):
        return (Plane(codes, 0),)
    planes, shift, rest = [], 0, codes.to(torch.int32)
    while True:
        low = rest.to(torch.int8)  # keeps the lowest eight bits, as a signed number
        planes.append(Plane(low, shift))
        if most <= 127:
            return tuple(planes)
        rest, most, shift = (rest - low) >> 8, (most + 128) >> 8, shift + 8


def values_of(operand: Operand, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor that an operand stands for."""
    return together([(plane.codes, plane.shift) for plane in operand.planes], operand.exponent, dtype)


def together(sums: Sequence[tuple[Tensor, int]], exponent: Tensor | int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sum of integers * 2^shift, times 2^exponent; exact below 2^53 and rounded once, to nearest even.

    So it depends on the integers alone, not on the types in which a backend gave them. The first of float32 sums is
    overwritten.

    Args:
        sums: integers, or float32 that holds integers exactly, of one shape; with their shifts.
        dtype: float32 or float64.

    >>> together([(torch.tensor([1.0, 3.0]), 0), (torch.tensor([2.0, 0.0]), 7)], -7)
    tensor([2.0078, 0.0234])
    """
    scale = pow2(exponent, dtype).to(sums[0][0].device)
    first = sums[0][0]
    shifts = [shift for _, shift in sums]
    in_place = dtype is first.dtype is torch.float32 and shifts[0] == 0 and len(sums) <= 2
    in_place = in_place and all(acc.dtype is torch.float32 for acc, _ in sums)
    y = first if in_place else torch.empty_like(first, dtype=dtype)
    add = _add_in_place if in_place else _add
    for out, *parts in _slices(y, *(acc for acc, _ in sums)):
        add(out, parts, shifts)
        out.mul_(scale)
    return y


def _add_in_place(out: Tensor, parts: Sequence[Tensor], shifts: list[int]) -> None:
    for part, shift in zip(parts[1:], shifts[1:], strict=True):
        out.add_(part, alpha=2.0**shift)  # a product with a power of two is exact, and the one sum is rounded once


def _add(out: Tensor, parts: Sequence[Tensor], shifts: list[int]) -> None:
    total = parts[0].to(torch.float64).mul_(2.0 ** shifts[0])
    for part, shift in zip(parts[1:], shifts[1:], strict=True):
        total.add_(part.to(torch.float64), alpha=2.0**shift)
    out.copy_(total)


def _slices(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Pieces that stay in the cache, in the order of memory; the whole where that differs between the tensors."""
    first = tensors[0]
    alike = all(tensor.stride() == first.stride() for tensor in tensors)
    if first.device.type != "cpu" or not alike or not is_dense(first):
        return [tensors]
    return list(zip(*(slices(tensor, _SLICE * torch.get_num_threads()) for tensor in tensors), strict=True))
