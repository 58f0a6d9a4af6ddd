"""Lay links between the low-bit modules of a network, along the data flow that its plan was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_lowbit.graph.network import Call, Flow
from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.graph.plan import Plan
from lightning_lowbit.modules.base import LowBitModule, low_bit_modules
from lightning_lowbit.modules.links import Station
from lightning_lowbit.modules.norm import LowBitBatchNorm

__all__ = ["Rewind", "connect"]


def connect(root: nn.Module, flow: Flow, plan: Plan) -> None:
    """Give every low-bit module a station per operand and per reader, for each of its calls in order."""
    ops = {(op.owner, op.key): op.path for op in plan.ops}
    modules: dict[int, LowBitModule] = {}
    for call in flow.calls:
        path = ops.get((call.owner, call.key), call.path)
        module = None if path is None else root.get_submodule(path)
        if isinstance(module, LowBitModule) and not isinstance(module, LowBitBatchNorm):
            modules[id(call)] = module
    stations: dict[int, list[Station | None]] = {id(call): [] for call in flow.calls}  # of its readers
    operands: dict[int, list[Station | None]] = {}
    exits = {id(_source(call, modules)) for call in flow.exits}
    for call in flow.calls:
        if id(call) in modules:
            operands[id(call)] = [_between(_source(source, modules), modules, stations) for source in call.inputs]
        elif call.kind is not Kind.KEEP and call.target is not None:
            for source in call.inputs:  # float code reads it
                producer = _source(source, modules)
                if id(producer) in modules and not _looked_through(call, modules):
                    stations[id(producer)].append(None)
    for call in flow.calls:
        if id(call) in modules:
            readers = stations[id(call)] + [None] * (id(call) in exits)
            modules[id(call)].links.calls.append((operands[id(call)], readers))
    for path in dict.fromkeys(entry.owner for entry in flow.entries):
        root.get_submodule(path).register_forward_pre_hook(Rewind())


def _looked_through(call: Call, modules: dict[int, LowBitModule]) -> bool:
    """Whether a call hands its values on: it moves them, or it is a norm that its layer has taken over."""
    return bool(call.inputs) and id(call) not in modules and (
        call.kind is Kind.KEEP or isinstance(call.target, LowBitBatchNorm)
    )  # fmt: skip


def _source(call: Call, modules: dict[int, LowBitModule]) -> Call:
    while _looked_through(call, modules):
        call = call.inputs[0]
    return call


def _between(
    producer: Call, modules: dict[int, LowBitModule], stations: dict[int, list[Station | None]]
) -> Station | None:
    if id(producer) not in modules:
        return None
    station = Station()
    stations[id(producer)].append(station)
    return station


@dataclass(eq=False)
class Rewind:
    """A forward pre-hook on what is called from outside: every module below begins with its first call."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        for _, low in low_bit_modules(module):
            low.links.turn = 0
