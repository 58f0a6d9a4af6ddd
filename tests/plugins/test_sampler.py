"""The order of samples that needs no random state: what each rank gets, and which loaders may have it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.plugins.order import RecordedOrder
from lightning_lowbit.plugins.sampler import OrderedSampler, is_blank, use_ordered_sampler

DATA = TensorDataset(torch.arange(10))


@given(
    length=st.integers(1, 60),
    world=st.integers(1, 5),
    batch=st.integers(1, 7),
    drop=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_ranks_share_the_epoch(length: int, world: int, batch: int, drop: bool, epoch: int) -> None:
    ranks = [
        OrderedSampler(length, shuffle=True, seed=3, rank=rank, world=world, batch_size=batch, drop_last=drop)
        for rank in range(world)
    ]
    counted: list[int] = []
    steps = set()
    for sampler in ranks:
        sampler.set_epoch(epoch)
        mine = list(sampler)
        assert len(mine) == len(sampler) == sampler.size + sampler.padded
        counted += mine[: sampler.size]
        batches = list(BatchSampler(sampler, batch, drop))
        steps.add(len(batches))
        if sampler.padded:
            assert len(batches[-1]) == 1, "the repeated sample must stand alone, so that its batch can weigh zero"
    assert len(steps) == 1, "ranks would wait for each other's collectives"
    assert len(set(counted)) == len(counted)
    assert len(counted) == (length - length % world if drop else length)
    assert max(r.size for r in ranks) - min(r.size for r in ranks) <= 1


@given(
    length=st.integers(1, 60), world=st.integers(1, 5), batch=st.integers(1, 7), drop=st.booleans(), rank=st.integers(0)
)  # fmt: skip
def test_a_blank_batch_is_the_repeated_sample_alone(length: int, world: int, batch: int, drop: bool, rank: int) -> None:
    sampler = OrderedSampler(
        length, shuffle=True, seed=3, rank=rank % world, world=world, batch_size=batch, drop_last=drop
    )
    counted = 0
    batches = list(BatchSampler(sampler, batch, drop))
    for index, positions in enumerate(batches):
        assert is_blank(sampler, index) is (counted >= sampler.size)
        assert is_blank(sampler, index + len(batches)) is is_blank(sampler, index)  # it begins again
        counted += len(positions)


def test_blank_batches_of_loaders() -> None:
    def blank(loader: DataLoader[object]) -> list[bool]:
        twin, _ = use_ordered_sampler(loader, seed=1, rank=1, world=2)
        assert twin is not None
        found = []
        for wrapped in (False, True):
            if wrapped:  # as while a run records the order
                name = "sampler" if twin.batch_sampler is None else "batch_sampler"
                object.__setattr__(twin, name, RecordedOrder(twin, getattr(twin, name)))
            found.append([is_blank(twin, index) for index, _ in enumerate(twin)])
        assert found[0] == found[1]
        return found[0]

    nine = TensorDataset(torch.arange(9))
    assert blank(DataLoader(nine, batch_size=2)) == [False, False, True]
    assert blank(DataLoader(nine, batch_size=None)) == [False] * 4 + [True]
    assert blank(DataLoader(nine, batch_size=3)) == [False, False]
    assert blank(DataLoader(DATA, batch_size=5)) == [False]
    assert not is_blank(DataLoader(nine), 8)
    assert not is_blank([1, 2], 1)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = OrderedSampler(50, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(1)
    first = order(0, 1)
    torch.manual_seed(2)
    assert order(0, 1) == first
    orders = [tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9, "seed 1 must not begin with an epoch of seed 0"
    state = torch.get_rng_state()
    order(5, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_rank_takes_every_world_th_position() -> None:
    whole = list(OrderedSampler(11, shuffle=True, seed=4))
    assert list(OrderedSampler(11, shuffle=True, seed=4, rank=1, world=3, batch_size=3)) == whole[1::3]
    assert list(OrderedSampler(4, shuffle=False, seed=4)) == [0, 1, 2, 3]


def test_start_holds_for_its_epoch_only() -> None:
    sampler = OrderedSampler(10, shuffle=True, seed=0)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.start_at(4)
    sampler.set_epoch(2)
    assert list(sampler) == whole[4:]
    assert len(sampler) == 10
    sampler.set_epoch(3)
    assert len(list(sampler)) == 10


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_impossible_ranks_are_refused(rank: int, world: int) -> None:
    with pytest.raises(ConfigError, match=f"rank={rank}, world={world}"):
        OrderedSampler(4, shuffle=True, seed=0, rank=rank, world=world)
    with pytest.raises(ConfigError, match=r"start_at\(5\) is outside this rank's 4"):
        OrderedSampler(4, shuffle=True, seed=0).start_at(5)


def test_loader_keeps_its_settings() -> None:
    generator = torch.Generator()
    loader = DataLoader(
        DATA, batch_size=3, shuffle=True, drop_last=True, generator=generator, collate_fn=list, timeout=0
    )
    twin, reason = use_ordered_sampler(loader, seed=1)
    assert twin is not None
    assert reason is None
    assert type(twin) is DataLoader
    assert (twin.batch_size, twin.drop_last, twin.collate_fn) == (3, True, list)
    assert twin.generator is generator
    assert isinstance(twin.sampler, OrderedSampler)
    assert twin.sampler.shuffle
    assert len(twin) == 3
    seen = [int(sample[0]) for batch in twin for sample in batch]
    assert seen == list(twin.sampler)[:9]
    assert isinstance(loader.sampler, RandomSampler), "the user's loader stays as it was"
    assert use_ordered_sampler(twin, seed=9)[0] is twin


@pytest.mark.parametrize(
    ("sampler", "shuffles"),
    [
        (SequentialSampler(DATA), False),
        (RandomSampler(DATA), True),
        (DistributedSampler(DATA, num_replicas=2, rank=1, shuffle=True), True),
        (DistributedSampler(DATA, num_replicas=2, rank=1, shuffle=False), False),
    ],
)
def test_shuffling_is_kept(sampler: object, shuffles: bool) -> None:
    twin, _ = use_ordered_sampler(DataLoader(DATA, batch_size=2, sampler=sampler), seed=1, rank=1, world=2)
    assert twin is not None
    assert twin.sampler.shuffle is shuffles
    assert len(list(twin)) == 3
    if not shuffles:
        assert list(twin.sampler) == [1, 3, 5, 7, 9]


class Stream(IterableDataset[int]):
    def __iter__(self):  # type: ignore[no-untyped-def]  # a test's stream
        return iter(range(4))


class EveryOther(BatchSampler):
    pass


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        ([1, 2], "list is not a torch DataLoader"),
        (DataLoader(Stream()), "Stream is an iterable dataset"),
        (DataLoader(DATA, sampler=SubsetRandomSampler([1, 2])), "SubsetRandomSampler"),
        (DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * 10, 10)), "WeightedRandomSampler"),
        (
            DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True)),
            "RandomSampler that does not visit",
        ),
        (DataLoader(DATA, batch_sampler=EveryOther(SequentialSampler(DATA), 2, False)), "EveryOther"),
    ],
)
def test_foreign_orders_are_refused(loader: object, reason: str) -> None:
    twin, why = use_ordered_sampler(loader, seed=1)
    assert twin is None
    assert why is not None
    assert reason in why
