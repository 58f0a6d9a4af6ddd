"""NITI in two processes is NITI in one, bit for bit, and sends what docs/distributed.md says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_script
from plugins.distributed_niti_script import PERIOD, SCENARIOS, run
from plugins.lifecycle_nets import QUIET, assert_equal_states

from lightning_lowbit.modules.base import StepContext
from lightning_lowbit.schemes.niti_training import _reduced

pytestmark = QUIET

SCRIPT = Path(__file__).with_name("distributed_niti_script.py")
Ranks = list[dict[str, Any]]
Step = dict[str, list[int]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Every scenario's results by rank; one pair of processes for all of them."""
    folder = tmp_path_factory.mktemp("ddp")
    run_script(SCRIPT, folder, 2, ranks=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_compute_what_one_does(ranks: Ranks, name: str, tmp_path: Path) -> None:
    """Batches that no number divides, a rank without a sample, accumulation, 16-bit weights, frozen shifts."""
    alone = run(SCENARIOS[name], tmp_path)
    for rank in ranks:
        assert rank[name]["steps"] == alone["steps"]
        assert_equal_states(rank[name]["state"], alone["state"])
        # Nothing is left to torch's DDP where layers and norms are NITI's.
        assert not rank[name]["wrapped"]
    assert alone["traffic"] == [{}] * len(alone["traffic"])


def test_resume_between_two_renewals_is_bit_equal(ranks: Ranks) -> None:
    """Until they are shared, ranges differ between the processes, and a file holds those of one."""
    for rank in ranks:
        assert rank["resumed"]["steps"] == rank["frozen"]["steps"] > PERIOD + 2
        assert_equal_states(rank["resumed"]["state"], rank["frozen"]["state"])


# -- traffic: the formula of docs/distributed.md ---------------------------------------------------------------
def expected(
    layers: int, norms: int, ops: int, wide: int, parameters: int, tensors: int, channels: int = 0
) -> tuple[int, Step]:
    """Maxima of a step, and its sums: calls and bytes."""
    forward = 1 + layers + norms + ops
    backward = (layers - 1) + norms + wide
    sums = {
        "sum int64": [1 + 2 * norms, 8 + 8 * 5 * channels],
        "sum int32": [1, 4 * (parameters + tensors)],
    }
    return forward + backward, sums


# Body: two convolutions, a linear layer, two norms of four channels, an add and a pool. The error at the fork and
# the one of the pool (a ninth is no power of two) arrive wide.
ISLANDS = expected(3, 2, 2, 2, parameters=40 + 148 + 51, tensors=6, channels=8)
STRAIGHT = expected(3, 0, 0, 0, parameters=40 + 296 + 27, tensors=6)


@pytest.mark.parametrize(
    ("name", "formula"), [("islands", ISLANDS), ("blank", ISLANDS), ("straight", STRAIGHT), ("finetune", STRAIGHT)]
)
def test_traffic_follows_the_formula(ranks: Ranks, name: str, formula: tuple[int, Step]) -> None:
    maxima, sums = formula
    for rank in ranks:
        steps = rank[name]["traffic"]
        assert len(steps) == 9
        assert steps == [{"max int32": [maxima, 4 * maxima], **sums}] * 9


@pytest.mark.parametrize(("name", "formula", "errors"), [("frozen", ISLANDS, 6), ("straight_frozen", STRAIGHT, 2)])
def test_frozen_shifts_leave_one_maximum_in_a_period(
    ranks: Ranks, name: str, formula: tuple[int, Step], errors: int
) -> None:
    """Errors have no range before the first renewal, and follow their batches until then."""
    _, sums = formula
    for rank in ranks:
        ranges = sum(key.endswith(".seen") for key in rank[name]["state"])
        first, renewal = [errors, 4 * errors], [1, 4 * ranges]
        both = [errors + 1, 4 * (errors + ranges)]
        maxima = [first, first, first, both, None, None, None, renewal, None]
        wanted = [sums if sent is None else {"max int32": sent, **sums} for sent in maxima]
        assert rank[name]["traffic"] == wanted


def test_accumulated_batches_sum_their_gradients_once(ranks: Ranks) -> None:
    maxima, sums = STRAIGHT
    each = {"max int32": [maxima, 4 * maxima], "sum int64": sums["sum int64"]}
    for rank in ranks:  # three batches an epoch: two and one
        assert rank["accumulated"]["traffic"] == [each, {**each, **sums}, {**each, **sums}] * 3


def test_a_generic_loss_sends_one_more_maximum_and_no_count(ranks: Ranks) -> None:
    maxima, sums = STRAIGHT
    step = {"max int32": [maxima + 1, 4 * (maxima + 1)], "sum int32": sums["sum int32"]}
    assert all(rank["generic"]["traffic"] == [step] * 9 for rank in ranks)


def test_sums_that_may_wrap_are_added_once_more_in_int64() -> None:
    """Two processes, the other one's gradients as given; the flag of either of them decides."""
    mine = [torch.tensor([2**30, -5]), torch.tensor([7, 8], dtype=torch.int32), torch.tensor([-(2**30), 1])]
    other = [torch.tensor([2**30, 1]), torch.tensor([1, 2], dtype=torch.int32), torch.tensor([-3, 1])]
    calls: list[list[torch.dtype]] = []

    def reduce_sums(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        calls.append([tensor.dtype for tensor in tensors])
        if len(calls) == 1:
            *theirs, flags = [*(t.to(torch.int32) for t in other), torch.tensor([1, 0, 0], dtype=torch.int32)]
            return [a + b for a, b in zip(tensors, [*theirs, flags], strict=True)]
        return [a + b for a, b in zip(tensors, [other[0], other[2]], strict=True)]

    totals = _reduced(mine, StepContext(0, None, reduce_sums=reduce_sums, world=2))
    assert [total.tolist() for total in totals] == [[2**31, -4], [8, 10], [-(2**30) - 3, 2]]
    assert calls == [[torch.int32] * 4, [torch.int64] * 2]
