"""A resumed fit ends with the bits of the uninterrupted one: weights, thresholds, freezing, phases."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from plugins.lifecycle_nets import NAMESPACES, QUIET, assert_equal_states, loader, seeded_net, states, trainer

from lightning_lowbit import Freeze, QuantCallback, Tqt
from lightning_lowbit.errors import ConfigError

pytestmark = QUIET
EPOCHS, STEPS = 4, 24
# Quantization from step 7, batch norm frozen from 15, thresholds freeze one by one from 15 to 22.
SCHEME = Tqt(freeze_batch_norm=0.5, freeze_thresholds=0.5, freeze_thresholds_end=0.9)
START = "7 steps"


class Keep:
    """The last optimizer state, rule and schedule that a run had, beside its weights."""

    def __init__(self, run: Any, net: Any, callback: QuantCallback) -> None:
        self.weights = states(net)
        self.optimizer = run.optimizers[0].state_dict()["state"]
        assert callback.rule is not None
        self.rule = callback.rule.state_dict()
        self.schedule = str(callback.schedule)


def _fit(
    folder: Path, namespace: str = NAMESPACES[0], ckpt_path: Path | None = None, seed: int = 0, scheme: Tqt =
        SCHEME,
    order: bool | None = None, **options: Any,
) -> Keep:  # fmt: skip
    pl = importlib.import_module(namespace)
    saver = pl.callbacks.ModelCheckpoint(
        folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False
    )
    epochs = pl.callbacks.ModelCheckpoint(
        folder, "end-{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True
    )
    callback = QuantCallback(scheme, start=START, resume_order=order)
    net = seeded_net(namespace, seed=seed)
    torch.manual_seed(seed)
    run = trainer(
        folder,
        callback,
        *([saver, epochs] if ckpt_path is None else []),
        namespace=namespace,
        max_epochs=EPOCHS,
        **options,
    )
    run.fit(net, loader(shuffle=True), loader(), ckpt_path=ckpt_path)
    return Keep(run, net, callback)


def _assert_same(a: Keep, b: Keep) -> None:
    assert_equal_states(a.weights, b.weights)
    assert a.schedule == b.schedule
    for key, state in a.optimizer.items():
        assert torch.equal(state["momentum_buffer"], b.optimizer[key]["momentum_buffer"])
    for name in ("average", "abs_grad", "count"):
        assert torch.equal(a.rule[name], b.rule[name])
    assert a.rule["begun"] == b.rule["begun"]
    assert a.rule["optimizer"].keys() == b.rule["optimizer"].keys()
    for key, state in a.rule["optimizer"].items():
        for name, value in state.items():
            assert torch.equal(value, b.rule["optimizer"][key][name]), (key, name)


FILES = {
    "float warm-up": "step=4.ckpt",
    "one step before quantization": "step=7.ckpt",
    "first quantized step": "step=8.ckpt",
    "mid-epoch": "step=15.ckpt",
    "frozen norms, mid-epoch": "step=17.ckpt",
    "thresholds freezing": "step=20.ckpt",
    "last batch of an epoch": "step=12.ckpt",
    "last batch, frozen": "step=18.ckpt",
    "epoch end in warm-up": "end-epoch=0.ckpt",
    "epoch end": "end-epoch=1.ckpt",
    "epoch end, frozen": "end-epoch=2.ckpt",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Keep]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, _fit(folder)


@pytest.mark.parametrize("file", FILES.values(), ids=FILES.keys())
def test_resume_is_bit_equal(whole: tuple[Path, Keep], tmp_path: Path, file: str) -> None:
    folder, keep = whole
    _assert_same(_fit(tmp_path, ckpt_path=folder / file, seed=99), keep)


def test_resume_is_bit_equal_with_the_ordered_sampler_and_accumulation(tmp_path: Path) -> None:
    options: dict[str, Any] = {"order": True, "accumulate_grad_batches": 2}
    scheme = Tqt(freeze_batch_norm=0.5)
    keep = _fit(tmp_path / "a", scheme=scheme, **options)
    for file in ("step=8.ckpt", "step=9.ckpt", "end-epoch=2.ckpt"):
        _assert_same(_fit(tmp_path / "b", ckpt_path=tmp_path / "a" / file, seed=99, scheme=scheme, **options), keep)


def test_resume_is_bit_equal_in_the_other_namespace(tmp_path: Path) -> None:
    keep = _fit(tmp_path / "a", NAMESPACES[1])
    _assert_same(_fit(tmp_path / "b", NAMESPACES[1], ckpt_path=tmp_path / "a" / "step=15.ckpt", seed=99), keep)


def test_resume_in_32_bits_survives_mixed_precision(tmp_path: Path) -> None:
    keep = _fit(tmp_path / "a", precision="bf16-mixed")
    _assert_same(_fit(tmp_path / "b", ckpt_path=tmp_path / "a" / "step=15.ckpt", seed=99, precision="bf16-mixed"), keep)


def test_resume_is_bit_equal_where_the_loaders_exist_before_the_fit_starts(tmp_path: Path) -> None:
    """A schedule made from estimated_stepping_batches asks for the loaders inside configure_optimizers."""

    def fit(folder: Path, ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
        net = seeded_net(seed=0 if ckpt_path is None else 4)

        def configure_optimizers() -> Any:
            optimizer = torch.optim.Adam(net.parameters(), 0.01)
            total = int(net.trainer.estimated_stepping_batches)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=total)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        net.configure_optimizers = configure_optimizers
        saver = importlib.import_module(NAMESPACES[0]).callbacks.ModelCheckpoint(
            folder, "{step}", save_top_k=-1, every_n_train_steps=1
        )
        torch.manual_seed(0 if ckpt_path is None else 4)
        trainer(folder, QuantCallback(SCHEME, start=START), saver, max_epochs=3).fit(
            net, loader(shuffle=True), loader(), ckpt_path=ckpt_path
        )
        return states(net)

    whole = fit(tmp_path / "a")
    for step in (4, 6, 9, 15):
        assert_equal_states(fit(tmp_path / "b", tmp_path / "a" / f"step={step}.ckpt"), whole)


def test_metrics_of_the_run_survive_a_resume(whole: tuple[Path, Keep], tmp_path: Path) -> None:
    folder, _ = whole
    callback = QuantCallback(SCHEME, start=START)
    trainer(tmp_path, callback, max_epochs=EPOCHS).fit(
        seeded_net(seed=5), loader(shuffle=True), loader(), ckpt_path=folder / "step=15.ckpt"
    )
    assert set(callback.metrics) == {"float", "calibrated", "trained"}


def test_fractions_are_kept_over_a_resume_with_another_length_and_said(
    whole: tuple[Path, Keep], tmp_path: Path
) -> None:
    folder, keep = whole
    callback = QuantCallback(SCHEME, start=START)
    longer = trainer(tmp_path, callback, max_epochs=2 * EPOCHS)
    with pytest.warns(UserWarning, match="resumed with max_epochs=8, begun with 4: fractions keep the steps"):
        longer.fit(seeded_net(), loader(shuffle=True), loader(), ckpt_path=folder / "end-epoch=1.ckpt")
    assert str(callback.schedule) == keep.schedule


def test_a_callback_with_only_the_name_takes_the_options_of_the_checkpoint(
    whole: tuple[Path, Keep], tmp_path: Path
) -> None:
    folder, keep = whole
    callback = QuantCallback("tqt", start=START)
    net = seeded_net(seed=3)
    trainer(tmp_path, callback, max_epochs=EPOCHS).fit(
        net, loader(shuffle=True), loader(), ckpt_path=folder / "end-epoch=2.ckpt"
    )
    assert callback.scheme == SCHEME
    assert_equal_states(states(net), keep.weights)


def test_another_scheme_than_the_checkpoint_is_refused(whole: tuple[Path, Keep], tmp_path: Path) -> None:
    folder, _ = whole
    with pytest.raises(ConfigError, match="Pass the same scheme, or only its name"):
        trainer(tmp_path, QuantCallback(Tqt(bits=4)), max_epochs=EPOCHS).fit(
            seeded_net(), loader(), loader(), ckpt_path=folder / "step=15.ckpt"
        )


def test_moments_of_freeze_travel_too(tmp_path: Path) -> None:
    def fit(folder: Path, ckpt_path: Path | None = None) -> Any:
        pl = importlib.import_module(NAMESPACES[0])
        saver = pl.callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=5)
        callback = QuantCallback(start=0)
        net = seeded_net(seed=0 if ckpt_path is None else 9)
        torch.manual_seed(0)
        trainer(folder, callback, Freeze("9 steps"), saver).fit(
            net, loader(shuffle=True), loader(), ckpt_path=ckpt_path
        )
        return states(net)

    whole = fit(tmp_path / "a")
    assert_equal_states(fit(tmp_path / "b", tmp_path / "a" / "step=5.ckpt"), whole)
    assert_equal_states(fit(tmp_path / "c", tmp_path / "a" / "step=10.ckpt"), whole)
