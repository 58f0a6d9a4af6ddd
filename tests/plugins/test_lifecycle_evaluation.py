"""Calibration and evaluation leave no trace: weights, later batches, random state, metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plugins.lifecycle_nets import (
    NAMESPACES,
    QUIET,
    Batch,
    assert_equal_states,
    loader,
    net_class,
    quantized,
    random_state,
    seeded_net,
    states,
    trainer,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_lowbit import Calibrate, QuantCallback, float_mode
from lightning_lowbit.errors import ConfigError, UnsupportedModelError
from lightning_lowbit.modules.base import Mode, switch_of
from lightning_lowbit.modules.convert import is_converted

pytestmark = QUIET


class Recorder:
    """What a run looked like from inside, batch by batch."""

    def __init__(self, net: Any) -> None:
        self.batches: list[Tensor] = []
        self.random: list[Any] = []
        net.on_train_batch_start = self.on_train_batch_start

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.batches.append(batch[0].clone())
        self.random.append(random_state())


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("start", [0, "3 steps"])
def test_calibration_leaves_data_order_and_random_state_as_a_float_run_has_them(
    tmp_path: Path, namespace: str, start: Any
) -> None:
    runs = []
    for callbacks in ([], [QuantCallback(start=start)]):
        net = seeded_net(namespace)
        runs.append(Recorder(net))
        torch.manual_seed(1)
        trainer(tmp_path, *callbacks, namespace=namespace).fit(net, loader(shuffle=True), loader())
    assert len(runs[0].batches) == 12
    assert all(torch.equal(a, b) for a, b in zip(runs[0].batches, runs[1].batches, strict=True))
    assert runs[0].random == runs[1].random


def test_calibration_leaves_the_float_results_alone(tmp_path: Path) -> None:
    """A run that goes on in float after calibration ends with the bits of one that had none."""
    nets = []
    for callbacks in ([], [QuantCallback(start="3 steps")]):
        net = seeded_net()
        torch.manual_seed(1)
        if callbacks:
            net.on_train_batch_start = _stay_float(net)
        trainer(tmp_path, *callbacks).fit(net, loader(shuffle=True), loader())
        nets.append({key: value for key, value in states(net).items() if "lowbit" not in key})
    assert_equal_states(*nets)


def _stay_float(net: Any) -> Any:
    def on_train_batch_start(batch: Batch, batch_idx: int) -> None:
        switch_of(net).mode = Mode.FLOAT

    return on_train_batch_start


@pytest.mark.parametrize("call", ["validate", "test", "predict"])
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_evaluation_of_a_trained_network_moves_nothing(tmp_path: Path, call: str, namespace: str) -> None:
    net = seeded_net(namespace)
    trainer(tmp_path, QuantCallback(start=0), namespace=namespace).fit(net, loader(), loader())
    evaluation = loader()
    plain, seen = seeded_net(namespace), []
    for module, callbacks in ((plain, []), (net, [QuantCallback()])):
        before = states(module)
        torch.manual_seed(3)
        getattr(trainer(tmp_path, *callbacks, namespace=namespace), call)(module, evaluation)
        seen.append(random_state())
        assert_equal_states(states(module), before)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("batches", [1, 2])
def test_predictions_of_a_network_that_was_never_calibrated_are_whole(tmp_path: Path, batches: int) -> None:
    net, data = seeded_net(), loader()
    first = trainer(tmp_path, QuantCallback(calibrate_batches=batches)).predict(net, data)
    second = trainer(tmp_path, QuantCallback()).predict(net, data)
    assert first is not None
    assert second is not None
    assert len(first) == len(data)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # type: ignore[arg-type]  # tensors


def test_validation_and_sanity_check_within_fit_move_nothing(tmp_path: Path) -> None:
    net = seeded_net()
    moments: list[tuple[str, dict[str, Tensor]]] = []
    net.on_validation_start = lambda: moments.append(("start", states(net)))
    net.on_validation_end = lambda: moments.append(("end", states(net)))
    trainer(tmp_path, QuantCallback(start=0), num_sanity_val_steps=2).fit(net, loader(), loader())
    names = [name for name, _ in moments]
    assert names == ["start", "end"] * 5  # sanity check, float, calibrated, two epochs
    for (_, a), (_, b) in zip(moments[::2], moments[1::2], strict=True):
        assert_equal_states(a, b)


def test_a_batch_equals_its_samples_one_by_one(tmp_path: Path) -> None:
    net = seeded_net()
    trainer(tmp_path, QuantCallback(start=0)).fit(net, loader())
    net.eval()
    x = loader().dataset[:8][0]
    with torch.no_grad():
        assert torch.equal(net(x), torch.cat([net(sample[None]) for sample in x]))


class Metered(net_class()):  # type: ignore[misc]  # made at run time
    def __init__(self) -> None:
        super().__init__()
        self.meter = MeanMetric()
        self.register_buffer("counter", torch.zeros(()))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss: Tensor = super().training_step(batch, batch_idx)
        self.meter(loss.detach())
        self.counter += 1
        self.log("metered", self.meter, on_step=False, on_epoch=True)
        return loss


def test_metrics_and_buffers_of_the_training_step_count_training_only(tmp_path: Path) -> None:
    net = Metered()
    run = trainer(tmp_path, QuantCallback(start="3 steps"), max_epochs=1)
    run.fit(net, loader())
    assert float(net.counter) == 6
    assert len(net.losses) == 6 + 2 * 6  # calibration ran the step on all six batches, in two passes
    trained = torch.tensor([*net.losses[:3], *net.losses[-3:]])
    torch.testing.assert_close(run.callback_metrics["metered"], trained.mean())


def test_calibration_step_is_used_if_there_is_one(tmp_path: Path) -> None:
    net, shapes = seeded_net(), []

    def calibration_step(batch: Batch) -> None:
        shapes.append(tuple(batch[0].shape))
        net(batch[0])

    net.calibration_step = calibration_step
    trainer(tmp_path, QuantCallback(start=0, calibrate_batches=3), max_epochs=1).fit(net, loader())
    assert shapes == [(8, 1, 6, 6)] * 6  # two passes over three batches
    assert len(net.losses) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_calibration_in_mid_epoch_leaves_persistent_workers_alone(tmp_path: Path, workers: int) -> None:
    batches = []
    for callbacks in ([], [QuantCallback(start="2 steps")]):
        net = seeded_net()
        recorder = Recorder(net)
        data = DataLoader(loader().dataset, 8, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
        torch.manual_seed(1)
        trainer(tmp_path, *callbacks).fit(net, data)
        batches.append(recorder.batches)
    assert [len(b) for b in batches] == [12, 12]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


class Fused(net_class()):  # type: ignore[misc]  # made at run time
    """In evaluation it multiplies with a layer's weight instead of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _FusedBody()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits


class _FusedBody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.b = nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x.flatten(1)))
        logits: Tensor = self.b(x) if _calls_its_layers(self) else nn.functional.linear(x, self.b.weight, self.b.bias)
        return logits


def _calls_its_layers(module: nn.Module) -> bool:
    return not is_converted(module) or switch_of(module).mode is Mode.OBSERVE


def test_a_layer_that_runs_in_calibration_and_not_in_evaluation_is_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"body\.b: converted and calibrated, but .*skip=\['body\.b'\]"):
        trainer(tmp_path, QuantCallback(start=0)).fit(Fused(), loader(), loader())
    accepted = trainer(tmp_path, QuantCallback(start=0, skip=["body.b"]))
    accepted.fit(Fused(), loader(), loader())


def test_a_layer_that_stays_silent_in_calibration_is_refused_by_path(tmp_path: Path) -> None:
    class Spare(net_class()):  # type: ignore[misc]  # made at run time
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(4, 4)

    with pytest.raises(ConfigError, match=r"spare: converted, but it did not run in calibration.*skip="):
        trainer(tmp_path, QuantCallback(start=0)).fit(Spare(), loader())
    trainer(tmp_path, QuantCallback(start=0, skip=["spare"])).fit(Spare(), loader())


def test_calibrate_sets_loader_and_number(tmp_path: Path) -> None:
    net = seeded_net()
    own = loader(seed=5)
    seen: list[Tensor] = []
    net.calibration_step = lambda batch: (seen.append(batch[0]), net(batch[0]))
    trainer(tmp_path, Calibrate(own, batches=2), QuantCallback(start=0), max_epochs=1).fit(net, loader())
    expected = [batch[0] for batch in own][:2]
    assert len(seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen, expected * 2, strict=True))


def test_metrics_name_float_calibrated_and_trained(tmp_path: Path) -> None:
    callback = QuantCallback(start=0)
    net = seeded_net()
    run = trainer(tmp_path, callback)
    run.fit(net, loader(), loader())
    assert callback.metrics["trained"] == {"val_loss": float(run.callback_metrics["val_loss"])}
    untrained = seeded_net()
    (value,) = trainer(tmp_path).validate(untrained, loader(), verbose=False)
    assert callback.metrics["float"] == value
    assert callback.metrics["calibrated"] != value
    assert quantized(net)
    with float_mode(net):
        assert not quantized(net)


@pytest.mark.parametrize(("start", "extra"), [("9 steps", 1), ("6 steps", 0)])
def test_the_float_metrics_are_of_the_weights_that_are_calibrated(tmp_path: Path, start: str, extra: int) -> None:
    """In mid-epoch the last validation was of older ones; at an epoch's end it is not repeated."""
    plain, callback = seeded_net(), QuantCallback(start=start)
    validations: list[str] = []
    trainer(tmp_path, max_steps=int(start.split()[0])).fit(plain, loader(), loader())
    (expected,) = trainer(tmp_path).validate(plain, loader(), verbose=False)
    net = seeded_net()
    net.on_validation_start = lambda: validations.append(start)
    trainer(tmp_path, callback).fit(net, loader(), loader())
    assert callback.metrics["float"] == expected
    assert len(validations) == 3 + extra  # of two epochs, and the calibrated one


def test_without_evaluate_there_is_no_validation_but_those_of_the_epochs(tmp_path: Path) -> None:
    net = seeded_net()
    validations: list[int] = []
    net.on_validation_start = lambda: validations.append(1)
    callback = QuantCallback(start="9 steps", evaluate=False)
    trainer(tmp_path, callback).fit(net, loader(), loader())
    assert len(validations) == 2
    assert sorted(callback.metrics) == ["float", "trained"]
