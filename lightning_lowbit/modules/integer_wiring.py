"""Where a layer of an integer network is handed floats on a way that the plan takes for one of integers."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lowbit.graph.network import Call, Flow
from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.graph.plan import Plan
from lightning_lowbit.modules.elementwise import LowBitCat, LowBitOp, LowBitReLU
from lightning_lowbit.modules.layers import LowBitLayer
from lightning_lowbit.modules.norm import LowBitBatchNorm

__all__ = ["reads_floats"]

# Moves that a carrier does not make (modules.carrier): their results are floats of the same worth.
_LEAVING: frozenset[Any] = frozenset({
    F.max_pool3d, torch.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
    F.channel_shuffle, F.interpolate, torch.tile, "tile", "repeat", "double",
})  # fmt: skip
_LEAVING_MODULES = (
    nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.ChannelShuffle, nn.Upsample,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)  # fmt: skip


def reads_floats(root: nn.Module, flow: Flow, plan: Plan) -> list[str]:
    """Paths of converted layers without an input quantizer whose input is no carrier in some call."""
    ways, found = _Ways(root, plan), []
    for call in flow.calls:
        layer = ways.module(call)
        waits = isinstance(layer, LowBitLayer) and layer.lowbit_input is None and bool(call.inputs)
        if waits and not ways.carries(call.inputs[0]):
            found.append(str(layer.path))  # type: ignore[union-attr]  # a layer
    return list(dict.fromkeys(found))


class _Ways:
    def __init__(self, root: nn.Module, plan: Plan) -> None:
        self.root, self.known = root, dict[int, bool]()
        self.places = {(op.owner, op.key): op.path for op in plan.ops}

    def module(self, call: Call) -> nn.Module | None:
        path = self.places.get((call.owner, call.key), call.path)
        return None if path is None else self.root.get_submodule(path)

    def carries(self, call: Call) -> bool:
        """Whether a call gives a carrier."""
        if id(call) not in self.known:
            self.known[id(call)] = self._carries(call, self.module(call))
        return self.known[id(call)]

    def _carries(self, call: Call, module: nn.Module | None) -> bool:
        passes = isinstance(module, LowBitReLU) or (isinstance(module, LowBitBatchNorm) and not module.island)
        if passes or (call.kind is Kind.KEEP and _stays(call)):
            return bool(call.inputs) and self.carries(call.inputs[0])
        if isinstance(module, LowBitCat):
            slots = (f"lowbit_operand_{index}" in module._modules for index in range(len(call.inputs)))
            return all(slot or self.carries(source) for slot, source in zip(slots, call.inputs, strict=True))
        if isinstance(module, (LowBitLayer, LowBitOp, LowBitBatchNorm)):
            return True  # which round what they compute
        return getattr(module, "lowbit_output", None) is not None


def _stays(call: Call) -> bool:
    """Whether a call that moves values leaves a carrier one."""
    target, args = call.target, call.args
    if isinstance(target, nn.Module):
        return not isinstance(target, _LEAVING_MODULES)
    if target is F.pad or target == "pad":
        return bool(call.kwargs.get("mode", args[2] if len(args) > 2 else "constant") == "constant")
    if target is operator.getitem:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return not any(isinstance(part, (list, Tensor, Call)) for part in index)
    return target not in _LEAVING
