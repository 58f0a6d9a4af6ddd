"""A tensor [N, C, ...] as blocks that fit the cache, in the order of memory, with its channels beside each.

====================================  ==============  =========================
layout                                a block         a number per channel
====================================  ==============  =========================
contiguous: :class:`Rows`             [n, c, places]  [c, 1]
channels last: :class:`Columns`       [n, k C]        [k C], written k times
contiguous, few places: the same      [n, C places]   [C places], written out
====================================  ==============  =========================

On other devices than the CPU, and compiled, all of the tensor is one block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Blocks", "Columns", "Rows", "blocks_of", "dense", "scratch"]

_SLICE = 1 << 17  # elements per thread: buffers stay in the cache, calls few
_SHORT = 32  # places: fewer are too short for an inner loop
_WIDE, _LARGE = 512, 1 << 14  # numbers in a row of columns: the same, where there are many to loop over


class Rows:
    """A contiguous tensor."""

    def __init__(self, x: Tensor, size: int) -> None:
        self.shape = len(x), x.shape[1], math.prod(x.shape[2:])
        samples, channels, places = self.shape
        self.share = (
            max(1, min(samples, size // max(channels * places, 1))),
            max(1, min(channels, size // max(places, 1))),
            max(1, min(places, size)),
        )
        self.counts = [-(-whole // share) for whole, share in zip(self.shape, self.share, strict=True)]
        self.device = x.device

    def of(self, t: Tensor) -> list[Tensor]:
        """Blocks of a tensor with x's shape and strides."""
        return self._cut(t.view(self.shape)) if t.numel() else []

    def wide(self, channel: Tensor) -> list[Tensor]:
        """[C] beside each block."""
        samples, _, places = self.counts
        chunks = torch.split(channel[:, None], self.share[1])
        return [chunk for chunk in chunks for _ in range(places)] * samples

    def totals(self) -> tuple[Tensor, list[Tensor]]:
        """Where sums over blocks are collected, and the part of each block."""
        samples, channels, places = self.counts
        totals = torch.zeros(samples * places, self.shape[1], dtype=torch.float64, device=self.device)
        parts = [torch.split(line, self.share[1]) for line in totals.unbind()]
        return totals, [
            parts[n * places + place][c] for n in range(samples) for c in range(channels) for place in range(places)
        ]

    def add(self, part: Tensor, block: Tensor) -> None:
        """Add up a block, into its part of the totals."""
        torch.sum(block, (0, 2), out=part)

    def fold(self, totals: Tensor) -> Tensor:
        """Sums per channel, [C]."""
        return totals.sum(0)

    def affine(self, v: Tensor, factor: Tensor, shift: Tensor, out: Tensor) -> Tensor:
        """factor * v + shift, both roundings made; ``out`` may be v, and not the shift."""
        return torch.mul(v, factor, out=out).add_(shift)

    def _cut(self, t: Tensor) -> list[Tensor]:
        blocks = [t]
        for axis in range(3):
            if self.counts[axis] > 1:
                blocks = [part for block in blocks for part in torch.split(block, self.share[axis], axis)]
        return blocks


class Columns:
    """A tensor whose channels are last in memory, or that has few places."""

    def __init__(self, x: Tensor, size: int) -> None:
        self.last = not x.is_contiguous()
        self.channels = x.shape[1]
        self.run = 1 if self.last else math.prod(x.shape[2:])  # numbers of one channel side by side
        period = max(self.channels * self.run, 1)
        count = x.numel() // period
        self.repeats = max(1, min(count, _WIDE // period)) if x.numel() >= _LARGE else 1
        self.width = self.repeats * period
        self.height, rest = count // self.repeats, count % self.repeats * period
        self.share, self.rest = max(1, size // self.width), rest
        self.ones = torch.ones(min(self.share, self.height), dtype=torch.float64, device=x.device)

    def of(self, t: Tensor) -> list[Tensor]:
        """Blocks of a tensor with x's shape and strides."""
        t = t.movedim(1, -1) if self.last else t
        if not self.rest:
            return _split(t.view(self.height, self.width), self.share) if self.height else []
        flat = t.view(-1)
        most = self.height * self.width
        return [*_split(flat[:most].view(self.height, self.width), self.share), flat[most:].view(1, -1)]

    def wide(self, channel: Tensor) -> list[Tensor]:
        """[C] beside each block."""
        line = channel if self.run == 1 else channel.repeat_interleave(self.run)
        line = line if self.repeats == 1 else line.repeat(self.repeats)
        blocks = [line] * -(-self.height // self.share)
        return [*blocks, line[: self.rest]] if self.rest else blocks

    def totals(self) -> tuple[Tensor, list[Tensor]]:
        """Where sums over blocks are collected, and the part of each block."""
        totals = torch.zeros(self.width, dtype=torch.float64, device=self.ones.device)
        parts = [totals] * -(-self.height // self.share)
        return totals, [*parts, totals[: self.rest]] if self.rest else parts

    def add(self, part: Tensor, block: Tensor) -> None:
        """Add up a block, into its part of the totals."""
        part.addmv_(block.t(), self.ones[: len(block)])  # twice as fast as a sum of short columns

    def fold(self, totals: Tensor) -> Tensor:
        """Sums per channel, [C]."""
        return totals.view(self.repeats, self.channels, self.run).sum((0, 2))

    def affine(self, v: Tensor, factor: Tensor, shift: Tensor, out: Tensor) -> Tensor:
        """factor * v + shift, both roundings made; ``out`` may be v, and not the shift."""
        return torch.addcmul(shift, v, factor, out=out)  # slow where one number is for a row: not for Rows


Blocks = Rows | Columns


def blocks_of(x: Tensor) -> Blocks:
    """How to walk over ``dense`` x [N, C, ...]."""
    sliced = x.device.type == "cpu" and not torch.compiler.is_compiling()
    size = _SLICE * torch.get_num_threads() if sliced else max(x.numel(), 1)
    few = sliced and math.prod(x.shape[2:]) < _SHORT
    return Columns(x, size) if few or not x.is_contiguous() else Rows(x, size)


def dense(x: Tensor) -> Tensor:
    """x, or a contiguous copy where its memory has neither of the two orders."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def _split(t: Tensor, share: int) -> list[Tensor]:
    return list(torch.split(t, share)) if len(t) > share else [t]


def scratch(blocks: Sequence[Tensor], count: int) -> list[tuple[Tensor, ...]]:
    """float64 memory in the shape of each block, ``count`` times; the blocks share it."""
    if not blocks:
        return []
    # One allocation: several are handed back to the system and faulted in anew, page by page, at every call.
    memory = torch.empty(count, blocks[0].numel(), dtype=torch.float64, device=blocks[0].device).unbind()
    views = {
        shape: tuple(m[: math.prod(shape)].view(shape) for m in memory) for shape in {block.shape for block in blocks}
    }
    return [views[block.shape] for block in blocks]
