"""Packing and products of words of signs by compiled loops, used after a probe; absent without numba.

Every operand is contiguous and on the CPU; `words` and `binary` check shapes and choose.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch
from torch import Tensor

from lightning_lowbit.kernels.geometry import Geometry
from lightning_lowbit.kernels.ledger import note

__all__ = ["LANES", "WORD", "Threshold", "compiled", "conv2d", "matmul", "pack_images", "pack_rows", "panels_of", "words_of"]

WORD = 64
LANES = 16
Threshold = tuple[Tensor, Tensor]
"""low int32 (O,) and flip bool (O,): the next value is +1 iff (dot >= low) != flip."""

# Below about so many products of bits, ten microseconds, handing over to another thread costs what it saves.
_SPLIT = 2**25


def words_of(length: int) -> int:
    """Words that hold so many signs."""
    return -(-length // WORD)


def compiled() -> ModuleType:
    """The loops, compiled or found compiled; raises what an import or a compiler may raise."""
    from lightning_lowbit.kernels import loops

    return loops


def pack_rows(x: Tensor) -> Tensor:
    """float32 (M, K) to int64 (M, ceil(K / 64))."""
    out = torch.empty(x.shape[0], words_of(x.shape[1]), dtype=torch.int64)
    _split(
        lambda first, last: compiled().pack_rows(
            x.data_ptr() + 4 * first * x.shape[1], out.data_ptr() + 8 * first * out.shape[1], last - first, x.shape[1]
        ),
        x.shape[0],
        64 * x.numel(),
    )
    return out


def pack_images(x: Tensor, groups: int) -> Tensor:
    """float32 (N, C, H, W), contiguous or in channels_last memory, to planes."""
    batch, channels, height, width = x.shape
    out = torch.empty(batch, groups * words_of(channels // groups), height, width, dtype=torch.int64)
    pack = compiled().pack_channels if x.is_contiguous() else compiled().pack_pixels
    inputs, outputs = 4 * x[0].numel(), 8 * out[0].numel()
    _split(
        lambda first, last: pack(
            x.data_ptr() + first * inputs, out.data_ptr() + first * outputs, last - first, height * width, groups,
            channels // groups,
        ),
        batch,
        64 * x.numel(),
    )  # fmt: skip
    return out


def panels_of(words: Tensor) -> Tensor:
    """int64 (O, W) to (ceil(O / LANES), W, LANES): what a column of vectors reads lies together."""
    outputs, length = words.shape
    panels = torch.empty(-(-outputs // LANES), length, LANES, dtype=torch.int64)
    compiled().make_panels(words.data_ptr(), panels.data_ptr(), outputs, length)
    return panels


def matmul(
    a: Tensor, panels: Tensor, outputs: int, k: int, dtype: torch.dtype, threshold: Threshold | None = None
) -> Tensor:
    """int64 (M, W) times panels: int32 or float32 (M, O), or with a threshold int64 (M, ceil(O / 64))."""
    loops = compiled()
    note("popcount", "matmul")
    rows, words = a.shape
    if threshold is None:
        form = loops.INTS if dtype == torch.int32 else loops.FLOATS
        out = torch.empty(rows, outputs, dtype=dtype)
    else:
        form = loops.BITS_OF_LANES
        out = torch.zeros(rows, words_of(outputs), dtype=torch.int64)
    step = out.element_size() * out.shape[1]
    many_rows = rows >= LANES * torch.get_num_threads()

    def part(first: int, last: int) -> None:
        part_rows, part_panels = ((first, last), (0, len(panels))) if many_rows else ((0, rows), (first, last))
        loops.multiply(
            a.data_ptr(), panels.data_ptr(), out.data_ptr(), step, form, *_addresses(threshold), *part_rows,
            *part_panels, words, outputs, k,
        )  # fmt: skip

    _split(part, rows if many_rows else len(panels), rows * panels.numel() * WORD)
    return out


def conv2d(x: Tensor, weight: Tensor, geo: Geometry, pad_value: int, threshold: Threshold | None = None) -> Tensor:
    """Planes times weight words (O, kh, kw, W): float32 (N, O, H', W'), or with a threshold planes."""
    loops = compiled()
    note("popcount", "conv2d")
    planes, padded = x.shape[1], geo.padded
    top, left = geo.top_bottom[0], geo.left_right[0]
    # The loops copy eight words at a time, and so read up to seven past the end.
    length = geo.batch * planes * padded[0] * padded[1]
    grown = torch.zeros(length + LANES, dtype=torch.int64)
    grown[:length].view(geo.batch, planes, *padded)[:, :, top : top + geo.size[0], left : left + geo.size[1]] = x
    if threshold is None:
        form, out = loops.FLOATS, torch.empty(geo.output_size)
    else:
        form, out = loops.BITS_OF_ROWS, torch.empty(geo.batch, words_of(geo.outputs), *geo.out, dtype=torch.int64)

    def part(first: int, last: int) -> None:
        loops.convolve(
            grown.data_ptr(), weight.data_ptr(), out.data_ptr(), form, *_addresses(threshold), first, last,
            int(pad_value == 0 and padded != geo.size), geo.batch, geo.groups, planes // geo.groups,
            geo.channels // geo.groups, geo.outputs, *padded, top, left, *geo.size, *geo.kernel, *geo.stride,
            *geo.dilation, *geo.out,
        )  # fmt: skip

    pixels = geo.batch * geo.out[0] * geo.out[1]
    _split(part, -(-pixels // LANES), pixels * weight.numel() * WORD)
    return out


def _addresses(threshold: Threshold | None) -> tuple[int, int]:
    return (0, 0) if threshold is None else (threshold[0].data_ptr(), threshold[1].data_ptr())


def _split(part: Callable[[int, int], None], length: int, products: int) -> None:
    """Call part(first, last) over a range, in as many threads as torch may use where there is enough to do."""
    threads = min(torch.get_num_threads(), length, products // _SPLIT)
    if threads <= 1:
        part(0, length)
        return
    ends = [length * thread // threads for thread in range(threads + 1)]
    others = [_pool(os.getpid(), threads).submit(part, *pair) for pair in zip(ends[1:], ends[2:], strict=False)]
    part(*ends[:2])
    for other in others:
        other.result()


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork has none of its parent's."""
    return ThreadPoolExecutor(threads, "lightning_lowbit")
