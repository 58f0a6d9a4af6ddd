"""The ranges of a program as TIDL's quantization prototxt (its option ``advanced_options:quant_params_proto_path``).

Written from TI's public description of that file: a layer has a name, a type, a bit depth and for each of its tensors
min, max, scale (codes per unit) and zero point, a bias its values too; the file is symmetric and for one subgraph. The
names of the layers are those of the tensors in the ONNX file of form "clip". It has not been read by TI's tools.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lightning_lowbit.export.runtime import Op, Program, Value

__all__ = ["prototxt"]

_TYPES = {
    "quantize": "TIDL_DataLayer",
    "conv": "TIDL_ConvolutionLayer",
    "conv_transpose": "TIDL_Deconv2DLayer",
    "linear": "TIDL_InnerProductLayer",
    "add": "TIDL_EltWiseLayer",
    "concat": "TIDL_ConcatLayer",
    "max_pool": "TIDL_PoolingLayer",
    "divide": "TIDL_PoolingLayer",
}


def prototxt(program: Program, names: Mapping[str, str]) -> str:
    """One layer per input and per op with a format of its own.

    Args:
        names: the ONNX tensor of each value.
    """
    ends = _settled(program)
    layers = [
        _layer(op, program, ends[op.output], names[ends[op.output].name])
        for op in program.ops
        if op.kind in _TYPES and program.values[op.output].dtype == "int"
    ]
    head = [f"num_layers: {len(layers)}", "quant_type: SYMMETRIC", "calib_type: PERTENSOR"]
    return "\n".join([*head, *layers]) + "\n"


def _settled(program: Program) -> dict[str, Value]:
    """For each value the one that its clips lead to: a layer's range is what its successors read."""
    ends: dict[str, Value] = {}
    for op in reversed(program.ops):
        value = program.values[op.output]
        readers = [reader for reader in program.ops if op.output in reader.inputs]
        sole = readers[0] if len(readers) == 1 and op.output not in program.outputs else None
        ends[op.output] = ends[sole.output] if sole is not None and sole.kind == "requantize" else value
    return ends


def _layer(op: Op, program: Program, value: Value, name: str) -> str:
    parts = [
        f'  layer_name: "{name}"',
        f'  layer_type: "{_TYPES[op.kind]}"',
        f"  bit_depth: {8 if value.bits <= 8 else 16}",
    ]
    parts.append(_tensor("outputs", value.low, value.high, value.exponent))
    if "weight" in op.constants:
        weight, source = op.constants["weight"], program.values[op.inputs[0]]
        total = np.asarray(program.values[op.output].exponent)
        unit = total - np.asarray(source.exponent)
        parts.append(_tensor("weights", int(weight.min()), int(weight.max()), unit))
        if "bias" in op.constants:
            bias = op.constants["bias"]
            worth = np.ldexp(bias.astype(np.float64), total)
            parts.append(_tensor("bias", int(bias.min()), int(bias.max()), total, worth.tolist()))
    return "\n".join(["layers {", *parts, "}"])


def _tensor(kind: str, low: int, high: int, exponent: Any, values: Iterable[float] = ()) -> str:
    """The range from code ``low`` to ``high``; where channels have formats of their own, the widest."""
    unit = 2.0 ** int(np.max(exponent))
    listed = list(values)
    ends = (min(listed), max(listed)) if listed else (low * unit, high * unit)
    rows = [f"min: {ends[0]!r}", f"max: {ends[1]!r}", f"size: {len(listed) or 1}", f"element_type: {int(low < 0)}"]
    rows += [f"scale: {1 / unit!r}", "zero_point: 0", *(f"value: {value!r}" for value in listed)]
    return "\n".join([f"  {kind} {{", *(f"    {row}" for row in rows), "  }"])
