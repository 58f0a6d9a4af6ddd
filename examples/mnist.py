"""MNIST in memory, from the authors' idx files: whole batches at a time, no worker processes."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import torch
from cifar import whole_batches
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

MEAN, STD = 0.1307, 0.3081  # of the training images, for gray values in [0, 1]
FILES = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> Tensor:
    """One idx file of bytes, gzipped or not: uint8 of the shape that its header says.

    The header is two zero bytes, the type (8 for bytes), the number of axes, and each length as 4 bytes, largest first.
    """
    packed = path.with_name(f"{path.name}.gz")
    data = gzip.decompress(packed.read_bytes()) if packed.is_file() else path.read_bytes()
    axes = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    if data[:3] != b"\0\0\x08" or len(data) != 4 + 4 * axes + math.prod(shape):
        raise ValueError(f"{path}: expected an idx file of bytes, got {len(data)} bytes that begin with {data[:4]!r}")
    return torch.frombuffer(bytearray(data[4 + 4 * axes :]), dtype=torch.uint8).view(shape)


class MnistSet(Dataset[Any]):
    """Whole batches: pixels uint8 [B, 28, 28] and labels int64 [B]."""

    def __init__(self, root: str | Path, split: str) -> None:
        folder, name = Path(root).expanduser(), FILES[split]
        self.pixels = read_idx(folder / f"{name}-images-idx3-ubyte")
        self.labels = read_idx(folder / f"{name}-labels-idx1-ubyte").long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pixels[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.pixels[indices], self.labels[indices]


class MnistData(LightningDataModule):
    """MNIST without augmentation; the test images serve as validation set.

    Args:
        root: folder with the four idx files, gzipped or not.
        batch_size: images per training step; the last incomplete batch is dropped.
        eval_batch_size: images per validation step.
    """

    def __init__(self, root: str, batch_size: int = 64, eval_batch_size: int = 500) -> None:
        super().__init__()
        self.root, self.batch_size, self.eval_batch_size = root, batch_size, eval_batch_size
        self.sets: dict[str, MnistSet] = {}

    def setup(self, stage: str) -> None:
        if not self.sets:
            self.sets = {split: MnistSet(self.root, split) for split in FILES}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.sets["train"], self.batch_size, shuffle=True, drop_last=True, collate_fn=whole_batches)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.sets["test"], self.eval_batch_size, collate_fn=whole_batches)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        pixels, labels = batch
        return pixels.float().div_(255).sub_(MEAN).div_(STD).unsqueeze(1), labels
