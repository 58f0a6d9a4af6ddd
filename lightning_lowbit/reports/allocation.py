"""Widths under a budget: for each tensor the bits that leave least noise for what all of them may cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Item", "allocate"]


@dataclass(frozen=True)
class Item:
    """Tensors that have one width.

    Attributes:
        keys: of their quantizers.
        paths: that name them in ``overrides``.
        option: of ``overrides`` that sets the width.
        noise: by width, power of the outputs' error over that of the outputs, with these quantizers alone.
    """

    keys: tuple[str, ...]
    paths: tuple[str, ...]
    option: str
    noise: Mapping[int, float]

    def decibels(self, bits: int) -> str:
        """SQNR of the outputs, as printed.

        >>> item = Item(("conv.lowbit_weight",), ("conv",), "weight_bits", {4: 0.01, 16: 0.0})
        >>> item.decibels(4), item.decibels(16)
        ('20.0 dB', 'equal')
        """
        noise = self.noise[bits]
        return "equal" if noise == 0 else f"{-10 * math.log10(noise):.1f} dB"


def allocate(
    items: Sequence[Item], cost: Callable[[Sequence[int]], float], most: float, start: int
) -> list[int] | None:
    """Bits of each item; None where ``start`` bits of each cost more than ``most``.

    From there that step is taken, again and again, that wins most for its cost, of those that fit. The errors of
    different tensors add up as if they were independent, as in Lin, Talathi, Annapureddy, "Fixed point quantization
    of deep convolutional networks", ICML 2016 (arXiv:1511.06393), section 3.

    Args:
        items: with the same widths each.
        cost: of the widths of all items; does not fall as they grow.
        most: that it may be.
        start: one of the widths.

    >>> small, large = (Item((k,), (k,), "weight_bits", {2: 0.4, 4: 0.02, 8: 0.0001}) for k in ("small", "large"))
    >>> allocate([small, large], lambda bits: 10 * bits[0] + 100 * bits[1], 500, 2)
    [8, 4]
    >>> allocate([small, large], lambda bits: 10 * bits[0] + 100 * bits[1], 219, 2) is None
    True
    """
    bits = [start] * len(items)
    now = cost(bits)
    if now > most:
        return None
    while True:
        best: tuple[float, int, int] | None = None
        for number, item in enumerate(items):
            for wider in (width for width in item.noise if width > bits[number]):
                won = item.noise[bits[number]] - item.noise[wider]
                more = cost([*bits[:number], wider, *bits[number + 1 :]]) - now
                if won > 0 and now + more <= most:
                    rate = won / more if more > 0 else math.inf
                    if best is None or rate > best[0]:
                        best = rate, number, wider
        if best is None:
            return bits
        _, number, wider = best
        bits[number] = wider
        now = cost(bits)
