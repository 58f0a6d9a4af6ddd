"""An ONNX graph under construction, and its file; the package `onnx` is imported when the first graph is made."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_lowbit.errors import ConfigError, InvariantError, UnsupportedModelError
from lightning_lowbit.export.runtime import Op, Program, Value

__all__ = ["Array", "Graph", "onnx_dtype", "require"]

Array = np.ndarray[Any, Any]
_PRODUCER = "lightning-lowbit"
_ALL = 2**63 - 1


def require(name: str) -> Any:
    """The module ``name``.

    Raises:
        ConfigError: not installed; it names the extra that brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"export_onnx needs the package {name!r} ({error}): pip install 'lightning-lowbit[onnx]'"
        ) from error


def onnx_dtype(low: int, high: int) -> str:
    """The narrowest of the integer types that ONNX Runtime computes with.

    >>> onnx_dtype(0, 255), onnx_dtype(-128, 127), onnx_dtype(-1, 200), onnx_dtype(0, 2**32)
    ('uint8', 'int8', 'int32', 'int64')
    """
    for name in ("uint8", "int8", "int32", "int64"):
        if np.iinfo(name).min <= low and high <= np.iinfo(name).max:
            return name
    raise UnsupportedModelError(f"codes from {low} to {high} exceed 64 bits; ONNX has no wider integer.")


class Graph:
    """Nodes and constants of one model, in the order in which they were added; the same calls give the same bytes."""

    def __init__(self, program: Program, opset: int) -> None:
        self.onnx = require("onnx")
        self.program, self.opset = program, opset
        self.nodes: list[Any] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._initializers: list[Any] = []
        self.path = ""
        self._kind = ""

    def at(self, op: Op) -> None:
        """What follows belongs to ``op``."""
        self.path, self._kind = op.path, op.kind

    def node(self, kind: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """Append a node of one output; the name of that output."""
        output = output or f"t{len(self.nodes)}"
        name = f"{self.path}/{self._kind}/{kind}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [output], name=name, **attributes))
        return output

    def constant(self, array: Any, dtype: str | None = None, own: bool = False) -> str:
        """An initializer; equal ones are one, but those that are some node's ``own``."""
        array = np.ascontiguousarray(np.asarray(array, dtype)).reshape(np.shape(array))
        key = (str(array.dtype), array.shape, array.tobytes())
        if key in self._constants and not own:
            return self._constants[key]
        name = f"c{len(self._initializers)}"
        self._initializers.append(self.onnx.numpy_helper.from_array(array, name))
        if not own:
            self._constants[key] = name
        return name

    def cast(self, name: str, dtype: str) -> str:
        kind = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.node("Cast", [name], to=kind)

    def reshape(self, name: str, shape: Sequence[int]) -> str:
        """To ``shape`` as a program writes it: -k is k times the batch.

        Raises:
            UnsupportedModelError: the batch stands in two dimensions.
        """
        if sum(size < 0 for size in shape) > 1:
            raise UnsupportedModelError(
                f"{self.path}: a reshape to {tuple(shape)} has the batch in two dimensions; ONNX infers one. "
                "Reshape so that one dimension depends on the batch."
            )
        return self.node("Reshape", [name, self.constant([-1 if size < 0 else size for size in shape], "int64")])

    def pad(self, name: str, before: Sequence[int], after: Sequence[int], value: Any, dtype: str) -> str:
        """Pad every axis; negative amounts crop."""
        if not any((*before, *after)):
            return name
        amounts = [int(n) for n in (*before, *after)]
        if self.opset < 11:
            return self.node("Pad", [name], pads=amounts, value=float(value))
        return self.node("Pad", [name, self.constant(amounts, "int64"), self.constant(value, dtype)])

    def slice(self, name: str, starts: Sequence[int], stops: Sequence[int | None], steps: Sequence[int]) -> str:
        """One entry per axis; axes that are taken whole are left out."""
        picked = [axis for axis, cut in enumerate(zip(starts, stops, steps, strict=True)) if cut != (0, None, 1)]
        if not picked:
            return name
        columns = (
            [starts[axis] for axis in picked],
            [_ALL if stops[axis] is None else stops[axis] for axis in picked],
            picked,
            [steps[axis] for axis in picked],
        )
        if self.opset < 10:
            return self.node("Slice", [name], starts=columns[0], ends=columns[1], axes=columns[2])
        return self.node("Slice", [name, *(self.constant(column, "int64") for column in columns)])

    def gather(self, name: str, index: Array, value: Value, zero: int, dtype: str) -> str:
        """Element index[j] of each flattened sample, ``zero`` where index is -1."""
        size = int(np.prod(value.shape[1:], dtype=np.int64))
        flat = self.reshape(name, (value.shape[0], size))
        if (index < 0).any():
            flat = self.pad(flat, (0, 0), (0, 1), zero, dtype)
        return self.node("Gather", [flat, self.constant(np.where(index < 0, size, index), "int64")], axis=1)

    def names(self, side: str) -> list[str]:
        """``input`` or ``output`` where there is one, else numbered."""
        many = len(getattr(self.program, f"{side}s"))
        return [side] if many == 1 else [f"{side}{index}" for index in range(many)]

    def model(self, outputs: Sequence[str], dtypes: Sequence[str], note: Mapping[str, str]) -> Any:
        """The checked model; ``outputs`` are tensors, which get the names that the file shows.

        Raises:
            InvariantError: ONNX's own checker refuses it.
        """
        helper, program = self.onnx.helper, self.program
        names = self.names("output")
        for tensor, name in zip(outputs, names, strict=True):
            self.node("Identity", [tensor], name)

        def shown(name: str, dtype: str, value: Value) -> Any:
            shape = ["batch" if n == -1 else f"{-n}*batch" if n < 0 else n for n in value.shape]
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
            return helper.make_tensor_value_info(name, kind, shape)

        graph = helper.make_graph(
            self.nodes,
            str(program.note.get("module", "network")),
            [
                shown(name, "float32", program.values[value])
                for name, value in zip(self.names("input"), program.inputs, strict=True)
            ],
            [
                shown(name, dtype, program.values[value])
                for name, dtype, value in zip(names, dtypes, program.outputs, strict=True)
            ],
            self._initializers,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        # readers refuse files newer than they are, so the format is the oldest that has the opset
        version = helper.find_min_ir_version_for(opsets)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=version, producer_name=_PRODUCER)
        helper.set_model_props(model, dict(note))
        try:
            self.onnx.checker.check_model(model, full_check=True)
        except Exception as error:  # checker and shape inference raise types of their own
            raise InvariantError(
                f"the ONNX model made of {graph.name} is not valid: {error}. Please report it."
            ) from error
        return model
