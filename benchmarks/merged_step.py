"""Cost of Jacinto's training step over that of the float step: its backward variants, and its phases.

    python benchmarks/merged_step.py [--net resnet20] [--rounds 15] [--no-compile] [--json FILE]

Rows, all on one thread and alternating, by ``ste_weights`` (or ``bn_value="batch"``):
    float, quantized, folded, batch    batch norms and ranges follow the batches
    ... standing                       neither does
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

from lightning_lowbit import Jacinto, convert
from lightning_lowbit.modules.base import low_bit_modules
from lightning_lowbit.modules.clipped import ClipQuantizer
from lightning_lowbit.plugins.compiling import compile_in_place
from lightning_lowbit.plugins.patching import Patches

# row -> options, whether norms and ranges stand still, whether compiled
ROWS: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "float": ({}, False, False),
    "quantized": ({"ste_weights": "quantized"}, False, False),
    "folded": ({"ste_weights": "folded"}, False, False),
    "batch": ({"bn_value": "batch"}, False, False),
    "float standing": ({}, True, False),
    "quantized standing": ({"ste_weights": "quantized"}, True, False),
    "folded standing": ({"ste_weights": "folded"}, True, False),
    "float compiled": ({}, False, True),
    "float standing compiled": ({}, True, True),
    "folded standing compiled": ({"ste_weights": "folded"}, True, True),
}


def merged_net(name: str, options: dict[str, Any], standing: bool) -> nn.Module:
    net = float_net(name)
    convert(net, Jacinto(**options), example_input=batch(name)[0])
    net.train()
    for _, module in low_bit_modules(net):
        module.milestone("freeze_batch_norm", standing)
    for module in net.modules():
        if isinstance(module, ClipQuantizer):
            module.frozen = standing
    return net


def measure(name: str, rounds: int, compiled: bool) -> dict[str, dict[str, Any]]:
    steps: dict[str, Step] = {}
    kept: dict[str, int] = {}
    plain = float_net(name)
    steps["plain"], loss = training_step(name, plain, False)
    kept["plain"] = kept_bytes(plain, loss)
    for label, (options, standing, compile_it) in ROWS.items():
        if compile_it and not compiled:
            continue
        net = merged_net(name, options, standing)
        if compile_it:
            compile_in_place(nn.Sequential(net), Patches())  # what compile=True does to the net of a LightningModule
        steps[label], loss = training_step(name, net, True)
        steps[label]()
        kept[label] = kept_bytes(net, loss)
    timings = alternate(steps, rounds)
    return {label: {**asdict(timing), "kept_mb": kept[label] / 1e6} for label, timing in timings.items()}


def show(name: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"\n{name}, batch {NETS[name][1][0]}, one thread")
    print(f"{'':26}{'ms':>8}{'min':>8}{'/ plain':>9}{'kept / plain':>14}")
    for label, row in rows.items():
        line = f"{label:26}{row['median_ms']:8.1f}{row['min_ms']:8.1f}{row['ratio']:9.2f}"
        print(f"{line}{row['kept_mb'] / rows['plain']['kept_mb']:14.2f}")


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
