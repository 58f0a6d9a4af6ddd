"""The data flow through a whole network: the containers' own graphs, inlined call by call."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import nn

from lightning_lowbit.graph.ops import REWRITTEN, Kind, classify, in_place, is_leaf
from lightning_lowbit.graph.trace import (
    CallKey,
    Untraceable,
    bound_arguments,
    call_keys,
    constants,
    has_forward,
    has_step,
    location,
    trace_container,
    trace_step,
)

__all__ = ["Call", "Flow", "ends", "follow", "only_layers_read", "placed_calls", "reaches", "readers"]

ALONE = -1  # the occurrence of a call that no traced forward makes
_FIRST_INPUT_ONLY = (Kind.COMPUTE, Kind.BATCH_NORM, Kind.RELU, Kind.ACTIVATION, Kind.AVG_POOL, Kind.KEEP)


@dataclass(eq=False)
class Call:
    """One operation as it ran: where, on which tensors, and who reads the result."""

    kind: Kind
    target: Any  # module instance, function, or method name
    owner: str  # path of the container whose code made the call
    key: CallKey  # the call inside its owner
    where: str
    path: str | None = None  # of the module, for a module call
    alias: str | None = None  # the name by which the owner called it; differs from path for a shared module
    inputs: list[Call] = field(default_factory=list)
    readers: list[Call] = field(default_factory=list)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    overwrites: bool = False  # works in place on a tensor that is read again later

    @property
    def alone(self) -> bool:
        """Whether this is a module in code that could not be followed, entered on its own."""
        return self.key[1] == ALONE

    @property
    def name(self) -> str:
        if self.path is not None:
            return self.path
        return f"{self.owner}.{self.key[0]}" if self.owner else self.key[0]


@dataclass
class Flow:
    """All calls of a network in the order in which they ran, its entries and exits, and what was not seen."""

    calls: list[Call] = field(default_factory=list)
    entries: list[Call] = field(default_factory=list)
    exits: list[Call] = field(default_factory=list)
    untraced: list[Untraceable] = field(default_factory=list)
    containers: list[str] = field(default_factory=list)  # traced, in the order of their first call
    seen: set[str] = field(default_factory=set)  # paths of every module that a traced forward reached
    heads: list[Call] = field(default_factory=list)  # entries of the network itself, as opposed to parts of it
    planned: dict[str, set[tuple[CallKey, ...]]] = field(default_factory=dict)  # container -> calls, per variant


def follow(root: nn.Module) -> Flow:
    """Trace ``root`` in evaluation mode. Parts that no traced forward reaches are entered on their own."""
    flow = Flow()
    walker = _Walker(root, flow)
    if has_forward(root):
        walker.enter(root, "")
    elif has_step(root):
        walker.enter_step(root)
    # The second network of a GAN, what stands behind an untraceable forward or step.
    for path, module in root.named_modules():
        if path and path not in flow.seen and (has_forward(module) or is_leaf(module)):
            walker.enter(module, path)
    return flow


def readers(call: Call) -> Iterator[Call]:
    """Who reads the values of a call, looking through what only moves them."""
    for reader in call.readers:
        if reader.kind is Kind.KEEP:
            yield from readers(reader)
        else:
            yield reader


def only_layers_read(call: Call, flow: Flow) -> bool:
    """Whether a call's values go, perhaps moved, into layers that multiply and nowhere else."""
    if call in flow.exits or not call.readers:
        return False
    return all(r.kind is Kind.COMPUTE or (r.kind is Kind.KEEP and only_layers_read(r, flow)) for r in call.readers)


def ends(root: nn.Module, flow: Flow) -> dict[str, tuple[bool, bool]]:
    """Of every layer that multiplies, by path: whether it is a first one, and whether a last one, by graph order.

    A layer alone in code that could not be followed goes by the order in which layers are registered.
    """
    registered = [path for path, module in root.named_modules() if classify(module) is Kind.COMPUTE]
    found: dict[str, tuple[bool, bool]] = {}
    for call in flow.calls:
        if call.path is None or call.path in found or classify(call.target) is not Kind.COMPUTE:
            continue
        if call.alone:
            found[call.path] = call.path == registered[0], call.path == registered[-1]
        else:
            found[call.path] = not reaches(call, "inputs"), not reaches(call, "readers")
    return found


def reaches(call: Call, direction: str) -> bool:
    """Whether another compute layer lies before (``inputs``) or behind (``readers``) this call."""
    stack, seen = list(getattr(call, direction)), set()
    while stack:
        other = stack.pop()
        if id(other) in seen:
            continue
        seen.add(id(other))
        if other.kind is Kind.COMPUTE:
            return True
        stack.extend(getattr(other, direction))
    return False


class _Walker:
    def __init__(self, root: nn.Module, flow: Flow) -> None:
        self.root, self.flow = root, flow
        self.graphs: dict[tuple[str, str], torch.fx.Graph | Untraceable] = {}
        self.paths = {id(module): path for path, module in root.named_modules()}
        self.items: dict[tuple[int, int | str], Call] = {}
        self.overwritten: dict[int, Call] = {}  # id of a call -> the call that has changed its result in place

    def enter(self, module: nn.Module, path: str) -> None:
        """Start at a module whose inputs come from outside."""
        if is_leaf(module):
            entry = self._entry(path)
            result: Any = self._call(module, None, "", (path, ALONE), path, [entry], (), {})
        else:
            fixed = constants(module, *_defaults_only(module))
            graph = self._graph(module, path, fixed)
            if isinstance(graph, Untraceable):
                return
            arguments = {
                node: None if _parameter(node) in fixed else self._entry(path)
                for node in graph.nodes
                if node.op == "placeholder"
            }
            result = self._inline(graph, module, path, arguments)
        self.flow.exits.extend(self._calls(result))

    def enter_step(self, module: nn.Module) -> None:
        """Start at a training_step. Its code stays as it is, so its functional operations stay float."""
        graph = trace_step(module)
        if isinstance(graph, Untraceable):
            self.flow.untraced.append(graph)
            return
        batch = next(node for node in graph.nodes if node.op == "placeholder")
        arguments: dict[torch.fx.Node, Any] = {batch: self._entry("")}
        self.flow.exits.extend(self._calls(self._inline(graph, module, "", arguments)))
        calls = [call for call in self.flow.calls if call.owner == ""]
        for call in calls:
            call.where = call.where or f"{type(module).__qualname__}.training_step"
            shared = sum(other.path == call.path for other in calls) > 1
            if call.kind in REWRITTEN and (call.path is None or shared):
                call.kind = Kind.FLOAT

    def _entry(self, path: str) -> Call:
        entry = Call(Kind.FLOAT, "input", path, ("input", len(self.flow.entries)), "")
        self.flow.entries.append(entry)
        if not path:
            self.flow.heads.append(entry)
        return entry

    def _item(self, batch: Call, index: int | str) -> Call:
        """``batch["image"]`` of what comes from outside: a tensor of its own, the same each time it is picked."""
        key = (id(batch), index)
        if key not in self.items:
            self.items[key] = self._entry(batch.owner)
        return self.items[key]

    def _graph(self, module: nn.Module, path: str, fixed: dict[str, Any]) -> torch.fx.Graph | Untraceable:
        self.flow.seen.add(path)
        variant = (path, repr(sorted(fixed.items())))
        if variant not in self.graphs:
            graph = trace_container(module, path, training=False, fixed=fixed)
            other = trace_container(module, path, training=True, fixed=fixed)
            if isinstance(graph, torch.fx.Graph) and (isinstance(other, Untraceable) or _differ(graph, other)):
                where = other.where if isinstance(other, Untraceable) else type(module).__qualname__
                graph = Untraceable(path, where, "its forward makes other calls in training than in evaluation")
            self.graphs[variant] = graph
            if isinstance(graph, Untraceable):
                self.flow.untraced.append(graph)
            else:
                self.flow.planned.setdefault(path, set()).add(placed_calls(graph))
                if path not in self.flow.containers:
                    self.flow.containers.append(path)
        return self.graphs[variant]

    def _inline(self, graph: torch.fx.Graph, module: nn.Module, path: str, arguments: dict[torch.fx.Node, Any]) -> Any:
        values: dict[torch.fx.Node, Any] = dict(arguments)
        keys = call_keys(graph)
        for node in graph.nodes:
            if node.op == "placeholder":
                values.setdefault(node, None)
                continue
            args = torch.fx.node.map_arg(node.args, values.get)
            kwargs = torch.fx.node.map_arg(node.kwargs, values.get)
            if node.op == "output":
                return args[0]
            if node.op == "get_attr":
                values[node] = None
            elif node.op == "call_module":
                child = module.get_submodule(str(node.target))
                values[node] = self._module(child, node, path, keys[node], args, kwargs)
            elif node.op == "call_function" and _is_pick(node.target, args):
                values[node] = args[0][args[1]]
            elif node.target is operator.getitem and args[0] in self.flow.entries and isinstance(args[1], (int, str)):
                values[node] = self._item(args[0], args[1])
            else:
                inputs = self._calls((args, kwargs))
                values[node] = self._call(node.target, node, path, keys[node], None, inputs, node.args, node.kwargs)
        return None

    def _module(self, child: nn.Module, node: torch.fx.Node, owner: str, key: CallKey, args: Any, kwargs: Any) -> Any:
        path = self.paths[id(child)]
        if is_leaf(child):
            return self._call(child, node, owner, key, path, self._calls((args, kwargs)), node.args, node.kwargs)
        graph = self._graph(child, path, constants(child, tuple(args), dict(kwargs)))
        if isinstance(graph, Untraceable):  # opaque: its tensors are float to everyone outside
            return self._call("untraced", node, owner, key, path, self._calls((args, kwargs)), (), {})
        given = bound_arguments(child, tuple(args), dict(kwargs)) or {}
        bound = {n: given.get(_parameter(n)) for n in graph.nodes if n.op == "placeholder"}
        return self._inline(graph, child, path, bound)

    def _call(
        self, target: Any, node: torch.fx.Node | None, owner: str, key: CallKey, path: str | None,
        inputs: list[Call], args: Any, kwargs: Any,
    ) -> Call | None:  # fmt: skip
        if isinstance(target, nn.Module):
            path = self.paths[id(target)]
            self.flow.seen.update(path if not name else f"{path}.{name}" for name, _ in target.named_modules())
        kind = classify(target, args, kwargs) if target != "untraced" else Kind.FLOAT
        if kind is Kind.ADD and len(inputs) == 1 and 0 in args:  # sum([a, b]) begins with 0 + a
            kind = Kind.KEEP
        if kind in _FIRST_INPUT_ONLY:
            inputs = inputs[:1]
        if kind is Kind.META or (kind is Kind.KEEP and not inputs):  # a size, or an item of one
            return None
        if kind is Kind.ADD and (len(inputs) < 2 or "alpha" in kwargs):
            kind = Kind.FLOAT  # tensor + number, a + alpha * b: on no grid that we know
        alias = path
        if node is not None and node.op == "call_module":
            alias = f"{owner}.{node.target}".lstrip(".")
        where = location(node) if node else ""
        call = Call(kind, target, owner, key, where, path, alias, inputs, [], args, dict(kwargs))
        for source in inputs:
            source.readers.append(call)
        self.flow.calls.append(call)
        if inputs and in_place(target, kwargs):
            self.overwritten[id(inputs[0])] = call
        return call

    def _calls(self, structure: Any) -> list[Call]:
        """All tensors in a structure, each as what it holds now: a call in place has put its result there."""
        found = []
        for call in _iterate(structure):
            while id(call) in self.overwritten:
                call = self.overwritten[id(call)]
                call.overwrites = True
            found.append(call)
        return found


def placed_calls(graph: torch.fx.Graph) -> tuple[CallKey, ...]:
    """The calls of a container that a plan counts: of modules, and of functions that may become low-bit ops.

    Only a forward that makes the same ones can be led through the planned ops, whatever flags it is given.
    """
    return tuple(
        key for node, key in call_keys(graph).items()
        if node.op == "call_module" or classify(node.target, node.args, node.kwargs) in REWRITTEN
    )  # fmt: skip


def _differ(evaluation: torch.fx.Graph, training: torch.fx.Graph) -> bool:
    return list(call_keys(evaluation).values()) != list(call_keys(training).values())


def _defaults_only(module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call that gives tensors for what must be given and nothing else."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    required = [p for p in parameters if p.default is p.empty]
    positional = [p for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = {p.name: torch.empty(0) for p in required if p.kind is p.KEYWORD_ONLY}
    return tuple(torch.empty(0) for _ in positional), named


def _parameter(placeholder: torch.fx.Node) -> str:
    """The user's name of a parameter (``trace._name_parameters``)."""
    return str(placeholder.meta["parameter"])


def _is_pick(target: Any, args: Any) -> bool:
    """``outputs[1]`` of a container that returned a tuple or a dict."""
    if getattr(target, "__name__", "") != "getitem":
        return False
    return isinstance(args[0], (tuple, list, dict)) and not isinstance(args[1], (Call, slice))


def _iterate(structure: Any) -> Iterator[Call]:
    if isinstance(structure, Call):
        yield structure
    elif isinstance(structure, (tuple, list)):
        for item in structure:
            yield from _iterate(item)
    elif isinstance(structure, dict):
        for item in structure.values():
            yield from _iterate(item)
