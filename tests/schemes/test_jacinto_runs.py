"""Whole runs of Jacinto: what freezes when, what resume and validation leave alone, calibration without training."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from schemes.conformance import Net, SaveAt, copy_of, differing, images, loader, net, trainer
from schemes.jacinto_nets import clips, layers
from torch import Tensor, nn

from lightning_lowbit import Jacinto, QuantCallback, convert, load_from_checkpoint
from lightning_lowbit.callbacks.fold import FoldBatchNorm
from lightning_lowbit.callbacks.freeze import Freeze

STEPS = 4  # of an epoch


class Before(Net):
    """One more norm, which no layer can take over."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(torch.relu(self.pre(x)))) + x
        x = torch.relu(self.conv3(torch.relu(x)))
        y: Tensor = self.fc(self.drop(self.pool(x).flatten(1)))
        return y


def before() -> Before:
    torch.manual_seed(0)
    return Before()


class Watch(pl.Callback):
    """What moved in every training step: ranges, statistics of merged norms, and of the others."""

    def __init__(self) -> None:
        self.moved: list[tuple[bool, bool, bool]] = []
        self.state: Any = None

    @staticmethod
    def look(module: Any) -> tuple[Tensor, ...]:
        ranges = torch.stack([q.clips.clone() for q in clips(module).values()])
        return ranges, module.bn1.running_mean.clone(), module.pre.running_mean.clone()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.state = self.look(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = self.look(pl_module)
        self.moved.append(tuple(not torch.equal(a, b) for a, b in zip(now, self.state, strict=True)))  # type: ignore[arg-type]  # three

    def first_still(self) -> list[int]:
        """First step from which on each stood still; all steps where it never did."""
        columns = list(zip(*self.moved, strict=True))
        return [1 + max((n for n, moved in enumerate(column) if moved), default=-1) for column in columns]


def fit(module: Any, *callbacks: Any, scheme: Jacinto | None = None, epochs: int = 3, **options: Any) -> Any:
    settings = {"max_epochs": epochs, **options}
    callback = QuantCallback(scheme or Jacinto(), start=0, resume_order=True, evaluate=False)
    trainer(callback, *callbacks, **settings).fit(module, loader(), loader())
    return module


@pytest.mark.parametrize(
    ("norms", "ranges", "want"),
    [
        (1, 2, (8, 4)), ("3 steps", "7 steps", (7, 3)), (0.25, 0.75, (9, 3)), ("half-1", "half", (4, 0)),
        (None, None, (12, 12)), (0, None, (12, 0)), ("half", "half+1", (8, 4)),
    ],
    ids=str,
)  # fmt: skip
def test_ranges_and_norms_freeze_when_they_should(norms: Any, ranges: Any, want: tuple[int, int]) -> None:
    watch = Watch()
    fit(before(), watch, scheme=Jacinto(freeze_batch_norm=norms, freeze_ranges=ranges))
    assert watch.first_still() == [want[0], want[1], want[1]]
    assert all(moved[0] == (step < want[0]) for step, moved in enumerate(watch.moved))


def test_callbacks_replace_the_scheme_s_moments() -> None:
    watch = Watch()
    fit(before(), watch, Freeze("5 steps"), FoldBatchNorm("2 steps"))
    assert watch.first_still() == [5, 2, 2]
    watch = Watch()
    fit(before(), watch, Freeze(None), FoldBatchNorm(None))
    assert watch.first_still() == [12, 12, 12]


def test_code_that_calls_train_thaws_no_norm() -> None:
    class Caller(Before):
        def on_train_epoch_start(self) -> None:
            self.train()

    torch.manual_seed(0)
    watch = Watch()
    fit(Caller(), watch, scheme=Jacinto(freeze_batch_norm=1, freeze_ranges=1))
    assert watch.first_still() == [STEPS, STEPS, STEPS]


def test_norms_train_in_a_warm_up_whatever_the_schedule() -> None:
    module, watch = before(), Watch()
    scheme = Jacinto(warmup="6 steps", freeze_batch_norm="half-1", freeze_ranges=None)
    trainer(QuantCallback(scheme, evaluate=False), watch, max_epochs=3).fit(module, loader(), loader())
    assert watch.first_still() == [12, 6, 6]
    assert [moved[0] for moved in watch.moved] == [False] * 6 + [True] * 6


def test_a_schedule_that_is_applied_again_or_backwards_changes_nothing_else() -> None:
    module = before()
    callback = QuantCallback(Jacinto(freeze_batch_norm=1, freeze_ranges=2), start=0, evaluate=False)
    trainer(callback, max_epochs=3).fit(module, loader(), loader())
    state, schedule = copy_of(module), callback.schedule
    assert schedule is not None

    def stands() -> tuple[bool, ...]:
        ranges = {quantizer.frozen for quantizer in clips(module).values()}
        merged = {layer.norm_frozen for layer in layers(module).values() if layer.norm is not None}
        assert len(ranges) == len(merged) == 1
        return (*ranges, *merged, not module.pre.training)

    for step, want in (
        (11, (1, 1, 1)),
        (11, (1, 1, 1)),
        (6, (0, 1, 1)),
        (0, (0, 0, 0)),
        (0, (0, 0, 0)),
        (9, (1, 1, 1)),
    ):
        schedule.apply(module, callback.rule, step)
        assert stands() == want
    assert differing(state, copy_of(module)) == []


@pytest.mark.parametrize("at", [3, 6, 10])
def test_a_resume_finds_what_is_frozen(at: int, tmp_path: Path) -> None:
    scheme = Jacinto(freeze_batch_norm="5 steps", freeze_ranges="9 steps", range_subsample=2)
    straight = fit(before(), SaveAt(tmp_path / "middle.ckpt", at), scheme=scheme)
    resumed, watch = before(), Watch()
    callback = QuantCallback(scheme, start=0, resume_order=True, evaluate=False)
    trainer(callback, watch, max_epochs=3).fit(resumed, loader(), loader(), ckpt_path=tmp_path / "middle.ckpt")
    assert differing(copy_of(straight), copy_of(resumed)) == []
    assert watch.first_still() == [max(0, 9 - at), max(0, 5 - at), max(0, 5 - at)]


def test_validation_in_the_middle_of_an_epoch_moves_no_buffer_and_freezes_nothing() -> None:
    class Whole(pl.Callback):
        checked = 0

        def everything(self, module: nn.Module) -> dict[str, Tensor]:
            return {name: t.clone() for name, t in (*module.named_buffers(), *module.named_parameters())}

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            self.state = self.everything(pl_module)
            self.flags = [(q.frozen, q.training) for q in clips(pl_module).values()]

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            assert differing(self.state, self.everything(pl_module)) == []
            self.checked += 1

    whole, watch = Whole(), Watch()
    fit(before(), whole, watch, scheme=Jacinto(freeze_batch_norm=None, freeze_ranges=None), val_check_interval=1)
    assert whole.checked == 3 * STEPS
    assert watch.moved == [(True, True, True)] * 3 * STEPS
    plain = fit(before(), scheme=Jacinto(freeze_batch_norm=None, freeze_ranges=None), limit_val_batches=0)
    again = fit(before(), scheme=Jacinto(freeze_batch_norm=None, freeze_ranges=None), val_check_interval=1)
    assert differing(copy_of(plain), copy_of(again)) == []


def test_batches_are_counted_one_by_one_under_accumulation() -> None:
    module = fit(net(), scheme=Jacinto(freeze_ranges=None, freeze_batch_norm=None), accumulate_grad_batches=2, epochs=1)
    calibrated = 4 - 1  # batches 0, 1, 2 and 3
    assert {float(q.batches) for q in clips(module).values()} == {calibrated + STEPS}


def test_mixed_precision_has_the_values_of_float32_and_the_same_evaluation() -> None:
    found = []
    for precision in ("32-true", "bf16-mixed"):
        module = net()
        seen: list[tuple[bool, Tensor]] = []
        module.drop.p = 0.0
        scheme = Jacinto(freeze_batch_norm=0, freeze_ranges=0)
        callback = QuantCallback(scheme, start=0, evaluate=False)
        run = trainer(callback, precision=precision, max_epochs=1, limit_train_batches=1)
        module.fc.register_forward_hook(lambda m, a, y, seen=seen: seen.append((m.training, y.detach().clone())))
        run.fit(module, loader(), loader())
        found.append([y for training, y in seen if training])
    assert len(found[0]) == len(found[1]) == 1
    assert torch.equal(found[0][0], found[1][0])
    module, losses = fit(net(), epochs=1), []
    for precision in ("bf16-mixed", "32-true"):
        other = copy.deepcopy(module)
        result = trainer(QuantCallback(Jacinto()), precision=precision).validate(other, loader(), verbose=False)
        losses.append(result[0]["val_loss"])
    assert losses[0] == losses[1]


# -- calibration without training ----------------------------------------------------------------------------
@pytest.mark.parametrize("preset", ["simple", "advanced"])
def test_validate_calibrates_a_network_that_was_never_trained(preset: str) -> None:
    module, plain = net(), net()
    want = trainer().validate(plain, loader(), verbose=False)[0]["val_loss"]
    callback = QuantCallback(Jacinto(preset=preset))
    got = trainer(callback).validate(module, loader(), verbose=False)[0]["val_loss"]
    assert got != want
    assert abs(got - want) < 0.02
    assert all(quantizer.ready for quantizer in clips(module).values())
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, plain.state_dict()[name])}
    biases = {"bn1.bias", "bn2.bias", "conv3.bias", "fc.bias"}
    assert moved == (biases if preset == "advanced" else set())
    again = trainer(callback).validate(module, loader(), verbose=False)[0]["val_loss"]
    assert again == got  # calibrated once


def test_ranges_of_simple_calibration_hold_all_values() -> None:
    module = net()
    convert(module, Jacinto(preset="simple"), images())
    quantizer = clips(module)["conv1.lowbit_input"]
    assert quantizer.clips.tolist() == [float(images().min()), float(images().max())]


# -- what happens once ---------------------------------------------------------------------------------------
def outlying() -> Net:
    module = net()
    with torch.no_grad():
        module.conv3.weight[0, 0, 0, 0] = 100.0
    return module


def clipped_in(told: list[warnings.WarningMessage]) -> int:
    return sum("clipped to" in str(w.message) for w in told)


def test_outliers_are_clipped_once_and_not_again_on_resume(tmp_path: Path) -> None:
    class Outlier(pl.Callback):
        """A weight that training has made large is left alone."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 5:
                pl_module.conv3.weight.data[1, 0, 0, 0] = 50.0

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        module = fit(outlying(), Outlier(), SaveAt(tmp_path / "middle.ckpt", 6), epochs=2)
    assert clipped_in(told) == 1
    assert float(module.conv3.weight.detach()[0].abs().max()) < 30
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        again = net(1)
        callback = QuantCallback(Jacinto(), start=0, resume_order=True, evaluate=False)
        trainer(callback).fit(again, loader(), loader(), ckpt_path=tmp_path / "middle.ckpt")
        loaded = load_from_checkpoint(Net, tmp_path / "middle.ckpt")
    assert clipped_in(told) == 0
    assert float(again.conv3.weight.detach()[1, 0, 0, 0]) > 40
    assert float(loaded.conv3.weight.detach()[1, 0, 0, 0]) > 40
    assert differing(copy_of(module), copy_of(again)) == []


@pytest.mark.parametrize(
    "options", [{}, {"ste_weights": "quantized"}, {"ste_weights": "folded"}, {"bn_value": "batch"}], ids=str
)
def test_weights_snap_in_the_first_batch_and_never_again(options: dict[str, Any], tmp_path: Path) -> None:
    class Look(pl.Callback):
        on_grid: list[bool]

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            layer = pl_module.conv3
            weight = layer.weight.detach()
            self.on_grid.append(torch.equal(weight, layer.lowbit_weight(weight)))

    look = Look()
    look.on_grid = []
    scheme = Jacinto(snap_weights_at_start=True, freeze_batch_norm=1, **options)
    straight = fit(net(), look, SaveAt(tmp_path / "middle.ckpt", 3), scheme=scheme, epochs=2)
    assert look.on_grid == [True] + [False] * 7
    resumed = net(1)
    callback = QuantCallback(scheme, start=0, resume_order=True, evaluate=False)
    trainer(callback).fit(resumed, loader(), loader(), ckpt_path=tmp_path / "middle.ckpt")
    assert differing(copy_of(straight), copy_of(resumed)) == []
    assert all(float(layer.lowbit_weight.snapped) == 1 for layer in layers(straight).values())
