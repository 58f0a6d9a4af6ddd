"""Two ranks fed different data hold one network; what torch's DDP keeps apart stays as DDP keeps it."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_script
from torch import Tensor, nn

from lightning_lowbit.modules.calibrate import calibrate
from lightning_lowbit.modules.convert import convert_module
from lightning_lowbit.schemes.tqt import Tqt

SCRIPT = Path(__file__).with_name("ddp_script.py")
SCENARIOS = ("scratch", "calibration", "init_from", "resume", "unequal", "sync_batchnorm")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Every scenario's results, rank by rank; one pair of processes for all of them."""
    folder = tmp_path_factory.mktemp("ddp")
    run_script(SCRIPT, folder, *SCENARIOS)
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)] for name in SCENARIOS}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


def feed(module: nn.Module, batches: list[Tensor]) -> int:
    for batch in batches:
        module(batch)
    return len(batches)


@pytest.mark.parametrize("scenario", ["scratch", "calibration", "init_from", "resume", "unequal"])
def test_both_ranks_end_with_one_network(ranks: dict[str, Any], scenario: str) -> None:
    first, second = ranks[scenario]
    apart = differing(first["state"], second["state"])
    # torch's DDP lets a rank's last batch into its own moving statistics, broadcast before the next one.
    assert {key.partition(".")[0] for key in apart} <= {"bn1"}
    assert [float(x) for x, _ in first["seen"]] != [float(x) for x, _ in second["seen"]]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first["seen"], second["seen"], strict=True))
    assert all(v == 1 for k, v in first["state"].items() if k.endswith("initialized"))


def test_the_warm_up_is_the_float_run_bit_for_bit(ranks: dict[str, Any]) -> None:
    """Quantizers that are not used yet neither trip DDP's reducer nor change a gradient or a statistic."""
    for result in ranks["scratch"]:
        assert differing({k: result["early"][k] for k in result["float_early"]}, result["float_early"]) == []
        assert all(v == 0 for k, v in result["early"].items() if k.endswith("initialized"))
        assert not torch.equal(result["early"]["conv1.weight"], result["state"]["conv1.weight"])


def test_thresholds_train_on_the_gradients_of_both_ranks(ranks: dict[str, Any]) -> None:
    moved = [key for key, value in ranks["scratch"][0]["state"].items() if key.endswith("log2_t") and value % 0.5 != 0]
    assert len(moved) >= 4  # calibration puts them at half integers


def test_calibration_sees_what_all_ranks_see(ranks: dict[str, Any]) -> None:
    """The grids are those of one process fed both ranks' batches; rank 0 alone would find finer ones."""
    script = importlib.import_module("plugins.ddp_script")
    found = {}
    for fed in ((0,), (0, 1)):
        net = script.net()
        convert_module(net, Tqt(mode="static", weight_init="max", act_init="max"))
        batches = [batch[0] for rank in fed for batch in script.share(rank, batches=2)]
        calibrate(net, functools.partial(feed, net, batches))
        found[fed] = {k: v for k, v in net.state_dict().items() if k.endswith(("log2_t", "negative"))}
    for result in ranks["calibration"]:
        assert differing({k: result["state"][k] for k in found[0, 1]}, found[0, 1]) == []
    assert "conv1.lowbit_input.log2_t" in differing(found[(0,)], found[0, 1])


def test_init_from_reaches_both_ranks(ranks: dict[str, Any]) -> None:
    for result in ranks["init_from"]:
        kept = {k: v for k, v in result["file"].items() if "num_batches" not in k}
        assert differing(kept, {k: result["state"][k] for k in kept}) == []


def test_resume_is_bit_equal_on_both_ranks(ranks: dict[str, Any]) -> None:
    """With shuffling and a dropout that draws other masks on each rank."""
    for result in ranks["resume"]:
        assert result["steps"] == result["resumed_steps"] == 12
        assert differing(result["state"], result["resumed"]) == []


def test_metrics_are_equal_on_both_ranks(ranks: dict[str, Any]) -> None:
    for scenario in ("scratch", "unequal"):
        first, second = (result["metrics"] for result in ranks[scenario])
        assert first == second
        assert [len(first[stage]) for stage in ("float", "calibrated", "trained")] == [1, 1, 1]


def test_sync_batchnorm_is_refused_by_name(ranks: dict[str, Any]) -> None:
    for result in ranks["sync_batchnorm"]:
        assert result["error"].startswith("Trainer(sync_batchnorm=True): ")
        assert "FoldBatchNorm" in result["error"]
