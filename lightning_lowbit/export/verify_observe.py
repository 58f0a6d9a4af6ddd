"""The codes that a network itself computes with, batch by batch, by the names of a program's values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_lowbit.export.program import Program
from lightning_lowbit.export.record import Recording, Ref, record
from lightning_lowbit.modules.carrier import Carrier
from lightning_lowbit.modules.convert import quantizers

__all__ = ["Observer", "codes_of", "fits"]

Array = np.ndarray[Any, Any]
_ROLES = ("input", "operand")  # of quantizers inside a layer or an operation that read what arrives in float


class Observer:
    """Watches a network's evaluation for the values of its program.

    Args:
        module: in evaluation mode.
        program: its program.
        sources: where the recording has a value: name -> ``Ref``.
    """

    def __init__(self, module: nn.Module, program: Program, sources: Mapping[str, Ref]) -> None:
        self.module, self.program = module, program
        self.wanted: dict[Ref, list[str]] = {}
        for name, ref in sources.items():
            if name in program.values:
                self.wanted.setdefault(ref, []).append(name)
        self.inside = [op for op in program.ops if op.kind in ("quantize", "threshold") and op.output not in sources]

    def __call__(self, arguments: Sequence[Any]) -> tuple[dict[str, Array], Recording]:
        """The network's tensors, by the names of the values that stand for them."""
        found: dict[str, Array] = {}

        def watch(ref: Ref, tensor: Tensor) -> None:
            names = self.wanted.get(ref, ())
            if names:
                array = _array(tensor)
                found.update(dict.fromkeys(names, array))

        with self._calls() as calls:
            recording = record(self.module, arguments, watch)
        for op in self.inside:
            codes = self._matching(op, calls, found)
            if codes is not None:
                found[op.output] = codes
        return found, recording

    @contextmanager
    def _calls(self) -> Iterator[dict[str, list[tuple[Array, Array]]]]:
        """What quantizers inside a layer read and gave, by the layer's path."""
        calls: dict[str, list[tuple[Array, Array]]] = {op.path: [] for op in self.inside}
        hooks = []
        for path, quantizer in quantizers(self.module):
            owner = path.rpartition(".")[0]
            if owner in calls and quantizer.site.role.startswith(_ROLES):
                found = calls[owner]
                hooks.append(
                    quantizer.register_forward_hook(
                        lambda _, given, result, found=found: found.append((_array(given[0]), _array(result)))
                    )
                )
        try:
            yield calls
        finally:
            for hook in hooks:
                hook.remove()

    def _matching(
        self, op: Any, calls: Mapping[str, list[tuple[Array, Array]]], found: Mapping[str, Array]
    ) -> Array | None:
        """The result of the quantizer's call that ``op`` stands for; None where it cannot be told."""
        value, given = self.program.values[op.output], found.get(op.inputs[0])
        fit = []
        for x, result in calls[op.path]:
            if not fits(result.shape, value.shape) or not (given is None or np.array_equal(x, given)):
                continue
            codes = codes_of(result, value.exponent, None)
            with np.errstate(invalid="ignore"):
                if ((codes == np.rint(codes)) & (codes >= value.low) & (codes <= value.high)).all():
                    fit.append(result)
        return fit[0] if fit and all(np.array_equal(fit[0], other) for other in fit) else None


def fits(sizes: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a tensor can be a value of that shape, for some batch."""
    return len(sizes) == len(shape) and all(n == s if s >= 0 else n % s == 0 for n, s in zip(sizes, shape, strict=True))


def _array(tensor: Tensor) -> Array:
    """A copy of a tensor's values; of a carrier exact ones, float64."""
    with torch._C.DisableTorchFunction():  # whoever records must not see these calls
        if isinstance(tensor, Carrier):
            return np.asarray(np.ldexp(tensor.payload.double().cpu().numpy(), int(tensor.exponent)))
        return np.array(tensor.detach().cpu().numpy())


def codes_of(values: Array, exponent: int | Sequence[int], axis: int | None) -> Array:
    """Values in units of 2^exponent, of their own dtype, exact."""
    steps = np.asarray(exponent)
    if axis is not None and steps.ndim:
        steps = steps.reshape([-1 if a == axis % values.ndim else 1 for a in range(values.ndim)])
    return np.asarray(np.ldexp(values, -steps))
