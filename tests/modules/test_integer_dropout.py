"""Dropout masks are a function of (seed, batch, layer, global sample) and kept nowhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules.integer_twin import Origin, carrier, codes, grad_of, half_away, send_back, values
from torch import Tensor

from lightning_lowbit import Niti
from lightning_lowbit.modules.base import Run, Switch
from lightning_lowbit.modules.carrier import Carrier


def origin(rank: int = 0, world: int = 1, batch: int = 0, path: str = "fc", **options: Any) -> Origin:
    return Origin(Niti(**options), Switch(run=Run(rank=rank, world=world, batch=batch)), path)


def ones(shape: tuple[int, ...] = (16, 50), **place: Any) -> Carrier:
    return carrier(torch.ones(shape, dtype=torch.int8), 0, origin(**place), grad=True)


def mask(x: Carrier, p: float = 0.5, function: Any = F.dropout) -> Tensor:
    y = function(x, p, True)
    assert type(y) is Carrier
    return y.payload != 0


def test_masks_come_again_for_the_same_place_and_only_there() -> None:
    first = mask(ones())
    assert torch.equal(first, mask(ones()))
    for other in ({"batch": 1}, {"path": "fc2"}, {"seed": 1}):
        assert 0.3 < (first == mask(ones(**other))).float().mean() < 0.7
    assert len(torch.unique(first, dim=0)) == 16  # a mask for each sample


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_draw_rows_of_one_mask(world: int) -> None:
    whole = mask(ones((12, 50)))
    for rank in range(world):
        part = mask(ones((12 // world, 50), rank=rank, world=world))
        assert torch.equal(part, whole[rank::world])


def test_a_shared_mask_is_one_for_all_samples_and_ranks() -> None:
    whole = mask(ones(dropout="shared"))
    assert len(torch.unique(whole, dim=0)) == 1
    assert torch.equal(whole[:4], mask(ones((4, 50), rank=1, world=2, dropout="shared")))


def test_half_is_exact_and_its_error_takes_the_same_mask() -> None:
    x = carrier(codes(16, 50), -7, origin(), grad=True)
    y = F.dropout(x, 0.5, True)
    kept = mask(ones())
    assert torch.equal(values(y), 2 * values(x) * kept)
    x.origin.switch.run.batch = 7  # the backward of a batch may run when the next one has begun
    err = codes(16, 50, seed=1)
    send_back(y, err, -9)
    assert torch.equal(grad_of(x), err.double() * 2.0**-8 * kept)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.3, 0.75, 0.9])
def test_any_probability(p: float) -> None:
    big = mask(ones((200, 200)), p)
    assert abs(float(big.float().mean()) - (1 - p)) < 5 * (p * (1 - p) / 40000) ** 0.5
    x = carrier(codes(16, 50), -7, origin(), grad=True)
    y = F.dropout(x, p, True)
    kept = mask(ones((16, 50)), p)
    assert y.payload.dtype is torch.int8
    # A factor of 8 bits is off by at most 2^-8 of it, and the product is rounded once.
    want = values(x) * kept / (1 - p)
    assert ((values(y) - want).abs() <= want.abs() * 2.0**-8 + 2.0 ** (int(y.exponent) - 1)).all()
    assert (values(y)[~kept] == 0).all()
    err = codes(16, 50, seed=1)
    send_back(y, err, -9)
    assert (grad_of(x)[~kept] == 0).all()
    torch.testing.assert_close(
        grad_of(x), err.double() * 2.0**-9 * kept / (1 - p), atol=2.0**-9 / (1 - p), rtol=2.0**-8
    )


def test_the_factor_is_an_integer_over_a_power_of_two() -> None:
    x = carrier(codes(4, 50), -7, origin())
    kept = mask(ones((4, 50)), 0.2)
    y = F.dropout(x, 0.2, True)  # 1 / 0.8 = 160 / 2^7
    assert torch.equal(y.payload.double(), half_away(x.payload.double() * kept * 160 / 256))
    assert int(y.exponent) == -7 + 1


@pytest.mark.parametrize("function", [F.dropout1d, F.dropout2d])
def test_channel_dropout_takes_whole_channels(function: Any) -> None:
    shape = (6, 20, 3, 3) if function is F.dropout2d else (6, 20, 9)
    kept = mask(ones(shape), 0.5, function).flatten(2)
    assert torch.equal(kept, kept[..., :1].expand_as(kept))
    assert 0.2 < kept.float().mean() < 0.8
    x = ones(shape)
    send_back(function(x, 0.5, True), torch.ones(shape, dtype=torch.int8), 0)
    assert torch.equal(grad_of(x).flatten(2) != 0, kept)


def test_evaluation_and_zero_are_the_identity_and_one_is_float() -> None:
    x = ones()
    assert F.dropout(x, 0.5, False) is x
    assert F.dropout(x, 0.0, True) is x
    assert float(F.dropout(x, 1.0, True).detach().abs().sum()) == 0


def test_exact_sums_of_errors_stay_exact() -> None:
    """An error wider than int8 (a fork behind the dropout) is scaled and not rounded."""
    x = carrier(codes(4, 10), grad=True)
    y = F.dropout(x, 0.2, True)
    wide = Carrier(torch.full((4, 10), 1001, dtype=torch.int32), torch.tensor(-9, dtype=torch.int32), Origin())
    y.backward(wide)
    kept = grad_of(x) != 0
    assert torch.equal(grad_of(x), kept * 1001 * 160 * 2.0**-16)


def test_an_injected_source_replaces_the_counters() -> None:
    place = origin()
    place.switch.run = dataclasses.replace(
        place.switch.run, injected=lambda path, purpose, n, per: torch.zeros((n, per), dtype=torch.int64)
    )
    x = carrier(codes(4, 10), origin=place)
    assert not F.dropout(x, 0.5, True).payload.any()
