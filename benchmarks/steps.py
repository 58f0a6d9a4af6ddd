"""What benchmarks of training steps share: a float step and low-bit ones, alternating, in one table."""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from qat_step import NETS, Step, float_net, training_step
from timing import alternate, kept_bytes
from torch import nn

from lightning_lowbit.plugins.compiling import compile_in_place
from lightning_lowbit.plugins.patching import Patches

Rows = Mapping[str, tuple[Callable[[str], nn.Module], bool]]
"""By label: what makes the converted net of a name, in training mode, and whether it is compiled."""


def measure(name: str, rows: Rows, rounds: int) -> dict[str, dict[str, Any]]:
    """Times of a step and bytes kept for backward, by label; "plain" is the float step."""
    steps: dict[str, Step] = {}
    kept: dict[str, int] = {}
    plain = float_net(name)
    steps["plain"], loss = training_step(name, plain, False)
    kept["plain"] = kept_bytes(plain, loss)
    for label, (make, compiled) in rows.items():
        net = make(name)
        if compiled:
            compile_in_place(nn.Sequential(net), Patches())  # what compile=True does to the net of a LightningModule
        steps[label], loss = training_step(name, net, True)
        steps[label]()
        kept[label] = kept_bytes(net, loss)
    timings = alternate(steps, rounds)
    return {label: {**asdict(timing), "kept_mb": kept[label] / 1e6} for label, timing in timings.items()}


def show(name: str, rows: Mapping[str, Mapping[str, Any]], beside: str | None = None) -> None:
    """A table; with ``beside``, the label of a row, one column more: over that row."""
    more = "" if beside is None else f"{'/ ' + beside:>12}"
    print(f"\n{name}, batch {NETS[name][1][0]}, one thread")
    print(f"{'':26}{'ms':>8}{'min':>8}{'/ plain':>9}{more}{'kept / plain':>14}")
    for label, row in rows.items():
        line = f"{label:26}{row['median_ms']:8.1f}{row['min_ms']:8.1f}{row['ratio']:9.2f}"
        line += "" if beside is None else f"{row['ratio'] / rows[beside]['ratio']:12.2f}"
        print(f"{line}{row['kept_mb'] / rows['plain']['kept_mb']:14.2f}")


def main(doc: str | None, rows: Rows, beside: str | None = None) -> None:
    """The command line of such a benchmark."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, default="resnet20")
    parser.add_argument("--batch", type=int, help="samples; the net's own number without")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled steps")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.batch is not None:
        make, (_, *sample) = NETS[options.net]
        NETS[options.net] = (make, (options.batch, *sample))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*")
    wanted = {label: row for label, row in rows.items() if not (row[1] and options.no_compile)}
    found = measure(options.net, wanted, options.rounds)
    show(options.net, found, beside)
    if options.json is not None:
        about = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps({"about": about, options.net: found}, indent=2) + "\n")
