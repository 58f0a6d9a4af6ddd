"""Inference of an 8-bit ResNet-20 in ONNX Runtime beside the float32 network: time, and bytes of the files.

    python benchmarks/inference.py [--checkpoint FILE] [--rounds 21] [--batches 1 128] [--json FILE]

One thread's CPU time, candidates in turn; a ratio is float32's time over the candidate's within one round. ``float32``
is what torch.onnx.export writes, batch norm folded by ONNX Runtime; ``qdq`` and ``integer`` are the forms of
``export_onnx``, whose outputs are first compared with the program's. Without a checkpoint the weights are random,
which changes no time.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from qat_step import Parts, ResNet20
from timing import Timing, alternate
from torch import nn

from lightning_lowbit import Tqt, convert, lower
from lightning_lowbit.export.onnx import export_onnx
from lightning_lowbit.export.program import IntegerProgram

# Calls that are timed together, so that a clock's step is small beside them.
CALLS = {1: 50}


def float_net(checkpoint: Path | None) -> nn.Module:
    torch.manual_seed(0)
    net = ResNet20(Parts())
    if checkpoint is not None:
        net.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
        return net.eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)  # type: ignore[arg-type]  # it tracks statistics
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return net.eval()


def write_files(folder: Path, checkpoint: Path | None) -> tuple[dict[str, Path], IntegerProgram]:
    net, x = float_net(checkpoint), torch.randn(64, 3, 32, 32)
    files = {name: folder / f"{name}.onnx" for name in ("float32", "qdq", "integer")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package is deprecated
        batch = {name: {0: "batch"} for name in ("input", "output")}
        names: dict[str, Any] = {"input_names": ["input"], "output_names": ["output"], "dynamic_axes": batch}
        torch.onnx.export(net, (x,), str(files["float32"]), opset_version=17, dynamo=False, **names)
        convert(net, Tqt(), example_input=x)
        program = lower(net.eval(), x)
    for form in ("qdq", "integer"):
        print(export_onnx(program, files[form], form, samples=x))
    return files, program


def session(path: Path, precise: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1" if precise else "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def measure(files: dict[str, Path], program: IntegerProgram, batch: int, rounds: int) -> dict[str, Timing]:
    x = np.random.default_rng(0).normal(size=(batch, 3, 32, 32)).astype(np.float32)
    calls = CALLS.get(batch, 1)

    def step(name: str, path: Path) -> Callable[[], object]:
        ready = session(path, False)
        if name != "float32" and not np.array_equal(ready.run(None, {"input": x})[0], program.run(x)):
            print(f"{name}: wrong sums on this CPU (it has no VNNI), measured with session.x64quantprecision=1")
            ready = session(path, True)
        return lambda: [ready.run(None, {"input": x}) for _ in range(calls)]

    timings = alternate({name: step(name, path) for name, path in files.items()}, rounds)
    return {name: Timing(t.median_ms / calls, t.min_ms / calls, t.ratio) for name, t in timings.items()}


def show(files: dict[str, Path], rows: dict[int, dict[str, Timing]]) -> None:
    base = files["float32"].stat().st_size
    print(f"\n{'':10}{'bytes':>10}{'/ float32':>11}", *(f"{f'batch {n}, ms':>16}{'speed':>8}" for n in rows), sep="")
    for name, path in files.items():
        size = path.stat().st_size
        line = f"{name:10}{size:10,}{size / base:11.3f}"
        for timings in rows.values():
            line += f"{timings[name].median_ms:16.3f}{1 / timings[name].ratio:7.2f}x"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a state_dict of the float network")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files, program = write_files(Path(folder), options.checkpoint)
        rows = {batch: measure(files, program, batch, options.rounds) for batch in options.batches}
        show(files, rows)
        sizes = {name: path.stat().st_size for name, path in files.items()}
    if options.json is not None:
        about = {
            "onnxruntime": onnxruntime.__version__,
            "machine": platform.machine(),
            "threads": 1,
        }
        times = {str(batch): {name: asdict(t) for name, t in timings.items()} for batch, timings in rows.items()}
        options.json.write_text(json.dumps({"about": about, "bytes": sizes, "batches": times}, indent=2) + "\n")


if __name__ == "__main__":
    main()
