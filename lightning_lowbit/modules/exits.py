"""Where a network is left: in evaluation, whoever called it gets ordinary tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_lowbit.graph.network import Call, Flow
from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.graph.plan import Plan
from lightning_lowbit.graph.trace import has_forward
from lightning_lowbit.modules.base import LowBitModule
from lightning_lowbit.modules.carrier import plain
from lightning_lowbit.modules.quantizer import Quantizer

__all__ = ["Exit", "place_exits"]


@dataclass(eq=False)
class Exit:
    """A forward hook as a value: deepcopy and pickle follow it."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Carriers in ``output``, or in tuples and dicts there, as float tensors.

        In training they stay, for the loss must see integers; a re-entrant checkpoint, which runs parts of a
        forward without gradients, is training too.
        """
        return output if module.training or torch.is_grad_enabled() else tree_map(plain, output)


def place_exits(root: nn.Module, flow: Flow, plan: Plan) -> None:
    """Hook what the user's code enters, and the modules whose results no other low-bit module reads.

    By the second, ``self.net(x)`` in a validation step leaves ``net`` like a forward of the whole. A part that feeds
    integers to another one hands them to whoever calls it alone.
    """
    # What stands in a forward that was not followed passes integers along an unknown way.
    blind = [part.path for part in flow.untraced if part.path or has_forward(root)]
    paths = {entry.owner for entry in flow.entries if not any(_within(entry.owner, part) for part in blind)}
    carrying, ops = {}, {(op.owner, op.key): op.path for op in plan.ops}
    for call in flow.calls:
        path = ops.get((call.owner, call.key), call.path)
        if path is not None and _makes_carriers(root.get_submodule(path)):
            carrying[id(call)] = path
    read = {carrying[id(p)] for call in flow.calls if id(call) in carrying for p in _producers(call, carrying)}
    paths |= {carrying[id(call)] for call in flow.calls if id(call) in carrying and not call.alone} - read
    for path in sorted({"", *paths}):
        root.get_submodule(path).register_forward_hook(Exit())


def _within(path: str, part: str) -> bool:
    return path != part and (not part or path.startswith(f"{part}."))


def _makes_carriers(module: nn.Module) -> bool:
    return isinstance(module, LowBitModule) or any(isinstance(child, Quantizer) for child in module.children())


def _producers(call: Call, carrying: dict[int, str]) -> Iterator[Call]:
    """The low-bit modules' calls whose results ``call`` reads, through what only moves values."""
    for source in call.inputs:
        if id(source) in carrying:
            yield source
        elif source.kind is Kind.KEEP:
            yield from _producers(source, carrying)
