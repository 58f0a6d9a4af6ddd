"""What moves elements of a tensor, found by moving their numbers: reshape, transpose, slice, pad, else gather."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_lowbit.modules.lowering import refuse

if TYPE_CHECKING:
    from lightning_lowbit.export.builder import Held, ProgramBuilder

__all__ = ["BATCHES", "concrete", "moved", "moved_counts", "symbolic"]

BATCHES = (2, 3)  # at these sizes a network is recorded, and moves are tried
Array = np.ndarray[Any, Any]


def concrete(shape: Sequence[int], batch: int) -> tuple[int, ...]:
    """A shape at one batch size.

    >>> concrete((-1, 3, -4), 2)
    (2, 3, 8)
    """
    return tuple(n if n >= 0 else -n * batch for n in shape)


def symbolic(shapes: Sequence[Sequence[int]], path: str) -> tuple[int, ...]:
    """The shape that is these at the sizes of ``BATCHES``.

    >>> symbolic([(2, 3, 8), (3, 3, 12)], "")
    (-1, 3, -4)
    """
    found = []
    for a, b in zip(*shapes, strict=True):
        k, rest = divmod(b - a, BATCHES[1] - BATCHES[0])
        if rest or (k and a != k * BATCHES[0]):
            raise refuse(
                path, f"its size is {a} and {b} for batches of {BATCHES}", "Keep sizes apart from the batch's."
            )
        found.append(-k if k else a)
    return tuple(found)


def numbers(shape: Sequence[int], batch: int) -> Tensor:
    """1, 2, 3 ... in a shape: the places of elements, 0 is left for what comes from nowhere."""
    sizes = concrete(shape, batch)
    return torch.arange(1, math.prod(sizes) + 1, dtype=torch.float64).reshape(sizes)


def moved(build: ProgramBuilder, x: Held, function: Callable[[Tensor], Tensor]) -> Held:
    """Write the operation that does what ``function`` does with places."""
    places = [function(numbers(x.shape, batch)) for batch in BATCHES]
    shape = symbolic([tuple(p.shape) for p in places], build.path)
    sizes = concrete(x.shape, BATCHES[0])
    place = places[0].to(torch.int64).numpy() - 1
    if place.size == math.prod(sizes) and np.array_equal(place.reshape(-1), np.arange(place.size)):
        return _reshaped(build, x, shape)
    each = math.prod(sizes) // BATCHES[0]
    rows = place.reshape(BATCHES[0], -1) if place.size % BATCHES[0] == 0 else place.reshape(1, -1)
    apart = len(rows) > 1 and np.array_equal(rows[1], np.where(rows[0] < 0, -1, rows[0] + each))
    if not apart or not shape or shape[0] != -1 or x.shape[0] != -1 or int(rows[0].max(initial=-1)) >= each:
        raise refuse(build.path, "it moves values from one sample to another", "Keep the batch on the first axis.")
    sample = rows[0].reshape(place.shape[1:])
    cut = _strided(sample, sizes[1:])
    if cut is not None:
        return _cut(build, x, shape, *cut)
    padding = _padding(sample, sizes[1:])
    if padding is not None:
        return _emit(build, "pad", x, shape, {"padding": [[0, 0], *padding], "value": 0}, zero=True)
    gathered = {"index": sample.astype(np.int32)}
    return _emit(build, "gather", x, shape, {}, gathered, zero=bool((sample < 0).any()))


def moved_counts(count: Array, shape: Sequence[int], function: Callable[[Tensor], Tensor]) -> Array:
    """What each moved sum is to be divided by; what comes from nowhere is 0, of anything."""
    each = torch.as_tensor(count).expand(concrete(shape, BATCHES[0])).to(torch.float64)
    found: Array = function(each)[0].clamp(min=1).to(torch.int64).numpy()
    return found


def _emit(
    build: ProgramBuilder, kind: str, x: Held, shape: Sequence[int], attributes: dict[str, Any],
    constants: dict[str, Array | None] | None = None, zero: bool = False,
) -> Held:  # fmt: skip
    if x.is_float:
        return build.emit(kind, [x], shape, attributes, constants, dtype="float32")
    low, high = (min(x.low, 0), max(x.high, 0)) if zero else (x.low, x.high)
    return build.emit(kind, [x], shape, attributes, constants, low=low, high=high, exponent=x.exponent)


def _reshaped(build: ProgramBuilder, x: Held, shape: tuple[int, ...]) -> Held:
    return x if shape == x.shape else _emit(build, "reshape", x, shape, {"shape": list(shape)})


def _strided(sample: Array, sizes: tuple[int, ...]) -> tuple[list[tuple[int, int, int]], list[int]] | None:
    """A regular cut through a sample: (start, stop, step) per input axis, and which input axes the result's are.

    None where it is none: places repeated, turned around, or axes merged.
    """
    if not sample.size or (sample < 0).any():
        return None
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    first = int(sample.reshape(-1)[0])
    starts = [first // stride % size for stride, size in zip(strides, sizes, strict=True)]
    cuts = [(start, start + 1, 1) for start in starts]
    order, whole = [], np.full((1,) * sample.ndim, first)
    for axis, size in enumerate(sample.shape):
        if size == 1:
            continue
        jump = int(sample[tuple(int(a == axis) for a in range(sample.ndim))]) if sample.ndim else first
        jump -= first
        source = next((a for a, stride in enumerate(strides) if jump >= stride and sizes[a] > 1), None)
        if source is None or jump % strides[source] or source in order:
            return None
        step = jump // strides[source]
        stop = starts[source] + (size - 1) * step + 1
        if stop > sizes[source]:
            return None
        cuts[source], whole = (starts[source], stop, step), whole + _along(np.arange(size) * jump, axis, sample.ndim)
        order.append(source)
    return (cuts, order) if np.array_equal(np.broadcast_to(whole, sample.shape), sample) else None


def _along(values: Array, axis: int, dims: int) -> Array:
    return values.reshape([-1 if a == axis else 1 for a in range(dims)])


def _cut(
    build: ProgramBuilder, x: Held, shape: tuple[int, ...], cuts: list[tuple[int, int, int]], order: list[int]
) -> Held:
    """slice, transpose and reshape, each where it does something."""
    sizes = x.shape[1:]
    kept = [-(-(stop - start) // step) for start, stop, step in cuts]
    if tuple(kept) != tuple(sizes):
        whole = [step == 1 and n == size for (_, _, step), n, size in zip(cuts, kept, sizes, strict=True)]
        attributes = {
            "starts": [0, *(0 if w else cut[0] for w, cut in zip(whole, cuts, strict=True))],
            "stops": [None, *(None if w else cut[1] for w, cut in zip(whole, cuts, strict=True))],
            "steps": [1, *(1 if w else cut[2] for w, cut in zip(whole, cuts, strict=True))],
        }
        x = _emit(build, "slice", x, (x.shape[0], *kept), attributes)
    permutation = [*order, *(axis for axis in range(len(sizes)) if axis not in order)]
    if order != sorted(order):
        turned = (x.shape[0], *(x.shape[1 + axis] for axis in permutation))
        x = _emit(build, "transpose", x, turned, {"permutation": [0, *(1 + axis for axis in permutation)]})
    return _reshaped(build, x, shape)


def _padding(sample: Array, sizes: tuple[int, ...]) -> list[list[int]] | None:
    """Per axis what stands before and behind a whole sample in zeros; None where it is something else."""
    if sample.ndim != len(sizes) or not (sample < 0).any():
        return None
    inside = np.argwhere(sample == 0)
    if len(inside) != 1:
        return None
    start = inside[0]
    window = sample[tuple(slice(a, a + n) for a, n in zip(start, sizes, strict=True))]
    same = window.shape == sizes and np.array_equal(window.reshape(-1), np.arange(window.size))
    if not same or int((sample >= 0).sum()) != window.size:
        return None
    return [[int(a), int(total - a - n)] for a, n, total in zip(start, sizes, sample.shape, strict=True)]
