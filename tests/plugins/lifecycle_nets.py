"""A tiny residual network and a Trainer for it, in either Lightning namespace, and what tests compare."""

from __future__ import annotations

import functools
import importlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit.modules.base import switch_of

__all__ = [
    "NAMESPACES",
    "QUIET",
    "Batch",
    "Body",
    "assert_equal_states",
    "loader",
    "net_class",
    "quantized",
    "random_state",
    "seeded_net",
    "states",
    "trainer",
]  # fmt: skip

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
# What Lightning says about these runs on purpose.
QUIET = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "You defined a `validation_step` but have no", ".*exists and is not empty", "The dirpath has changed",
        ".*callbacks used to create the checkpoint need to be provided", ".*LeafSpec",
        ".*does not have many workers",
    )
]  # fmt: skip
SAMPLES, BATCH = 44, 8  # six batches, the last one of four samples
Batch = list[Tensor]


class Body(nn.Module):
    """Convolutions with batch norm, a residual add, a pool, dropout and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.relu2 = nn.ReLU()
        self.pool = nn.AvgPool2d(3)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)) + x)
        logits: Tensor = self.fc(self.dropout(self.flatten(self.pool(x))))
        return logits


@functools.cache
def net_class(namespace: str = NAMESPACES[0], built: str = "init") -> Any:
    """The LightningModule class of a namespace, whose layers are built in init, setup or configure_model."""
    pl = importlib.import_module(namespace)

    class Net(pl.LightningModule):  # type: ignore[misc, name-defined]  # the namespace is chosen at run time
        def __init__(self, lr: float = 0.05) -> None:
            super().__init__()
            self.lr = lr
            self.losses: list[float] = []
            self.body: nn.Module | None = Body() if built == "init" else None

        def build(self) -> None:
            if self.body is None:
                self.body = Body()

        def setup(self, stage: str) -> None:
            if built == "setup":
                self.build()

        def configure_model(self) -> None:
            if built == "configure_model":
                self.build()

        def forward(self, x: Tensor) -> Tensor:
            assert self.body is not None
            logits: Tensor = self.body(x)
            return logits

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("train_loss", loss)
            self.losses.append(float(loss.detach()))
            return loss

        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def test_step(self, batch: Batch, batch_idx: int) -> None:
            self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
            logits: Tensor = self(batch[0])
            return logits

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)

    Net.__qualname__, Net.__module__ = f"Net_{namespace}_{built}".replace(".", "_"), __name__
    globals()[Net.__qualname__] = Net  # pickle finds it
    return Net


def seeded_net(namespace: str = NAMESPACES[0], built: str = "init", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return net_class(namespace, built)(**options)


def loader(shuffle: bool = False, samples: int = SAMPLES, seed: int = 7) -> DataLoader[Any]:
    """Images [n, 1, 6, 6] with three classes that a mean decides."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 1, 6, 6, generator=generator)
    y = torch.bucketize(x.mean((1, 2, 3)) * 6, torch.tensor([-0.4, 0.4]))
    return DataLoader(TensorDataset(x, y), BATCH, shuffle=shuffle)


def trainer(folder: Path, *callbacks: Any, namespace: str = NAMESPACES[0], **options: Any) -> Any:
    pl = importlib.import_module(namespace)
    if options.get("enable_checkpointing") is None:
        options["enable_checkpointing"] = any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks)
    settings = {
        "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder, "num_sanity_val_steps": 0, **options,
    }  # fmt: skip
    return pl.Trainer(callbacks=list(callbacks), **settings)


def states(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def assert_equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    differing = [key for key in a if not torch.equal(a[key], b[key])]
    assert differing == []


def random_state() -> tuple[bytes, Any, bytes]:
    """All global generators, in a form that == compares."""
    _, words, position, _, _ = np.random.get_state()
    return (
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        np.asarray(words).tobytes() + bytes(str(position), "ascii"),
    )


def quantized(module: nn.Module) -> bool:
    return switch_of(module).quantizing
