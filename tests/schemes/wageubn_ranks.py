"""Two processes, different data: what each rank of a WAGEUBN run holds.

python wageubn_ranks.py FOLDER
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from schemes.conformance import as_script, images, net, trainer
from schemes.wageubn_nets import converted, rule, state
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit import QuantCallback, Wageubn
from lightning_lowbit.modules.base import switch_of
from lightning_lowbit.modules.error_gate import ErrorGate
from lightning_lowbit.numerics.shift import max_abs, range_exponent
from lightning_lowbit.plugins.distributed import process_rank, reduce_sum, world_size

RUNS: dict[str, dict[str, Any]] = {"plain": {}, "shared": {"sync_range": True}, "fake": {"update": "fake"}, "bad": {}}
STEPS = 4


def batch(rank: int, number: int) -> Tensor:
    return images(5 + rank + 2 * number, 4) * (1 + 11 * rank)


def strategy() -> Any:
    return {
        "strategy": DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)), "devices": 2,
        "use_distributed_sampler": False,
    }  # fmt: skip


def fitted(rank: int, name: str) -> dict[str, Tensor]:
    module = net()
    batches = [batch(rank, number) for number in range(STEPS)]
    if name == "bad" and rank == 1:
        batches[2][0, 0, 0, 0] = torch.nan
    x = torch.cat(batches)
    data = DataLoader(TensorDataset(x, torch.arange(len(x)) % 3), batch_size=4)
    scheme = Wageubn(first_last="int8", freeze_widths=None, **RUNS[name])
    units: list[Tensor] = []
    peak = ErrorGate._peak

    def noted(gate: ErrorGate, g: Tensor, run: Any) -> Any:
        found = peak(gate, g, run)
        units.append(range_exponent(max_abs(g) if found is None else found))
        return found

    ErrorGate._peak = noted  # type: ignore[method-assign]  # looks on
    try:
        callback = QuantCallback(scheme, start=0, evaluate=False, calibrate_batches=1)
        trainer(callback, max_epochs=1, **strategy()).fit(module, data)
    finally:
        ErrorGate._peak = peak  # type: ignore[method-assign]
    skipped = torch.tensor(float(rule(module).skipped))
    own = {"own largest": x.abs().max(), "own unit": torch.stack(units[:7]), "own skipped": skipped}
    return {**state(module), **own}


def normalized(norm: type[nn.Module], x: Tensor, of: Tensor, whole: bool) -> dict[str, Tensor]:
    """Forward and backward of a norm by the statistics of ``x`` alone or of all processes' values."""
    torch.manual_seed(0)
    net = converted(nn.Sequential(nn.Linear(6, 5), norm(5), nn.Linear(5, 3)), of, e1="off", e2="off")  # type: ignore[call-arg]
    run = switch_of(net).run
    if not whole:
        run.reduce_sum, run.world, run.rank = reduce_sum, world_size(), process_rank()
    x = x.clone().requires_grad_()
    y = net[:2](x)
    (y * torch.linspace(-1, 2, 5) * x[:, :1].detach()).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **dict(net[1].named_buffers())}


def main(folder: Path) -> None:
    rank = trainer(**strategy()).global_rank
    result = {name: fitted(rank, name) for name in RUNS}
    x = torch.cat([batch(0, 0), batch(1, 0)]).flatten()[:384].reshape(64, 6)
    result["sync"] = normalized(nn.SyncBatchNorm, x[32 * rank : 32 * rank + 32], x, False)
    result["whole"] = normalized(nn.BatchNorm1d, x, x, True)
    torch.save(result, folder / f"{rank}.pt")


if __name__ == "__main__":
    as_script(main)
