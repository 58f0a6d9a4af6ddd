"""Cost of F8Net's training step over that of the float step: its phases, and what choosing fraclens adds.

    python benchmarks/fixed_point_step.py [--net resnet20] [--rounds 15] [--no-compile] [--json FILE]

Rows, all on one thread and alternating:
    standing    fraclens stand still, batch norms are live: two convolutions in every layer
    rms, histogram, grid    the same, and fraclens of activations are chosen from every batch
    frozen      fraclens and batch norms stand still: one convolution
The second ratio is over ``standing``: what the choice costs.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from qat_step import NETS, Step, batch, float_net, training_step
from timing import alternate, kept_bytes
from torch import nn

from lightning_lowbit import F8Net, convert
from lightning_lowbit.modules.base import low_bit_modules
from lightning_lowbit.modules.fraclen import FraclenInput
from lightning_lowbit.plugins.compiling import compile_in_place
from lightning_lowbit.plugins.patching import Patches

# row -> how fraclens are chosen (None: they stand still), whether batch norms stand still, whether compiled
ROWS: dict[str, tuple[str | None, bool, bool]] = {
    "standing": (None, False, False),
    "rms": ("rms", False, False),
    "histogram": ("histogram", False, False),
    "grid": ("grid", False, False),
    "frozen": (None, True, False),
    "rms compiled": ("rms", False, True),
    "frozen compiled": (None, True, True),
}


def fixed_point_net(name: str, select: str | None, frozen: bool) -> nn.Module:
    net = float_net(name)
    convert(net, F8Net(select=select or "rms"), example_input=batch(name)[0])  # type: ignore[arg-type]  # one of them
    net.train()
    for _, module in low_bit_modules(net):
        module.milestone("freeze_batch_norm", frozen)
    for module in net.modules():
        if isinstance(module, FraclenInput):
            module.frozen = select is None
    return net


def measure(name: str, rounds: int, compiled: bool) -> dict[str, dict[str, Any]]:
    steps: dict[str, Step] = {}
    kept: dict[str, int] = {}
    plain = float_net(name)
    steps["float"], loss = training_step(name, plain, False)
    kept["float"] = kept_bytes(plain, loss)
    for label, (select, frozen, compile_it) in ROWS.items():
        if compile_it and not compiled:
            continue
        net = fixed_point_net(name, select, frozen)
        if compile_it:
            compile_in_place(nn.Sequential(net), Patches())  # what compile=True does to the net of a LightningModule
        steps[label], loss = training_step(name, net, True)
        steps[label]()
        kept[label] = kept_bytes(net, loss)
    timings = alternate(steps, rounds)
    return {label: {**asdict(timing), "kept_mb": kept[label] / 1e6} for label, timing in timings.items()}


def show(name: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"\n{name}, batch {NETS[name][1][0]}, one thread")
    print(f"{'':18}{'ms':>8}{'min':>8}{'/ float':>9}{'/ standing':>12}{'kept / float':>14}")
    for label, row in rows.items():
        over = row["ratio"] / rows["standing"]["ratio"]
        line = f"{label:18}{row['median_ms']:8.1f}{row['min_ms']:8.1f}{row['ratio']:9.2f}{over:12.2f}"
        print(f"{line}{row['kept_mb'] / rows['float']['kept_mb']:14.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, default="resnet20")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled steps")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*")
    rows = measure(options.net, options.rounds, not options.no_compile)
    show(options.net, rows)
    if options.json is not None:
        about = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps({"about": about, options.net: rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
