"""Packing and products of words of signs by compiled loops, used after a probe; absent without numba.

Operands are contiguous and on the CPU; `words` and `binary` check shapes, and ask `exact` first.
"""

from __future__ import annotations

import functools
import itertools
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lowbit.kernels.backends import asked
from lightning_lowbit.kernels.geometry import Geometry, geometry
from lightning_lowbit.kernels.ledger import note, refusals, silent

__all__ = [
    "LANES", "WORD", "Threshold", "compiled", "conv2d", "exact", "matmul", "pack_images", "pack_rows", "panels_of",
    "uncompiled", "words_of",
]  # fmt: skip

WORD = 64
LANES = 16
Threshold = tuple[Tensor, Tensor]
"""low int32 (O,) and flip bool (O,): the next value is +1 iff (dot >= low) != flip."""

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Below about so many products of bits, ten microseconds, handing over to another thread costs what it saves.
_SPLIT = 2**25


def words_of(length: int) -> int:
    """Words that hold so many signs."""
    return -(-length // WORD)


def uncompiled(function: _Function) -> _Function:
    """torch.compile calls this function as it is: it chooses among libraries and reads addresses."""
    kept: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]  # torch's stub
    return kept


def compiled() -> ModuleType:
    """The loops, compiled or found compiled; raises what an import or a compiler may raise."""
    from lightning_lowbit.kernels import loops

    return loops


def exact(device: str) -> bool:
    """Whether the loops work on tensors of this device type, nobody asks for another backend, and a probe passed."""
    return device == "cpu" and asked() == "auto" and _passed()


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
    others = [_pool(os.getpid(), threads).submit(part, *pair) for pair in itertools.pairwise(ends[1:])]
    part(*ends[:2])
    for other in others:
        other.result()


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork has none of its parent's."""
    return ThreadPoolExecutor(threads, "lightning_lowbit")


@functools.cache
def _passed() -> bool:
    """Whether the loops leave the bits of their definitions, once per process; if not, the report says why."""
    try:
        with silent():
            reason = _differs()
    except ImportError as error:
        refusals["popcount"] = f"{error}; pip install 'lightning-lowbit[kernels]'"
        return False
    except Exception as error:  # whatever a compiler raises, or a folder of compiled code
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if reason:
        refusals["popcount"] = reason
        warnings.warn(
            f"packed products are unpacked first, with the same results: the compiled ones failed ({reason})",
            stacklevel=4,
        )
    return not reason


_MATRICES = ((1, 1, 1), (3, 64, 17), (11, 130, 70))
# Groups, holes, strides, uneven padding, pixels that fill no panel, and a row that is a tap outside.
_LAYERS = (
    geometry((2, 70, 5, 7), (9, 70, 3, 3), 1, 1),
    geometry((3, 6, 9, 8), (66, 3, 3, 2), (2, 1), ((0, 1), (2, 1)), (1, 2), 2),
    geometry((1, 64, 6, 6), (8, 64, 1, 1), 2),
)


def _differs() -> str | None:
    generator = torch.Generator().manual_seed(577)

    def signs(*size: int) -> Tensor:
        return torch.randint(0, 2, size, generator=generator) * 2.0 - 1

    def threshold(outputs: int) -> Threshold:
        low = torch.randint(-8, 9, (outputs,), dtype=torch.int32, generator=generator)
        return low, torch.arange(outputs) % 3 == 0

    for m, k, n in _MATRICES:
        x, w, (low, flip) = signs(m, k), signs(n, k), threshold(n)
        dot, panels = x @ w.t(), panels_of(_pack(w))
        pairs: tuple[tuple[Tensor, Tensor], ...] = (
            (pack_rows(x), _pack(x)),
            (matmul(_pack(x), panels, n, k, torch.int32), dot.to(torch.int32)),
            (matmul(_pack(x), panels, n, k, torch.float32), dot),
            (matmul(_pack(x), panels, n, k, torch.float32, (low, flip)), _pack((dot >= low).ne(flip) * 2.0 - 1)),
        )
        if not all(torch.equal(found, expected) for found, expected in pairs):
            return f"wrong matrix product, {m}x{k}x{n}"
    for geo in _LAYERS:
        x, w, (low, flip) = signs(*geo.input_size), signs(*geo.weight_size), threshold(geo.outputs)
        planes, words = _pack_planes(x, geo.groups), _pack(w.permute(0, 2, 3, 1).contiguous())
        packed = [pack_images(x.contiguous(memory_format=memory), geo.groups) for memory in _MEMORIES]
        if not all(torch.equal(found, planes) for found in packed):
            return "wrong packing of images"
        for pad_value in (0, 1):
            padded = F.pad(x, (*geo.left_right, *geo.top_bottom), value=pad_value)
            dot = F.conv2d(padded, w, None, geo.stride, 0, geo.dilation, geo.groups)
            bits = _pack_planes((dot >= low[:, None, None]).ne(flip[:, None, None]) * 2.0 - 1, 1)
            pairs = (
                (conv2d(planes, words, geo, pad_value), dot),
                (conv2d(planes, words, geo, pad_value, (low, flip)), bits),
            )
            if not all(torch.equal(found, expected) for found, expected in pairs):
                return f"wrong convolution, {geo.input_size} with {geo.weight_size}"
    return None


_MEMORIES = (torch.contiguous_format, torch.channels_last)


def _pack(x: Tensor) -> Tensor:
    """The definition: bit j of word w is 1 where element 64 w + j of the last axis is negative."""
    negative = F.pad((x < 0).to(torch.int64), (0, -x.shape[-1] % WORD)).reshape(*x.shape[:-1], -1, WORD)
    words: Tensor = (negative << torch.arange(WORD)).sum(-1)
    return words


def _pack_planes(x: Tensor, groups: int) -> Tensor:
    grouped = x.reshape(len(x), groups, -1, *x.shape[2:])
    return _pack(grouped.permute(0, 3, 4, 1, 2)).flatten(-2).permute(0, 3, 1, 2).contiguous()
