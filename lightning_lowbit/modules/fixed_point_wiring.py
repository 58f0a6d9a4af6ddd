"""What fixed-point modules must know of those around them: who clips, who rectifies, who reads float64 (F8Net)."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_lowbit.graph.network import Call, Flow, only_layers_read, readers
from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.graph.plan import OpPlan, Plan
from lightning_lowbit.graph.units import EdgeClass, others_read
from lightning_lowbit.modules.elementwise import LowBitOp, LowBitReLU
from lightning_lowbit.modules.fraclen import FraclenInput
from lightning_lowbit.modules.layers import LowBitLayer

__all__ = ["Wiring", "keeps_six"]

_SIX = 6.0


def keeps_six(edges: EdgeClass, flow: Flow) -> str | None:
    """The name of a ReLU6 whose bound no clip can stand for: not only layers read it."""
    return next((call.name for call in edges.rectified_at_six if not only_layers_read(call, flow)), None)


class Wiring:
    """Tells the modules of a converted network of each other, from its data flow.

    Args:
        root: with all modules in their places.
        flow, plan: as it was converted.
    """

    def __init__(self, root: nn.Module, flow: Flow, plan: Plan) -> None:
        self.root, self.flow, self.plan = root, flow, plan
        self.ops = {(op.owner, op.key): root.get_submodule(op.path) for op in plan.ops}
        found = ((layer.path, root.get_submodule(layer.path)) for layer in plan.layers)
        self.layers = {path: layer for path, layer in found if isinstance(layer, LowBitLayer)}

    def absorb_before_norms(self) -> None:
        """A factor on products that a batch norm divides by their spread changes nothing: weights take the unit up."""
        for layer in self.layers.values():
            if layer.norm is not None and isinstance(layer.lowbit_input, FraclenInput):
                layer.lowbit_input.absorbs = True

    def clip(self, clipped: list[EdgeClass], private: bool) -> None:
        """Give every reader of the classes its clip and ReLU6's bound.

        Behind a mean (``private``), or with another width than its leader, it has a fraclen of its own.
        """
        for edges in clipped:
            inputs = {path: self._input(path) for path in edges.consumers}
            for source in inputs.values():
                if source.alpha is None:  # the only one of its tie
                    source.share([source], True)
                source.limit = _SIX if edges.rectified_at_six else None
                source.private = source.form.bits != source.leader.form.bits
            for path in (path for pool in edges.pools for path in pool.consumers if private):
                inputs[path].private = True

    def narrow(self) -> None:
        """Mark what others than fixed-point modules read, and layers whose results sums are written into."""
        first = next(iter(self.layers.values()))
        overwritten = any(op.overwrites for op in self.plan.ops)
        for layer in self.layers.values():
            layer.__dict__["overwritten"] = overwritten
            if layer.lowbit_input is not None:
                layer.lowbit_input.__dict__["reader"] = layer
        for call in self.flow.calls:
            module = self.ops.get((call.owner, call.key)) or self.layers.get(call.path or "")
            if isinstance(module, (LowBitOp, LowBitLayer)) and others_read(call, self.flow, self.plan):
                module.__dict__["read_by_others"] = module if isinstance(module, LowBitLayer) else first

    def leave_rectifiers(self, clipped: list[EdgeClass], sums: bool) -> None:
        """Leave rectifiers to the clips of their readers, where these are all that sees them.

        Args:
            clipped: classes where a ReLU6's bound is the readers' clip.
            sums: rectifiers of sums too, which the published code has as they are.
        """
        bounded = {id(call) for edges in clipped for call in edges.rectified_at_six}
        for op in self.plan.ops:
            rectifier = self.root.get_submodule(op.path)
            if isinstance(rectifier, LowBitReLU) and (not rectifier.six or id(op.call) in bounded):
                rectifier.__dict__["rectified_by"] = self._unsigned_readers(op, rectifier, sums)

    def _unsigned_readers(self, op: OpPlan, rectifier: LowBitReLU, sums: bool) -> list[FraclenInput]:
        """The quantizers that read a rectifier's result, if all clip at 0 and nothing else sees it, nor its operand."""
        calls = [call for call in self.flow.calls if (call.owner, call.key) == (op.owner, op.key)]
        found = [reader.path or "" for call in calls for reader in readers(call)]
        if rectifier._forward_hooks or op.overwrites or not self.layers.keys() >= set(found):
            return []
        if not all(only_layers_read(call, self.flow) and self._read_once(call.inputs[0]) for call in calls):
            return []
        if not sums and not all(call.inputs[0].kind in (Kind.COMPUTE, Kind.BATCH_NORM) for call in calls):
            return []
        inputs = [self.layers[path].lowbit_input for path in found]
        clips = [q for q in inputs if isinstance(q, FraclenInput) and q.site.signed is False and q.fixed is None]
        return clips if len(clips) == len(inputs) else []

    def _read_once(self, call: Call) -> bool:
        """Whether a tensor, and what it is a view of, has one reader: it may be handed on as it is."""
        alone = len(call.readers) == 1 and call not in self.flow.exits
        return alone and (call.kind is not Kind.KEEP or not call.inputs or self._read_once(call.inputs[0]))

    def shift_means(self, classes: list[EdgeClass]) -> list[str]:
        """Let the weights behind a mean by a shift make up for what the shift leaves.

        Returns:
            notes on means that divide exactly all the same.
        """
        notes = []
        for pool in (pool for edges in classes for pool in edges.pools):
            op: Any = self.ops[pool.call.owner, pool.call.key]
            op.__dict__["by_shift"] = pool.exclusive
            for path in pool.consumers if pool.exclusive else ():
                source = self.layers[path].lowbit_input
                if source is not None:
                    source.__dict__["mean"] = op
            if not pool.exclusive:
                notes.append(f"{pool.call.name} divides exactly: more than layers read it, or they read more than it")
        return notes

    def _input(self, path: str) -> FraclenInput:
        source = self.layers[path].lowbit_input
        assert isinstance(source, FraclenInput)
        return source
