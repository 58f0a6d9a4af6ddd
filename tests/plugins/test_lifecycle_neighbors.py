"""Other callbacks and Trainer options beside the life cycle: averaging, tuners, pruning, short runs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from plugins.lifecycle_nets import (
    NAMESPACES,
    QUIET,
    assert_equal_states,
    loader,
    quantized,
    seeded_net,
    states,
    trainer,
)
from torch import Tensor

from lightning_lowbit import FoldBatchNorm, QuantCallback, Tqt
from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.convert import quantizers

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:.*would never act"),
]


def callbacks_of(namespace: str) -> Any:
    return importlib.import_module(namespace).callbacks


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("built", ["init", "configure_model"])
def test_ema_behind_us_averages_grids_and_evaluates_low_bit(tmp_path: Path, namespace: str, built: str) -> None:
    net = seeded_net(namespace, built)
    pl = callbacks_of(namespace)
    ema = pl.EMAWeightAveraging(decay=0.9)
    saver = pl.ModelCheckpoint(tmp_path, "last", save_top_k=1)
    callback = QuantCallback(start="4 steps")
    run = trainer(tmp_path, callback, ema, saver, namespace=namespace)
    run.fit(net, loader(), loader())
    assert quantized(net)
    average = dict(ema._average_model.module.named_parameters())
    assert all(torch.equal(p, average[name]) for name, p in net.named_parameters())
    assert all(q.ready and float(q.initialized) == 1 for _, q in quantizers(net))
    # A threshold's average lies where trained thresholds lie, not half way to the zero it had in float.
    file = torch.load(saver.best_model_path, weights_only=True)
    for key, value in file["current_model_state"].items():
        if key.endswith("log2_t"):
            assert abs(float(value) - float(file["state_dict"][key])) < 0.2, key
    run = trainer(tmp_path, QuantCallback(), namespace=namespace)
    (validated,) = run.validate(
        seeded_net(namespace, built, seed=3), loader(), ckpt_path=saver.best_model_path, verbose=False
    )
    assert validated["val_loss"] == pytest.approx(callback.metrics["trained"]["val_loss"])


def test_ema_resumes_bit_equal(tmp_path: Path) -> None:
    def fit(folder: Path, ckpt_path: Path | None = None) -> dict[str, Tensor]:
        pl = callbacks_of(NAMESPACES[0])
        net = seeded_net(seed=0 if ckpt_path is None else 5)
        saver = pl.ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        torch.manual_seed(0)
        trainer(folder, QuantCallback(start="2 steps"), pl.EMAWeightAveraging(decay=0.9), saver).fit(
            net, loader(shuffle=True), loader(), ckpt_path=ckpt_path
        )
        return states(net)

    whole = fit(tmp_path / "a")
    for step in (4, 6, 9):
        assert_equal_states(fit(tmp_path / "b", tmp_path / "a" / f"step={step}.ckpt"), whole)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen norms", "live norms"])
def test_swa_behind_us_leaves_sane_running_statistics(tmp_path: Path, frozen: bool) -> None:
    net = seeded_net()
    swa = callbacks_of(NAMESPACES[0]).StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    fold = FoldBatchNorm("3 steps" if frozen else None)
    callback = QuantCallback(start=0)
    trainer(tmp_path, callback, swa, fold, max_epochs=3).fit(net, loader(), loader())
    assert quantized(net)
    # What the extra epoch found must be the statistics of the layer's own output over the data.
    net.eval()
    seen: list[Tensor] = []
    layer = net.body.conv1
    with torch.no_grad():
        for x, _ in loader():
            seen.append(layer.op(layer.lowbit_input(x), layer.weight, layer.bias))
    y = torch.cat(seen)
    torch.testing.assert_close(net.body.bn1.running_mean, y.mean((0, 2, 3)), atol=0.02, rtol=0.05)
    torch.testing.assert_close(net.body.bn1.running_var, y.var((0, 2, 3)), atol=0.02, rtol=0.1)
    assert callback.schedule is not None
    assert callback.schedule.run.total == 18  # the epoch for the statistics is none of training


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging", "ModelPruning"])
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_neighbors_before_us_are_refused(tmp_path: Path, name: str, namespace: str) -> None:
    pl = callbacks_of(namespace)
    options: dict[str, Any] = {
        "EMAWeightAveraging": {}, "StochasticWeightAveraging": {"swa_lrs": 0.1},
        "ModelPruning": {"pruning_fn": "l1_unstructured"},
    }[name]  # fmt: skip
    with pytest.raises(ConfigError, match=f"{name} took the float model.*Put QuantCallback before it"):
        trainer(tmp_path, getattr(pl, name)(**options), QuantCallback(), namespace=namespace).fit(
            seeded_net(namespace), loader()
        )


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("first", [True, False], ids=["finder first", "finder behind"])
def test_learning_rate_finder_leaves_the_fit_as_if_it_had_not_run(tmp_path: Path, namespace: str, first: bool) -> None:
    def fit(finder: bool) -> Any:
        net, started = seeded_net(namespace), []
        net.on_train_batch_end = lambda *args: started.append(quantized(net))
        callbacks = [QuantCallback(start=None)]
        if finder:
            lr = callbacks_of(namespace).LearningRateFinder(
                num_training_steps=5, update_attr=False, early_stop_threshold=None
            )
            callbacks.insert(0 if first else 1, lr)
        torch.manual_seed(1)
        run = trainer(tmp_path, *callbacks, namespace=namespace)
        run.fit(net, loader(), loader())
        return started[-12:], {key: value.shape for key, value in states(net).items()}

    assert fit(True) == fit(False)


def test_learning_rate_finder_before_a_resumed_run_keeps_its_schedule(tmp_path: Path) -> None:
    pl = callbacks_of(NAMESPACES[0])
    saver = pl.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    callback = QuantCallback(start="2 steps")
    trainer(tmp_path, callback, saver).fit(seeded_net(), loader(), loader())
    finder = pl.LearningRateFinder(num_training_steps=5, update_attr=False, early_stop_threshold=None)
    again = QuantCallback(start="9 steps")
    run = trainer(tmp_path, finder, again, max_epochs=3)
    with pytest.warns(UserWarning, match="fractions keep the steps"):
        run.fit(seeded_net(), loader(), loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert str(again.schedule) == str(callback.schedule)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_batch_size_finder(tmp_path: Path, namespace: str) -> None:
    net, started = seeded_net(namespace), []
    net.batch_size = 2
    dataset = loader().dataset
    net.train_dataloader = lambda: torch.utils.data.DataLoader(dataset, net.batch_size)
    net.val_dataloader = loader  # Lightning's finder asks for it without looking whether there is one
    net.on_train_batch_end = lambda *args: started.append(quantized(net))
    finder = callbacks_of(namespace).BatchSizeFinder(max_trials=2, steps_per_trial=2)
    trainer(tmp_path, QuantCallback(), finder, namespace=namespace).fit(net)
    assert net.batch_size == 4
    assert started[-22:] == [False] * 6 + [True] * 16


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"overfit_batches": 1}, {"overfit_batches": 0.5}], ids=str)
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled")
def test_short_runs_on_purpose_go_through(tmp_path: Path, namespace: str, options: dict[str, Any]) -> None:
    net = seeded_net(namespace)
    trainer(tmp_path, QuantCallback(start=0), namespace=namespace, **options).fit(net, loader(), loader())
    assert quantized(net)


def test_early_stopping_and_limits(tmp_path: Path) -> None:
    net = seeded_net()
    stop = callbacks_of(NAMESPACES[0]).EarlyStopping("val_loss", patience=0, min_delta=10.0)
    run = trainer(tmp_path, QuantCallback(start=0), stop, max_epochs=9, limit_train_batches=3, limit_val_batches=2)
    run.fit(net, loader(), loader())
    assert run.current_epoch == 2  # the two validations before training do not count
    assert run.global_step == 6


def test_endless_runs_take_steps(tmp_path: Path) -> None:
    net = seeded_net()
    trainer(tmp_path, QuantCallback(Tqt(), start="3 steps"), max_epochs=-1, max_steps=5).fit(net, loader(), loader())
    assert quantized(net)
