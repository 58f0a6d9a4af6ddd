"""Whole runs of WAGEUBN: schedules, resume, checkpoints, averages, stages."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from schemes.conformance import STEPS, Net, SaveAt, copy_of, differing, loader, net, trainer
from schemes.wageubn_nets import chain, converted, errors, finite, images, norms, rule, state
from torch import Tensor, nn

from lightning_lowbit import QuantCallback, Wageubn, lowbit_step
from lightning_lowbit.demos import DigitsCnn, DigitsData
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.schemes.wageubn_training import ClosedRule


def fit(module: Any, *callbacks: Any, scheme: Wageubn | None = None, path: Path | None = None, **options: Any) -> Any:
    callback = QuantCallback(scheme or Wageubn(), start=0, resume_order=True, evaluate=False)
    trainer(callback, *callbacks, **options).fit(module, loader(shuffle=True), loader(), ckpt_path=path)
    return module


class Watch(pl.Callback):
    """dr and rate in every step."""

    def __init__(self) -> None:
        self.dr: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.dr.append(rule(pl_module).logged()["dr"])


def test_dr_follows_its_moments() -> None:
    watch = Watch()
    fit(net(), watch, scheme=Wageubn(dr=(128, 32, 8), dr_at=(0, "3 steps", 0.75)))
    assert watch.dr == [128.0] * 3 + [32.0] * 3 + [8.0] * 2
    assert len(watch.dr) == STEPS


def test_manual_optimization_is_automatic_optimization() -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]  # nothing to return
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    manual = Manual()
    manual.load_state_dict(net().state_dict())
    results = []
    for module in (manual, net()):
        torch.manual_seed(3)
        results.append(copy_of(fit(module)))
    assert differing(*results) == []


@pytest.mark.parametrize("update", ["integer", "fake"])
def test_a_resume_in_the_middle_has_the_bits_of_a_run_without_one(update: Any, tmp_path: Path) -> None:
    scheme = Wageubn(update=update, first_last="int8", dr=(128, 8), dr_at=(0, 0.6), seed=5)
    straight = fit(net(), SaveAt(tmp_path / "middle.ckpt", STEPS // 2 + 1), scheme=scheme)
    resumed = fit(net(3), scheme=scheme, path=tmp_path / "middle.ckpt")
    assert differing(state(straight), state(resumed)) == []
    assert any("acc conv2.weight" in key for key in state(resumed)) == (update == "integer")


def test_integers_win_over_weights_that_were_edited(tmp_path: Path) -> None:
    straight = fit(net(), SaveAt(tmp_path / "middle.ckpt", 5))
    content = torch.load(tmp_path / "middle.ckpt", weights_only=False)
    content["state_dict"]["conv3.weight"] += 0.125
    torch.save(content, tmp_path / "edited.ckpt")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        resumed = fit(net(3), path=tmp_path / "edited.ckpt")
    said = "conv3.weight: the checkpoint's weight differs from its integers, which are taken."
    assert sum(said in str(w.message) for w in told) == 1
    assert differing(state(straight), state(resumed)) == []


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_an_average_is_of_values_and_training_goes_on_from_the_integers() -> None:
    seen: list[Tensor] = []
    on = []

    class Note(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append(pl_module.conv2.weight.detach().clone())
            on.append(
                torch.equal(
                    rule(pl_module).masters["conv2.weight"],
                    rule(pl_module)._master("conv2.weight", rule(pl_module).stored["conv2.weight"]),
                )
            )

    module = fit(net(), EMAWeightAveraging(decay=0.5), Note())
    plain = fit(net())
    want = seen[0]
    for weight in seen[1:]:
        want = 0.5 * want + 0.5 * weight
    torch.testing.assert_close(module.conv2.weight.detach(), want)
    assert torch.equal(seen[-1], plain.conv2.weight)
    assert all(on)
    assert bool(torch.isfinite(module(images(4, 1, 8, 8))).all())


def test_a_checkpoint_of_another_network_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"conv9\.weight: the checkpoint holds its stored weight.*skip="):
        rule(converted(chain())).load_state_dict({"masters": {"conv9.weight": torch.zeros(1)}, "accumulators": {}})


def test_the_rule_is_the_update_of_this_scheme() -> None:
    assert isinstance(rule(converted(chain())), ClosedRule)
    assert rule(converted(chain())).logged() == {"dr": 128.0, "skipped_steps": 0.0}


def test_skipped_steps_are_counted_on_after_a_load() -> None:
    net = converted(chain())
    rule(net).skipped = 3
    twin = converted(chain())
    rule(twin).load_state_dict(rule(net).state_dict())
    assert rule(twin).logged()["skipped_steps"] == 3.0


def test_a_run_counts_what_it_skips_and_logs_it() -> None:
    module = net()
    data = loader()
    data.dataset.tensors[0][5, 0, 0, 0] = torch.nan  # type: ignore[attr-defined]  # a TensorDataset
    callback = QuantCallback(Wageubn(), start=0, evaluate=False, calibrate_batches=1)
    run = trainer(callback, max_epochs=2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run.fit(module, data)
    assert sum("skipped_steps" in str(w.message) for w in told) == 1
    assert float(run.callback_metrics["skipped_steps"]) == 2
    assert finite(module)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_a_run_in_another_precision_is_on_the_same_grids(precision: str) -> None:
    module = net()
    callback = QuantCallback(Wageubn(check=True), start=0, evaluate=False)
    run = trainer(callback, precision=precision)
    data = loader()
    if precision == "64-true":
        data.dataset.tensors = (data.dataset.tensors[0].double(), data.dataset.tensors[1])  # type: ignore[attr-defined]
    run.fit(module, data, loader() if "bf16" in precision else data)
    assert {p.dtype for p in module.parameters()} == {torch.float64 if "64" in precision else torch.float32}
    assert finite(module)
    held = rule(module)
    assert all(torch.equal(held._shown(e, held.masters[n]), e.parameter) for n, e in held.stored.items())


# -- stages --------------------------------------------------------------------------------------------------
class Stages(pl.Callback):
    """In every step: whether norms, errors and gradients are quantized, and widths stand still."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, ...]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        held = rule(pl_module)
        gates = {q.gate.on for q in errors(pl_module).values()} | {g.on for g in held.gates}
        on = {grids.on for grids in norms(pl_module).values()}
        frozen = {bool(q.width[5]) for q in held.widths}
        assert len(gates) == len(on) == len(frozen) == 1
        self.seen.append((*on, *gates, bool(held.masters), *frozen))


STAGED = {
    "quantize_norms": "2 steps", "quantize_errors": "3 steps", "quantize_gradients": "5 steps",
    "freeze_widths": "7 steps",
}  # fmt: skip


def test_norms_errors_and_gradients_begin_when_they_should() -> None:
    stages = Stages()
    fit(net(), stages, scheme=Wageubn(**STAGED, check=True))  # type: ignore[arg-type]  # moments
    firsts = [column.index(True) for column in zip(*stages.seen, strict=True)]
    assert firsts == [2, 3, 5, 7]
    assert len(stages.seen) == STEPS
    assert all(list(column) == sorted(column) for column in zip(*stages.seen, strict=True))


@pytest.mark.parametrize("at", [2, 4])
def test_a_resume_between_stages_has_the_bits_of_a_run_without_one(at: int, tmp_path: Path) -> None:
    scheme = Wageubn(**STAGED, first_last="int8", width_patience=2)  # type: ignore[arg-type]  # moments
    straight = fit(net(), SaveAt(tmp_path / "middle.ckpt", at), scheme=scheme)
    stages = Stages()
    resumed = fit(net(3), stages, scheme=scheme, path=tmp_path / "middle.ckpt")
    assert differing(state(straight), state(resumed)) == []
    assert [column.index(True) for column in zip(*stages.seen, strict=True)] == [max(0, n - at) for n in (2, 3, 5, 7)]


@pytest.mark.parametrize("event", ["quantize_norms", "quantize_errors", "quantize_gradients"])
def test_a_stage_without_a_moment_is_refused(event: str) -> None:
    with pytest.raises(ConfigError, match=rf"{event}"):
        Wageubn(**{event: None})  # type: ignore[arg-type]  # this is the test


def test_a_warm_up_is_float() -> None:
    class Look(pl.Callback):
        started: list[bool]

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.started.append(bool(rule(pl_module).masters))

    look = Look()
    look.started = []
    callback = QuantCallback(Wageubn(), start="3 steps", resume_order=True, evaluate=False)
    trainer(callback, look).fit(net(), loader(), loader())
    assert look.started == [False] * 3 + [True] * (STEPS - 3)


def test_a_complex_parameter_of_the_user_s_is_no_matter() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter = nn.Parameter(torch.ones(6, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.filter).real

    found = converted(
        nn.Sequential(Spectral(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
        torch.randn(8, 6),
    )
    found(torch.randn(8, 6)).square().mean().backward()
    lowbit_step(found, torch.optim.SGD(found.parameters(), 0.1))
    assert rule(found).skipped == 0


class DigitsSgd(DigitsCnn):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.75)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_digits_train_from_scratch_in_twelve_epochs() -> None:
    pl.seed_everything(0, verbose=False)
    callback = QuantCallback("wageubn")
    run = trainer(callback, max_epochs=12)
    run.fit(DigitsSgd(), DigitsData(seed=0))
    assert callback.metrics["float"]["val_acc"] < 0.3
    assert callback.metrics["trained"]["val_acc"] > 0.98  # 98.6 % where it was written, and 0.28 points are one image


def test_weights_that_grew_before_the_update_began_are_told_and_not_warned_of() -> None:
    found = converted(chain(), quantize_gradients="1 steps")
    held = rule(found)
    held.milestone("quantize_gradients", False, 1)
    weight = next(entry for entry in held.stored.values() if entry.weight)
    with torch.no_grad():
        weight.parameter.view(-1)[0] = 3.0 * 2.0**weight.power
    held.milestone("quantize_gradients", True, 1)
    found(images()).square().mean().backward()
    lowbit_step(found, torch.optim.SGD(found.parameters(), 0.1))
    assert any("1 of" in words and "clipped" in words for words in held.news())
