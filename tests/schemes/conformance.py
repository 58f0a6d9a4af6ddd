"""What every scheme is put through: a small residual network, its data, and rows of options.

A scheme contributes at most a line of ``OPTIONS``; one without a line is tested with its defaults. Run as a
script under a launcher of two processes it trains every row on both and saves what each rank holds:

    python conformance.py FOLDER
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
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit.callbacks.quant import QuantCallback
from lightning_lowbit.schemes import registry, resolve

OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "bnn": (
        {"first": "int8", "last": "int8"},
        {"scale": "channel_mean", "ste": "annealed", "shift": True, "relu": "rprelu", "weights_at": 0.5},
        {"update": "bop", "bop_gamma": 0.1, "first": "binary", "pad_value": 1, "relu": "hardtanh"},
        {"stochastic": "both", "latent_std": 0.5, "scale": "max", "ste": "progressive"},
    ),
    "f8net": (
        {},
        {"clip": False, "select": "grid", "freeze_fraclen": None, "freeze_batch_norm": None, "rescale": "none"},
        {
            "ties": "realign",
            "select": "histogram",
            "ste": "clip",
            "avgpool": "shift",
            "overrides": {
                "conv1": {"act_bits": 6},
                "conv2": {"act_bits": 5, "weight_bits": 4},
                "fc": {"act_bits": 4},
            },
        },
        {"ties": "reference", "bits": 5, "weight_select": "histogram", "alpha_lr": 0.01},
    ),
    "jacinto": (
        {},
        {"ste_weights": "quantized", "bias": "tidl", "bits": 4, "range_sync": "hist", "freeze_batch_norm": None},
        {"ste_weights": "folded", "per_channel": "all", "act_round": "half_even", "bias_calibration": 0.05},
        {"bn_value": "batch", "preset": "WC8_AT8", "freeze_ranges": 0.5},
        {"preset": "reference", "freeze_batch_norm": 0.3, "freeze_ranges": None, "range_shrink": 0.0},
    ),
    "tqt": (
        {},
        {"bits": 4, "freeze_batch_norm": None},
        {"bias": "own", "acc_bits": 16, "act_round": "half_up", "narrow": True},
        {"bits": 3, "weight_init": "3sd", "act_init": "klj", "threshold_optimizer": "normed_sgd"},
    ),
    "wageubn": (
        {},
        {
            "first_last": "int8",
            "act_format": "fixed_unit",
            "e2": "shift8",
            "io": "strict",
            "dr": (128, 8),
            "dr_at": (0, 0.5),
        },
        {"preset": "authors", "sync_range": True, "quantize_errors": 0.3, "norm_momentum": 0.1},
        {"bits": 5, "update": "fake", "act_init": "mse", "norms": False, "rounding": "nearest", "freeze_widths": 0.3},
    ),
}
SAMPLES, BATCH, EPOCHS = 16, 4, 2
STEPS = EPOCHS * SAMPLES // BATCH
FAR = 16.0  # how much brighter the second rank's images are


@dataclass(frozen=True)
class Case:
    """One scheme with one set of options."""

    scheme: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.scheme, *(f"{k}={v}" for k, v in self.options.items())])

    def callback(self, **settings: Any) -> QuantCallback:
        return QuantCallback(resolve(self.scheme, **self.options), start=0, resume_order=True, **settings)


def cases() -> list[Case]:
    """Every registered scheme in every row of its options."""
    return [Case(name, options) for name in sorted(registry()) for options in OPTIONS.get(name, ({},))]


class Net(pl.LightningModule):
    """A stem, a residual add of two layers, a strided convolution, a pool and a classifier, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 8, 3, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        x = torch.relu(self.conv3(x))
        y: Tensor = self.fc(self.drop(self.pool(x).flatten(1)))
        return y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class SaveAt(pl.Callback):
    """A checkpoint behind one training step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def net(seed: int = 0) -> Net:
    """Weights by the seed, and norms that have seen something."""
    torch.manual_seed(seed)
    module = Net()
    for norm in (module.bn1, module.bn2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        norm.running_mean.normal_(std=0.1)  # type: ignore[union-attr]  # statistics are tracked
        norm.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return module


def images(seed: int = 0, samples: int = SAMPLES) -> Tensor:
    return torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def loader(shuffle: bool = False, gain: float = 1.0) -> DataLoader[Any]:
    """A loader whose draws come from a generator of its own."""
    x = images() * gain
    y = (x.mean((1, 2, 3)) > 0).long() + (x[:, 0, 0, 0] > 0).long()
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=shuffle, generator=generator)


def trainer(*callbacks: Any, **options: Any) -> pl.Trainer:
    silent = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    settings: dict[str, Any] = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0, **silent, **options}
    return pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **settings)


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Keys that only one of two state dicts has, or whose values are not equal bit for bit."""
    return sorted(a.keys() ^ b.keys()) + [k for k in a.keys() & b.keys() if not torch.equal(a[k], b[k])]


def each_call(module: nn.Module, wanted: Callable[[nn.Module], bool], note: Callable[..., None]) -> list[Any]:
    """Have ``note(module, args, output)`` called for every wanted submodule; returns the hooks."""
    return [m.register_forward_hook(note) for m in module.modules() if wanted(m)]


def two_ranks(folder: Path) -> None:
    for number, case in enumerate(cases()):
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
        run = trainer(case.callback(), strategy=strategy, devices=2, use_distributed_sampler=False)
        module = net()
        run.fit(module, loader(gain=1 + FAR * run.global_rank), loader())
        torch.save(module.state_dict(), folder / f"{number}-{run.global_rank}.pt")


def as_script(main: Callable[[Path], None]) -> None:
    """Run in a process of its own, with the folder for its results as the only word."""
    warnings.filterwarnings("ignore")  # the tests judge values
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))


if __name__ == "__main__":
    as_script(two_ranks)
