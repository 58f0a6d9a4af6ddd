"""int8 training against float32 training, through the whole Trainer: time of a step and memory kept for backward.

    python benchmarks/int8_training.py [--nets mlp512 mlp128 vgg resnet20] [--rounds 5] [--steps 6] [--json FILE]

One thread's CPU time, fits in turn; the ratio is the median over rounds of the median step of each fit. Float is
SGD with momentum in channels_last memory. ResNet-20's float row has its batch norms, the int8 row has them folded;
``islands`` is the int8 network that keeps them as islands.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from qat_step import Parts, ResNet20, vgg_small
from timing import kept_bytes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit import Niti, QuantCallback
from lightning_lowbit.kernels import backend_report
from lightning_lowbit.modules.block import WeightCodes


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))


def resnet20() -> nn.Module:
    return ResNet20(Parts())


# name -> network, batch size, size of a sample
NETS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "mlp512": (mlp, 512, (784,)),
    "mlp128": (mlp, 128, (784,)),
    "vgg": (vgg_small, 32, (3, 32, 32)),
    "resnet20": (resnet20, 128, (3, 32, 32)),
}


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6, momentum=0.9)


class Clock(pl.Callback):
    """CPU time of each step: from the batch at hand to the end of its update."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.start = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        self.times.append(1e3 * (time.process_time() - self.start))


class Row:
    """One network trained in one way; every ``run`` is a fit of some steps."""

    def __init__(self, name: str, scheme: Niti | None) -> None:
        make, self.batch, size = NETS[name]
        torch.manual_seed(0)
        self.module = Module(make()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
        self.scheme, self.size = scheme, size

    def run(self, steps: int) -> float:
        """Median step in milliseconds, the first two left out."""
        clock = Clock()
        callbacks: list[pl.Callback] = [clock]
        if self.scheme is not None:
            callbacks.append(QuantCallback(self.scheme, calibrate_batches=1, evaluate=False))
        trainer = pl.Trainer(
            max_epochs=1, limit_train_batches=steps + 2, accelerator="cpu", callbacks=callbacks, logger=False,
            enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(self.module, self.data(steps + 2))
        return statistics.median(clock.times[2:])

    def data(self, batches: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, *self.size, generator=generator)
        y = torch.randint(0, 10, (self.batch,), generator=generator)
        return DataLoader(TensorDataset(x.repeat(batches, *[1] * len(self.size)), y.repeat(batches)), self.batch)

    def kept(self) -> int:
        """Bytes from forward to backward of one batch, on the network as the fits left it."""
        x, y = next(iter(self.data(1)))
        self.module.train()
        # The int8 weights are the network's state, as the float weights are the other network's.
        weights = [module.codes() for module in self.module.modules() if isinstance(module, WeightCodes)]
        return kept_bytes(self.module, lambda: F.cross_entropy(self.module(x), y), weights)


def rows(name: str) -> dict[str, Row]:
    found = {"float": Row(name, None), "int8": Row(name, Niti(norms="fold"))}
    if name == "resnet20":
        found["islands"] = Row(name, Niti(norms="island"))
    return found


def measure(name: str, rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Per row: median milliseconds, the median over rounds of the ratio to float, and kept memory over float."""
    candidates = rows(name)
    for row in candidates.values():
        row.run(2)  # compile, calibrate
    times = {key: [] for key in candidates}  # type: dict[str, list[float]]
    for _ in range(rounds):
        for key, row in candidates.items():
            times[key].append(row.run(steps))
    kept = {key: row.kept() for key, row in candidates.items()}
    return {
        key: {
            "ms": statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, times["float"], strict=True)),
            "kept_MB": kept[key] / 1e6,
            "kept_ratio": kept[key] / kept["float"],
        }
        for key, own in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results = {}
    print(f"{'net':10} {'row':8} {'ms/step':>9} {'of float':>9} {'kept MB':>9} {'of float':>9}")
    for name in arguments.nets:
        results[name] = measure(name, arguments.rounds, arguments.steps)
        for key, row in results[name].items():
            cells = f"{row['ms']:9.1f} {row['ratio']:9.2f} {row['kept_MB']:9.1f} {row['kept_ratio']:9.2f}"
            print(f"{name:10} {key:8} {cells}")
    print(backend_report())
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
