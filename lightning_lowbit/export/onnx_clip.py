"""The form that TI's tools import: a float graph whose activations pass Clip nodes, each with the range of its codes.

Weights and bias are the worth of their codes, so that a float runtime computes everything but the rounding of the
activations. From opset 11 on the limits of Clip are inputs, before that attributes; importers of TIDL 7 read only
these. Import it there with power-of-two scales (quantization_scale_type 1) and without calibration.
"""

from __future__ import annotations

import numpy as np

from lightning_lowbit.errors import UnsupportedModelError
from lightning_lowbit.export.onnx_graph import Array
from lightning_lowbit.export.onnx_real import RealForm
from lightning_lowbit.export.onnx_windows import pool_node
from lightning_lowbit.export.runtime import Op, Value

__all__ = ["ClipForm"]


class ClipForm(RealForm):
    """Every quantizer is a Clip, or nothing where it does not clip."""

    form = "clip"

    def settle(self, op: Op, value: Value, real: str) -> None:
        low, high = op.attributes["low"], op.attributes["high"]
        if not isinstance(value.exponent, int):
            raise UnsupportedModelError(
                f"{op.path} ({op.kind}, exponent): one per channel, and a Clip has one range. Use form='integer'."
            )
        unit = 2.0**value.exponent
        self.reals[op.output] = self.clip(real, *(None if end is None else end * unit for end in (low, high)))

    def weights(self, op: Op, weight: Array, axis: int) -> list[str]:
        exponent = self.weight_exponent(op)
        along = [-1 if n == axis else 1 for n in range(weight.ndim)] if exponent.ndim else ()
        names = [self.graph.constant(np.ldexp(weight.astype(np.float64), exponent.reshape(along)), "float32")]
        if "bias" in op.constants:
            unit = exponent + self.program.values[op.inputs[0]].exponent
            names.append(self.graph.constant(np.ldexp(op.constants["bias"].astype(np.float64), unit), "float32"))
        return names

    def _slice(self, op: Op, value: Value) -> None:
        steps = [int(step) for step in op.attributes["steps"]]
        if self.graph.opset >= 10 or max(steps) == 1:
            super()._slice(op, value)
            return
        # Slice has no steps before opset 10; a pool of single elements has
        plain = steps[:2] == [1, 1] and not any(op.attributes["starts"]) and set(op.attributes["stops"]) == {None}
        if not plain or len(steps) < 3:
            raise UnsupportedModelError(
                f"{op.path} (slice, steps): opset {self.graph.opset} has no Slice with steps. Use opset=11."
            )
        ones = [1] * (len(steps) - 2)
        pool = Op(
            "max_pool",
            op.path,
            op.inputs,
            op.output,
            {"kernel": ones, "stride": steps[2:], "padding": [[0, 0] for _ in ones]},
        )
        self.reals[op.output] = pool_node(self.graph, "MaxPool", pool, self.real(op.inputs[0]))
