"""Shares and counts of a binary network: exact, alone and in a collection, in one update or in many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.reports.metrics import ClippedShare, FlipRatio, NanCount, OutsideShare, ZeroShare

INF, NAN = float("inf"), float("nan")
X = torch.tensor([[-INF, -1.5, -1.0, -0.0], [0.0, 1.0, 1.25, NAN]])
KNOWN = {ClippedShare: 5 / 8, ZeroShare: 2 / 8, OutsideShare: 3 / 8, NanCount: 1}
KINDS = pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.__name__)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_known_values(kind: Any, dtype: torch.dtype) -> None:
    metric = kind()
    metric.update(X.to(dtype))
    assert metric.compute() == KNOWN[kind]
    metric.reset()
    metric.update(torch.full((3,), 0.5, dtype=dtype))
    assert metric.compute() == 0


@KINDS
@given(values=st.lists(st.sampled_from(X.flatten().tolist()), min_size=2, max_size=30), cut=st.integers(0, 30))
def test_two_updates_are_one(kind: Any, values: list[float], cut: int) -> None:
    x = torch.tensor(values)
    parts, whole = kind(), kind()
    for part in (x[:cut], x[cut:]):
        parts.update(part)
    whole.update(x)
    assert torch.equal(parts.compute(), whole.compute())


def test_flips_are_counted_by_step() -> None:
    before = torch.tensor([1.0, -1.0, 0.0, -0.0, NAN, -2.0, 3.0, -4.0])
    after = torch.tensor([2.0, 1.0, -0.5, 0.0, -1.0, NAN, 0.0, -0.1])
    flipped = 4  # the second to sign +1, the third, NaN to negative, and negative to NaN
    flips = FlipRatio()
    flips.update(before, after)
    assert flips.compute() == flipped / 8
    flips.update(before < 0, after < 0, steps=3)
    assert flips.compute() == 2 * flipped / (4 * 8)
    flips.reset()
    flips.update(before < 0, after)  # signs with weights
    assert flips.compute() == flipped / 8


def test_two_updates_of_flips_are_one() -> None:
    before, after = torch.randn(2, 40, 9, generator=torch.Generator().manual_seed(0))
    parts, whole = FlipRatio(), FlipRatio()
    for rows in (slice(0, 7), slice(7, 40)):
        parts.update(before[rows], after[rows], 5)
    whole.update(before, after, 5)
    assert torch.equal(parts.compute(), whole.compute())
    assert 0.05 < whole.compute() < 0.15  # half of the signs differ, over five steps


@pytest.mark.parametrize(
    ("after", "steps"), [(torch.zeros(3), 1), (torch.zeros(2, 1), 1), (torch.zeros(2), 0)],
    ids=["other size", "other shape", "no step"],
)  # fmt: skip
def test_what_is_not_one_layer_at_two_times_is_refused(after: Tensor, steps: int) -> None:
    with pytest.raises(ConfigError, match=r"FlipRatio: got \(2,\) before and .* expected one shape and at least 1"):
        FlipRatio().update(torch.zeros(2), after, steps)


@KINDS
def test_counts_are_integers_beyond_float32(kind: Any) -> None:
    metric = kind()
    metric.update(X)
    (name, *_) = [name for name in metric.metric_state if name != "seen"]
    counted = int(getattr(metric, name))
    setattr(metric, name, torch.tensor(2**24 + 1))
    metric.update(X)
    assert getattr(metric, name).dtype is torch.int64
    assert int(getattr(metric, name)) == 2**24 + 1 + counted


@KINDS
def test_nothing_is_kept_for_a_gradient(kind: Any) -> None:
    metric = kind()
    metric.update(X.clone().requires_grad_())
    assert not any(state.requires_grad for state in metric.metric_state.values())


def test_a_collection_keeps_them_apart() -> None:
    """torchmetrics joins metrics whose states look alike after the first batch: here all counts are 0 then."""
    together = MetricCollection([kind() for kind in KNOWN])
    together.update(torch.full((8,), 0.5))
    together.update(X)
    assert together.compute() == {"ClippedShare": 5 / 16, "ZeroShare": 2 / 16, "OutsideShare": 3 / 16, "NanCount": 1}


@KINDS
def test_processes_add_their_counts(kind: Any) -> None:
    """As torchmetrics reduces what it gathered: stacked, then the state's own reduction."""
    a, b, whole = kind(), kind(), kind()
    a.update(X)
    b.update(torch.full((8,), 0.5))
    whole.update(torch.cat([X, torch.full((2, 4), 0.5)]))
    for name, reduction in whole._reductions.items():
        assert torch.equal(reduction(torch.stack([getattr(a, name), getattr(b, name)])), getattr(whole, name))
