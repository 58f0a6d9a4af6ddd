"""The examples on generated images, and what they share: CIFAR-10, MNIST, the network of the public checkpoints."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import cifar
import export_resnet20
import finetune_resnet20
import mnist
import pytest
import resnet
import torch
from examples.generated import write_idx
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


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
    resnet.load_public(model, checkpoint)
    test = cifar.load_images(root, "test")
    with torch.no_grad():
        logits = model.eval()(cifar.normalize(test.pixels))
    accuracy = 100 * float((logits.argmax(1) == test.labels).float().mean())
    assert results["float"]["before"] == pytest.approx([accuracy] * 2, abs=1e-3)
    for row, result in results.items():
        assert {len(values) for values in result.values()} == {1 + (row == "float")}
        assert all(0 <= accuracy <= 100 for accuracy in result["before"] + result["after"])
    printed = capsys.readouterr().out
    assert all(f"| {row} |" in printed for row in results)


def test_what_the_command_line_trained_is_exported(
    root: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = pytest.importorskip("lightning_lowbit.cli")
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", str(CONFIGS / "resnet20_tqt.yaml"), "--data.root", str(root)]
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


def test_integer_yaml_logs_mu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli = pytest.importorskip("lightning_lowbit.cli")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_LOWBIT_COMPILE", "never")  # compiling takes longer than a run
    words = ["fit", "--config", str(CONFIGS / "digits_niti.yaml"), "--trainer.max_epochs", "4"]
    cli.main([*words, "--trainer.limit_train_batches", "3", "--trainer.log_every_n_steps", "1"])
    (metrics,) = tmp_path.rglob("metrics.csv")
    header, *rows = (line.split(",") for line in metrics.read_text().splitlines())
    seen = [float(row[header.index("mu")]) for row in rows if row[header.index("mu")]]
    # 12 steps of 3 an epoch: 5 from the start, 4 from step 6, 3 from step 9.
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {5.0, 4.0, 3.0}
