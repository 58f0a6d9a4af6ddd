"""From data flow to a plan: which layers merge, which tensors are quantized where, and which share a grid.

The placement rule: a tensor that forks, or feeds an add, a concat or a pool, is quantized once, where it is
produced; a tensor that only feeds convolutions and linears likewise. What comes from outside or from float
code is quantized where it enters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from lightning_lowbit.graph.network import Call, Flow, ends, reaches, readers
from lightning_lowbit.graph.ops import COMPUTE, PRODUCERS, REWRITTEN, Kind, clips, drops
from lightning_lowbit.graph.plan import LayerPlan, OpPlan, Plan, Site, Union
from lightning_lowbit.graph.trace import CallKey

__all__ = ["LayerPlan", "OpPlan", "Plan", "Site", "make_plan"]


def make_plan(root: nn.Module, flow: Flow, convertible: set[str], kept: set[str], islands: Iterable[str] = ()) -> Plan:
    """Plan the conversion of the layers in ``convertible``.

    ``kept`` are norms that must not be folded; ``islands`` those that, where they are not, take and give integers.
    """
    return _Planner(root, flow, convertible, kept, set(islands)).plan()


class _Planner:
    def __init__(self, root: nn.Module, flow: Flow, convertible: set[str], kept: set[str], islands: set[str]) -> None:
        self.root, self.flow, self.convertible, self.kept, self.islands = root, flow, convertible, kept, islands
        self.result = Plan()
        self.by_path: dict[str, list[Call]] = defaultdict(list)
        for call in flow.calls:
            if call.path is not None:
                self.by_path[call.path].append(call)
        self.fold: dict[str, str] = {}  # conv path -> norm path
        self.names: dict[int, str] = {}  # id(call) -> path of the module that will hold its quantizers
        self.union = Union()
        self.sites: dict[str, Site] = {}
        self.signs: dict[int, bool | None] = {}
        self.ends = ends(root, flow)
        self.arrives_on: dict[str, list[str]] = {}  # layer -> the site that declares the grid of its first input

    # -- the passes, in order -----------------------------------------------------------------------------
    def plan(self) -> Plan:
        self._pair_norms()
        self.islands -= set(self.fold.values())
        self.result.islands = [path for path in self.by_path if path in self.islands]
        self._leave_float()
        self._name_ops()
        for call in self.flow.calls:
            if call.kind in PRODUCERS:
                self._produce(call)
        for call in self.flow.calls:
            self._read(call)
        for entry in self.flow.entries:
            self._tie_readers(entry)
        for call in self.flow.calls:
            if call.kind is Kind.COMPUTE and call.path in self.convertible and call is self.by_path[call.path][0]:
                self._layer(call)
        self.result.sites = list(self.sites.values())
        for call in self.flow.calls:
            self._leave(call)
        self.result.ties = self.union.groups(self.sites)
        self._tie_weights()
        return self.result

    def _pair_norms(self) -> None:
        for path, calls in self.by_path.items():
            if calls[0].kind is not Kind.COMPUTE or path not in self.convertible:
                continue
            readers = {reader.path for call in calls for reader in call.readers}
            if len(readers) != 1 or any(len(call.readers) != 1 or call in self.flow.exits for call in calls):
                continue
            (norm,) = readers
            if norm is None or norm in self.kept or norm not in self.by_path:
                continue
            norm_calls = self.by_path[norm]
            fed_by_us = all(c.inputs and c.inputs[0].path == path for c in norm_calls)
            if norm_calls[0].kind is Kind.BATCH_NORM and fed_by_us:
                self.fold[path] = norm

    def _leave_float(self) -> None:
        """Operations of float code, fed and read by no converted layer: a mean inside a norm, a loss."""
        on_grid: set[int] = set()
        for call in self.flow.calls:
            if call.kind in (Kind.COMPUTE, Kind.BATCH_NORM):
                covered = not self._float_result(call)
            else:
                covered = call.kind is not Kind.FLOAT and any(id(source) in on_grid for source in call.inputs)
            if covered:
                on_grid.add(id(call))
        for call in reversed(self.flow.calls):  # readers first: what only they would want is not wanted
            if call.kind in REWRITTEN and id(call) not in on_grid and not self._wants(call):
                call.kind = Kind.FLOAT

    def _name_ops(self) -> None:
        """Give every functional call, and every call of a shared rectifier or pool, a module of its own."""
        used = {path for path, _ in self.root.named_modules()}
        named: dict[tuple[str, CallKey], str] = {}
        callers: dict[str, set[tuple[str, CallKey]]] = defaultdict(set)
        for call in self.flow.calls:
            if call.alias is not None:
                callers[call.alias].add((call.owner, call.key))
        overwriting = {(call.owner, call.key) for call in self.flow.calls if call.overwrites}
        for call in self.flow.calls:
            if call.kind not in REWRITTEN:
                if call.path is not None:
                    self.names[id(call)] = call.path
                continue
            if call.kind is Kind.ACTIVATION and call.path is not None:
                self.names[id(call)] = call.path
                continue
            if call.alias is not None and len(callers[call.alias]) == 1:
                self.names[id(call)] = call.alias
                if (call.owner, call.key) not in named:
                    named[call.owner, call.key] = call.alias
                    self.result.ops.append(OpPlan(call.alias, call.owner, call.key, call.kind, call.alias, call))
                continue
            if (call.owner, call.key) not in named:
                stem = f"{call.owner}." if call.owner else ""
                name = f"{stem}lowbit_{call.kind.value}"
                number = 0
                while name in used:
                    number += 1
                    name = f"{stem}lowbit_{call.kind.value}_{number}"
                used.add(name)
                named[call.owner, call.key] = name
                self.result.ops.append(OpPlan(name, call.owner, call.key, call.kind, None, call))
            self.names[id(call)] = named[call.owner, call.key]
        self.result.ops = [replace(op, overwrites=(op.owner, op.key) in overwriting) for op in self.result.ops]

    # -- sites --------------------------------------------------------------------------------------------
    def _wants(self, call: Call) -> set[str]:
        wants = set()
        for reader in readers(call):
            if reader.kind is Kind.COMPUTE and reader.path in self.convertible:
                wants.add("compute")
            elif reader.kind in (Kind.ADD, Kind.CAT, Kind.AVG_POOL):
                wants.add("operand")
            elif call.kind in (Kind.ADD, Kind.RELU) and reader.kind is Kind.BATCH_NORM and reader.path in self.islands:
                wants.add("norm")
        return wants

    def _float_result(self, call: Call) -> bool:
        """Whether a call's values lie on no grid: a layer left in float, a norm that is not folded."""
        if call.kind is Kind.COMPUTE:
            return call.path not in self.convertible
        if call.kind is Kind.BATCH_NORM:
            return call.path not in self.fold.values() and call.path not in self.islands
        return call.kind not in PRODUCERS

    def _produce(self, call: Call) -> None:
        wants = self._wants(call)
        read = bool(wants)
        if call.kind is Kind.AVG_POOL and not wants:
            wants = {"operand"}  # a mean is on no grid before it is rounded
        if not wants or self._float_result(call) or (call.kind is Kind.COMPUTE and call.path in self.fold):
            return
        role = "operand" if "operand" in wants else "output"
        path = self.names[id(call)]
        key = f"{path}.lowbit_output"
        known = self.sites.get(key)
        if known is not None:  # called again: one rule for all calls, the wider role wins
            role = "operand" if "operand" in (role, known.role) else "output"
        pattern, op = self._pattern(call), call.kind.value
        if call.kind in (Kind.COMPUTE, Kind.BATCH_NORM) and call.path not in self.islands:
            op = "conv"
        multiplied = "compute" in wants or (known is not None and known.multiplied)
        layers = [r.path for r in readers(call) if r.kind is Kind.COMPUTE and r.path in self.convertible]
        last = all(self.ends[path][1] for path in layers if path) and (known is None or known.last)
        channels, behind = _channels(call)
        consumers, operations = self._consumers(call)
        if known is not None:
            consumers, operations = [*known.readers, *consumers], [*known.operations, *operations]
        self.sites[key] = Site(
            path, role, op, pattern, self._signed(call), last=last, channels=channels, behind=behind,
            multiplied=multiplied, read=read or (known is not None and known.read), slot="lowbit_output",
            clips=clips(call.target, call.args, call.kwargs), readers=_once(consumers), operations=_once(operations),
        )  # fmt: skip

    def _consumers(self, call: Call) -> tuple[list[str], list[str]]:
        """Paths of the converted layers that multiply a call's values, and of the operations that read them."""
        layers, operations = list[str](), list[str]()
        for reader in readers(call):
            if reader.kind is Kind.COMPUTE and reader.path in self.convertible:
                layers.append(reader.path)
            elif reader.kind is Kind.CAT:
                behind, beside = self._consumers(reader)
                layers, operations = layers + behind, operations + beside
            elif reader.kind in (Kind.ADD, Kind.AVG_POOL) or reader.path in self.islands:
                operations.append(self.names[id(reader)])
        return layers, operations

    def _leave(self, call: Call) -> None:
        """A result that the outside or float code sees, not only rectifiers and norms."""
        bounds = clips(call.target, call.args, call.kwargs)
        if call.kind not in (Kind.COMPUTE, Kind.BATCH_NORM, Kind.RELU, Kind.ADD) and bounds is None:
            return
        path = self.names.get(id(call))
        if path is None or path in self.fold or self._float_result(call) or not self._seen_outside(call):
            return
        op = "conv" if call.kind in (Kind.COMPUTE, Kind.BATCH_NORM) else call.kind.value
        site = Site(
            path, "result", op, self._pattern(call), self._signed(call), last=not reaches(call, "readers"), read=False,
            slot="lowbit_output", clips=bounds,
        )  # fmt: skip
        if site.key not in self.sites and site.key not in {known.key for known in self.result.results}:
            self.result.results.append(site)

    def _seen_outside(self, call: Call) -> bool:
        if call in self.flow.exits or not call.readers:
            return True
        return any(
            self._seen_outside(reader) if reader.kind is Kind.KEEP else not _refines(reader) for reader in call.readers
        )

    def _signed(self, call: Call) -> bool | None:
        if id(call) not in self.signs:
            self.signs[id(call)] = self._find_sign(call)
        return self.signs[id(call)]

    def _find_sign(self, call: Call) -> bool | None:
        if call.kind is Kind.RELU:
            return False
        if call.kind in (Kind.COMPUTE, Kind.BATCH_NORM):
            return True
        if call.kind in (Kind.AVG_POOL, Kind.ADD, Kind.KEEP, Kind.CAT):
            signs = {self._signed(source) for source in call.inputs}
            return True if True in signs else None if None in signs else False
        return True if call in self.flow.heads else None  # behind code that was not followed the data decide

    def _pattern(self, call: Call) -> str:
        """Name the merged chain that ends in ``call``, back to its layer: conv2d+bn+relu."""
        words: list[str] = []
        while True:
            if call.kind is Kind.COMPUTE:
                words.append(COMPUTE.get(type(call.target), "compute"))
            elif call.kind is Kind.BATCH_NORM:
                words.append("bn")
            elif call.kind is Kind.KEEP:
                pass
            else:
                words.append(_word(call))
            ends = call.kind in (Kind.COMPUTE, Kind.ADD, Kind.AVG_POOL, Kind.CAT, Kind.FLOAT)
            if ends or not call.inputs or self._source_keys(call.inputs[0]):
                return "+".join(reversed(words))
            call = call.inputs[0]

    def _source_keys(self, call: Call) -> list[str]:
        """Site keys of the quantizers that a value has passed; empty when it is float."""
        if call.kind is Kind.KEEP:
            return self._source_keys(call.inputs[0]) if call.inputs else []
        if call.kind is Kind.CAT:
            path = self.names[id(call)]
            keys = []
            for index, source in enumerate(call.inputs):
                keys += self._source_keys(source) or [f"{path}.lowbit_operand_{index}"]
            return keys
        key = f"{self.names.get(id(call), '')}.lowbit_output"
        return [key] if key in self.sites else []

    def _read(self, call: Call) -> None:
        if call.kind is Kind.COMPUTE and call.path in self.convertible and call.inputs:
            self._read_input(call)
        elif call.kind in (Kind.ADD, Kind.CAT, Kind.AVG_POOL):
            keys = [key for index, _ in enumerate(call.inputs) for key in self._read_operand(call, index)]
            self.result.operands[self.names[id(call)]] = keys
            self.union.join(keys)
            if call.kind is Kind.CAT:
                self.result.same_grid.update(keys)
        self._tie_readers(call)

    def _read_input(self, call: Call) -> None:
        assert call.path is not None
        sources = self._source_keys(call.inputs[0])
        role = self.sites[sources[0]].role if sources else None
        signed = self._signed(call.inputs[0])
        channels = getattr(call.target, "in_channels", getattr(call.target, "in_features", None))
        site = Site(
            call.path, "input", COMPUTE[type(call.target)], "", signed, source=role, channels=channels,
            behind=len(getattr(call.target, "kernel_size", ())), multiplied=True, slot="lowbit_input",
            dropped=_dropped(call.inputs[0]), arrives=self.sites[sources[0]] if sources else None,
        )  # fmt: skip
        known = self.sites.get(site.key)
        if known is not None:  # called again; what arrives on two grids, or on none, is quantized by the layer itself
            same = sources[:1] == self.arrives_on[call.path]
            signed = signed if signed == known.signed else True if True in (signed, known.signed) else None
            dropped = site.dropped or known.dropped
            source, arrives = (known.source, known.arrives) if same else (None, None)
            site = replace(known, signed=signed, source=source, dropped=dropped, arrives=arrives)
        self.arrives_on.setdefault(call.path, sources[:1])
        self.sites[site.key] = site

    def _read_operand(self, call: Call, index: int) -> list[str]:
        source = call.inputs[index]
        keys = self._source_keys(source)
        if keys:
            return keys
        path, slot = self.names[id(call)], f"lowbit_operand_{index}"
        consumers = self._consumers(call)[0] if call.kind is Kind.CAT else ()
        site = Site(path, "operand", call.kind.value, "", self._signed(source), slot=slot, readers=_once(consumers))
        self.sites[site.key] = site
        return [site.key]

    def _tie_readers(self, call: Call) -> None:
        """All who quantize one tensor where they read it do so on one grid (layers and operands apart)."""
        inputs, operands = [], []
        for reader in readers(call):
            if reader.kind is Kind.COMPUTE and reader.path in self.convertible:
                inputs.append(f"{reader.path}.lowbit_input")
            elif reader.kind in (Kind.ADD, Kind.CAT, Kind.AVG_POOL) and not self._source_keys(call):
                path = self.names[id(reader)]
                operands += [
                    f"{path}.lowbit_operand_{i}" for i, s in enumerate(reader.inputs) if self._origin(s) is call
                ]
        for keys in (inputs, operands):
            self.union.join([key for key in keys if key in self.sites])

    def _origin(self, call: Call) -> Call:
        return self._origin(call.inputs[0]) if call.kind is Kind.KEEP and call.inputs else call

    # -- layers -------------------------------------------------------------------------------------------
    def _layer(self, call: Call) -> None:
        path = call.path
        assert path is not None
        module = call.target
        op = COMPUTE[type(module)]
        norm = self.fold.get(path)
        first, last = self.ends[path]
        depthwise = 1 < getattr(module, "groups", 1) == getattr(module, "in_channels", 0)
        sources = self._source_keys(call.inputs[0]) if call.inputs else []
        pattern = op + ("+bn" if norm else "")
        after = list(readers(self.by_path[norm][0] if norm else call))
        if len(after) == 1 and after[0].kind in (Kind.RELU, Kind.ACTIVATION):
            end = after[0]
            pattern += f"+{_word(end)}"
        self.result.layers.append(
            LayerPlan(
                path, op, pattern, norm, first, last, depthwise, sources[0] if sources else f"{path}.lowbit_input"
            )
        )
        key = f"{path}.lowbit_input"
        if key in self.sites:
            site = self.sites[key]
            self.sites[key] = replace(site, first=first, last=last, depthwise=depthwise, pattern=pattern)

    def _tie_weights(self) -> None:
        """Layers that multiply with one Parameter do so on one grid."""
        groups: dict[int, list[LayerPlan]] = defaultdict(list)
        for layer in self.result.layers:
            if layer.batch_norm is None:  # a folded norm makes another tensor of it
                groups[id(self.root.get_submodule(layer.path).weight)].append(layer)
        for layers in groups.values():
            if len(layers) > 1:
                first, last = any(layer.first for layer in layers), any(layer.last for layer in layers)
                for layer in layers:
                    self.result.layers[self.result.layers.index(layer)] = replace(layer, first=first, last=last)
                self.result.ties.append([f"{layer.path}.lowbit_weight" for layer in layers])
                self.result.same_grid.update(self.result.ties[-1])


def _once(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(paths))


def _dropped(call: Call) -> bool:
    """Whether a value has passed a dropout on the way from where it was computed."""
    while call.kind is Kind.KEEP and call.inputs:
        if drops(call.target):
            return True
        call = call.inputs[0]
    return False


def _refines(call: Call) -> bool:
    """Whether a call makes of its argument what a layer before it would have given at once: norms and clips."""
    return call.kind in (Kind.RELU, Kind.BATCH_NORM) or clips(call.target, call.args, call.kwargs) is not None


def _word(call: Call) -> str:
    """What a call is called in a pattern."""
    if call.kind is Kind.ADD:
        return "add"
    return call.key[0] if call.path is None else type(call.target).__name__.lower()


def _channels(call: Call) -> tuple[int | None, int | None]:
    """Channels of a call's result and how many axes lie behind theirs, known from the layer or norm behind it."""
    for name in ("out_channels", "out_features", "num_features"):
        if call.kind in (Kind.COMPUTE, Kind.BATCH_NORM) and hasattr(call.target, name):
            behind = len(getattr(call.target, "kernel_size", ())) if call.kind is Kind.COMPUTE else None
            return int(getattr(call.target, name)), behind
    if call.kind not in (Kind.RELU, Kind.ACTIVATION, Kind.ADD, Kind.AVG_POOL) or not call.inputs:
        return None, None  # what moves values may move them between channels
    return _channels(call.inputs[0])
