"""Two processes, different data: what each rank of a Jacinto run holds.

python jacinto_ranks.py FOLDER
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from schemes.conformance import Net, as_script, copy_of, images, loader, net, trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit import Jacinto, QuantCallback
from lightning_lowbit.callbacks.calibrate import Calibrate

SYNCS = ("mean", "hist", "none")
PERCENT = 1.0  # of a batch: two values of 256


def batch(rank: int) -> Tensor:
    return images(5 + rank, 4) * (1 + 3 * rank)


def of(*batches: Tensor) -> DataLoader[Any]:
    x = torch.cat(batches)
    return DataLoader(TensorDataset(x, torch.arange(len(x)) % 3), batch_size=4)


def strategy() -> Any:
    return {
        "strategy": DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)), "devices": 2,
        "use_distributed_sampler": False,
    }  # fmt: skip


def steps(rank: int, number: int, calibrate: DataLoader[Any] | None = None, **options: Any) -> Net:
    """``number`` batches of this rank; the range of the first stands alone (share 1) behind one calibration batch."""
    module = net()
    scheme = Jacinto(**{"freeze_batch_norm": None, "freeze_ranges": None, "range_shrink": PERCENT, **options})
    callbacks = [QuantCallback(scheme, start=0, evaluate=False)]
    callbacks += [] if calibrate is None else [Calibrate(calibrate, 1)]  # type: ignore[list-item]  # a callback too
    data = of(*[batch(rank + 2 * n) for n in range(number)])
    trainer(*callbacks, max_epochs=1, **strategy()).fit(module, data, loader())
    return module


def main(folder: Path) -> None:
    rank = trainer(**strategy()).global_rank
    same = of(images(4, 4))
    result: dict[str, Any] = {}
    for sync in SYNCS:
        result[sync] = copy_of(steps(rank, 1, same, range_sync=sync))
        result[f"{sync} long"] = copy_of(steps(rank, 3, range_sync=sync))
        result[f"{sync} calibrated"] = copy_of(steps(rank, 1, of(batch(rank)), range_sync=sync, freeze_ranges=0))
    result["reference"] = copy_of(steps(rank, 2, preset="reference", range_sync="mean"))
    result["biases"] = copy_of(steps(rank, 1, of(batch(rank)), bias_calibration=0.5, range_sync="mean"))
    torch.save(result, folder / f"{rank}.pt")


if __name__ == "__main__":
    as_script(main)
