"""An order of samples that is a function of (seed, epoch): a resumed run needs no random state for it."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_lowbit.errors import ConfigError

__all__ = ["OrderedSampler", "is_blank", "use_ordered_sampler"]


class OrderedSampler(Sampler[int]):
    """Positions ``rank::world`` of one order of ``range(length)`` that depends on (seed, epoch) alone.

    No sample is repeated, so the sizes of two ranks may differ by one. All ranks yield equally many batches:
    a rank that would have none of the last global batch gets one repeated sample there and says so in
    ``padded``; whoever trains on it gives that sample weight zero. With ``drop_last`` every rank stops after
    ``length // world`` samples instead.

    Args:
        length: samples in the dataset.
        shuffle: permute anew in each epoch; False keeps the dataset's order.
        seed: any integer; two seeds give unrelated orders.
        rank: this process, in [0, world).
        world: processes that share the dataset.
        batch_size: samples per batch and rank, as the loader groups them; decides whether a rank is padded.
        drop_last: whether the loader drops a last batch that is not full.

    Raises:
        ConfigError: for a rank outside the world, or sizes below one.

    >>> sampler = OrderedSampler(5, shuffle=False, seed=0, rank=1, world=2, batch_size=2)
    >>> list(sampler), sampler.padded   # rank 0 has 0, 2, 4: two batches; rank 1 needs a second one
    ([1, 3, 4], True)
    """

    def __init__(
        self,
        length: int,
        *,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world: int = 1,
        batch_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        if length < 1 or world < 1 or batch_size < 1 or not 0 <= rank < world:
            raise ConfigError(
                f"OrderedSampler: got length={length}, rank={rank}, world={world}, batch_size={batch_size};"
                " expected length, world and batch_size of at least 1 and 0 <= rank < world. Check that the"
                " dataset is not empty and that rank and world come from the same process group."
            )
        self.length = length
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world = world
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.epoch = 0
        self.start = 0

    @property
    def size(self) -> int:
        """Samples of this rank in one epoch, each counted once; the repeated one is not among them."""
        if self.drop_last:
            return self.length // self.world
        return len(range(self.rank, self.length, self.world))

    @property
    def padded(self) -> bool:
        """Whether this rank's last batch is one repeated sample, which must count for nothing."""
        largest = -(-self.length // self.world)
        return not self.drop_last and self.size < largest and self.size % self.batch_size == 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; a start set for another epoch is forgotten."""
        if epoch != self.epoch:
            self.start = 0
        self.epoch = epoch

    def start_at(self, position: int) -> None:
        """Begin the current epoch at this rank's ``position``-th sample (batches trained x batch_size).

        The length stays that of the whole epoch, because a trainer counts the trained batches itself.
        """
        if not 0 <= position <= len(self):
            raise ConfigError(
                f"OrderedSampler: start_at({position}) is outside this rank's {len(self)} samples. The"
                " dataset or the batch size differs from the run that wrote the position: resume with the"
                " same ones."
            )
        self.start = position

    def order(self) -> list[int]:
        """The epoch's order of the whole dataset, the same on every rank."""
        if not self.shuffle:
            return list(range(self.length))
        # torch keeps 32 bits of a CPU seed, so (seed, epoch) is mixed into 32: seed + epoch would give seed 1
        # the orders of seed 0, one epoch later.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{self.epoch}".encode()))
        order: list[int] = torch.randperm(self.length, generator=generator).tolist()
        return order

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        mine = order[self.rank :: self.world][: self.size]
        if self.padded:
            mine.append(order[-1])
        return iter(mine[self.start :])

    def __len__(self) -> int:
        return self.size + self.padded


def is_blank(loader_or_sampler: Any, batch_idx: int) -> bool:
    """Whether batch ``batch_idx`` of this rank's epoch is only the repeated sample, which counts for nothing.

    Args:
        loader_or_sampler: an ``OrderedSampler``, or a loader; one without such a sampler has no blank batch.
        batch_idx: counted from the epoch's start; a shorter loader that begins again counts on.

    >>> sampler = OrderedSampler(5, shuffle=False, seed=0, rank=1, world=2, batch_size=2)
    >>> [is_blank(sampler, batch) for batch in range(2)]   # [1, 3], then the repeated sample
    [False, True]
    """
    sampler = getattr(loader_or_sampler, "sampler", loader_or_sampler)
    sampler = getattr(sampler, "inner", sampler)  # while a run follows the order of a loader that does not batch
    if not isinstance(sampler, OrderedSampler) or not sampler.padded:
        return False
    whole = sampler.size // sampler.batch_size  # exact: a padded rank has no batch that is not full
    return batch_idx % (whole + 1) == whole


def use_ordered_sampler(
    loader: Any, *, seed: int, rank: int = 0, world: int = 1
) -> tuple[DataLoader[Any], None] | tuple[None, str]:
    """A copy of ``loader`` that draws its order from an ``OrderedSampler``; all its other settings stay.

    A loader that shuffles goes on shuffling, one that does not keeps its order.

    Args:
        loader: a map-style DataLoader with torch's own random, sequential or distributed sampler.
        seed: see ``OrderedSampler``.
        rank: this process.
        world: processes that share the dataset.
    Returns:
        (loader, None), or (None, reason) for a loader that must keep its own order.
    """
    if not isinstance(loader, DataLoader):
        return None, f"a {type(loader).__name__} is not a torch DataLoader"
    if isinstance(loader.dataset, IterableDataset):
        return None, f"{type(loader.dataset).__name__} is an iterable dataset, which has no order to choose"
    sampler, batches = loader.sampler, loader.batch_sampler
    if isinstance(sampler, OrderedSampler):
        return loader, None
    if batches is not None and type(batches) is not BatchSampler:
        return None, f"its batch sampler is the user's {type(batches).__name__}"
    length = len(loader.dataset)  # type: ignore[arg-type]  # torch types no dataset as sized; map-style ones are
    # Exact classes: a subclass (a wrapper around a user's sampler, say) exists to change the order.
    shuffle = type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == length
    if type(sampler) is DistributedSampler:
        shuffle = sampler.shuffle
    elif not shuffle and type(sampler) is not SequentialSampler:
        return None, f"its sampler is a {type(sampler).__name__} that does not visit every sample once"
    ordered = OrderedSampler(
        length,
        shuffle=shuffle,
        seed=seed,
        rank=rank,
        world=world,
        batch_size=loader.batch_size or 1,
        drop_last=loader.drop_last,
    )
    # A shallow copy keeps every setting, those of later torch releases too. DataLoader forbids plain
    # assignment of its sampler.
    twin = copy.copy(loader)
    object.__setattr__(twin, "_iterator", None)
    object.__setattr__(twin, "sampler", ordered)
    if batches is not None:
        object.__setattr__(twin, "batch_sampler", BatchSampler(ordered, batches.batch_size, batches.drop_last))
    return twin, None
