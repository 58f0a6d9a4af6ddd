"""An integer program as an ONNX file: for ONNX Runtime's int8 kernels, as a proof in integers, or for TI's tools."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_lowbit.errors import ConfigError, InvariantError, UnsupportedModelError, listed
from lightning_lowbit.export.onnx_checks import Difference, as_arrays, compare, float_tensors_between, session
from lightning_lowbit.export.onnx_clip import ClipForm
from lightning_lowbit.export.onnx_graph import Graph
from lightning_lowbit.export.onnx_integer import IntegerForm
from lightning_lowbit.export.onnx_qdq import QdqForm, objections
from lightning_lowbit.export.program import digest, write_atomically
from lightning_lowbit.export.runtime import Program, run, trace
from lightning_lowbit.export.tidl import prototxt

__all__ = ["OnnxReport", "export_onnx"]

_FORMS: dict[str, Any] = {"qdq": QdqForm, "integer": IntegerForm, "clip": ClipForm}
_OPSETS = {"qdq": (13, 17, 20), "integer": (13, 17, 20), "clip": (9, 11, 12)}  # oldest, default, newest


@dataclass(frozen=True)
class OnnxReport:
    """What was written.

    Attributes:
        inexact: what the form does not compute as the program does, each with its path and field.
        differences: quantizers, then outputs, beside the program's on the samples; codes in units of the code.
    """

    path: Path
    form: str
    opset: int
    nodes: int
    bytes: int
    notes: tuple[str, ...] = ()
    inexact: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()

    def __str__(self) -> str:
        rows = [f"{self.path}: form {self.form}, opset {self.opset}, {self.nodes} nodes, {self.bytes:,} bytes"]
        rows += [f"  {note}" for note in self.notes]
        rows += [f"  not exact: {reason}" for reason in self.inexact]
        if self.differences:
            apart = [row for row in self.differences if row.count]
            rows += [f"  {row}" for row in apart]
            if not apart:
                rows.append(f"  equal to the program in all {len(self.differences)} tensors compared")
        return "\n".join(rows)


def export_onnx(
    program: Any,
    path: str | os.PathLike[str],
    form: str = "qdq",
    opset: int | None = None,
    *,
    example_input: Any = None,
    allow_inexact: bool = False,
    samples: Any = None,
    weight_type: str = "int8",
) -> OnnxReport:
    """Write an integer program, or a trained low-bit module, to an ONNX file.

    Forms:
        qdq: QuantizeLinear and DequantizeLinear around float operators, for int8 kernels. It needs ties to even, sums
            within 24 bits and activations of 8 bits.
        integer: integers only between the rounding of the input and the scaling of the output; the results of ONNX
            Runtime are those of ``program.run``, bit for bit, with and without VNNI.
        clip: float with Clip nodes that carry the ranges, for TI's tools; their quantization prototxt stands beside it.

    Args:
        program: what `lower` gives, or a module, which is lowered with ``example_input``.
        path: written whole or not at all.
        opset: None: 17, for ``clip`` 11.
        allow_inexact: write a QDQ file even where it does not compute the program's integers; ``samples`` are then
            needed, and the measured difference is part of the report.
        samples: a float batch, or one per input, on which ONNX Runtime is compared with the program.
        weight_type: of the QDQ form; "uint8" is exact on x86 without VNNI in any session, and halves the speed where
            there is VNNI. With "int8" a CPU without it needs the session option that the report names.
    Raises:
        UnsupportedModelError: the form cannot hold the network; it names the paths and fields.
        ConfigError: an unknown form or opset, no samples where they are needed, or a package that is missing.
    """
    version = _opset(form, opset)
    if weight_type not in ("int8", "uint8"):
        raise ConfigError(f"weight_type: got {weight_type!r}, expected 'int8' or 'uint8'.")
    program = _lowered(program, example_input)
    graph = Graph(program, version)
    writer = QdqForm(program, graph, weight_type) if form == "qdq" else _FORMS[form](program, graph)
    inexact = objections(program) if form == "qdq" else []
    if inexact and not allow_inexact:
        raise UnsupportedModelError(
            f"form='qdq' would not compute the integers of this network: {listed(inexact, 4)}. Use form='integer', "
            "train with act_round='half_even' and 8-bit activations, or accept it: allow_inexact=True, samples=batch."
        )
    if inexact and samples is None:
        raise ConfigError("allow_inexact=True: got no samples. Give samples=batch: the difference is measured on it.")
    tensors, dtypes = writer.build()
    model = graph.model(tensors, dtypes, _properties(program, form))
    notes = []
    if form == "qdq" and weight_type == "int8":
        notes.append('on x86 without VNNI set the session option session.x64quantprecision="1": it saturates otherwise')
    if form == "integer":
        floats = float_tensors_between(model)
        if floats:
            raise InvariantError(f"floats between the integers of the ONNX graph: {listed(floats)}. Please report it.")
        notes.append("no float tensor between quantize and dequantize")
    data = model.SerializeToString(deterministic=True)
    differences = _measured(program, model, writer, samples) if samples is not None else ()
    if form == "clip":
        beside = Path(path).with_suffix(".prototxt")
        write_atomically(beside, prototxt(program, writer.reals).encode())
        notes.append(
            f"ranges for TIDL in {beside.name}; this file runs in float: its activations are clipped, not rounded"
        )
    write_atomically(path, data)
    nodes = len(model.graph.node)
    return OnnxReport(Path(path), form, version, nodes, len(data), tuple(notes), tuple(inexact), differences)


def _opset(form: str, opset: int | None) -> int:
    if form not in _FORMS:
        raise ConfigError(f"form: got {form!r}, expected one of {', '.join(_FORMS)}.")
    oldest, default, newest = _OPSETS[form]
    opset = default if opset is None else opset
    if not oldest <= opset <= newest:
        raise ConfigError(f"opset: got {opset}, form={form!r} is written in opset {oldest} to {newest}.")
    return opset


def _lowered(program: Any, example_input: Any) -> Program:
    if isinstance(program, Program):
        return program
    from lightning_lowbit.export.lowering import lower  # a program is exported without torch

    return lower(program, example_input)


def _properties(program: Program, form: str) -> dict[str, str]:
    return {
        "lightning_lowbit.form": form,
        "lightning_lowbit.note": json.dumps(program.note, sort_keys=True, default=str),
        "lightning_lowbit.program": digest(program),
    }


def _measured(program: Program, model: Any, writer: Any, samples: Any) -> tuple[Difference, ...]:
    """The bytes of every quantizer, where the form has them, and the outputs."""
    arrays = as_arrays(samples, len(program.inputs))
    names = [info.name for info in model.graph.input]
    feeds = dict(zip(names, arrays, strict=True))
    found = []
    codes = {op.output: op for op in program.ops if op.kind in ("quantize", "requantize", "divide")}
    codes = {name: op for name, op in codes.items() if isinstance(writer, QdqForm) and name in writer.codes}
    if codes:
        watched = type(model)()
        watched.CopyFrom(model)
        for name in codes:
            watched.graph.output.add().name = writer.codes[name][0]
        values = session(watched.SerializeToString()).run([writer.codes[name][0] for name in codes], feeds)
        expected = trace(program, *arrays)
        for (name, op), got in zip(codes.items(), values, strict=True):
            found.append(
                compare(f"{op.path} ({op.kind})", got.astype(np.int64) - writer.codes[name][1], expected[name])
            )
    outputs = session(model.SerializeToString()).run(None, feeds)
    flat = program if program.structure == {"leaf": 0} else None
    wanted = [run(program, *arrays)] if flat else _leaves(program.structure, run(program, *arrays))
    found += [
        compare(info.name, got, want) for info, got, want in zip(model.graph.output, outputs, wanted, strict=True)
    ]
    return tuple(found)


def _leaves(structure: Any, value: Any) -> list[Any]:
    """The outputs in their order, out of what the structure made of them."""
    found: dict[int, Any] = {}

    def walk(part: Any, held: Any) -> None:
        if "leaf" in part:
            found[part["leaf"]] = held
        for kind in ("list", "tuple"):
            for index, child in enumerate(part.get(kind, ())):
                walk(child, held[index])
        for key, child in part.get("dict", {}).items():
            walk(child, held[key])

    walk(structure, value)
    return [found[index] for index in sorted(found)]
