"""The examples on generated data: a zip of 60 small JPEGs, a random checkpoint of one block per stage."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import cifar  # noqa: E402
import export_resnet20  # noqa: E402
import finetune_resnet20  # noqa: E402
import fixed_point  # noqa: E402
import full_8bit  # noqa: E402
import integer_training  # noqa: E402
import mnist  # noqa: E402
import resnet  # noqa: E402

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 training and 2 test images per class, one hue per class, the last class stored first."""
    image = pytest.importorskip("PIL.Image")
    path = tmp_path_factory.mktemp("data") / "cifar10_tiny.zip"
    generator = torch.Generator().manual_seed(0)
    with zipfile.ZipFile(path, "w") as archive:
        for index, name in reversed(list(enumerate(cifar.CLASSES))):
            for split, count in (("train", 4), ("test", 2)):
                for number in range(count):
                    pixels = torch.randint(0, 60, (32, 32, 3), generator=generator, dtype=torch.uint8)
                    pixels[..., index % 3] += 15 * index
                    data = io.BytesIO()
                    image.fromarray(pixels.numpy()).save(data, "JPEG", quality=95)
                    archive.writestr(f"{split}/{name}/{number:04d}.jpg", data.getvalue())
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the public ones are saved: from DataParallel, beside the best accuracy."""
    seed_everything(3, verbose=False)
    path = tmp_path_factory.mktemp("checkpoint") / "resnet8.th"
    state = {f"module.{key}": value for key, value in resnet.ResNet(blocks=1).state_dict().items()}
    torch.save({"best_prec1": 10.0, "state_dict": state}, path)
    return path


def test_classes_are_numbered_by_the_alphabet(root: Path) -> None:
    images = cifar.load_images(root, "train")
    assert images.pixels.shape == (40, 32, 32, 3)
    assert images.pixels.dtype == torch.uint8
    assert images.labels.tolist() == [label for label in range(10) for _ in range(4)]
    means = images.pixels.float().mean((1, 2))
    assert means[images.labels == 9].argmax(1).eq(9 % 3).all()
    assert means[images.labels == 8].argmax(1).eq(8 % 3).all()


def test_zip_binary_version_and_cache_hold_the_same_images(root: Path, tmp_path: Path) -> None:
    images = cifar.load_images(root.parent, "test", cache=tmp_path / "cache")
    records = torch.cat([images.labels[:, None].byte(), images.pixels.permute(0, 3, 1, 2).flatten(1)], 1)
    (tmp_path / "test_batch.bin").write_bytes(records.numpy().tobytes())
    copy = tmp_path / root.name
    copy.write_bytes(bytes(root.stat().st_size))  # of the same size, but no zip: only the cache can answer
    cached = cifar.load_images(copy, "test", cache=tmp_path / "cache")
    for other in (cached, cifar.load_images(tmp_path, "test")):
        assert torch.equal(other.pixels, images.pixels)
        assert torch.equal(other.labels, images.labels)


def test_a_root_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--data.root .*found 0 zip files"):
        cifar.load_images(tmp_path, "train")


def test_augmentation_is_a_crop_and_a_flip_per_sample() -> None:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (20, 32, 32, 3), generator=generator, dtype=torch.uint8)
    sample = torch.arange(100, 120)
    y, x, flip = cifar.draw(sample, seed=5, epoch=2)
    augmented = cifar.augment(pixels, sample, seed=5, epoch=2)
    for i in range(20):
        expected = F.pad(pixels[i], (0, 0, 4, 4, 4, 4))[y[i] : y[i] + 32, x[i] : x[i] + 32]
        assert torch.equal(augmented[i], expected.flip(1) if flip[i] else expected)


def test_augmentation_depends_on_seed_sample_and_epoch_alone() -> None:
    sample = torch.arange(4000)
    drawn = torch.stack(cifar.draw(sample, seed=5, epoch=2))
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.stack(cifar.draw(sample[order], seed=5, epoch=2)), drawn[:, order])
    for other in (cifar.draw(sample, 5, 3), cifar.draw(sample, 6, 2), cifar.draw(sample + 1, 5, 2)):
        # 162 equally likely outcomes: about 25 of 4000 agree by chance, and 60 is 7 standard deviations away.
        assert int((torch.stack(other) == drawn).all(0).sum()) < 60


def test_augmentation_is_uniform_over_its_162_outcomes() -> None:
    y, x, flip = cifar.draw(torch.arange(162_000), seed=0, epoch=0)
    counts = torch.bincount(y * 18 + x * 2 + flip, minlength=162).double()
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert 161 - 5 * 18 < chi_square < 161 + 5 * 18  # mean 161, standard deviation sqrt(2 * 161)


class Recorder(LightningModule):
    """Keeps the training batches of every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, Tensor, Tensor]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, *batch))
        return self.weight**2

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        assert len(batch) == 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_data_module_augments_by_the_trainers_epoch(root: Path) -> None:
    data = cifar.CifarData(str(root), batch_size=12, seed=9)
    data.setup("fit")
    assert data.train_set is not None
    images = data.train_set.images
    # Labels that number the samples, so that a shuffled batch tells which they are.
    data.train_set = cifar.CifarSet(cifar.Images(images.pixels, torch.arange(40)), train=True)
    module = Recorder()
    Trainer(max_epochs=2, **QUIET).fit(module, data)
    # 40 = 3 * 12 + 4, and the last 4 are dropped.
    assert [epoch for epoch, _, _ in module.seen] == [0] * 3 + [1] * 3
    for epoch, batch, sample in module.seen:
        expected = cifar.normalize(cifar.augment(images.pixels[sample], sample, seed=9, epoch=epoch))
        assert torch.equal(batch, expected)
        assert batch.shape == (12, 3, 32, 32)
        assert batch.is_contiguous(memory_format=torch.channels_last)


def test_normalization_is_the_checkpoints() -> None:
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(cifar.normalize(pixels).flatten(), torch.tensor(expected))


def test_network_has_the_public_names_and_size() -> None:
    net = resnet.ResNet()
    names = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{n}" for n in ("weight", "bias"))}
    for block in (f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(3)):
        names |= {f"{block}.conv{i}.weight" for i in (1, 2)}
        names |= {f"{block}.bn{i}.{n}" for i in (1, 2) for n in ("weight", "bias")}
    assert {name for name, _ in net.named_parameters()} == names
    assert sum(p.numel() for p in net.parameters()) == 269_722


def test_shortcut_takes_every_second_pixel_between_zero_channels() -> None:
    block = resnet.BasicBlock(16, 32, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 16, 8, 8)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_finetune_prints_every_row(root: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--checkpoint", str(checkpoint), "--data.root", str(root), "--data.batch_size", "20", "--blocks", "1"]
    argv += ["--accelerator", "cpu"]
    results = finetune_resnet20.main(argv)
    assert list(results) == list(finetune_resnet20.ROWS)
    results["float"] = finetune_resnet20.main([*argv, "--rows", "float", "--seeds", "0", "1"])["float"]

    model = resnet.LitResNet(blocks=1)
    finetune_resnet20.load_public(model, checkpoint)
    test = cifar.load_images(root, "test")
    with torch.no_grad():
        logits = model.eval()(cifar.normalize(test.pixels))
    accuracy = 100 * float((logits.argmax(1) == test.labels).float().mean())
    assert results["float"].before == pytest.approx([accuracy] * 2, abs=1e-3)
    for result in results.values():
        assert len(result.before) == len(result.after) == len(result.minutes) == 1 + (result.label == "float")
        assert all(0 <= accuracy <= 100 for accuracy in result.before + result.after)
    printed = capsys.readouterr().out
    assert all(f"| {result.label} |" in printed for result in results.values())


def test_yaml_runs_through_the_command_line(
    root: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = pytest.importorskip("lightning_lowbit.cli")
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", str(EXAMPLES / "configs" / "resnet20_tqt.yaml"), "--data.root", str(root)]
    words += ["--data.batch_size", "8", "--model.blocks", "1", "--quant.init_from", str(checkpoint)]
    cli.main([*words, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)])
    (trained,) = tmp_path.rglob("*.ckpt")
    pytest.importorskip("onnxruntime")
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    words = ["--checkpoint", str(trained), "--data.root", str(root), "--limit", "10"]
    rows = export_resnet20.main([*words, "--folder", str(tmp_path / "integers")])
    assert len(rows) == 4
    assert {equal for _, equal in rows.values()} == {10}


# -- integer training ----------------------------------------------------------------------------------------------
def write_idx(path: Path, array: Tensor) -> None:
    header = bytes([0, 0, 8, array.dim()]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    path.write_bytes(gzip.compress(header + array.numpy().tobytes()))


@pytest.fixture(scope="module")
def idx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four files of MNIST with 40 training and 20 test images of noise."""
    folder = tmp_path_factory.mktemp("mnist")
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 40), ("t10k", 20)):
        pixels = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", torch.arange(count, dtype=torch.uint8) % 10)
    return folder


def test_idx_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    pixels = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
    write_idx(tmp_path / "some-idx3-ubyte.gz", pixels)
    (tmp_path / "plain-idx3-ubyte").write_bytes(gzip.decompress((tmp_path / "some-idx3-ubyte.gz").read_bytes()))
    assert torch.equal(mnist.read_idx(tmp_path / "some-idx3-ubyte"), pixels)
    assert torch.equal(mnist.read_idx(tmp_path / "plain-idx3-ubyte"), pixels)
    (tmp_path / "short-idx3-ubyte").write_bytes((tmp_path / "plain-idx3-ubyte").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"short-idx3-ubyte: expected an idx file .* got 39 bytes"):
        mnist.read_idx(tmp_path / "short-idx3-ubyte")


def test_mnist_batches_are_normalized(idx: Path) -> None:
    data = mnist.MnistData(str(idx), batch_size=8)
    data.setup("fit")
    raw, labels = next(iter(data.val_dataloader()))
    images, same = data.on_after_batch_transfer((raw, labels), 0)
    assert images.shape == (20, 1, 28, 28)
    torch.testing.assert_close(images[:, 0], (raw / 255 - 0.1307) / 0.3081)
    assert torch.equal(same, torch.arange(20) % 10)


def test_integer_training_prints_both_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"{name}.json" for name in ("certificate", "json")}
    argv = ["--net", "mlp", "--epochs", "6", "--data.batch_size", "32", "--seeds", "0", "1"]
    results = integer_training.main([*argv, *(word for name in files for word in (f"--{name}", str(files[name])))])
    printed = capsys.readouterr().out
    for row, result in results.items():
        assert [len(curve) for curve in result.epochs] == [6, 6]
        assert max(result.before) < 30
        assert min(curve[-1] for curve in result.epochs) > 85
        assert f"| {row} |" in printed
    written = json.loads(files["json"].read_text())
    assert written["niti"]["epochs"] == results["niti"].epochs
    certificate = json.loads(files["certificate"].read_text())
    assert certificate["scheme"] == "niti"
    assert certificate["limits"] == []
    assert len(certificate["records"]) == 6


def test_integer_training_takes_every_network(root: Path, idx: Path) -> None:
    for net, folder, options in (
        ("lenet", idx, []),
        ("vgg_small", root, ["--steps_per_epoch", "1"]),
        ("digits_bn", idx, ["--steps_per_epoch", "2"]),
        ("resnet20", root, ["--steps_per_epoch", "1", "--niti", '{"mu": [-2]}']),
    ):
        results = integer_training.main(
            ["--net", net, "--data.root", str(folder), "--data.batch_size", "4", "--rows", "niti", *options]
        )
        assert all(0 <= value <= 100 for curve in results["niti"].epochs for value in curve)


def test_images_that_are_missing_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        integer_training.main(["--net", "lenet"])
    assert "--net lenet needs --data.root" in capsys.readouterr().err


def test_integer_yaml_logs_mu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli = pytest.importorskip("lightning_lowbit.cli")
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", str(EXAMPLES / "configs" / "niti_digits.yaml"), "--trainer.max_epochs", "4"]
    cli.main([*words, "--trainer.limit_train_batches", "3", "--trainer.log_every_n_steps", "1"])
    (metrics,) = tmp_path.rglob("metrics.csv")
    header, *rows = (line.split(",") for line in metrics.read_text().splitlines())
    seen = [float(row[header.index("mu")]) for row in rows if row[header.index("mu")]]
    # 12 steps of 3 an epoch: 5 from the start, 4 from step 6, 3 from step 9.
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {5.0, 4.0, 3.0}


# -- fixed point -------------------------------------------------------------------------------------------------------
def test_fixed_point_prints_every_row(root: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--checkpoint", str(checkpoint), "--data.root", str(root), "--data.batch_size", "8", "--batches", "2"]
    fixed_point.main([*argv, "--blocks", "1", "--freeze", "3 steps", "--accelerator", "cpu"])
    printed = capsys.readouterr().out
    assert all(f"| {row} |" in printed for row in fixed_point.ROWS)


def test_fixed_point_yaml_runs_both_recipes(
    root: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = pytest.importorskip("lightning_lowbit.cli")
    monkeypatch.chdir(tmp_path)
    before = torch.load(checkpoint)["state_dict"]
    for name, moves in (("f8net_resnet20", True), ("f8net_resnet20_tiny", False)):
        words = ["fit", "--config", str(EXAMPLES / "configs" / f"{name}.yaml"), "--data.root", str(root)]
        words += ["--data.batch_size", "8", "--model.blocks", "1", "--quant.init_from", str(checkpoint)]
        cli.main([*words, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path / name)])
        (file,) = (tmp_path / name).rglob("*.ckpt")
        after = torch.load(file, weights_only=False)["state_dict"]
        weight, mean = "layer2.0.conv1.weight", "layer2.0.bn1.running_mean"
        assert torch.equal(after[f"net.{weight}"], before[f"module.{weight}"]) != moves
        assert not torch.equal(after[f"net.{mean}"], before[f"module.{mean}"])
        assert any(key.endswith("alpha") for key in after) == moves


# -- ranges that follow the batches ------------------------------------------------------------------------------------
def test_jacinto_yaml_trains_and_calibrates(
    root: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = pytest.importorskip("lightning_lowbit.cli")
    monkeypatch.chdir(tmp_path)
    for command, name in (("fit", "jacinto_resnet20"), ("validate", "jacinto_resnet20_calibrated")):
        words = [command, "--config", str(EXAMPLES / "configs" / f"{name}.yaml"), "--data.root", str(root)]
        words += ["--data.batch_size", "8", "--model.blocks", "1", "--quant.init_from", str(checkpoint)]
        cli.main([*words, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path / name)])
        assert "val_acc" in capsys.readouterr().out
    (file,) = tmp_path.rglob("*.ckpt")
    state = torch.load(file, weights_only=False)["state_dict"]
    before = torch.load(checkpoint)["state_dict"]
    assert not torch.equal(state["net.layer2.0.conv1.weight"], before["module.layer2.0.conv1.weight"])
    assert any(key.endswith("lowbit_output.clips") for key in state)


# -- full 8 bits -------------------------------------------------------------------------------------------------------
def test_full_8bit_prints_both_rows(root: Path, idx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--net", "cnn", "--epochs", "4", "--json", str(tmp_path / "json")]
    results = full_8bit.main(argv)
    printed = capsys.readouterr().out
    assert list(results) == ["float", "wageubn"]
    assert all(f"| {row} |" in printed for row in results)
    assert min(result.epochs[0][-1] for result in results.values()) > 85
    assert json.loads((tmp_path / "json").read_text())["wageubn"]["epochs"] == results["wageubn"].epochs
    for net, folder in (("lenet", idx), ("digits_bn", idx), ("resnet20", root)):
        argv = ["--net", net, "--data.root", str(folder), "--data.batch_size", "4", "--steps_per_epoch", "1"]
        results = full_8bit.main([*argv, "--rows", "wageubn", "--wageubn", '{"e2": "flag16"}'])
        assert all(0 <= value <= 100 for curve in results["wageubn"].epochs for value in curve)
    with pytest.raises(SystemExit):
        full_8bit.main(["--net", "lenet"])
    assert "--net lenet needs --data.root" in capsys.readouterr().err


def test_full_8bit_yaml_trains(root: Path, idx: Path, checkpoint: Path, tmp_path: Path) -> None:
    cli = pytest.importorskip("lightning_lowbit.cli")
    small = ["--model.blocks", "1", "--quant.init_from", str(checkpoint)]
    for name, folder, options in (("wageubn_resnet20", root, small), ("wageubn_mnist", idx, [])):
        words = ["fit", "--config", str(EXAMPLES / "configs" / f"{name}.yaml"), "--data.root", str(folder)]
        words += ["--data.batch_size", "8", "--trainer.max_epochs", "1", *options]
        cli.main([*words, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path / name)])
        (file,) = (tmp_path / name).rglob("*.ckpt")
        state = torch.load(file, weights_only=False)["state_dict"]
        scale = next(key for key in state if key.endswith(".lowbit_weight.scale"))
        codes = state[scale.replace("lowbit_weight.scale", "weight")] * 2.0 ** (23 - state[scale])
        assert torch.equal(codes, codes.round())  # on the grid of what is stored
