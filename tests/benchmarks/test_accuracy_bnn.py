"""Accuracies of binary networks on scikit-learn's digits and on a few generated images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import accuracy_bnn
import binary_nets
import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_lowbit import Bnn, QuantCallback
from lightning_lowbit.demos import DigitsData


def test_digits_are_learned_and_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--net", "digits_mlp", "--data.batch_size", "64", "--epochs", "5", "--seeds", "0", "1"]
    files = ["--json", str(tmp_path / "json"), "--packed", str(tmp_path / "packed")]
    results = accuracy_bnn.main([*argv, *files])
    printed = capsys.readouterr().out
    for row, result in results.items():
        assert [len(curve) for curve in result.epochs] == [5, 5]
        assert max(result.before) < 30
        assert min(curve[-1] for curve in result.epochs) > 90
        assert f"| {row} |" in printed
    assert json.loads((tmp_path / "json").read_text())["bnn"]["epochs"] == results["bnn"].epochs
    for curve in results["bnn"].epochs:
        assert f"packed: {curve[-1]:.2f} on 360 images, logits of 0 differ" in printed
    # Two binary layers of 256 x 256 take a 32nd of their bytes, and float ends stay as they are.
    assert 90_000 < (tmp_path / "packed").stat().st_size < 110_000


@pytest.mark.parametrize("net", ["mnist_mlp", "vgg", "resnet20"])
def test_every_network_trains_and_is_packed(
    net: str, root: Path, idx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = idx if net == "mnist_mlp" else root
    argv = ["--net", net, "--data.root", str(folder), "--data.batch_size", "8", "--steps_per_epoch", "1"]
    accuracy_bnn.main([*argv, "--packed", str(tmp_path / "packed"), "--bnn", '{"first": "int8", "last": "int8"}'])
    assert "on 20 images, logits of 0 differ from evaluation's" in capsys.readouterr().out


def test_weights_become_binary_in_the_second_stage(root: Path, checkpoint: Path) -> None:
    argv = ["--net", "resnet8", "--data.root", str(root), "--data.batch_size", "8", "--checkpoint", str(checkpoint)]
    results = accuracy_bnn.main([*argv, "--stages", "1", "2", "--distill"])
    assert {row: len(result.epochs[0]) for row, result in results.items()} == {"float": 3, "bnn": 3}


class Recorder(Callback):
    """The rate of every step, and whether weights were binary in it."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, bool]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        layer = pl_module.get_submodule("net.4")
        self.seen.append((optimizer.param_groups[0]["lr"], layer.lowbit_weight.ready))


def test_the_rate_restarts_where_the_weights_become_binary() -> None:
    recorder = Recorder()
    trainer = Trainer(
        max_epochs=5, limit_train_batches=4, callbacks=[QuantCallback(Bnn(weights_at=2)), recorder], accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(binary_nets.BinaryClassifier("digits_mlp", lr=0.01, restart=0.4), DigitsData())
    rates, binary = zip(*recorder.seen, strict=True)
    assert binary == (False,) * 8 + (True,) * 12
    assert rates[0] == rates[8] == 0.01
    for stage in (rates[:8], rates[8:]):
        assert list(stage) == sorted(stage, reverse=True)
        assert stage[-1] < 0.0005


def test_images_that_are_missing_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy_bnn.main(["--net", "vgg"])
    assert "--net vgg needs --data.root" in capsys.readouterr().err
