"""Two processes, different data: what each rank of an F8Net run holds, and the statistics of both in one process.

python f8net_ranks.py FOLDER
"""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from schemes.conformance import FAR, as_script, copy_of, images, loader, net, trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit import F8Net, QuantCallback
from lightning_lowbit.callbacks.calibrate import Calibrate


def strategy() -> Any:
    return {
        "strategy": DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)),
        "devices": 2,
        "use_distributed_sampler": False,
    }


def batches(*ranks: int) -> DataLoader[Any]:
    """Two batches of each rank, in turns: rank 1's images are brighter."""
    x = torch.stack([images(5 + rank, 8) * (1 + 3 * rank) for rank in ranks], 1)  # [8, ranks, ...]
    x = x.reshape(2, 4, len(ranks), *x.shape[2:]).transpose(1, 2).flatten(0, 2)
    return DataLoader(TensorDataset(x, torch.arange(len(x)) % 3), batch_size=4)


def learned(*ranks: int, **options: Any) -> dict[str, Tensor]:
    """Fraclens behind two steps that move nothing else; grids from the same four images everywhere."""
    module = net()
    module.drop.p = 0.0
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    scheme = F8Net(freeze_batch_norm=0, freeze_fraclen=None, alpha_lr=0.0, momentum=0.5)
    calibrate = Calibrate(DataLoader(TensorDataset(images(4, 4), torch.arange(4) % 3), batch_size=4))
    callback = QuantCallback(scheme, start=0, evaluate=False)
    run = trainer(callback, calibrate, max_epochs=1, **options)
    run.fit(module, batches(*ranks), loader())
    assert run.global_step == 2, run.global_step
    return {key: value.clone() for key, value in module.state_dict().items() if key.endswith("fraclen")}


def main(folder: Path) -> None:
    module = net()
    scheme = F8Net(freeze_fraclen=None, freeze_batch_norm=None, alpha_lr=0.05)
    run = trainer(QuantCallback(scheme, start=0), **strategy())
    rank = run.global_rank
    run.fit(module, loader(gain=1 + FAR * rank), loader())
    fresh = net()
    trainer(QuantCallback(scheme, start=0), max_steps=1, **strategy()).fit(fresh, loader(gain=1 + FAR * rank), loader())
    result = {"trained": copy_of(module), "before": copy_of(fresh), "pooled": learned(rank, **strategy())}
    torch.distributed.destroy_process_group()
    result["both"] = learned(0, 1, accumulate_grad_batches=2)
    result["alone"] = learned(0)
    torch.save(result, folder / f"{rank}.part")
    (folder / f"{rank}.part").rename(folder / f"{rank}.pt")
    while rank == 0 and not (folder / "1.pt").exists():  # who started rank 1 does not end before it
        time.sleep(0.1)


if __name__ == "__main__":
    as_script(main)
