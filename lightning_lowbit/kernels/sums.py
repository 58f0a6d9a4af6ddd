"""The exact sum of two payloads on different exponents."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lowbit.kernels.fusion import flat_as, route, run
from lightning_lowbit.numerics.block import NARROW_ROOM, align

__all__ = ["aligned_sum"]


def aligned_sum(a: Tensor, exponent_a: Tensor, b: Tensor, exponent_b: Tensor) -> tuple[Tensor, Tensor]:
    """a * 2^ea + b * 2^eb on the finer exponent, as ``numerics.block.align`` brings them together.

    Args:
        a, b: payloads of one shape; int8, or wider where they are sums themselves.
        exponent_a, exponent_b: int32 0-dim.
    Returns:
        the sum, int32 (int64 where a payload is wider than int8), and its exponent.

    >>> one, two = torch.tensor([3], dtype=torch.int8), torch.tensor([5], dtype=torch.int8)
    >>> aligned_sum(one, torch.tensor(-2), two, torch.tensor(1))[0]
    tensor([43], dtype=torch.int32)
    """
    if a.dtype is b.dtype is torch.int8 and a.device.type == "cpu" and (how := route(a)) != "reference":
        gap = int(exponent_b) - int(exponent_a)  # memory of this process: reading it waits for nothing
        if abs(gap) <= NARROW_ROOM:
            finer, coarser = (a, b) if gap >= 0 else (b, a)
            with torch.inference_mode(False), torch.no_grad():
                total = torch.empty_like(finer, dtype=torch.int32)
                flats = [flat_as(x.detach(), total) for x in (total, finer, coarser)]
                run(_sum, (), _factor, (), abs(gap), flats, how == "compiled")
            return total, exponent_a if gap >= 0 else exponent_b
    x, y, exponent = align(a, exponent_a, b, exponent_b)
    return x + y, exponent


def _factor(gap: int) -> tuple[int, ...]:
    return (1 << min(gap, NARROW_ROOM),)


def _sum(numbers: Sequence[Any], constants: tuple[Hashable, ...], *tensors: Tensor) -> None:
    total, finer, coarser = tensors
    total.copy_(finer.to(torch.int32) + coarser.to(torch.int32) * numbers[0])
