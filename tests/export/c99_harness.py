"""Compiles an exported file and runs it on many samples."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lowbit.export import runtime
from lightning_lowbit.export.c99_graph import integers_inside, one_sample
from lightning_lowbit.export.runtime import Program

Array = NDArray[Any]
COMPILER = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
STRICT = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wconversion", "-Wsign-conversion", "-Wshadow", "-Werror"]
OPTIMIZED = [*STRICT, "-O2"]
SANITIZED = [*STRICT, "-O0", "-fsanitize=undefined,float-cast-overflow,address", "-fno-sanitize-recover=all"]


def compiled(sources: Sequence[Path], flags: Sequence[str], binary: Path) -> Path:
    assert COMPILER is not None
    done = subprocess.run(
        [COMPILER, *flags, *map(str, sources), "-o", str(binary)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[:4000]
    return binary


def executed(binary: Path, given: bytes = b"") -> tuple[int, bytes]:
    done = subprocess.run([str(binary)], input=given, capture_output=True, timeout=120)
    assert not done.stderr, done.stderr.decode()[:4000]
    return done.returncode, done.stdout


class Ends:
    """Inputs and outputs of an exported program, as its functions take them."""

    def __init__(self, program: Program) -> None:
        self.program = integers_inside(program)
        self.values = one_sample(self.program.values)
        makers = {op.output: op for op in self.program.ops}
        self.entries = [op for op in self.program.ops if op.kind == "quantize"]
        self.float_outputs = [k for k, name in enumerate(program.outputs) if self.values_of(name) == "float32"]
        outputs = self.program.outputs
        self.codes = [makers[n].inputs[0] if n in makers and makers[n].kind == "dequantize" else n for n in outputs]

    def values_of(self, name: str) -> str:
        return self.program.values[name].dtype

    def driver(self, file: Path, name: str = "network") -> str:
        """Floats from stdin; codes and floats of every output to stdout."""
        many_in, many_out = len(self.entries) > 1, len(self.codes) > 1
        lines, after = [f'#include "{file}"', "#include <stdio.h>", "int main(void)", "{"], list[str]()
        arguments = []
        for k, op in enumerate(self.entries):
            size, label = self.size(op.output), f"input_{k}" if many_in else "input"
            lines.append(f"    static float x{k}[{size}]; static {self.storage(op.output)}_t codes{k}[{size}];")
            after.append(f"if (fread(x{k}, sizeof *x{k}, {size}, stdin) != {size}) {{ break; }}")
            after.append(f"{name}_quantize_{label}(x{k}, codes{k});")
            arguments.append(f"codes{k}")
        arguments += [f"out{k}" for k in range(len(self.codes))]
        after.append(f"{name}_run_codes({', '.join(arguments)});")
        for k, value in enumerate(self.codes):
            size, label = self.size(value), f"output_{k}" if many_out else "output"
            lines.append(f"    static {self.storage(value)}_t out{k}[{size}];")
            after.append(f"fwrite(out{k}, sizeof *out{k}, {size}, stdout);")
            if k in self.float_outputs:
                lines.append(f"    static float y{k}[{size}];")
                after.append(f"{name}_dequantize_{label}(out{k}, y{k}); fwrite(y{k}, sizeof *y{k}, {size}, stdout);")
        body = "\n".join(f"        {line}" for line in after)
        return "\n".join(lines) + f"\n    for (;;) {{\n{body}\n    }}\n    return 0;\n}}\n"

    def size(self, value: str) -> int:
        return int(np.prod(self.values[value].shape))

    def storage(self, value: str) -> str:
        found = self.values[value]
        return "int64" if found.dtype == "int64" else found.storage

    def stream(self, inputs: Sequence[Array]) -> bytes:
        """What the driver reads: sample by sample, every entry's floats."""
        by_name = dict(zip(self.program.inputs, inputs, strict=True))
        samples = len(inputs[0])
        rows = [by_name[op.inputs[0]].reshape(samples, -1) for op in self.entries]
        return np.concatenate(rows, axis=1).astype("<f4").tobytes()

    def split(self, written: bytes, samples: int) -> tuple[list[Array], list[Array]]:
        """Codes and floats of the driver's output, [samples, size] each."""
        fields = []
        for k, value in enumerate(self.codes):
            fields.append((f"c{k}", np.dtype(self.storage(value)), (self.size(value),)))
            if k in self.float_outputs:
                fields.append((f"f{k}", np.dtype(np.float32), (self.size(value),)))
        table = np.frombuffer(written, np.dtype(fields))
        assert len(table) == samples, f"{len(table)} samples came back of {samples}"
        return [table[f"c{k}"] for k in range(len(self.codes))], [table[f"f{k}"] for k in self.float_outputs]


def differences(program: Program, inputs: Sequence[Array], written: bytes) -> list[str]:
    """Each output of the C network that is not, bit for bit, what the runtime gives."""
    ends, samples = Ends(program), len(inputs[0])
    codes, floats = ends.split(written, samples)
    leaves = {"list": [{"leaf": k} for k in range(len(program.outputs))]}
    expected = runtime.run(replace(ends.program, structure=leaves), *inputs, integers=True)
    values = runtime.run(replace(program, structure=leaves), *inputs)
    wrong = []
    for k, (got, want) in enumerate(zip(codes, expected, strict=True)):
        want = want[0] if isinstance(want, tuple) else want
        if not np.array_equal(got.astype(np.int64), np.asarray(want).reshape(samples, -1)):
            wrong.append(f"codes of output {k}: {np.argwhere(got != want.reshape(samples, -1))[:3].tolist()}")
    for k, got in zip(ends.float_outputs, floats, strict=True):
        if got.tobytes() != np.ascontiguousarray(values[k]).tobytes():
            wrong.append(f"floats of output {k}")
    return wrong
