"""Two processes, different data: runs the scenarios named on the command line and saves what each rank holds.

    python ddp_script.py FOLDER scratch resume ...

Every scenario leaves FOLDER/{scenario}-{rank}.pt; the tests compare the two files.
"""

from __future__ import annotations

import logging
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit.callbacks.calibrate import Calibrate
from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.schemes.tqt import Tqt

BATCH, SAMPLES = 4, 32
FAR = 64.0  # every other image is that much brighter


class Net(pl.LightningModule):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(4, 2)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.conv2(x) + x)
        y: Tensor = self.fc(self.drop(x.mean((2, 3))))
        return y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.training:  # calibration runs this in evaluation mode
            assert self.bn1.running_mean is not None
            self.seen.append((batch[0].mean(), self.bn1.running_mean.clone()))
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class StateAt(pl.Callback):
    """Copies the state dict behind one training batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.state: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            self.state = copy_of(pl_module)


class SaveAt(pl.Callback):
    """A checkpoint behind one training batch."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(SAMPLES, 1, 6, 6, generator=generator)
    images[1::2] *= FAR
    return TensorDataset(images, torch.randint(0, 2, (SAMPLES,), generator=generator))


def loader(shuffle: bool = False) -> DataLoader[Any]:
    """For Lightning to share out; what it makes of a train loader is shuffled either way."""
    return DataLoader(data(), batch_size=BATCH, shuffle=shuffle)


def share(rank: int, batches: int, size: int = BATCH) -> DataLoader[Any]:
    """A loader of one rank's own: rank 1 has the bright half."""
    images, labels = data().tensors
    return DataLoader(
        TensorDataset(images[rank::2][: batches * size], labels[rank::2][: batches * size]), batch_size=size
    )


def trainer(*callbacks: Any, **options: Any) -> pl.Trainer:
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
    silent = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    settings: dict[str, Any] = {"max_epochs": 1, "num_sanity_val_steps": 0, **silent, **options}
    return pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, callbacks=list(callbacks), **settings)


def net(seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def fit(module: Net, run: pl.Trainer, *loaders: Any, **options: Any) -> dict[str, Any]:
    run.fit(module, *loaders, **options)
    quant = [c for c in run.callbacks if isinstance(c, QuantCallback)]  # type: ignore[attr-defined]  # its list
    return {
        "state": copy_of(module),
        "seen": module.seen,
        "metrics": quant[0].metrics if quant else {},
        "steps": run.global_step,
    }


# -- scenarios -----------------------------------------------------------------------------------------------
def scratch(folder: Path, rank: int) -> dict[str, Any]:
    """Two of four steps in float, then calibrated and quantized; beside it the float run."""
    early, plain_early = StateAt(1), StateAt(1)
    quant = QuantCallback(Tqt(bits=4, freeze_batch_norm=None), start="2 steps")
    result = fit(net(), trainer(quant, early), loader(), loader())
    fit(net(), trainer(plain_early), loader(), loader())
    return {**result, "early": early.state, "float_early": plain_early.state}


def calibration(folder: Path, rank: int) -> dict[str, Any]:
    """No step moves anything: what is left is what calibration found."""
    quant = QuantCallback(Tqt(mode="static", weight_init="max", act_init="max"), start=0)
    run = trainer(quant, use_distributed_sampler=False, limit_train_batches=2)
    return fit(net(), run, share(rank, batches=2))


def init_from(folder: Path, rank: int) -> dict[str, Any]:
    """Each rank builds other weights; the file's come to both, and nothing moves them."""
    path = folder / f"float-{rank}.pt"
    torch.save(net(seed=7).state_dict(), path)
    quant = QuantCallback(Tqt(mode="static"), init_from=str(path))
    result = fit(net(seed=rank), trainer(quant), loader(), loader())
    return {**result, "file": torch.load(path)}


def resume(folder: Path, rank: int) -> dict[str, Any]:
    """Interrupted in the middle of the second of three epochs, with shuffling and dropout."""
    first_quant, second_quant = (QuantCallback(Tqt(bits=4), start=0, resume_order=True) for _ in range(2))
    path = folder / "middle.ckpt"
    first, second = net(dropout=0.5), net(5, dropout=0.5)
    pl.seed_everything(3 + rank, verbose=False)  # dropout draws other masks on the other rank
    whole = fit(first, trainer(first_quant, SaveAt(path, 6), max_epochs=3), loader(True))
    pl.seed_everything(11 + rank, verbose=False)
    again = fit(second, trainer(second_quant, max_epochs=3), loader(True), ckpt_path=path)
    return {**whole, "resumed": again["state"], "resumed_steps": again["steps"]}


def unequal(folder: Path, rank: int) -> dict[str, Any]:
    """Rank 1 has fewer calibration batches, and smaller ones in training and validation."""
    quant = QuantCallback(Tqt(mode="static", act_init="max"), start=0)
    calibrate = Calibrate(share(rank, batches=3 - 2 * rank))
    run = trainer(quant, calibrate, use_distributed_sampler=False, limit_train_batches=2)
    return fit(net(), run, share(rank, 2, BATCH - 2 * rank), share(rank, 2, BATCH - 2 * rank))


def sync_batchnorm(folder: Path, rank: int) -> dict[str, Any]:
    try:
        fit(net(), trainer(QuantCallback("tqt", start=0), sync_batchnorm=True), loader())
    except ValueError as error:
        return {"error": str(error)}
    return {"error": ""}


def main() -> None:
    warnings.filterwarnings("ignore")  # the two processes' own; the tests judge values
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        rank = int(trainer().strategy.cluster_environment.global_rank())  # type: ignore[attr-defined]  # of DDP
        torch.save(globals()[name](folder, rank), folder / f"{name}-{rank}.pt")


if __name__ == "__main__":
    main()
