"""A program: two processes train the toy scheme, on different data and on one data set; each writes its ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from schemes.toy_integer import ToyInteger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit import QuantCallback

GLOBAL_BATCH, SAMPLES = 16, 33  # the last global batch has one sample: the second process has none of it


class Net(L.LightningModule):
    """Linear layers without bias: a fork, a layer called twice, rectifiers between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.again = nn.Linear(6, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.left, self.right = nn.Linear(8, 3, bias=False), nn.Linear(8, 3, bias=False)
        self.relu = nn.ReLU()
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.relu(self.first(x))
        x = self.relu(self.again(self.relu(self.again(x))))
        return self.left(x), self.right(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        a, b = self(x)
        loss = nn.functional.cross_entropy(a, y) + nn.functional.cross_entropy(b, (y + 1) % 3)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(seed: int = 0, samples: int = 64, batch: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 6, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=batch, shuffle=True)


def trainer(epochs: int, folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=bool(callbacks), default_root_dir=folder,
        callbacks=[QuantCallback(ToyInteger(), calibrate_batches=1), *callbacks], **options,
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    net, shared = Net(), Net()
    start = {k: v.clone() for k, v in net.state_dict().items()}
    run = trainer(2, out, devices=2, strategy=DDPStrategy(process_group_backend="gloo"), use_distributed_sampler=False)
    run.fit(net, data(seed=run.global_rank))
    trainer(2, out, devices=2, strategy=DDPStrategy(process_group_backend="gloo")).fit(
        shared, data(samples=SAMPLES, batch=GLOBAL_BATCH // 2)
    )
    ends = {"state": net.state_dict(), "start": start, "losses": net.losses, "shared": shared.state_dict()}
    torch.save(ends, out / f"rank{run.global_rank}.pt")
