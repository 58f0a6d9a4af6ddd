"""What an exported model holds: floats between its integers, and how far its codes are from the program's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_lowbit.errors import ConfigError, InvariantError
from lightning_lowbit.export.onnx_graph import Array, require

__all__ = ["Difference", "compare", "float_tensors_between", "session"]

_MOVES = ("Reshape", "Transpose", "Slice", "Pad", "Gather", "Concat", "MaxPool", "Identity")
_QUANTIZE = ("Mul", "Round", "Floor", "Sub", "Abs", "Sign", "Add", "Clip", "Cast")
_DEQUANTIZE = ("Cast", "Mul", "Div")


def float_tensors_between(model: Any) -> list[str]:
    """Names of the floats that an integer graph must not have.

    That is every float tensor which depends on a code and on which a code depends, and every one that is more than
    the rounding of an input or the scaling of a code. The place of the largest float is no code.

    Args:
        model: an ONNX ModelProto.
    """
    onnx = require("onnx")
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {info.name: info.type.tensor_type.elem_type for info in (*graph.value_info, *graph.input, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    constants = {tensor.name for tensor in graph.initializer}
    proto = onnx.TensorProto
    floats = {
        name for name, kind in types.items() if kind in (proto.FLOAT, proto.DOUBLE, proto.FLOAT16, proto.BFLOAT16)
    }
    after: set[str] = set()  # tensors computed from a code
    found: set[str] = set()
    for node in graph.node:
        unknown = [name for name in node.output if name not in types]
        if unknown:
            raise InvariantError(f"{node.name}: no type is known of {unknown[0]}. Please report it.")
        inputs = [name for name in node.input if name and name not in constants]
        late = any(name in after for name in inputs)
        for name in node.output:
            # the comparison within a rounding rule is no code yet
            code = name not in floats and types[name] != proto.BOOL
            if late or code:
                after.add(name)
            allowed = _DEQUANTIZE if late else _QUANTIZE
            if name in floats and node.op_type not in (*allowed, *_MOVES):
                found.add(name)
    before: set[str] = set()  # tensors from which a code is computed
    for node in reversed(graph.node):
        if node.op_type == "ArgMax" and node.input[0] in floats:  # a class chosen among the results is no code
            continue
        if any(name in before or (name not in floats and types[name] != proto.BOOL) for name in node.output):
            before.update(node.input)
    return sorted(found | (floats & after & before))


def session(model: bytes, threads: int = 1, optimize: bool = True) -> Any:
    """An ONNX Runtime session on the CPU."""
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")  # no saturation without VNNI
    if not optimize:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Difference:
    """One tensor of a model beside the program's: how many of its codes differ, and by how many units at most."""

    path: str
    count: int
    total: int
    largest: float

    def __str__(self) -> str:
        if not self.count:
            return f"{self.path}: all {self.total} equal"
        share = 100 * self.count / self.total
        return f"{self.path}: {self.count} of {self.total} differ ({share:.2g} %), by up to {self.largest:g}"


def compare(path: str, got: Array, expected: Array) -> Difference:
    """Elementwise; both in units of the code, or of the output."""
    if got.shape != expected.shape:
        raise InvariantError(f"{path}: the model gives {got.shape}, the program {expected.shape}. Please report it.")
    apart = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    return Difference(path, int((apart > 0).sum()), int(apart.size), float(apart.max(initial=0)))


def as_arrays(samples: Any, count: int) -> tuple[Array, ...]:
    """One float32 array per input.

    Raises:
        ConfigError: another number of inputs.
    """
    given = tuple(samples) if isinstance(samples, (tuple, list)) else (samples,)
    if len(given) != count:
        raise ConfigError(
            f"samples: got {len(given)} inputs, expected {count}. Give one batch per input of the network."
        )
    return tuple(np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, np.float32) for x in given)
