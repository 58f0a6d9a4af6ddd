"""A stand-in for a loader's batch sampler: records how an epoch's order was drawn, and draws it again."""

from __future__ import annotations

import random
import zlib
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_lowbit.plugins.rng import capture_rng, restore_rng

__all__ = ["RecordedOrder", "generators_of", "refusal"]


def refusal(loader: Any) -> str | None:
    """Why the order of ``loader`` cannot be recorded, or None if it can."""
    if not isinstance(loader, DataLoader):
        return "it is not a torch DataLoader"
    if isinstance(loader.dataset, IterableDataset):
        return "its dataset is iterable and chooses the order itself"
    if type(loader).__iter__ is not DataLoader.__iter__ or hasattr(loader, "load_state_dict"):
        return "it iterates in its own way"
    try:
        len(loader)
    except TypeError:
        return "its sampler has no length"
    for owner in _sampler_chain(loader):
        for name, value in vars(owner).items():
            if isinstance(value, (random.Random, np.random.Generator, np.random.RandomState)):
                return f"{type(owner).__name__}.{name} is a {type(value).__name__} and not a torch.Generator"
    return None


def generators_of(loader: DataLoader[Any]) -> list[torch.Generator]:
    """The torch generators that the loader and its samplers own, each once, in a fixed order."""
    found: dict[int, torch.Generator] = {}
    for owner in (loader, *_sampler_chain(loader)):
        for value in vars(owner).values():
            if isinstance(value, torch.Generator):
                found.setdefault(id(value), value)
    return list(found.values())


def _sampler_chain(loader: DataLoader[Any]) -> list[Any]:
    """The loader's batch sampler, its sampler, the sampler inside that one, and so on."""
    chain: list[Any] = []
    queue: list[Any] = [loader.batch_sampler, loader.sampler]
    while queue:
        link = queue.pop(0)
        if link is None or not hasattr(link, "__dict__") or any(link is known for known in chain):
            continue
        chain.append(link)
        inside = vars(link)
        # Lightning's distributed wrapper keeps the user's sampler in dataset._sampler.
        queue += [inside.get("sampler"), getattr(inside.get("dataset"), "_sampler", None)]
    return chain


class RecordedOrder:
    """Yields the batches of ``inner`` with exactly its draws, and remembers the random state before them.

    While ``silent`` it yields nothing and draws nothing. While it holds a record in ``replay`` an iteration
    draws the recorded order again and begins behind the batches already trained.

    Args:
        loader: the loader that iterates it.
        inner: the loader's batch sampler, or its sampler where it does not batch.
    """

    def __init__(self, loader: DataLoader[Any], inner: Any) -> None:
        self.inner = inner
        self.generators = generators_of(loader)
        self.silent = False
        self.replay: dict[str, Any] | None = None
        self.current: EpochOrder | None = None

    def __iter__(self) -> Iterator[Any]:
        if self.silent:
            return iter(())
        # A loader with workers iterates its sampler twice and uses the second pass: the record stays here
        # until whoever set it takes it away.
        if self.replay is not None:
            restore_rng(self.replay["iterated"], self.generators)
        self.current = EpochOrder(self)
        return self.current

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not set yet while a copy is being built
            raise AttributeError(name)
        return getattr(self.inner, name)


class EpochOrder(Iterator[Any]):
    """One pass over an order. A sampler may draw when it is iterated or at its first batch: both are kept."""

    def __init__(self, order: RecordedOrder) -> None:
        self.generators = order.generators
        self.replay = order.replay
        self.replayed = True
        self.iterated = capture_rng(order.generators)
        self.drawn: dict[str, Any] | None = None
        self.checksums = array("L")
        self.batches = iter(order.inner)

    def begin(self) -> None:
        """Draw the order and pass over the trained batches, unless that has happened."""
        if self.drawn is not None:
            return
        replay = self.replay
        if replay is not None:
            restore_rng(replay["drawn"], self.generators)
        self.drawn = capture_rng(self.generators)
        if replay is not None:
            passed = [self._advance(None) for _ in range(replay["position"])]
            self.replayed = None not in passed and self.checksum(replay["position"]) == replay["checksum"]

    def __next__(self) -> Any:
        self.begin()
        batch = self._advance(StopIteration)
        if batch is StopIteration:
            raise StopIteration
        return batch

    def _advance(self, default: Any) -> Any:
        batch = next(self.batches, default)
        if batch is not default:
            before = self.checksums[-1] if self.checksums else 0
            self.checksums.append(zlib.crc32(repr(batch).encode(), before))
        return batch

    def checksum(self, position: int) -> int:
        """A number that stands for the first ``position`` batches; 0 for none or for too few."""
        return self.checksums[position - 1] if 0 < position <= len(self.checksums) else 0

    def record(self, position: int) -> dict[str, Any]:
        """What draws this order again, for a run that has trained ``position`` of its batches."""
        return {
            "iterated": self.iterated,
            "drawn": self.drawn,
            "position": position,
            "checksum": self.checksum(position),
        }
