"""The example of binary networks on scikit-learn's digits and on a few images of noise."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import binary_nets  # noqa: E402
import binary_networks  # noqa: E402
import resnet  # noqa: E402

from lightning_lowbit import Bnn, QuantCallback  # noqa: E402
from lightning_lowbit.demos import DigitsData  # noqa: E402


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The authors' binary version with 16 training and 8 test images of noise."""
    folder = tmp_path_factory.mktemp("cifar10")
    generator = torch.Generator().manual_seed(0)
    for name, count in (("data_batch_1", 16), ("test_batch", 8)):
        records = torch.randint(0, 256, (count, 1 + 3072), generator=generator, dtype=torch.uint8)
        records[:, 0] %= 10
        (folder / f"{name}.bin").write_bytes(records.numpy().tobytes())
    return folder


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain idx files with 16 training and 8 test images of noise."""
    folder = tmp_path_factory.mktemp("mnist")
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 16), ("t10k", 8)):
        _write_idx(folder / f"{name}-images-idx3-ubyte", torch.randint(0, 256, (count, 28, 28), generator=generator))
        _write_idx(folder / f"{name}-labels-idx1-ubyte", torch.arange(count) % 10)
    return folder


def _write_idx(path: Path, array: Tensor) -> None:
    header = bytes([0, 0, 8, array.dim()]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    path.write_bytes(header + array.byte().numpy().tobytes())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    seed_everything(3, verbose=False)
    path = tmp_path_factory.mktemp("checkpoint") / "resnet8.th"
    state = {f"module.{key}": value for key, value in resnet.ResNet(blocks=1).state_dict().items()}
    torch.save({"best_prec1": 10.0, "state_dict": state}, path)
    return path


def test_digits_are_learned_and_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--net", "digits_mlp", "--data.batch_size", "64", "--epochs", "5", "--seeds", "0", "1"]
    files = ["--json", str(tmp_path / "json"), "--packed", str(tmp_path / "packed")]
    results = binary_networks.main([*argv, *files])
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
    net: str, cifar10: Path, mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = mnist if net == "mnist_mlp" else cifar10
    argv = ["--net", net, "--data.root", str(root), "--data.batch_size", "8", "--steps_per_epoch", "1"]
    binary_networks.main([*argv, "--packed", str(tmp_path / "packed"), "--bnn", '{"first": "int8", "last": "int8"}'])
    assert "on 8 images, logits of 0 differ from evaluation's" in capsys.readouterr().out


def test_weights_become_binary_in_the_second_stage(cifar10: Path, checkpoint: Path) -> None:
    argv = ["--net", "resnet8", "--data.root", str(cifar10), "--data.batch_size", "8", "--checkpoint", str(checkpoint)]
    results = binary_networks.main([*argv, "--stages", "1", "2", "--distill"])
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
        binary_networks.main(["--net", "vgg"])
    assert "--net vgg needs --data.root" in capsys.readouterr().err


def test_yaml_files_run_through_the_command_line(
    cifar10: Path, mnist: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = pytest.importorskip("lightning_lowbit.cli")
    monkeypatch.chdir(tmp_path)
    public = str(checkpoint)
    few = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"]
    few += ["--data.batch_size", "8"]
    for name, words in (
        ("digits", ["--trainer.limit_train_batches", "2"]),
        ("mnist", ["--data.root", str(mnist)]),
        ("vgg", ["--data.root", str(cifar10)]),
        ("resnet20", ["--data.root", str(cifar10), "--model.net", "resnet8", "--quant.init_from", public]),
    ):
        if name == "resnet20":
            words += ["--quant.scheme.weights_at", "0.5", "--trainer.callbacks.teacher", public]
        words += ["--trainer.default_root_dir", str(tmp_path / name)]
        cli.main(["fit", "--config", str(EXAMPLES / "configs" / f"bnn_{name}.yaml"), *few, *words])
        assert list(tmp_path.rglob(f"{'runs' if name == 'digits' else name}/**/*.ckpt")), name
