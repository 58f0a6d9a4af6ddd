"""Cost of QuantMonitor: a step that it measures over one without it, and its share of a run at the default interval.

    python benchmarks/monitor.py [--net resnet20] [--schemes tqt niti ...] [--rounds 15] [--json FILE]

One thread's CPU time, the steps in turn:
    measured     a step with a measurement, over one without
    behind       the step behind it, over one without: memory that comes and goes, caches
    between      what the callback's hooks take in a step that is not measured, microseconds
    share        (measured + behind - 2) / interval + between / step: of a run at the default interval, in percent
    histograms   measured, where a logger gets codes too; what it makes of them is not counted
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from qat_step import NETS, Step, batch, float_net, training_step
from timing import alternate
from torch import nn

from lightning_lowbit import convert
from lightning_lowbit.callbacks.monitor import QuantMonitor

SCHEMES = ("tqt", "niti", "bnn", "f8net", "jacinto", "wageubn")
INTERVAL = QuantMonitor().every_n_steps
_CALLS = 2000


class _Logger:
    """Takes all that a monitor has to say."""

    def __init__(self, draws: bool) -> None:
        self.experiment = SimpleNamespace(add_histogram=lambda *args: None) if draws else None

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        pass


class _Trainer:
    """What a monitor asks of a Trainer."""

    def __init__(self, net: nn.Module, draws: bool) -> None:
        self.net, self.is_global_zero, self.loggers = net, True, [_Logger(draws)]
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"))
        self.precision_plugin, self.callback_metrics = object(), {}
        self.fit_loop = SimpleNamespace(
            epoch_loop=SimpleNamespace(_batches_that_stepped=0), _should_accumulate=lambda: False
        )


def watched(net: nn.Module, monitor: QuantMonitor, step: Step, draws: bool) -> Step:
    """The step between the hooks that a Trainer would call."""
    trainer = _Trainer(net, draws)
    net.device = torch.device("cpu")  # type: ignore[assignment]  # as a LightningModule has it
    optimizer: Any = None
    monitor.on_train_start(trainer, net)

    def run() -> None:
        monitor.on_train_batch_start(trainer, net, None, 0)
        step()
        monitor.on_before_optimizer_step(trainer, net, optimizer)
        monitor.on_train_batch_end(trainer, net, None, None, 0)
        trainer.fit_loop.epoch_loop._batches_that_stepped += 1

    return run


def idle(net: nn.Module) -> float:
    """Seconds of CPU time of the hooks in a step that is not measured."""
    run = watched(net, QuantMonitor(10**9), lambda: None, False)
    start = time.process_time()
    for _ in range(_CALLS):
        run()
    return (time.process_time() - start) / _CALLS


def lowbit_net(name: str, scheme: str) -> nn.Module:
    net = float_net(name)
    convert(net, scheme, example_input=batch(name)[0])
    return net.train()


def ratios(step: Step, other: Step, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of a step; over it, ``other`` and the step behind that."""
    timings = alternate({"plain": step, "other": other, "behind": step}, rounds)
    return timings["plain"].median_ms, timings["other"].ratio, timings["behind"].ratio


def measure(name: str, scheme: str, rounds: int) -> dict[str, float]:
    net = lowbit_net(name, scheme)
    step, _ = training_step(name, net, True)
    between = idle(net)
    found = {"between_us": between * 1e6}
    for row, draws in (("histograms", True), ("measured", False)):
        monitor = QuantMonitor(1, histograms=int(draws))
        plain, ratio, behind = ratios(step, watched(net, monitor, step, draws), rounds)
        share = 100 * ((ratio + behind - 2) / INTERVAL + between * 1e3 / plain)
        found |= {"step_ms": plain, "sites": len(monitor.values), row: ratio, "behind": behind, f"share_{row}": share}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, default="resnet20")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    print(f"{options.net}, batch {NETS[options.net][1][0]}, one thread, every {INTERVAL} steps")
    columns = {"sites": 6, "step ms": 9, "measured": 10, "behind": 8, "between µs": 12, "share": 9, "histograms": 12}
    print(" " * 10 + "".join(f"{name:>{width}}" for name, width in columns.items()) + f"{'share':>9}")
    results = {}
    for scheme in options.schemes:
        found = results[scheme] = measure(options.net, scheme, options.rounds)
        print(
            f"{scheme:10}{found['sites']:6.0f}{found['step_ms']:9.1f}{found['measured']:10.2f}{found['behind']:8.2f}"
            f"{found['between_us']:12.1f}{found['share_measured']:7.2f} %{found['histograms']:12.2f}"
            f"{found['share_histograms']:7.2f} %",
            flush=True,
        )
    if options.json is not None:
        about = {
            "torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads(),
            "every_n_steps": INTERVAL,
        }  # fmt: skip
        options.json.write_text(json.dumps({"about": about, options.net: results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
