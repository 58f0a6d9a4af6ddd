"""The demonstration network trains, and its data are what the docstrings say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_lowbit.demos import DigitsCnn, DigitsData
from lightning_lowbit.errors import ConfigError


@pytest.fixture
def data() -> DigitsData:
    data = DigitsData()
    data.setup()
    return data


def first_labels(data: DigitsData) -> torch.Tensor:
    labels: torch.Tensor = next(iter(data.train_dataloader()))[1]
    return labels


def test_float_training_reaches_its_accuracy(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=15, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    model = DigitsCnn()
    trainer.fit(model, datamodule=DigitsData())
    accuracy = float(trainer.callback_metrics["val_acc"])
    assert accuracy >= 0.985

    data = DigitsData()
    (test,) = trainer.test(model, datamodule=data, verbose=False)
    assert test["test_acc"] == pytest.approx(accuracy)
    predicted = torch.cat(trainer.predict(model, datamodule=data))
    assert (predicted == data.val_set.tensors[1]).float().mean().item() == pytest.approx(accuracy)


def test_images_are_sixteenths_and_the_parts_do_not_overlap(data: DigitsData) -> None:
    assert data.train_set is not None
    assert data.val_set is not None
    images, labels = data.train_set.tensors
    assert images.shape == (1437, 1, 8, 8)
    assert images.dtype == torch.float32
    assert torch.equal(images * 16, (images * 16).round())
    assert (images.min(), images.max()) == (0, 1)
    assert sorted(labels.unique().tolist()) == list(range(10))
    # The set holds no image twice, so a shared image would be a shared index.
    together = torch.cat([images, data.val_set.tensors[0]]).flatten(1)
    assert len(together.unique(dim=0)) == 1797


def test_the_order_depends_on_the_seed_alone(data: DigitsData) -> None:
    first = first_labels(data)
    torch.manual_seed(1234)
    assert torch.equal(first_labels(data), first)
    other = DigitsData(seed=1)
    other.setup()
    assert not torch.equal(first_labels(other), first)


def test_every_epoch_has_its_own_order(data: DigitsData) -> None:
    loader = data.train_dataloader()
    assert not torch.equal(next(iter(loader))[1], next(iter(loader))[1])


def test_a_loader_before_setup_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Call setup\(\) first"):
        DigitsData().train_dataloader()


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"lightning-lowbit\[demo\]"):
        DigitsData().setup()
