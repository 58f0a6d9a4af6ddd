"""Two processes with different data: how they share ranges, and what must be equal on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_script
from schemes.jacinto_ranks import PERCENT, SYNCS, batch
from torch import Tensor

from lightning_lowbit.numerics.percentile import percentile_range

INPUT = "conv1.lowbit_input.clips"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_script(Path(__file__).with_name("jacinto_ranks.py"), folder, ranks=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    return {key for key in a if not torch.equal(a[key], b[key])}


@pytest.mark.parametrize("sync", SYNCS)
@pytest.mark.parametrize("run", ["", " long"], ids=["step", "steps"])
def test_ranges_are_equal_on_all_ranks_if_they_are_shared(ranks: Any, sync: str, run: str) -> None:
    apart = differing(ranks[0][sync + run], ranks[1][sync + run])
    clips = {key for key in ranks[0][sync + run] if key.endswith("clips")}
    assert len(clips) == 7
    assert apart & clips == (clips if sync == "none" else set())
    assert [key for key in apart if key.endswith(("weight", "bias", "batches"))] == []


def test_what_is_shared_is_the_mean_or_the_range_of_all_data(ranks: Any) -> None:
    own = [percentile_range(batch(rank), PERCENT) for rank in range(2)]
    pooled = percentile_range(torch.cat([batch(0), batch(1)]), PERCENT)
    assert not torch.equal(own[0], own[1])
    for rank in range(2):
        assert torch.equal(ranks[rank]["mean"][INPUT], (own[0] + own[1]) / 2)
        assert torch.equal(ranks[rank]["hist"][INPUT], pooled)
        assert torch.equal(ranks[rank]["none"][INPUT], own[rank])


def test_calibration_is_shared_whatever_training_does(ranks: Any) -> None:
    own = [percentile_range(batch(rank), PERCENT) for rank in range(2)]
    pooled = percentile_range(torch.cat([batch(0), batch(1)]), PERCENT)
    want = {"mean": (own[0] + own[1]) / 2, "hist": pooled, "none": (own[0] + own[1]) / 2}
    for sync in SYNCS:
        clips = [key for key in ranks[0][f"{sync} calibrated"] if key.endswith("clips")]
        assert differing(*(rank[f"{sync} calibrated"] for rank in ranks)) & set(clips) == set()
        assert torch.equal(ranks[0][f"{sync} calibrated"][INPUT], want[sync])


@pytest.mark.parametrize("run", ["reference", "biases"])
def test_weights_that_are_moved_by_hand_are_equal_on_all_ranks(ranks: Any, run: str) -> None:
    apart = differing(ranks[0][run], ranks[1][run])
    assert [key for key in apart if key.endswith(("weight", "bias", "clips", "snapped"))] == []
    if run == "reference":
        assert float(ranks[0][run]["conv3.lowbit_weight.snapped"]) == 1
