"""What integer training sends between processes: collectives, bytes and wall time of a step, over gloo on one machine.

    python benchmarks/collectives.py [--nets mlp resnet20 islands] [--worlds 1 2 4] [--steps 12] [--json FILE]

The global batch stays the same, so that all runs of a network compute the same bits. The share is the wall time
inside collectives, waiting for the slowest process included; ranges of frozen shifts are renewed every PERIOD steps.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from int8_training import Module, resnet20
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowbit import LowBitDDPStrategy, LowBitStrategy, Niti
from lightning_lowbit.plugins.distributed import counted

PERIOD, BATCH = 4, 128


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


NETS = {
    "mlp": (mlp, (784,), {}),
    "resnet20": (resnet20, (3, 32, 32), {"norms": "fold"}),
    "islands": (resnet20, (3, 32, 32), {"norms": "island"}),
}


class Clock(pl.Callback):
    """Per step: what was sent, the wall time of all of it, and that of waiting in collectives."""

    def __init__(self, traffic: Any) -> None:
        self.traffic, self.start, self.waited = traffic, 0.0, 0.0
        self.steps: list[dict[str, Any]] = []
        self.all_reduce = dist.all_reduce

    def timed(self, *args: Any) -> None:
        start = time.perf_counter()
        self.all_reduce(*args)
        self.waited += time.perf_counter() - start

    def on_train_batch_start(self, *args: Any) -> None:
        dist.all_reduce, self.traffic.open, self.waited = self.timed, {}, 0.0
        self.start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        wall, dist.all_reduce = time.perf_counter() - self.start, self.all_reduce
        self.traffic.end_step()
        self.steps.append({"sent": self.traffic.steps[-1], "wall": wall, "waited": self.waited})


def run(name: str, world: int, frozen: bool, steps: int) -> list[dict[str, Any]]:
    make, size, options = NETS[name]
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(BATCH, *size, generator=generator), torch.randint(0, 10, (BATCH,), generator=generator)
    data = TensorDataset(x.repeat(steps, *[1] * len(size)), y.repeat(steps))
    torch.manual_seed(0)
    scheme = Niti(**options, frozen_shifts=PERIOD if frozen else None)
    life = {"calibrate_batches": 1, "evaluate": False}
    strategy = LowBitStrategy(scheme, **life)
    if world > 1:
        strategy = LowBitDDPStrategy(scheme, process_group_backend="gloo", **life)
    with counted() as traffic:
        clock = Clock(traffic)
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", devices=world, strategy=strategy, callbacks=[clock], logger=False,
            enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        module = Module(make()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
        trainer.fit(module, DataLoader(data, BATCH // world))
    return clock.steps


def summary(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Means of a whole period; errors have no frozen range in the first one."""
    settled = steps[PERIOD : len(steps) - len(steps) % PERIOD]

    def mean(kind: str, column: int) -> float:
        sent = [entry[column] for step in settled for key, entry in step["sent"].items() if key.startswith(kind)]
        return sum(sent) / len(settled)

    return {
        "maxima": mean("max", 0), "sums": mean("sum", 0), "max_bytes": mean("max", 1), "sum_bytes": mean("sum", 1),
        "ms": 1e3 * statistics.median(step["wall"] for step in settled),
        "share": statistics.median(step["waited"] / step["wall"] for step in settled),
    }  # fmt: skip


def child(arguments: argparse.Namespace) -> None:
    """One of the processes: the first one writes the rows of all networks."""
    (world,) = arguments.worlds
    rows = {f"{n} {s}": summary(run(n, world, s == "frozen", arguments.steps)) for n in arguments.nets for s in SHIFTS}
    if not dist.is_initialized() or dist.get_rank() == 0:
        arguments.child.write_text(json.dumps(rows))


SHIFTS = ("dynamic", "frozen")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=3 * PERIOD)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if arguments.child:
        child(arguments)
        return
    results = {}
    print(
        f"{'net':10} {'shifts':8} {'procs':>5} {'MAX':>6} {'bytes':>6} {'SUM':>5} {'bytes':>9} {'ms':>7} {'share':>6}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for world in arguments.worlds:
            out = Path(folder) / f"{world}.json"
            settings = ["--nets", *arguments.nets, "--worlds", str(world), "--steps", str(arguments.steps)]
            subprocess.run(
                [sys.executable, __file__, *settings, "--child", str(out)],
                check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            results[world] = json.loads(out.read_text())
            for row, r in results[world].items():
                net, shifts = row.split()
                sent = f"{r['maxima']:6.2f} {r['max_bytes']:6.0f} {r['sums']:5.1f} {r['sum_bytes']:9.0f}"
                print(f"{net:10} {shifts:8} {world:5} {sent} {r['ms']:7.1f} {r['share']:6.1%}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
