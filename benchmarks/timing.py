"""Ratios of training steps on cores that others use too: one thread, its own CPU time, steps in turn.

An absolute time means little on a shared machine, and four threads under load wait for each other. The CPU
time of a single thread is steady; drift (caches, clock) hits all steps of a round alike, so ratios are taken
within each round and their median is reported.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Timing", "alternate", "kept_bytes"]


@dataclass(frozen=True)
class Timing:
    """CPU time of a step in milliseconds, and the median of its ratio to the first step of the same round."""

    median_ms: float
    min_ms: float
    ratio: float


def alternate(steps: dict[str, Callable[[], object]], rounds: int = 15, warmup: int = 3) -> dict[str, Timing]:
    """Run all steps in turn, ``rounds`` times; the first one is the base of the ratios."""
    torch.set_num_threads(1)
    for _ in range(warmup):
        for step in steps.values():
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append((time.process_time() - start) * 1e3)
    base = times[next(iter(steps))]
    return {
        name: Timing(statistics.median(t), min(t), statistics.median(own / of for own, of in zip(t, base, strict=True)))
        for name, t in times.items()
    }


def kept_bytes(module: nn.Module, loss: Callable[[], Tensor], state: Iterable[Tensor] = ()) -> int:
    """Bytes that live from forward to backward, parameters, buffers and other ``state`` of ``module`` aside.

    Counts what autograd keeps (through its hooks: most of it has no Python object) and every tensor that
    Python still holds after the forward (what a Function put on its context instead), each storage once.
    """
    own = dict(_storages([*module.parameters(), *module.buffers(), *state]))
    before = dict(_storages(_live()))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.update(_storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    kept.update((pointer, size) for pointer, size in _storages(_live()) if pointer not in before)
    value.backward()
    module.zero_grad(set_to_none=True)
    return sum(size for pointer, size in kept.items() if pointer not in own)


def _live() -> list[Tensor]:
    gc.collect()
    return [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]


def _storages(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    for tensor in tensors:
        try:
            storage = tensor.untyped_storage()
            yield storage.data_ptr(), storage.nbytes()
        except (RuntimeError, NotImplementedError):
            continue  # left behind by the compiler, or sparse: it has no memory of its own
