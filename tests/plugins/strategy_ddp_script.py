"""Two processes under LowBitDDPStrategy: runs all scenarios and saves what each rank holds.

    python strategy_ddp_script.py FOLDER

Leaves FOLDER/{rank}.pt, a result by scenario; the tests compare the two files.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from plugins.lifecycle_nets import loader, seeded_net
from plugins.lifecycle_nets import trainer as any_trainer
from schemes.toy_integer import ToyInteger
from schemes.toy_ranks import Net as ToyNet
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit import LowBitDDPStrategy, QuantCallback, Tqt
from lightning_lowbit.plugins.distributed import Traffic, counted, process_rank, reduce_sum_flat, world_size
from lightning_lowbit.plugins.strategy import strategies_of

GLOBAL_BATCH, SAMPLES = 16, 64


class Net(ToyNet):
    """The toy network with things that no gradient reaches, other ones on each rank, and a note of what it saw."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.fixed = nn.Parameter(torch.full((2,), float(rank)), requires_grad=False)
        self.register_buffer("flags", torch.tensor([rank == 0, True]))
        self.seen: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.training:  # calibration runs this in evaluation mode
            self.seen.append(batch[0][:, 0].clone())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])


class Watch(pl.Callback):
    """Whether torch's DDP is there, and the traffic of each step."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.wrapped = False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.wrapped = isinstance(trainer.strategy.model, DistributedDataParallel)
        self.traffic.end_step()


def data(world: int, samples: int = SAMPLES) -> DataLoader[Any]:
    """Batches of GLOBAL_BATCH over all processes, shuffled."""
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), GLOBAL_BATCH // world, shuffle=True)


def ddp(*scheme: Any, namespace: str = "lightning.pytorch", **options: Any) -> Any:
    limits = {"process_group_backend": "gloo", "timeout": timedelta(seconds=60)}
    return strategies_of(namespace)[1](*scheme, **limits, **options)


def trainer(folder: Path, *callbacks: Any, strategy: Any, **options: Any) -> Any:
    return any_trainer(folder, *callbacks, strategy=strategy, devices=2, **options)


def result(net: Any, run: Any) -> dict[str, Any]:
    return {"state": {k: v.detach().clone() for k, v in net.state_dict().items()}, "steps": run.global_step}


def toy(folder: Path, rank: int, samples: int = SAMPLES) -> dict[str, Any]:
    """Every trained parameter is an integer: no wrap."""
    net = Net(rank)
    with counted() as traffic:
        watch = Watch(traffic)
        keep = pl.callbacks.ModelCheckpoint(dirpath=folder / f"toy{samples}", filename="{epoch}", save_top_k=-1)
        run = trainer(folder, watch, keep, strategy=ddp(ToyInteger()))
        run.fit(net, data(2, samples))
    return {
        **result(net, run), "seen": net.seen, "wrapped": watch.wrapped, "traffic": traffic.steps,
        "losses": net.losses, "callback": type(run.callbacks[0]).__name__,
    }  # fmt: skip


def resumed(folder: Path, rank: int) -> dict[str, Any]:
    """From the first epoch's end, without a callback, other weights at the start."""
    net = Net(rank)
    nn.init.normal_(net.first.weight)
    run = trainer(folder, strategy=ddp(ToyInteger()))
    run.fit(net, data(2), ckpt_path=folder / "toy64" / "epoch=0.ckpt")
    return result(net, run)


def ragged(folder: Path, rank: int) -> dict[str, Any]:
    """17 = 16 + 1 samples: rank 1 has none of the last batch."""
    return toy(folder, rank, GLOBAL_BATCH + 1)


def validated(folder: Path, rank: int) -> dict[str, Any]:
    """No fit before, and other weights on each rank, as Lightning allows it in float."""
    net = Net(rank)
    torch.manual_seed(10 + rank)
    nn.init.normal_(net.first.weight)
    run = trainer(folder, strategy=ddp(ToyInteger()))
    run.validate(net, data(2), verbose=False)
    return result(net, run)


def by_string(folder: Path, rank: int) -> dict[str, Any]:
    net = seeded_net()
    watch = Watch(Traffic())
    run = trainer(folder, QuantCallback(Tqt(bits=4), start=0), watch, strategy="lowbit_ddp")
    assert type(run.strategy) is LowBitDDPStrategy
    run.fit(net, loader(), loader())
    return {**result(net, run), "wrapped": watch.wrapped}


def other_namespace(folder: Path, rank: int) -> dict[str, Any]:
    name = "pytorch_lightning"
    net = seeded_net(name)
    run = trainer(folder, namespace=name, strategy=ddp(Tqt(bits=4), namespace=name, start=0))
    run.fit(net, loader(), loader())
    return {**result(net, run), "ddp": isinstance(run.strategy, importlib.import_module(name).strategies.DDPStrategy)}


def flat(folder: Path, rank: int) -> dict[str, Any]:
    """Runs behind the fits, in the process group that they leave."""
    parts = [integers(rank) for rank in (0, 1)]
    with counted() as traffic, counted() as inner:
        sums = reduce_sum_flat(parts[rank])
        reduce_sum_flat([])
    return {
        "state": {str(i): value for i, value in enumerate(sums)}, "parts": parts, "traffic": traffic.open,
        "inner": inner.open, "who": (process_rank(), world_size()),
    }  # fmt: skip


def integers(rank: int) -> list[Tensor]:
    """Both dtypes mixed, an empty one, a scalar, one in channels_last, and a sum that wraps around."""
    generator = torch.Generator().manual_seed(rank)

    def draw(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(-(2**30), 2**30, shape, generator=generator).to(dtype)

    image = draw(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    return [draw(3, 2), draw(4, dtype=torch.int64) << 32, image, draw(0), draw(), torch.tensor([2**31 - 1]).int()]


SCENARIOS: tuple[Callable[[Path, int], dict[str, Any]], ...] = (
    toy, resumed, ragged, validated, by_string, other_namespace, flat,
)  # fmt: skip


def main() -> None:
    warnings.filterwarnings("ignore")  # the two processes' own; the tests judge values
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    rank = int(trainer(folder, strategy=ddp()).strategy.cluster_environment.global_rank())
    torch.save({scenario.__name__: scenario(folder, rank) for scenario in SCENARIOS}, folder / f"{rank}.pt")


if __name__ == "__main__":
    main()
