"""FraclenSchedule: how fast fractional lengths follow, when they stop, what is logged, and where it is refused."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from schemes.conformance import SaveAt, copy_of, differing, loader, net, trainer
from schemes.f8net_nets import inputs, rule
from torch import Tensor

from lightning_lowbit import F8Net, QuantCallback
from lightning_lowbit.callbacks.fraclen import FraclenSchedule
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.layers import LowBitLayer

READERS = ("conv1", "conv2", "conv3", "fc")


class Watch(pl.Callback):
    """Per training batch: whether fraclens and norms stand still, and where the fraclens are."""

    def __init__(self) -> None:
        self.frozen: list[bool] = []
        self.norms: list[bool] = []
        self.fraclens: list[dict[str, float]] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.frozen.append(inputs(pl_module)["conv1"].frozen)
        layers = [m for m in pl_module.modules() if isinstance(m, LowBitLayer) and m.norm is not None]
        self.norms.append(layers[0].norm_frozen)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.fraclens.append(rule(pl_module).fraclens())

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.metrics.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.metrics.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def run(schedule: FraclenSchedule, scheme: F8Net | None = None, **options: Any) -> Watch:
    watch = Watch()
    callback = QuantCallback(scheme or F8Net(), start=0, evaluate=False)
    trainer(schedule, callback, watch, **options).fit(net(), loader(), loader())
    return watch


@pytest.mark.parametrize(
    ("freeze", "norms", "want"),
    [(0.25, 0.5, (2, 4)), (1, "6 steps", (4, 6)), ("3 steps", None, (3, 8)), (None, 1, (8, 4)), (0, 0, (0, 0))],
    ids=["fractions", "epoch_and_steps", "norms_never", "fraclens_never", "at_once"],
)
def test_each_freezes_in_its_time(freeze: Any, norms: Any, want: tuple[int, int]) -> None:
    watch = run(FraclenSchedule(freeze=freeze, freeze_batch_norm=norms))
    assert watch.frozen == [step >= want[0] for step in range(8)]
    assert watch.norms == [step >= want[1] for step in range(8)]
    held = watch.fraclens[max(0, want[0] - 1) :]
    if want[0]:
        assert all(later == held[0] for later in held)
    moving = watch.fraclens[: want[0]]
    assert all(a != b for a, b in itertools.pairwise(moving))


def test_the_schedule_takes_the_place_of_the_scheme_s_own() -> None:
    watch = run(FraclenSchedule(freeze=0.75, freeze_batch_norm=None), F8Net(freeze_fraclen=0, freeze_batch_norm=0))
    assert watch.frozen == [False] * 6 + [True] * 2
    assert not any(watch.norms)


def test_the_momentum_falls_geometrically_until_fraclens_freeze() -> None:
    seen: list[float] = []

    class Momenta(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            inputs(pl_module)["conv1"].fraclen.fill_(0.0)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(float(inputs(pl_module)["conv1"].fraclen))

    schedule = FraclenSchedule(momentum=0.4, final_momentum=0.1, freeze=0.75)
    scheme = F8Net(momentum=0.9)
    trainer(QuantCallback(scheme, start=0), schedule, Momenta()).fit(net(), loader(), loader())
    want = [0.4 * 0.25 ** (step / 6) for step in range(6)]
    steps = [value / share for value, share in zip(seen, want, strict=False)]  # the batch's own fraclen
    assert steps == pytest.approx([round(value) for value in steps], rel=1e-5)
    assert min(steps) >= 4
    assert seen[6:] == [0.0, 0.0]


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_a_momentum_alone_stays(momentum: float | None) -> None:
    schedule = FraclenSchedule(momentum=momentum)
    module = net()
    trainer(QuantCallback(F8Net(momentum=0.25), start=0), schedule).fit(module, loader(), loader())
    assert rule(module).momentum == (momentum or 0.25)
    assert rule(module).last_momentum is None


def test_fraclens_and_flips_are_logged_every_epoch(tmp_path: Path) -> None:
    watch = run(FraclenSchedule(momentum=1.0, freeze=None), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    with next(tmp_path.rglob("metrics.csv")).open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["fraclen_flips"]]
    assert len(rows) == 2
    keys = {f"fraclen/{key.removesuffix('.lowbit_input')}" for key in watch.fraclens[0]}
    assert keys <= {f"fraclen/{path}" for path in READERS}
    assert {"fraclen/conv1", "fraclen/conv2"} <= keys
    for row, step in zip(rows, (3, 7), strict=True):
        logged = {key: float(value) for key, value in row.items() if key.startswith("fraclen/")}
        held = watch.fraclens[step]
        assert logged == {f"fraclen/{key.removesuffix('.lowbit_input')}": held[key] for key in held}
        assert watch.metrics[1 + step // 4]["fraclen/conv1"] == logged["fraclen/conv1"]


def test_flips_are_those_of_one_epoch() -> None:
    """The first layer's fraclen is put elsewhere before some batches, and comes back at once."""

    class Disturb(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx) in ((0, 1), (0, 2), (0, 3), (1, 2)):
                inputs(pl_module)["conv1"].fraclen.fill_(0.0)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert float(inputs(pl_module)["conv1"].fraclen) > 0

    found = []
    for disturbing in ([], [Disturb()]):
        watch, module = Watch(), net()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        module.configure_optimizers = lambda made=optimizer: made  # type: ignore[method-assign, misc]
        scheme = F8Net(momentum=1.0, alpha_lr=0.0)
        schedule = FraclenSchedule(freeze=None, freeze_batch_norm=None)
        trainer(QuantCallback(scheme, start=0), schedule, watch, *disturbing).fit(module, loader(), loader())
        found.append([metrics["fraclen_flips"] for metrics in watch.metrics[1:]])
    quiet, disturbed = found
    assert [b - a for a, b in zip(quiet, disturbed, strict=True)] == [3.0, 1.0]


def test_nothing_is_logged_when_that_is_asked_for_and_before_quantization_starts() -> None:
    quiet = run(FraclenSchedule(log=False))
    assert not any(key.startswith("fraclen") for metrics in quiet.metrics for key in metrics)
    watch = Watch()
    trainer(QuantCallback(F8Net(), start=1), FraclenSchedule(freeze=0.75, freeze_batch_norm=None), watch).fit(
        net(), loader(), loader()
    )
    assert [any(key.startswith("fraclen") for key in metrics) for metrics in watch.metrics] == [False, False, True]


@pytest.mark.parametrize("order", ["first", "last"])
def test_it_stands_before_or_behind_quant_callback(order: str) -> None:
    watch, callback, schedule = Watch(), QuantCallback(F8Net(), start=0), FraclenSchedule(freeze="2 steps")
    both = [schedule, callback] if order == "first" else [callback, schedule]
    trainer(*both, watch).fit(net(), loader(), loader())
    assert watch.frozen == [False] * 2 + [True] * 6


@pytest.mark.parametrize("scheme", ["tqt", "bnn", "niti"])
def test_another_scheme_is_refused_by_name(scheme: str) -> None:
    module = net()
    before = copy_of(module)
    with pytest.raises(ConfigError, match=rf"(?i)fraclen.*{scheme}|{scheme}.*fraclen"):
        trainer(QuantCallback(scheme, start=0), FraclenSchedule()).fit(module, loader(), loader())
    assert differing(before, {key: value for key, value in copy_of(module).items() if key in before}) == []


def test_without_quant_callback_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"FraclenSchedule\(\.\.\.\).*Add QuantCallback"):
        trainer(FraclenSchedule()).fit(net(), loader(), loader())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": 0.0}, r"momentum=0\.0.*\(0, 1\]"),
        ({"momentum": 1.5}, r"momentum=1\.5.*\(0, 1\]"),
        ({"final_momentum": float("nan")}, r"final_momentum=nan"),
        ({"final_momentum": 0.1, "freeze": None}, "reached when fraclens freeze"),
        ({"freeze": 1.0}, r"FraclenSchedule\(freeze\)=1\.0"),
        ({"freeze_batch_norm": "later"}, r"FraclenSchedule\(freeze_batch_norm\)='later'"),
    ],
    ids=["zero", "above_one", "nan", "never_reached", "no_fraction", "no_moment"],
)
def test_a_wrong_setting_says_what_is_allowed(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FraclenSchedule(**options)


@pytest.mark.parametrize("step", [3, 5], ids=["moving", "frozen"])
def test_resume_is_bit_equal_in_the_middle_of_a_falling_momentum(tmp_path: Path, step: int) -> None:
    def callbacks() -> list[Any]:
        schedule = FraclenSchedule(momentum=0.5, final_momentum=0.01, freeze="4 steps", freeze_batch_norm="6 steps")
        return [QuantCallback(F8Net(alpha_lr=0.05), start=0, resume_order=True), schedule]

    path, module = tmp_path / "middle.ckpt", net()
    torch.manual_seed(5)
    whole = trainer(*callbacks(), SaveAt(path, step))
    whole.fit(module, loader(shuffle=True), loader())
    again = net(seed=9)
    torch.manual_seed(77)
    resumed = trainer(*callbacks())
    resumed.fit(again, loader(shuffle=True), loader(), ckpt_path=path)
    assert differing(copy_of(again), copy_of(module)) == []
    logged: list[dict[str, Tensor]] = [
        {key: value for key, value in run.callback_metrics.items() if key.startswith("fraclen/")}
        for run in (whole, resumed)
    ]
    assert logged[0]
    assert logged[0] == logged[1]
