"""A network and a data set that train in seconds on a CPU, for examples, documents and tests."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_lowbit.errors import ConfigError

__all__ = ["DigitsCnn", "DigitsData"]

Batch = tuple[Tensor, Tensor]


class DigitsData(LightningDataModule):
    """scikit-learn's handwritten digits in memory: 1437 images to train on, 360 to validate on.

    An image is float32 of shape (1, 8, 8) with values k / 16 in [0, 1]; a label is an int64 in [0, 9]. The
    split is the same in every run; the order of the training images is a function of ``seed`` alone, so that
    a float and a low-bit run see the same batches.

    Args:
        batch_size: images per batch; the last batch of an epoch is smaller.
        seed: seed of the order in which the training images come.

    Raises:
        ConfigError: scikit-learn, which ships the images, is not installed.
    """

    def __init__(self, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.train_set: TensorDataset | None = None
        self.val_set: TensorDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and split the images; further calls keep what is there."""
        if self.train_set is not None:
            return
        images, labels = _read_digits()
        # 1437 / 360 is the 80 / 20 split; its own generator keeps it out of reach of the user's seed.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        train, val = order[:1437], order[1437:]
        self.train_set = TensorDataset(images[train], labels[train])
        self.val_set = TensorDataset(images[val], labels[val])

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled training batches."""
        generator = torch.Generator().manual_seed(self.seed)
        return self._loader(self.train_set, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation batches, always in the same order."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The validation images again: the set is too small for a third part."""
        return self._loader(self.val_set)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The validation images, labels included."""
        return self._loader(self.val_set)

    def _loader(self, dataset: TensorDataset | None, **options: Any) -> DataLoader[Batch]:
        if dataset is None:
            raise ConfigError("DigitsData: no images yet. Call setup() first; a Trainer does so by itself.")
        # torch types what a TensorDataset yields as tuple[Tensor, ...].
        return DataLoader(cast("Dataset[Batch]", dataset), batch_size=self.batch_size, **options)


def _read_digits() -> Batch:
    """Images (1797, 1, 8, 8) float32 in [0, 1] and labels (1797,) int64."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ConfigError(
            "DigitsData: its images come with scikit-learn, which is not installed. "
            "Install the extra: pip install 'lightning-lowbit[demo]'."
        ) from error
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.as_tensor(digits.target, dtype=torch.int64)


class DigitsCnn(LightningModule):
    """A small residual network for `DigitsData`; logs ``val_loss`` and ``val_acc``.

    Stem, one residual block, one strided convolution, average pool, linear: every kind of site that a scheme
    has to place (a tensor that forks, an add, a pool, a first and a last layer) is there once.

    Args:
        channels: channels of the stem and of the residual block; the strided convolution has twice as many.
        lr: highest learning rate of the one-cycle schedule.
    """

    def __init__(self, channels: int = 16, lr: float = 0.02) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(2 * channels)
        self.relu4 = nn.ReLU()
        self.pool = nn.AvgPool2d(4)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(2 * channels, 10)
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes=10, average="micro")
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) to logits (N, 10)."""
        x = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(x)))
        x = self.relu3(self.bn3(self.conv3(y)) + x)
        x = self.relu4(self.bn4(self.conv4(x)))
        logits: Tensor = self.fc(self.flatten(self.pool(x)))
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy on the validation images."""
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val_loss", nn.functional.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the accuracy on the test images."""
        images, labels = batch
        self.test_acc(self(images), labels)
        self.log("test_acc", self.test_acc)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Predicted digit of each image, int64 of shape (N,)."""
        prediction: Tensor = self(batch[0]).argmax(dim=1)
        return prediction

    def configure_optimizers(self) -> Any:
        """Adam under one cycle over the whole run."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
