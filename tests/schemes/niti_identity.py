"""One training run of NITI on scikit-learn's digits, and the SHA-256 of all its integers behind every step.

The tests train it in their own process; as a script it trains in processes that they start:

    python niti_identity.py FOLDER RUN [RUN ...] [--devices 2] [--nodes 2]

A RUN is NAME=STRATEGY:VARIANT; each process leaves FOLDER/NAME-RANK.pt. The run called "killed" ends by SIGKILL.
With several nodes a process is a node: it starts its one rank as torchrun does.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.launcher import LaunchConfig, elastic_launch
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit import LowBitDDPStrategy, Niti, QuantCallback
from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.block import WeightCodes
from lightning_lowbit.modules.convert import quantizers
from lightning_lowbit.reports.certificate import digest

# 195 = 12 x 16 + 3: a multiple of neither 16 nor 2 nor 4. Of the last batch's three samples, two processes have two
# and one, and the last of four has none.
SAMPLES, GLOBAL_BATCH, EPOCHS = 195, 16, 2
STEPS_AN_EPOCH = -(-SAMPLES // GLOBAL_BATCH)
KILLED_AT, SAVED_EVERY = 19, 4  # the last checkpoint, behind step 16, lies in the second epoch

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "island": {"norms": "island"},  # batch norms between integer layers; the other nets have none
    "wide": {"accumulate_bits": 8, "momentum": 8, "weight_decay": True},
    "random": {
        "act_rounding": "stochastic", "err_rounding": "stochastic", "grad_rounding": "stochastic", "dropout": "shared",
    },
    "static": {"frozen_shifts": 5},
}  # fmt: skip


class Outcome(NamedTuple):
    """What a run left.

    Attributes:
        steps: by optimizer steps done, the digest of every named integer tensor.
        end: the same of the trained network.
        outputs: of the trained network, for images it was not trained on.
        float_errors: modules that a float error reached; empty where training was in integers throughout.
    """

    steps: dict[int, dict[str, str]]
    end: dict[str, str]
    outputs: Tensor
    float_errors: set[str]

    @property
    def sha256(self) -> str:
        """One number for all of it."""
        return digest([self.end, self.outputs])


class Net(pl.LightningModule):
    """Biases, a residual add, a max pool with overlapping windows, dropout, a linear head."""

    def __init__(self, norms: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8) if norms else nn.Identity()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8) if norms else nn.Identity()
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv3 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        x = torch.relu(self.conv3(self.pool(x)))
        y: Tensor = self.fc(self.drop(x.flatten(1)))
        return y

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Trail(pl.Callback):
    """Digests of all integers behind every step; kills the process before one if told to."""

    def __init__(self, killed_at: int | None) -> None:
        self.killed_at = killed_at
        self.steps: dict[int, dict[str, str]] = {}
        self.float_errors: set[str] = set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        lifecycle = next(callback for callback in trainer.callbacks if isinstance(callback, QuantCallback))
        self.steps[trainer.global_step] = integers(pl_module, lifecycle.rule)
        self.float_errors |= switch_of(pl_module).run.float_errors


def integers(root: nn.Module, rule: Any) -> dict[str, str]:
    """Digests of all that a network and its update rule hold, float parameters (codes times 2^e) included."""
    state: dict[str, Any] = dict(root.state_dict())
    for path, quantizer in quantizers(root):
        if isinstance(quantizer, WeightCodes):
            state[f"{path} codes"] = quantizer.codes()
    return {name: digest(value) for name, value in {**state, "rule": rule.state_dict()}.items()}


def data(samples: int = SAMPLES, first: int = 0) -> TensorDataset:
    digits = load_digits()
    part = slice(first, first + samples)
    images = torch.as_tensor(digits.images[part], dtype=torch.float32).unsqueeze(1) / 16
    return TensorDataset(images, torch.as_tensor(digits.target[part], dtype=torch.int64))


def train(
    folder: Path | None = None, *, variant: str = "plain", world: int = 1, killed_at: int | None = None,
    ckpt_path: Path | None = None, compile: bool = False, seed: int = 0, **options: Any,
) -> tuple[Net, Outcome]:  # fmt: skip
    """A run of two epochs with validation.

    Args:
        folder: where checkpoints go, every few steps; None saves none.
        variant: options of the scheme, by their name in ``VARIANTS``.
        world: processes, which share the global batch.
        killed_at: steps behind which the process ends.
        ckpt_path: the checkpoint that the run goes on from; the weights at the start are others then.
        seed: of the scheme's random integers.
        options: of the Trainer.
    """
    torch.manual_seed(0 if ckpt_path is None else 9)
    net, trail = Net(variant == "island"), Trail(killed_at)
    scheme = Niti(seed=seed, **VARIANTS[variant])
    callbacks: list[Any] = [QuantCallback(scheme, compile=compile), trail]
    if folder is not None:
        callbacks.append(
            pl.callbacks.ModelCheckpoint(
                folder, "{step}", save_top_k=-1, every_n_train_steps=SAVED_EVERY, save_on_train_epoch_end=False
            )
        )
    run = pl.Trainer(
        max_epochs=EPOCHS, callbacks=callbacks, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=folder is not None, num_sanity_val_steps=0, **{"accelerator": "cpu", **options},
    )  # fmt: skip
    train_loader = DataLoader(data(), GLOBAL_BATCH // world, shuffle=True)
    run.fit(net, train_loader, DataLoader(data(33, SAMPLES), 11), ckpt_path=ckpt_path)
    net.eval()
    with torch.no_grad():
        outputs = (net(data(64, 1000).tensors[0].to(net.device)) + 0.0).cpu()
    return net, Outcome(trail.steps, integers(net, callbacks[0].rule), outputs, trail.float_errors)


def strategy(name: str) -> Any:
    limits: dict[str, Any] = {"process_group_backend": "gloo", "timeout": timedelta(seconds=100)}
    kinds = {"ddp": pl.strategies.DDPStrategy, "lowbit_ddp": LowBitDDPStrategy}
    return kinds[name](**limits) if name in kinds else name


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    given = parser.parse_args()
    if given.nodes == 1:
        train_all(given)
    else:
        elastic_launch(node(given.nodes), train_all)(given)


def node(nodes: int) -> LaunchConfig:
    """What torchrun makes of its command line, but for ``fork``: a rank that starts anew imports torch again."""
    rank, master = os.environ.pop("LOCAL_RANK"), (os.environ.pop("MASTER_ADDR"), os.environ.pop("MASTER_PORT"))
    return LaunchConfig(
        nodes, nodes, 1, run_id="nodes", start_method="fork", rdzv_backend="static", rdzv_endpoint=":".join(master),
        rdzv_configs={"rank": int(rank), "timeout": 100},
    )  # fmt: skip


def train_all(given: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")  # the tests judge values
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for run in given.runs:
        name, _, rest = run.partition("=")
        kind, _, variant = rest.partition(":")
        options: dict[str, Any] = {"strategy": strategy(kind), "devices": given.devices, "num_nodes": given.nodes}
        if name == "killed":
            options |= {"folder": given.folder, "killed_at": KILLED_AT}
        _, outcome = train(variant=variant, world=given.devices * given.nodes, **options)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        torch.save(outcome._asdict(), given.folder / f"{name}-{rank}.pt")


if __name__ == "__main__":
    main()
