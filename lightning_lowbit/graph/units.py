"""Which tensors of a network share one unit: edge classes (F8Net's clipping levels, followed through the graph).

F8Net keeps the stream that enters a layer in multiples of a unit eta = 2^fraclen * alpha / M: who writes it divides
by eta, who multiplies it takes eta into its weights, and nothing is divided at run time. That holds only where all
that writes and all that reads a tensor takes part. An edge class is a connected component under the calls that
commute with a positive factor (rectifiers, pools, moves, sums, joins, folded norms); eta is its own, or 1 where it is
open.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from lightning_lowbit.graph.network import Call, Flow
from lightning_lowbit.graph.ops import Kind
from lightning_lowbit.graph.plan import Plan, Union

__all__ = ["FROM_OUTSIDE", "EdgeClass", "Pool", "edge_classes", "others_read"]

FROM_OUTSIDE = "it comes from outside the network"
"""Why the class of the network's input is open."""

_PASSING = (Kind.RELU, Kind.KEEP, Kind.AVG_POOL, Kind.ADD, Kind.CAT)  # f(eta * x) = eta * f(x) for eta > 0


@dataclass(frozen=True)
class Pool:
    """An average pool: whose weights could take a factor of it.

    Attributes:
        call: the pool.
        consumers: converted layers that read its result through calls that only move values, in order of calls.
        exclusive: whether nothing else reads it, and they read nothing else.
    """

    call: Call
    consumers: tuple[str, ...]
    exclusive: bool


@dataclass(frozen=True)
class EdgeClass:
    """Tensors that must be in one unit, since values are added, joined or only moved between them.

    Attributes:
        producers: paths of converted layers whose results (behind a folded norm) are in it, in order of calls.
        consumers: paths of converted layers that read one of its tensors, in order of calls.
        following: producer -> the first consumer, in order of calls, that its result reaches through the class.
        skipped: consumer -> consumers of sums that the tensor which it reads goes into, past layers (identity skips).
        open: why its unit must stay 1; None where all that writes and reads it is known.
        rectified_at_six: its ReLU6 calls.
        pools: its average pools.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    following: Mapping[str, str]
    skipped: Mapping[str, tuple[str, ...]]
    open: str | None
    rectified_at_six: tuple[Call, ...]
    pools: tuple[Pool, ...]


def edge_classes(root: nn.Module, flow: Flow, plan: Plan) -> list[EdgeClass]:
    """Edge classes that a layer of ``plan`` writes or reads, in order of their first tensor, entries before calls.

    A layer called several times has one unit before it and one behind it. Where a part of the network could not be
    followed, every class is open: what it does with a tensor, or with a layer, is unknown.
    """
    return _Tracker(root, flow, plan).classes()


def others_read(call: Call, flow: Flow, plan: Plan, passing: frozenset[Any] = frozenset()) -> bool:
    """Whether a call's values, perhaps moved, leave the network or enter a call that is not converted.

    Args:
        passing: operations, as (owner, key), that hand on what they read without a quantizer.
    """
    layers, norms = {layer.path for layer in plan.layers}, {layer.batch_norm for layer in plan.layers}
    ops = {(op.owner, op.key) for op in plan.ops if op.kind is not Kind.ACTIVATION}

    def reach(call: Call) -> bool:
        if call in flow.exits:
            return True
        for reader in call.readers:
            handed_on = reader.kind is Kind.KEEP or (reader.owner, reader.key) in passing
            if handed_on or (reader.kind is Kind.BATCH_NORM and reader.path in norms):
                if reach(reader):
                    return True
            elif (reader.owner, reader.key) not in ops and not (reader.kind is Kind.COMPUTE and reader.path in layers):
                return True
        return False

    return reach(call)


class _Tracker:
    def __init__(self, root: nn.Module, flow: Flow, plan: Plan) -> None:
        self.root, self.flow = root, flow
        self.converted = {layer.path for layer in plan.layers}
        self.folded = {layer.batch_norm for layer in plan.layers}
        self.layers: dict[str, list[Call]] = defaultdict(list)  # path -> its calls
        for call in flow.calls:
            if self._is_layer(call):
                self.layers[str(call.path)].append(call)
        self.order = {id(call): number for number, call in enumerate(flow.calls)}
        self.exits = {id(call) for call in flow.exits}
        self.union = Union()
        self.reasons: dict[str, str] = {}  # the first one that is found for a class

    def classes(self) -> list[EdgeClass]:
        for call in self.flow.calls:
            if self._passes(call):
                self._join([call, *call.inputs])
        for calls in self.layers.values():
            self._join(calls)
            self._join([call.inputs[0] for call in calls if call.inputs])
        self._open_what_is_not_known()
        members: dict[str, list[Call]] = defaultdict(list)
        for call in (*self.flow.entries, *self.flow.calls):
            members[self._class(call)].append(call)
        found = (self._edge_class(name, calls) for name, calls in members.items())
        return [edge for edge in found if edge.producers or edge.consumers]

    def _edge_class(self, name: str, members: list[Call]) -> EdgeClass:
        producers = [path for path, calls in self.layers.items() if self._class(calls[0]) == name]
        consumers = [
            path for path, calls in self.layers.items()
            if any(self._class(source) == name for call in calls for source in call.inputs)
        ]  # fmt: skip
        following = {path: self._following(path) for path in producers}
        return EdgeClass(
            tuple(producers),
            tuple(consumers),
            {path: consumer for path, consumer in following.items() if consumer is not None},
            {path: tuple(dict.fromkeys(self._past_sums(path))) for path in consumers},
            self.reasons.get(name) or (None if consumers else "no converted layer reads it"),
            tuple(call for call in members if isinstance(call.target, nn.ReLU6) or call.target is F.relu6),
            tuple(self._pool(call) for call in members if call.kind is Kind.AVG_POOL),
        )

    def _is_layer(self, call: Call) -> bool:
        return call.kind is Kind.COMPUTE and call.path in self.converted

    def _passes(self, call: Call) -> bool:
        return call.kind in _PASSING or (call.kind is Kind.BATCH_NORM and call.path in self.folded)

    def _class(self, call: Call) -> str:
        return self.union.find(str(id(call)))

    def _join(self, calls: list[Call]) -> None:
        self.union.join([str(id(call)) for call in calls])

    def _open_what_is_not_known(self) -> None:
        everything = [*self.flow.entries, *self.flow.calls]
        for part in self.flow.untraced:
            name = part.path or type(self.root).__name__
            self._open(everything, f"{name} ({part.where}) cannot be followed: {part.reason}")
        hooked = self._hooked(everything)
        self._open(self.flow.entries, FROM_OUTSIDE)
        for call in self.flow.calls:
            if reason := self._needs_true_values(call) or hooked.get(id(call)):
                self._open([*call.inputs, call], reason)
            if id(call) in self.exits:
                self._open([call], f"{_label(call)} is a result of the network")

    def _open(self, calls: Iterable[Call], reason: str) -> None:
        for call in calls:
            self.reasons.setdefault(self._class(call), reason)

    def _needs_true_values(self, call: Call) -> str | None:
        """Why a call is right only where the tensors that it reads and writes are in units of 1."""
        if call.kind is Kind.CAT and _joined(call) != len(call.inputs):
            return f"{_label(call)} joins a parameter or a constant to it"
        if self._passes(call) or self._is_layer(call):
            return None
        if call.kind is Kind.COMPUTE:
            return f"{_label(call)} is not converted"
        if call.kind is Kind.BATCH_NORM:
            return f"{_label(call)} is not folded into a layer"
        return f"{_label(call)} computes with true values"

    def _hooked(self, everything: list[Call]) -> dict[int, str]:
        """Of the calls that the user's hooks look at, by id: who has the hook."""
        found: dict[int, str] = {}
        for call in self.flow.calls:  # by its target: another module may stand in the root's tree by now
            if isinstance(call.target, nn.Module) and _has_hooks(call.target):
                found[id(call)] = f"a hook on {call.path or type(self.root).__name__} looks at it"
        for path in self.flow.containers:
            if not _has_hooks(self.root.get_submodule(path)):
                continue
            reason = f"a hook on {path or type(self.root).__name__} looks at it"
            inside = [call for call in self.flow.calls if _within(call.owner, path)]
            if not inside:  # it hands on what it is given, and calls do not tell what that is
                self._open(everything, reason)
            for call in inside:
                found.setdefault(id(call), reason)
        return found

    def _reached(self, path: str) -> Iterator[Call]:
        """The layers' calls that a layer's result reaches, in its unit all the way."""
        stack, seen = list(self.layers[path]), set()
        while stack:
            for reader in stack.pop().readers:
                if self._is_layer(reader):
                    yield reader
                elif self._passes(reader) and id(reader) not in seen:
                    seen.add(id(reader))
                    stack.append(reader)

    def _past_sums(self, path: str) -> Iterator[str]:
        """Layers that read a sum which the tensor that ``path`` reads is added into, in its unit all the way."""
        stack = [(source, False) for call in self.layers[path] for source in call.inputs]
        seen: set[tuple[int, bool]] = set()
        while stack:
            tensor, added = stack.pop()
            for reader in tensor.readers:
                behind = added or reader.kind is Kind.ADD
                if self._is_layer(reader):
                    if added:
                        yield str(reader.path)
                elif self._passes(reader) and (id(reader), behind) not in seen:
                    seen.add((id(reader), behind))
                    stack.append((reader, behind))

    def _following(self, path: str) -> str | None:
        first = min(self._reached(path), key=lambda call: self.order[id(call)], default=None)
        return None if first is None else first.path

    def _pool(self, pool: Call) -> Pool:
        moved, readers = [pool], []
        for call in moved:  # grows while it is walked
            moved += [reader for reader in call.readers if reader.kind is Kind.KEEP]
            readers += [reader for reader in call.readers if reader.kind is not Kind.KEEP]
        on_the_way = {id(call) for call in moved}
        layers = sorted(filter(self._is_layer, readers), key=lambda call: self.order[id(call)])
        consumers = tuple(dict.fromkeys(str(call.path) for call in layers))
        calls = [call for path in consumers for call in self.layers[path]]
        exclusive = (
            len(layers) == len(readers)
            and not on_the_way & self.exits
            and all(call.inputs and id(call.inputs[0]) in on_the_way for call in calls)
        )
        return Pool(pool, consumers, exclusive)


def _label(call: Call) -> str:
    return f"{call.name} ({call.where})" if call.where else call.name


def _joined(call: Call) -> int:
    """How many tensors a concat is given, known or not."""
    tensors = call.args[0] if call.args else call.kwargs["tensors"]
    return len(tensors) if isinstance(tensors, (list, tuple)) else len(call.inputs)


def _within(owner: str, path: str) -> bool:
    return not path or owner == path or owner.startswith(f"{path}.")


def _has_hooks(module: nn.Module) -> bool:
    """Whether hooks of the user's see the tensors that pass a module: not pruning's, nor this package's own."""
    hooks = [
        *module._forward_hooks.values(), *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(), *module._backward_pre_hooks.values(),
    ]  # fmt: skip
    package = __name__.partition(".")[0]
    ours = [isinstance(h, BasePruningMethod) or type(h).__module__.partition(".")[0] == package for h in hooks]
    return not all(ours)
