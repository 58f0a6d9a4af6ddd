"""NITI in several processes: trains all scenarios and saves what each rank holds.

    python distributed_niti_script.py FOLDER WORLD

Leaves FOLDER/{rank}.pt, a result by scenario; the tests compare them with runs in one process.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from plugins.lifecycle_nets import Body, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit import LowBitDDPStrategy, LowBitStrategy, Niti
from lightning_lowbit.plugins.distributed import Traffic, counted

PERIOD = 4


class Net(pl.LightningModule):
    def __init__(self, body: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.loss = body, loss
        self.wrapped = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self.body(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(self.body(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Watch(pl.Callback):
    """The traffic of each training step, and a checkpoint between two renewals of frozen shifts."""

    def __init__(self, traffic: Traffic, path: Path) -> None:
        self.traffic, self.path = traffic, path
        self.wrapped = False

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.traffic.open = {}  # what validation and the beginning of the run have sent
        self.wrapped = isinstance(trainer.strategy.model, nn.parallel.DistributedDataParallel)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.traffic.end_step()
        if trainer.global_step == PERIOD + 2:
            trainer.save_checkpoint(self.path)


def straight() -> nn.Module:
    """Three layers with biases: every parameter is an integer."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(),
        nn.Linear(8, 3),
    )  # fmt: skip


def squares(logits: Tensor, target: Tensor) -> Tensor:
    """A loss that hands back float errors."""
    return nn.functional.mse_loss(logits, nn.functional.one_hot(target, 3).float())


@dataclass(frozen=True)
class Scenario:
    body: Callable[[], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    samples: int = 47  # two batches of 18, and 11 that no number of processes divides
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    settings: dict[str, Any] = field(default_factory=dict)
    batch: int = 18  # over all processes


SCENARIOS = {
    "islands": Scenario(Body),
    "frozen": Scenario(Body, {"frozen_shifts": PERIOD}),
    "straight": Scenario(straight),
    "straight_frozen": Scenario(straight, {"frozen_shifts": PERIOD}),
    "blank": Scenario(Body, samples=37),
    "accumulated": Scenario(straight, {"momentum": 8, "weight_decay": True}, settings={"accumulate_grad_batches": 2}),
    "finetune": Scenario(straight, {"recipe": "finetune", "grad_rounding": "stochastic"}),
    "generic": Scenario(straight, samples=54, loss=squares),
}


def data(scenario: Scenario, world: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    x = torch.randn(scenario.samples, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    x = x * torch.linspace(0.1, 4.0, scenario.samples).view(-1, 1, 1, 1)  # ranges differ between the processes
    every = TensorDataset(x, torch.bucketize(x.mean((1, 2, 3)) * 6, torch.tensor([-0.4, 0.4])))
    size = scenario.batch // world
    return DataLoader(every, size, shuffle=True), DataLoader(every, size)


def run(scenario: Scenario, folder: Path, world: int = 1, resume: Path | None = None) -> dict[str, Any]:
    """One fit; its traffic by step, and the checkpoint that lies in its middle."""
    torch.manual_seed(0)
    net = Net(scenario.body(), scenario.loss)
    scheme = Niti(**scenario.options)
    strategy = LowBitStrategy(scheme)
    if world > 1:
        strategy = LowBitDDPStrategy(scheme, process_group_backend="gloo", timeout=timedelta(seconds=60))
    with counted() as traffic:
        watch = Watch(traffic, folder / f"middle{world}.ckpt")
        fit = trainer(folder, watch, strategy=strategy, devices=world, max_epochs=3, **scenario.settings)
        fit.fit(net, *data(scenario, world), ckpt_path=resume)
    return {
        "state": {key: value.detach().clone() for key, value in net.state_dict().items()}, "traffic": traffic.steps,
        "wrapped": watch.wrapped, "steps": fit.global_step,
    }  # fmt: skip


def main() -> None:
    warnings.filterwarnings("ignore")  # the processes' own; the tests judge values
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder, world = Path(sys.argv[1]), int(sys.argv[2])
    results = {name: run(scenario, folder, world) for name, scenario in SCENARIOS.items() if name != "frozen"}
    results["frozen"] = run(SCENARIOS["frozen"], folder, world)  # last: the next one goes on from its checkpoint
    results["resumed"] = run(SCENARIOS["frozen"], folder, world, resume=folder / f"middle{world}.ckpt")
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main()
