"""Two ranks under LowBitDDPStrategy hold one network; integers are reduced beside torch's DDP, and counted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_script
from plugins.lifecycle_nets import QUIET, assert_equal_states, states, trainer
from plugins.strategy_ddp_script import SCENARIOS, Net, data
from schemes.toy_integer import ToyInteger

from lightning_lowbit import LowBitDDPStrategy, LowBitStrategy
from lightning_lowbit.errors import InvariantError
from lightning_lowbit.plugins.distributed import counted, process_rank, reduce_sum, reduce_sum_flat, world_size

pytestmark = QUIET

SCRIPT = Path(__file__).with_name("strategy_ddp_script.py")
Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Every scenario's results by rank; one pair of processes for all of them."""
    folder = tmp_path_factory.mktemp("ddp")
    run_script(SCRIPT, folder, ranks=2, timeout=120)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Net:
    """The toy run in one process, on the same global batches."""
    net = Net(0)
    trainer(tmp_path_factory.mktemp("alone"), strategy=LowBitStrategy(ToyInteger())).fit(net, data(1))
    return net


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_both_ranks_end_with_one_network(ranks: Ranks, scenario: str) -> None:
    # torch's DDP lets a rank's last batch into its own moving statistics of a batch norm, broadcast before the next.
    first, second = (
        {k: v for k, v in rank[scenario]["state"].items() if ".bn" not in k and "flags" not in k} for rank in ranks
    )
    assert_equal_states(first, second)


def test_integers_alone_need_no_wrap(ranks: Ranks) -> None:
    assert [rank["toy"]["wrapped"] for rank in ranks] == [False, False]
    assert [rank["by_string"]["wrapped"] for rank in ranks] == [True, True]
    for rank in ranks:  # what the wrap would have shared is shared without it
        for scenario in ("toy", "validated"):
            assert rank[scenario]["state"]["fixed"].tolist() == [0.0, 0.0]
            assert rank[scenario]["state"]["flags"].tolist() == [True, True]


def test_ranks_saw_different_halves_of_the_global_batches(ranks: Ranks, alone: Net) -> None:
    assert len(alone.seen) == ranks[0]["toy"]["steps"] == 8
    for together, first, second in zip(alone.seen, *(rank["toy"]["seen"] for rank in ranks), strict=True):
        assert torch.equal(first, together[0::2])
        assert torch.equal(second, together[1::2])
    assert ranks[0]["toy"]["losses"] != ranks[1]["toy"]["losses"]


def test_two_processes_compute_what_one_does(ranks: Ranks, alone: Net) -> None:
    """Exponents are maxima over the processes, sums are integers: equal samples make equal bits."""
    begun = len(alone.losses) - len(alone.seen)  # calibration comes before
    mean = sum(rank["toy"]["losses"][begun] for rank in ranks) / 2
    assert mean == pytest.approx(alone.losses[begun], rel=1e-3)  # the same weights and samples
    together = ranks[0]["toy"]["state"]
    assert_equal_states(
        {k: v for k, v in states(alone).items() if k.endswith("weight")},
        {k: v for k, v in together.items() if k.endswith("weight")},
    )


def test_resume_without_a_callback_is_bit_equal(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["resumed"]["steps"] == rank["toy"]["steps"]
        assert_equal_states(rank["resumed"]["state"], rank["toy"]["state"])
        assert rank["toy"]["callback"] == "Lifecycle"


def test_a_ragged_end_leaves_nobody_waiting(ranks: Ranks) -> None:
    assert [rank["ragged"]["steps"] for rank in ranks] == [4, 4]
    assert [[len(x) for x in rank["ragged"]["seen"]] for rank in ranks] == [[8, 1, 8, 1]] * 2


def test_both_namespaces(ranks: Ranks) -> None:
    assert all(rank["other_namespace"]["ddp"] for rank in ranks)
    # Not the moving statistics, as above; the weights saw the same batches in the same order.
    a, b = ({k: v for k, v in ranks[0][s]["state"].items() if ".bn" not in k} for s in ("by_string", "other_namespace"))
    assert_equal_states(a, b)


# -- reductions ------------------------------------------------------------------------------------------------
def test_fused_sums_are_the_sums_of_each(ranks: Ranks) -> None:
    for number, rank in enumerate(ranks):
        result = rank["flat"]
        assert result["who"] == (number, 2)
        for i, (a, b) in enumerate(zip(*result["parts"], strict=True)):
            total = result["state"][str(i)]
            assert total.dtype is a.dtype
            assert torch.equal(total, a + b)
        assert result["state"]["5"].tolist() == [-2]  # wraps as torch's own addition
        numbers = {dtype: sum(t.numel() for t in result["parts"][0] if t.dtype is dtype) for dtype in DTYPES}
        # One collective for each dtype, none for an empty list; both recorders hear of it.
        assert result["traffic"] == {"sum int32": [1, 4 * numbers[torch.int32]], "sum int64": [1, 8 * 4]}
        assert result["inner"] == result["traffic"]


DTYPES = (torch.int32, torch.int64)


def test_traffic_is_counted_by_step(ranks: Ranks) -> None:
    weights = {"first": 6 * 8, "again": 8 * 8, "left": 8 * 3, "right": 8 * 3}
    for rank in ranks:
        steps = rank["toy"]["traffic"]
        assert len(steps) == 8
        for step in steps:
            # The input, five calls of layers, two float errors, four errors of inputs, one sum where a tensor forks.
            assert step == {"max int32": [13, 4 * 13], "sum int64": [4, 8 * sum(weights.values())]}


def test_one_process_reduces_nothing_and_copies_nothing() -> None:
    tensors = [torch.arange(3, dtype=torch.int32), torch.arange(3)]
    with counted() as traffic:
        sums = reduce_sum_flat(tensors)
        assert reduce_sum(tensors[0]) is tensors[0]
        traffic.end_step()
    assert all(a is b for a, b in zip(sums, tensors, strict=True))
    assert traffic.steps == [{}]
    assert (process_rank(), world_size()) == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.int16])
def test_what_would_wrap_or_round_is_no_fused_sum(dtype: torch.dtype) -> None:
    with pytest.raises(InvariantError, match=r"got torch\..* \(2,\), expected int32 or int64"):
        reduce_sum_flat([torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=dtype)])


def test_one_process_of_ddp_needs_no_wrap_either(tmp_path: Path) -> None:
    """devices=1 under "lowbit_ddp" is the run in one process, bit for bit."""
    environment = dict(os.environ)  # the launcher leaves the port and the ranks there
    ends = []
    try:
        for strategy in (LowBitStrategy(ToyInteger()), LowBitDDPStrategy(ToyInteger(), process_group_backend="gloo")):
            net = Net(0)
            trainer(tmp_path, strategy=strategy, devices=1).fit(net, data(1))
            ends.append(states(net))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)
    assert_equal_states(*ends)
