"""Put low-bit modules in place: trace, plan, swap. The edit is in place, parameters keep names and identity."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lowbit.errors import ConfigError, UnsupportedModelError, nearest
from lightning_lowbit.graph.network import Flow, follow
from lightning_lowbit.graph.ops import COMPUTE, FLOAT_BY_NATURE, Kind
from lightning_lowbit.graph.patterns import LayerPlan, OpPlan, Plan, Site, make_plan
from lightning_lowbit.graph.rewrite import TracedForward
from lightning_lowbit.modules.base import Link, LowBitModule, Scheme, Switch, low_bit_modules
from lightning_lowbit.modules.elementwise import LowBitOp, make_op
from lightning_lowbit.modules.layers import LAYERS, LowBitLayer
from lightning_lowbit.modules.norm import NORMS, LowBitBatchNorm
from lightning_lowbit.modules.quantizer import Quantizer

__all__ = ["Conversion", "PassThrough", "Selection", "convert_module", "is_converted", "quantizers"]

Pattern = str | type[nn.Module]


@dataclass(frozen=True)
class Selection:
    """Which layers the user wants converted: module-path globs or layer classes.

    ``include`` narrows what is converted; ``skip`` wins over it and also accepts a refusal that names a path.
    """

    skip: Sequence[Pattern] = ()
    include: Sequence[Pattern] | None = None

    def skips(self, path: str, module: nn.Module) -> bool:
        return _matches(self.skip, path, module)

    def wants(self, path: str, module: nn.Module) -> bool:
        return not self.skips(path, module) and (self.include is None or _matches(self.include, path, module))


def _matches(patterns: Iterable[Pattern], path: str, module: nn.Module) -> bool:
    for pattern in patterns:
        if isinstance(pattern, str):
            parts = path.split(".")  # a pattern that names a container takes all that it holds
            if any(fnmatch.fnmatchcase(".".join(parts[: n + 1]), pattern) for n in range(len(parts))):
                return True
        elif isinstance(module, pattern):
            return True
    return False


@dataclass
class Conversion:
    """What was converted, what was not and why; ``spec`` is the part that a checkpoint keeps."""

    layers: list[LayerPlan] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # path -> reason
    float_by_nature: dict[str, list[str]] = field(default_factory=dict)  # class name -> paths
    uncovered: list[str] = field(default_factory=list)  # code whose functional operations stay float
    sites: list[Site] = field(default_factory=list)
    ties: list[list[str]] = field(default_factory=list)

    def spec(self) -> dict[str, Any]:
        """Plain types: sites as {key: role}, ties as lists of keys."""
        return {"sites": {site.key: site.role for site in self.sites}, "ties": [list(tie) for tie in self.ties]}


def is_converted(root: nn.Module) -> bool:
    return next(low_bit_modules(root), None) is not None


def quantizers(root: nn.Module) -> list[tuple[str, Quantizer]]:
    """All quantizers by path, each once, in module order."""
    return [(path, module) for path, module in root.named_modules() if isinstance(module, Quantizer)]


def convert_module(
    root: nn.Module, scheme: Scheme, selection: Selection | None = None, ties: list[list[str]] | None = None
) -> Conversion:
    """Convert ``root`` in place.

    Args:
        root: any module; layers are found by following its forward, and on their own where that is impossible.
        selection: what to convert.
        ties: site keys that share a step, from a checkpoint; None derives them from the data flow.
    Raises:
        ConfigError: nothing to convert, or a pattern that matches nothing.
        UnsupportedModelError: a layer that would be quietly bypassed; the message names it and the way around.
    """
    selection = selection or Selection()
    _check_patterns(root, selection)
    _check_layers(root, selection)
    result = Conversion()
    wanted = _wanted(root, selection, result)
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # evaluation takes the same path as training: our linears run
    flow = follow(root)
    plan = make_plan(root, flow, wanted, _norms_to_keep(root, scheme))
    builder = _Builder(root, scheme, plan, flow)
    builder.build(ties)
    builder.switch.conversion = result
    result.layers, result.sites = plan.layers, [q.site for _, q in quantizers(root)]
    result.ties = ties if ties is not None else _present(plan.ties, {site.key for site in result.sites})
    result.uncovered = _uncovered(root, flow, wanted)
    return result


# -- what is converted -------------------------------------------------------------------------------------------
def _check_patterns(root: nn.Module, selection: Selection) -> None:
    paths = dict(root.named_modules())
    for name, patterns in (("skip", selection.skip), ("include", selection.include or ())):
        for pattern in patterns:
            if not any(_matches([pattern], path, module) for path, module in paths.items() if path):
                known = nearest(pattern, paths) if isinstance(pattern, str) else ""
                raise ConfigError(f"{name}: {pattern!r} matches no module of {type(root).__name__}.{known}")


def _check_layers(root: nn.Module, selection: Selection) -> None:
    for path, module in root.named_modules():
        if isinstance(module, nn.MultiheadAttention) and selection.wants(path, module):
            raise UnsupportedModelError(
                f"{path}: nn.MultiheadAttention multiplies with its projections' weights without calling them, so they "
                f"would stay float unseen. Accept that with skip=['{path}'] (what stands around it is converted), or use "
                "an attention written with nn.Linear layers."
            )


def _wanted(root: nn.Module, selection: Selection, result: Conversion) -> set[str]:
    wanted, layers = set(), 0
    for path, module in root.named_modules():
        if isinstance(module, FLOAT_BY_NATURE):
            result.float_by_nature.setdefault(type(module).__name__, []).append(path)
        if type(module) in COMPUTE:
            layers += 1
            if not path:
                raise ConfigError(
                    f"{type(module).__name__}: the module itself is one layer, which cannot be replaced in place. "
                    "Put it in a container, e.g. nn.Sequential(layer)."
                )
            if selection.wants(path, module):
                wanted.add(path)
            else:
                result.skipped[path] = "by skip=" if selection.skips(path, module) else "not in include="
        elif isinstance(module, tuple(COMPUTE)) and not isinstance(module, LowBitLayer):
            result.skipped[path] = f"{type(module).__qualname__} is a subclass of a torch layer with code of its own"
    if not wanted:
        lazy = any(isinstance(m, nn.modules.lazy.LazyModuleMixin) for m in root.modules())
        found = f"{layers} layers, all left out by skip= and include=" if layers else "none of them"
        raise ConfigError(
            f"{type(root).__name__}: nothing to convert. Expected nn.Linear, nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d, "
            f"found {found}." + (" Lazy layers have no weights yet: run one batch first." if lazy else "")
        )
    return wanted


def _norms_to_keep(root: nn.Module, scheme: Scheme) -> set[str]:
    kept = set()
    for path, module in root.named_modules():
        if isinstance(module, _BatchNorm):
            foldable = type(module) in NORMS and module.track_running_stats and module.running_mean is not None
            answer = scheme.batch_norm(Site(path, "output", "batch_norm"))
            if not foldable or answer != "fold":
                kept.add(path)
    return kept


def _uncovered(root: nn.Module, flow: Flow, wanted: set[str]) -> list[str]:
    notes = [f"{u.path or type(root).__name__} ({u.where}): {u.reason}" for u in flow.untraced]
    for call in flow.calls:
        if call.kind is Kind.FLOAT and call.path is None and call.target != "input" and any(
            reader.path in wanted for reader in call.readers
        ):
            notes.append(f"{call.name} ({call.where}) stays float")
    return notes


def _present(ties: list[list[str]], keys: set[str]) -> list[list[str]]:
    present = [[key for key in tie if key in keys] for tie in ties]
    return [tie for tie in present if len(tie) > 1]


# -- putting it in place -----------------------------------------------------------------------------------------
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
        for site in self.plan.sites:
            self._quantizer(site)
        for layer in self.plan.layers:
            self._finish_layer(layer)
        self._operand_grids()
        self._tie(self.plan.ties if ties is None else ties, exact=ties is not None)
        if self.scheme.links:
            self._link()
        self._rewrite()
        for path, module in low_bit_modules(self.root):
            if isinstance(module, LowBitLayer):
                self.scheme.prepare(module)

    def _op(self, plan: OpPlan) -> None:
        op = make_op(plan.kind, plan.call.target)
        pattern = next((s.pattern for s in self.plan.sites if s.path == plan.path), plan.kind.value)
        op.attach(plan.path, self.scheme, self.switch, pattern or plan.kind.value)
        parent, _, name = plan.path.rpartition(".")
        owner = self.root.get_submodule(parent)
        op.train(owner.training if plan.in_place_of is None else self.root.get_submodule(plan.path).training)
        if plan.in_place_of is not None:
            op.__dict__["replaced"] = owner._modules[name]  # not registered; revert puts it back
        owner._modules[name] = op

    def _layer(self, plan: LayerPlan) -> None:
        layer: Any = self.root.get_submodule(plan.path)
        layer.__class__ = LAYERS[type(layer)]  # same object: hooks, references and optimizers stay valid
        layer.attach(plan.path, self.scheme, self.switch, plan.pattern)
        layer.prepare()
        if plan.batch_norm is not None:
            norm: Any = self.root.get_submodule(plan.batch_norm)
            norm.__class__ = NORMS[type(norm)]
            norm.attach(plan.batch_norm, self.scheme, self.switch, plan.pattern)
            norm.prepare()
            layer.fold(norm)

    def _quantizer(self, site: Site) -> None:
        quantizer = self.scheme.quantizer(site)
        if quantizer is None:
            return
        quantizer.switch = self.switch
        owner = self.root.get_submodule(site.path)
        owner.add_module(site.slot or f"lowbit_{site.role}", _placed_like(quantizer, owner, self.root))
        self.made[site.key] = quantizer
        if not isinstance(owner, LowBitModule):  # an activation module of the user's: its result passes the quantizer
            owner.register_forward_hook(PassThrough(quantizer))

    def _finish_layer(self, plan: LayerPlan) -> None:
        layer = self.root.get_submodule(plan.path)
        assert isinstance(layer, LowBitLayer)
        own = self.made.get(f"{plan.path}.lowbit_input")
        layer.__dict__["input_grid"] = own or self.made.get(plan.grid_of_input)
        for role in ("weight", "bias", "accumulator", "error", "weight_grad"):
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

    def _operand_grids(self) -> None:
        for key, names in self.plan.operands.items():
            module = self.root.get_submodule(key)
            if isinstance(module, LowBitOp):
                module.__dict__["operand_grids"] = [self.made[name] for name in names if name in self.made]

    def _tie(self, ties: list[list[str]], exact: bool) -> None:
        for tie in ties:
            missing = [key for key in tie if key not in self.made]
            if missing and exact:
                raise ConfigError(
                    f"{missing[0]}: the checkpoint ties it to {tie[0]}, this network has no such tensor. The model's code "
                    "differs from the one that was trained; load into the same code, or start from its float weights."
                )
            group = [self.made[key] for key in tie if key in self.made]
            if len(group) < 2:
                continue
            same_grid = any(key in self.plan.same_grid for key in tie)
            for member in group:
                member.group = group
            group[0].share(group, same_grid)

    def _link(self) -> None:
        for call in self.flow.calls:
            module = self.root.get_submodule(call.path) if call.path is not None else None
            for source in call.inputs:
                producer = self.root.get_submodule(source.path) if source.path is not None else None
                link = Link()
                if isinstance(module, LowBitModule):
                    module.links_in.append(link)
                if isinstance(producer, LowBitModule):
                    producer.links_out.append(link)

    def _rewrite(self) -> None:
        instead: dict[str, dict[Any, str]] = {}
        after: dict[str, dict[Any, str]] = {}
        for op in self.plan.ops:
            if op.in_place_of is None:
                place = after if op.kind is Kind.ACTIVATION else instead
                place.setdefault(op.owner, {})[op.key] = op.path.rpartition(".")[2]
        for owner in {**instead, **after}:
            module = self.root.get_submodule(owner)
            module.__dict__["forward"] = TracedForward(module, owner, instead.get(owner, {}), after.get(owner, {}))


@dataclass(eq=False)
class PassThrough:
    """A forward hook as a value: deepcopy and pickle follow it to the copied quantizer."""

    quantizer: Quantizer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.quantizer(output)


def _placed_like(quantizer: Quantizer, owner: nn.Module, root: nn.Module) -> Quantizer:
    """On the owner's device; always float32, whatever the default dtype is while a Trainer configures the model."""
    tensor = next(iter(owner.parameters()), None)
    if tensor is None:
        tensor = next(iter(root.parameters()), torch.empty(0))
    return quantizer.to(tensor.device)
