"""Images and a checkpoint for the examples: 60 small JPEGs, 60 gray ones of noise, a network of one block a stage."""

from __future__ import annotations

import gzip
import io
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor

for folder in ("examples", "benchmarks"):
    sys.path.insert(0, str(Path(__file__).parents[2] / folder))

import cifar  # noqa: E402
import resnet  # noqa: E402


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 training and 2 test images per class of CIFAR-10, one hue per class, the last class stored first."""
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
def idx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four files of MNIST with 40 training and 20 test images of noise."""
    folder = tmp_path_factory.mktemp("mnist")
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 40), ("t10k", 20)):
        pixels = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", torch.arange(count, dtype=torch.uint8) % 10)
    return folder


def write_idx(path: Path, array: Tensor) -> None:
    header = bytes([0, 0, 8, array.dim()]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    path.write_bytes(gzip.compress(header + array.numpy().tobytes()))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the public ones are saved: from DataParallel, beside the best accuracy."""
    seed_everything(3, verbose=False)
    path = tmp_path_factory.mktemp("checkpoint") / "resnet8.th"
    state = {f"module.{key}": value for key, value in resnet.ResNet(blocks=1).state_dict().items()}
    torch.save({"best_prec1": 10.0, "state_dict": state}, path)
    return path
