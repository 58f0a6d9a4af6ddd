"""Put low-bit modules in place: trace, plan, swap. Parameters keep names and identity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lowbit.errors import ConfigError, listed
from lightning_lowbit.graph.network import Call, Flow, ends, follow, readers
from lightning_lowbit.graph.ops import Kind, is_leaf, multiplies
from lightning_lowbit.graph.patterns import make_plan
from lightning_lowbit.graph.plan import LayerPlan, OpPlan, Plan, Site
from lightning_lowbit.graph.rewrite import TracedForward
from lightning_lowbit.graph.trace import CallKey, Untraceable, has_forward
from lightning_lowbit.modules.answers import checked_quantizer
from lightning_lowbit.modules.base import LowBitModule, Scheme, Switch, low_bit_modules
from lightning_lowbit.modules.elementwise import LowBitOp, make_op
from lightning_lowbit.modules.exits import place_exits
from lightning_lowbit.modules.layers import LAYERS, LowBitLayer
from lightning_lowbit.modules.norm import NORMS
from lightning_lowbit.modules.quantizer import Quantizer
from lightning_lowbit.modules.selection import (
    Pattern,
    Selection,
    check_layers,
    check_patterns,
    float_by_nature,
    left_out,
    norms_to_keep,
    wanted_layers,
)
from lightning_lowbit.modules.slow_path import SlowPath

__all__ = [
    "PassThrough",
    "Pattern",
    "Report",
    "Selection",
    "convert_module",
    "is_converted",
    "quantizers",
]


@dataclass
class Report:
    """What was converted, what was not and why; ``spec`` is the part that a checkpoint keeps."""

    layers: list[LayerPlan] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # path -> reason
    float_by_nature: dict[str, list[str]] = field(default_factory=dict)  # class name -> paths
    uncovered: list[str] = field(default_factory=list)  # code whose functional operations stay float
    untraced: list[Untraceable] = field(default_factory=list)  # forwards that are not followed
    effects: list[str] = field(default_factory=list)  # of those: each with its reason, what follows, and the way out
    sites: list[Site] = field(default_factory=list)
    ties: list[list[str]] = field(default_factory=list)
    derived_ties: list[list[str]] = field(default_factory=list)  # what the data flow says; ties may be a file's
    between: list[str] = field(default_factory=list)  # float functions whose results converted modules read
    notes: list[str] = field(default_factory=list)  # what the scheme says of this network
    findings: list[str] = field(default_factory=list)  # what will train badly under this scheme, and the way out
    evaluation_only: bool = False  # loaded from a compact checkpoint: nothing to train

    def __str__(self) -> str:
        """One line: how many layers are low-bit, and what is not, by name; one more for each finding."""
        total = len(self.layers) + len(self.skipped)
        skipped = [f"{path} ({reason})" for path, reason in self.skipped.items()]
        natural = [f"{name} ({len(paths)})" for name, paths in self.float_by_nature.items()]
        parts = [f"{len(self.layers)} of {total} layers low-bit"]
        for title, items in (("skipped", skipped), ("float by nature", natural), ("not followed", self.uncovered)):
            if items:
                parts.append(f"{title}: {', '.join(items)}")
        return "\n".join(["; ".join(parts), *(f"  - {finding}" for finding in self.findings)])

    def spec(self) -> dict[str, Any]:
        """Plain types: sites as {key: role}, ties as lists of keys."""
        return {
            "sites": {site.key: site.role for site in self.sites},
            "ties": [list(tie) for tie in self.ties],
        }


def is_converted(root: nn.Module) -> bool:
    return next(low_bit_modules(root), None) is not None


def quantizers(root: nn.Module) -> list[tuple[str, Quantizer]]:
    """All quantizers by path, each once, in module order."""
    return [(path, module) for path, module in root.named_modules() if isinstance(module, Quantizer)]


def convert_module(
    root: nn.Module, scheme: Scheme, selection: Selection | None = None, ties: list[list[str]] | None = None
) -> Report:
    """Convert ``root`` in place.

    Args:
        root: any module; layers are found by following its forward, and on their own where that is
            impossible.
        selection: what to convert.
        ties: site keys that share a step, from a checkpoint; None derives them from the data flow.
    Raises:
        ConfigError: nothing to convert, or a pattern that matches nothing.
        UnsupportedModelError: a layer that would be quietly bypassed; the message names it and the way
        around.
    """
    selection = selection or Selection()
    if is_converted(root):
        raise ConfigError(
            f"{type(root).__name__} is converted already. Convert a float module, or take the low-bit layers "
            "out first with lightning_lowbit.modules.revert.revert(module)."
        )
    check_patterns(root, selection)
    check_layers(root, selection)
    flow = follow(root)
    result = Report(skipped=left_out(root, selection, scheme, ends(root, flow)), float_by_nature=float_by_nature(root))
    wanted = wanted_layers(root, result.skipped)
    kept, islands = norms_to_keep(root, scheme)
    plan = make_plan(root, flow, wanted, kept, islands)
    plan.ties = scheme.tied(root, flow, plan)
    result.uncovered = _uncovered(root, flow, wanted)
    result.untraced = flow.untraced
    result.between = _between(flow, plan)
    builder = _Builder(root, scheme, plan, flow)
    builder.build(ties)
    builder.switch.conversion = result
    result.effects = _effects(root, flow, kept)
    result.notes = scheme.connect(root, flow, plan)
    result.layers, result.sites = plan.layers, [q.site for _, q in quantizers(root)]
    result.derived_ties = _present(plan.ties, {site.key for site in result.sites})
    result.ties = result.derived_ties if ties is None else ties
    result.findings = scheme.findings(root, flow, plan)
    return result


def _uncovered(root: nn.Module, flow: Flow, wanted: set[str]) -> list[str]:
    """Code that was not followed, and float functions that feed a converted layer or multiply."""
    notes = [_not_followed(root, untraced) for untraced in flow.untraced]
    for call in flow.calls:
        if call.kind is not Kind.FLOAT or call.path is not None:
            continue
        if multiplies(call.target) or any(reader.path in wanted for reader in call.readers):
            notes.append(f"{call.name} ({call.where}) stays float")
    return list(dict.fromkeys(notes))


def _not_followed(root: nn.Module, untraced: Untraceable) -> str:
    return f"{untraced.path or type(root).__name__} ({untraced.where}): {untraced.reason}"


def _effects(root: nn.Module, flow: Flow, kept: set[str]) -> list[str]:
    """Of each forward that is not followed: what stays float for that alone; ``kept`` are norms that do anyway."""
    followed = {"", *(path for path, module in root.named_modules() if has_forward(module) and not is_leaf(module))}
    norms: dict[str, list[str]] = {}
    for path, module in root.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, LowBitModule) and path not in kept:
            caller = path.rpartition(".")[0]
            while caller not in followed:
                caller = caller.rpartition(".")[0]
            norms.setdefault(caller, []).append(path)
    found = []
    for untraced in flow.untraced:
        result = "functions between them stay float"
        if untraced.path in norms:
            result = f"its batch norms stay float ({listed(norms[untraced.path], 3)}), and there is no export to C"
        found.append(
            f"{_not_followed(root, untraced)}. Its layers are converted one by one: {result}. "
            "Move that out of forward, or decide it in __init__."
        )
    return list(dict.fromkeys(found))


def _between(flow: Flow, plan: Plan) -> list[str]:
    """Float functions whose results converted layers or operations read, by name."""
    layers, ops = {layer.path for layer in plan.layers}, {(op.owner, op.key) for op in plan.ops}
    found = (
        call.name for call in flow.calls
        if call.kind in (Kind.ACTIVATION, Kind.FLOAT)
        and any(reader.path in layers or (reader.owner, reader.key) in ops for reader in readers(call))
    )  # fmt: skip
    return list(dict.fromkeys(found))


def _present(ties: list[list[str]], keys: set[str]) -> list[list[str]]:
    present = [[key for key in tie if key in keys] for tie in ties]
    return [tie for tie in present if len(tie) > 1]


# -- putting it in place ----------------------------------------------------------------------------------
class _Builder:
    def __init__(self, root: nn.Module, scheme: Scheme, plan: Plan, flow: Flow) -> None:
        self.root, self.scheme, self.plan, self.flow = root, scheme, plan, flow
        self.switch = Switch()
        self.made: dict[str, Quantizer] = {}

    def build(self, ties: list[list[str]] | None) -> None:
        for op in self.plan.ops:
            self._op(op)
        for layer in self.plan.layers:
            self._layer(layer)
        for path in self.plan.islands:
            self._norm(path, "bn").island = True
        for site in (*self.plan.sites, *self.plan.results):
            self._quantizer(site)
        for layer in self.plan.layers:
            self._finish_layer(layer)
        for op in self.plan.ops:
            self._operation(op.path, op.kind.value)
        for path in self.plan.islands:
            self._operation(path, Kind.BATCH_NORM.value)
        self._operand_grids()
        self._tie(self.plan.ties if ties is None else ties, exact=ties is not None)
        if self.scheme.carries_errors:
            place_exits(self.root, self.flow, self.plan)
        self._rewrite()
        for module in self.root.modules():
            if SlowPath.applies(module) and "forward" not in module.__dict__ and _holds_low_bit(module):
                module.__dict__["forward"] = SlowPath(module, self.switch)
        for _, module in low_bit_modules(self.root):
            if not isinstance(module, LowBitOp):
                self.scheme.prepare(module)

    def _op(self, plan: OpPlan) -> None:
        op = make_op(plan.kind, plan.call.target, plan.overwrites)
        pattern = next((s.pattern for s in self.plan.sites if s.path == plan.path), plan.kind.value)
        op.attach(plan.path, self.scheme, self.switch, pattern or plan.kind.value)
        parent, _, name = plan.path.rpartition(".")
        owner = self.root.get_submodule(parent)
        op.train(owner.training if plan.in_place_of is None else self.root.get_submodule(plan.path).training)
        if plan.in_place_of is not None:
            op.__dict__["replaced"] = owner._modules[name]  # not registered; revert puts it back
        if isinstance(plan.call.target, nn.Module):
            _share_hooks(plan.call.target, op)
        owner._modules[name] = op

    def _layer(self, plan: LayerPlan) -> None:
        layer: Any = self.root.get_submodule(plan.path)
        layer.__class__ = LAYERS[type(layer)]  # same object: hooks, references and optimizers stay valid
        layer.attach(plan.path, self.scheme, self.switch, plan.pattern)
        layer.prepare()
        if plan.batch_norm is not None:
            layer.fold(self._norm(plan.batch_norm, plan.pattern))

    def _norm(self, path: str, pattern: str) -> Any:
        norm: Any = self.root.get_submodule(path)
        norm.__class__ = NORMS[type(norm)]
        norm.attach(path, self.scheme, self.switch, pattern)
        norm.prepare()
        return norm

    def _quantizer(self, site: Site) -> None:
        quantizer = checked_quantizer(self.scheme, site)
        if quantizer is None:
            return
        quantizer.switch = self.switch
        owner = self.root.get_submodule(site.path)
        owner.add_module(site.slot or f"lowbit_{site.role}", _placed_like(quantizer, owner, self.root))
        quantizer.train(owner.training)
        self.made[site.key] = quantizer
        if not isinstance(owner, LowBitModule):  # an activation module of the user's: its result passes the quantizer
            owner.register_forward_hook(PassThrough(quantizer))

    def _finish_layer(self, plan: LayerPlan) -> None:
        layer = self.root.get_submodule(plan.path)
        assert isinstance(layer, LowBitLayer)
        own = self.made.get(f"{plan.path}.lowbit_input")
        layer.__dict__["input_grid"] = own or self.made.get(plan.grid_of_input)
        for role in ("unit", "weight", "bias", "accumulator", "error", "weight_grad"):
            site = Site(
                plan.path, role, plan.op, plan.pattern, True, plan.first, plan.last, plan.depthwise,
                slot=f"lowbit_{role}",
            )  # fmt: skip
            if role == "bias" and layer.bias is None and layer.norm is None:
                continue
            self._quantizer(site)
            quantizer = self.made.get(site.key)
            if quantizer is not None:
                quantizer.__dict__["layer"] = layer

    def _operation(self, path: str, kind: str) -> None:
        """Operations and islands have sums and errors too."""
        for role, slot in (("sum", "lowbit_accumulator"), ("error", "lowbit_error")):
            self._quantizer(Site(path, role, kind, slot=slot))

    def _operand_grids(self) -> None:
        for key, names in self.plan.operands.items():
            module = self.root.get_submodule(key)
            if isinstance(module, LowBitOp) and all(name in self.made for name in names):
                module.__dict__["operand_grids"] = [self.made[name] for name in names]
        places = {(op.owner, op.key): op.path for op in self.plan.ops}
        for call in self.flow.calls:  # where a scheme rounds sums, those declare the grid of whatever reads them
            path = places.get((call.owner, call.key), call.path)
            target = None if path is None else self.root.get_submodule(path)
            declared = [self._declared(source, places) for source in call.inputs]
            if isinstance(target, LowBitLayer) and target.input_grid is None and declared:
                target.__dict__["input_grid"] = declared[0]
            elif isinstance(target, LowBitOp) and not target.operand_grids and None not in declared:
                target.__dict__["operand_grids"] = declared

    def _declared(self, call: Call, places: dict[tuple[str, CallKey], str]) -> Quantizer | None:
        """The quantizer whose grid a call's values lie on, looked for along the way that they came."""
        while True:
            path = places.get((call.owner, call.key), call.path)
            for slot in ("lowbit_output", "lowbit_accumulator"):
                made = self.made.get(f"{path}.{slot}")
                if made is not None and made.has_grid:
                    return made
            if call.kind not in (Kind.KEEP, Kind.RELU, Kind.BATCH_NORM) or not call.inputs:
                return None
            call = call.inputs[0]

    def _tie(self, ties: list[list[str]], exact: bool) -> None:
        for tie in ties:
            missing = [key for key in tie if key not in self.made]
            if missing and exact:
                raise ConfigError(
                    f"{missing[0]}: the checkpoint ties it to {tie[0]}, this network has no such tensor. "
                    "The model's code differs from the one that was trained; load into the same code, or "
                    "start from its float weights."
                )
            group = [self.made[key] for key in tie if key in self.made]
            if len(group) < 2:
                continue
            same_grid = any(key in self.plan.same_grid for key in tie)
            for member in group:
                member.group = group
            group[0].share(group, same_grid)

    def _rewrite(self) -> None:
        instead: dict[str, dict[Any, str]] = {}
        after: dict[str, dict[Any, str]] = {}
        for op in self.plan.ops:
            if op.in_place_of is None:
                place = after if op.kind is Kind.ACTIVATION else instead
                place.setdefault(op.owner, {})[op.key] = op.path.rpartition(".")[2]
        for owner in {**instead, **after}:
            module = self.root.get_submodule(owner)
            module.__dict__["forward"] = TracedForward(
                module, owner, instead.get(owner, {}), after.get(owner, {}), self.flow.planned[owner]
            )


@dataclass(eq=False)
class PassThrough:
    """A forward hook as a value: deepcopy and pickle follow it to the copied quantizer."""

    quantizer: Quantizer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.quantizer(output)


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def _share_hooks(module: nn.Module, op: LowBitOp) -> None:
    """The user's hooks run on what is called in the module's place; the same dicts, so later ones do too."""
    for name in _HOOKS:
        op.__dict__[name] = module.__dict__[name]


def _holds_low_bit(module: nn.Module) -> bool:
    return any(isinstance(child, LowBitModule) for child in module.modules())


def _placed_like(quantizer: Quantizer, owner: nn.Module, root: nn.Module) -> Quantizer:
    """On the owner's device; always float32, whatever default dtype a Trainer has set."""
    tensor = next((p for module in (owner, root) for p in module.parameters()), torch.empty(0))
    return quantizer.to(tensor.device)
